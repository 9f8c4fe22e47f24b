"""Densities of counts that torch and Pyro lack, or have with a flaw."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

__all__ = ["CountsOfTotal", "ZeroInflatedNegativeBinomial"]


class ZeroInflatedNegativeBinomial(dist.ZeroInflatedNegativeBinomial):
    r"""A negative binomial that is zero with an extra probability.

    .. math:: P(x) = \pi\,[x = 0] + (1 - \pi)\,\frac{\Gamma(x + r)}{x!\,\Gamma(r)}\,
              (1 - p)^r\,p^x

    Pyro's, which can be expanded also after it was drawn from.

    Args:
        total_count: Inverse dispersion r > 0, ``(*batch,)``.
        logits: Of p; log(m / r) for counts that have the mean m where the gate is open.
        gate_logits: Of :math:`\pi`.

    Example:
        >>> zero = torch.tensor(0.0)
        >>> p = pv.distributions.ZeroInflatedNegativeBinomial(
        ...     torch.tensor(1.0), logits=zero, gate_logits=zero
        ... )
        >>> f"{p.log_prob(zero).exp():.2f}"
        '0.75'
    """

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with a larger batch shape."""
        # What drawing has cached, Pyro takes for a second parameter.
        self.__dict__.pop("gate", None)
        return super().expand(batch_shape, _instance)


class CountsOfTotal(TorchDistribution):
    r"""Multinomial counts given their total, which may be another for each datum.

    .. math:: P(x | n) = n!\,\prod_d \frac{\pi_d^{x_d}}{x_d!}, \quad n = \sum_d x_d

    The total is observed with the counts and not modelled, so this is no P(x).

    Args:
        logits: Of :math:`\pi`, ``(*batch, D)``.
        total_count: The totals, a number or ``(*batch,)``, to draw from and to check counts
            against; None where counts are scored alone.

    Example:
        >>> pv.distributions.CountsOfTotal(torch.zeros(2), 3).sample().sum()
        tensor(3.)
    """

    arg_constraints: Any = {}  # noqa: RUF012 - any logits
    support: Any = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(
        self,
        logits: Tensor,
        total_count: Tensor | float | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.logits = logits - logits.logsumexp(-1, keepdim=True)
        self.total_count = None
        if total_count is not None:
            totals = torch.as_tensor(total_count, dtype=logits.dtype, device=logits.device)
            self.total_count = totals.expand(logits.shape[:-1])
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "CountsOfTotal":
        """The same distribution with a larger batch shape."""
        totals = None if self.total_count is None else self.total_count.expand(batch_shape)
        logits = self.logits.expand(*batch_shape, *self.event_shape)
        return CountsOfTotal(logits, totals, validate_args=self._validate_args)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - as torch's
        """Counts, ``sample_shape + batch_shape + (D,)``.

        Raises:
            ValueError: The totals are unknown.
        """
        if self.total_count is None:
            raise ValueError(
                "CountsOfTotal: how many there are in all is observed with the counts; to draw, "
                "say it with total_count=."
            )
        shape = torch.Size(sample_shape) + self.batch_shape
        left = self.total_count.expand(shape)
        counts = []
        with torch.no_grad():
            # Each count given those before it is binomial.
            after = self.logits.flip(-1).logcumsumexp(-1).flip(-1)
            shares = (self.logits - after).exp().clamp(max=1.0).expand(*shape, -1)
            for share in shares.unbind(-1):
                counts.append(torch.binomial(left, share))
                left = left - counts[-1]
        return torch.stack(counts, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of counts given their total, ``(*batch,)``, in nats."""
        total = value.sum(-1)
        if self._validate_args:
            self._validate_sample(value)
            if self.total_count is not None and not (total == self.total_count).all():
                raise ValueError(
                    "CountsOfTotal: expected counts that add up to total_count "
                    f"({_range(self.total_count)}), got totals of {_range(total)}; leave "
                    "total_count out to score counts of any totals."
                )
        log_ways = torch.lgamma(total + 1) - torch.lgamma(value + 1).sum(-1)
        return log_ways + (value * self.logits).sum(-1)

    @property
    def mean(self) -> Tensor:
        """The expected counts, or their shares where the total is unknown, ``(*batch, D)``."""
        shares = self.logits.exp()
        return shares if self.total_count is None else self.total_count[..., None] * shares

    @property
    def variance(self) -> Tensor:
        """The variances of the counts, or for a total of one, ``(*batch, D)``."""
        return self.mean * (1 - self.logits.exp())


def _range(values: Tensor) -> str:
    low, high = values.min().item(), values.max().item()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
