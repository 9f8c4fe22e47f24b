r"""Decoders that see what they have said: :math:`p(x|z) = \prod_d p(x_d | x_{<d}, z)`."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from pyro_vae.program.conditional import Family
from pyro_vae.program.recipe import recorded

__all__ = ["Autoregressive"]


@recorded
class Autoregressive(nn.Module):
    r"""A likelihood whose every dimension is given the ones before it.

    .. math:: \log p(x|z) = \sum_{d=1}^D \log p(x_d \mid x_1, \dots, x_{d-1}, z)

    Scores take one pass, draws D of them. Without inputs it is p(x) itself, a model without
    latents.

    Args:
        network: Module ``(x (*batch, D), *inputs) -> (*batch, P, D)`` whose params of dimension d
            see x below d alone, such as ``networks.masked_mlp``.
        family: Function from ``params`` to a distribution; see ``pyro_vae.families``. Its
            dimensions have to be independent.
        dim: Number of dimensions D.

    References: Germain et al., "MADE" (2015); Gulrajani et al., "PixelVAE" (2017).

    Example:
        >>> network = pv.networks.masked_mlp(9, 2, 1)
        >>> likelihood = pv.Autoregressive(network, pv.families.bernoulli, 9)
        >>> likelihood(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 9])
    """

    def __init__(self, network: nn.Module, family: Family, dim: int) -> None:
        super().__init__()
        self.network = network
        self.family = family
        self.dim = dim

    def forward(self, *inputs: Tensor) -> TorchDistribution:
        """Return the distribution given the inputs.

        Args:
            inputs: ``(*batch, C)`` each; the batch dimensions broadcast.

        Returns:
            A distribution with ``batch_shape (*batch,)`` and ``event_shape (D,)``.
        """
        batch = torch.broadcast_shapes(*(i.shape[:-1] for i in inputs)) if inputs else torch.Size()
        like = inputs[0] if inputs else next(self.network.parameters())

        def given(x: Tensor) -> TorchDistribution:
            return self.family(self.network(x, *inputs))

        return _Ordered(given, torch.Size(batch), like.new_zeros(self.dim))


class _Ordered(TorchDistribution):
    """The distribution of an ``Autoregressive``; ``given`` conditions on all values at once."""

    arg_constraints: Any = {}  # noqa: RUF012 - the family has its own
    has_rsample = False

    def __init__(
        self,
        given: Callable[[Tensor], TorchDistribution],
        batch_shape: torch.Size,
        zeros: Tensor,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.given = given
        self.zeros = zeros
        super().__init__(batch_shape, zeros.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> Any:  # type: ignore[override]
        """The family's support."""
        with torch.no_grad():
            return self._conditioned(self.zeros).support

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "_Ordered":
        """The same distribution with a larger batch shape."""
        return _Ordered(
            self.given, torch.Size(batch_shape), self.zeros, validate_args=self._validate_args
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, ``(*batch,)``, in nats: one pass."""
        return self._conditioned(value).log_prob(value)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - as torch's
        """Values, ``sample_shape + batch_shape + (D,)``: a pass for each dimension."""
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape + self.zeros.shape
            x = self.zeros.expand(shape).clone()
            for d in range(len(self.zeros)):
                x[..., d] = self.given(x).sample()[..., d]
        return x

    def _conditioned(self, value: Tensor) -> TorchDistribution:
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return self.given(value.expand(*batch, -1))
