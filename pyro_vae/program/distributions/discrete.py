"""Discrete latents that can be summed over, and their relaxation."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from pyro_vae.program.distributions.transforms import ToSimplex

__all__ = ["Bits", "RelaxedOneHot"]

_MOST_BITS = 16


class Bits(dist.Independent):
    """Independent bits, all patterns of which can be enumerated where there are few.

    Args:
        logits: ``(*batch, D)``.

    Example:
        >>> pv.distributions.Bits(torch.zeros(2)).enumerate_support()
        tensor([[0., 0.],
                [1., 0.],
                [0., 1.],
                [1., 1.]])
    """

    def __init__(self, logits: Tensor, *, validate_args: bool | None = None) -> None:
        super().__init__(dist.Bernoulli(logits=logits), 1, validate_args=validate_args)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether the patterns can be enumerated: up to 16 bits."""
        return self.event_shape[0] <= _MOST_BITS

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Bits":
        """The same distribution with a larger batch shape."""
        logits = self.base_dist.logits.expand(*batch_shape, *self.event_shape)
        return Bits(logits, validate_args=self._validate_args)

    def enumerate_support(self, expand: bool = True) -> Tensor:  # noqa: FBT001, FBT002 - as torch's
        """All 2^D patterns, ``(2^D, *batch, D)``, or ``(2^D, 1, ..., D)`` if not expanded.

        Raises:
            ValueError: There are more than 16 bits.
        """
        (dim,) = self.event_shape
        if not self.has_enumerate_support:
            raise ValueError(
                f"Bits: expected at most {_MOST_BITS} bits to sum over, got {dim}, which have 2^"
                f"{dim} patterns; draw them (ReweightedWakeSleep), or relax them "
                "(families.relaxed_bernoulli)."
            )
        logits = self.base_dist.logits
        numbers = torch.arange(2**dim, device=logits.device)
        places = torch.arange(dim, device=logits.device)
        patterns = ((numbers[:, None] >> places) & 1).to(logits.dtype)
        patterns = patterns.view(2**dim, *(1,) * len(self.batch_shape), dim)
        return patterns.expand(-1, *self.batch_shape, -1) if expand else patterns


class RelaxedOneHot(dist.TransformedDistribution):
    """The Concrete density on the simplex, whose draws never underflow to zero.

    Args:
        temperature: A 0-d tensor, positive.
        logits: ``(*batch, D)``.

    Example:
        >>> p = pv.distributions.RelaxedOneHot(torch.tensor(0.1), torch.zeros(5))
        >>> bool(p.log_prob(p.sample()).isfinite())
        True
    """

    def __init__(
        self, temperature: Tensor, logits: Tensor, *, validate_args: bool | None = None
    ) -> None:
        base = ExpRelaxedCategorical(temperature, logits=logits, validate_args=validate_args)
        self.temperature, self.logits = temperature, logits
        super().__init__(base, [ToSimplex()], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "RelaxedOneHot":
        """The same distribution with a larger batch shape."""
        logits = self.logits.expand(*batch_shape, *self.event_shape)
        return RelaxedOneHot(self.temperature, logits, validate_args=self._validate_args)
