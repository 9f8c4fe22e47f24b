"""Distributions over integer levels."""

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

__all__ = ["Discretized", "Levels"]


class Levels(dist.Categorical):
    """A categorical over the numbers 0..L-1: unlike torch's, its mean is the expected level.

    Args:
        logits: ``(*batch, L)``.

    Example:
        >>> pv.distributions.Levels(logits=torch.zeros(5, 3)).mean
        tensor([1., 1., 1., 1., 1.])
    """

    @property
    def mean(self) -> Tensor:
        """The expected level, ``(*batch,)``."""
        return (self.probs * self._levels()).sum(-1)

    @property
    def variance(self) -> Tensor:
        """The variance of the level, ``(*batch,)``."""
        return (self.probs * (self._levels() - self.mean[..., None]).square()).sum(-1)

    def _levels(self) -> Tensor:
        probs = self.probs
        return torch.arange(probs.shape[-1], dtype=probs.dtype, device=probs.device)


class Discretized(TorchDistribution):
    r"""A continuous value rounded to the nearest of the levels 0..L-1.

    .. math:: P(l) = F(l + \tfrac12) - F(l - \tfrac12), \quad
              P(0) = F(\tfrac12), \quad P(L-1) = 1 - F(L - \tfrac32)

    Exact far out in the tails, where the difference of two values of F would be zero.

    Args:
        base: A ``Logistic``, ``Normal`` or ``Laplace`` of Pyro's, ``batch_shape (*batch,)``.
        num_levels: Number of levels L.

    Raises:
        TypeError: ``base`` is another distribution.

    Example:
        >>> p = pv.distributions.Discretized(dist.Normal(0.0, 1e-3), 4)
        >>> p.log_prob(torch.tensor(0.0)).exp().item(), p.log_prob(torch.tensor(1.0)).item() < -1e5
        (1.0, True)
    """

    arg_constraints: Any = {}  # noqa: RUF012 - the base has its own
    has_rsample = False

    def __init__(
        self, base: TorchDistribution, num_levels: int, *, validate_args: bool | None = None
    ) -> None:
        if type(base) not in _INTERVALS:
            names = ", ".join(kind.__name__ for kind in _INTERVALS)
            raise TypeError(f"Discretized: expected base to be one of {names}, got {base!r}.")
        self.base = base
        self.num_levels = num_levels
        super().__init__(base.batch_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:  # type: ignore[override]
        """The levels."""
        return constraints.integer_interval(0, self.num_levels - 1)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Discretized":
        """The same distribution with a larger batch shape."""
        base = self.base.expand(batch_shape)
        return Discretized(base, self.num_levels, validate_args=self._validate_args)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - as torch's
        """Levels, ``sample_shape + batch_shape``."""
        with torch.no_grad():
            return self.base.sample(sample_shape).round().clamp(0, self.num_levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of levels, ``(*batch,)``, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        base: Any = self.base
        lower = (value - 0.5 - base.loc) / base.scale
        upper = (value + 0.5 - base.loc) / base.scale
        # All three are symmetric: work where F is small and has all its digits.
        flipped = lower + upper > 0
        a, b = torch.where(flipped, -upper, lower), torch.where(flipped, -lower, upper)
        log_cdf, log_interval = _INTERVALS[type(base)]
        # The width once more, since b - a has lost digits far from the centre.
        inside = log_interval(a, b, 1 / base.scale)
        inside = torch.where(value == 0, log_cdf(upper), inside)
        return torch.where(value == self.num_levels - 1, log_cdf(-lower), inside)

    @property
    def mean(self) -> Tensor:
        """The expected level, ``(*batch,)``."""
        return self._moments()[0]

    @property
    def variance(self) -> Tensor:
        """The variance of the level, ``(*batch,)``."""
        mean, square = self._moments()
        return square - mean.square()

    def _moments(self) -> tuple[Tensor, Tensor]:
        """The sums over levels of P(X > l) and (2 l + 1) P(X > l): the first two moments."""
        base: Any = self.base
        log_cdf, _ = _INTERVALS[type(base)]
        first = second = torch.zeros_like(base.loc)
        for level in range(self.num_levels - 1):
            above = log_cdf((base.loc - level - 0.5) / base.scale).exp()
            first, second = first + above, second + (2 * level + 1) * above
        return first, second


def _logistic_interval(a: Tensor, b: Tensor, width: Tensor) -> Tensor:
    return F.logsigmoid(b) + F.logsigmoid(-a) + (-torch.expm1(-width)).log()


def _log_erfcx(x: Tensor) -> Tensor:
    """log(F(x) exp(x^2 / 2)) of the normal for x <= 0, without the exponential that underflows."""
    return torch.special.erfcx(-math.sqrt(0.5) * x.clamp_max(0)).log() - math.log(2)


def _normal_log_cdf(x: Tensor) -> Tensor:
    # Torch's log_ndtr has a gradient that is wrong far out.
    right = torch.log1p(-0.5 * torch.special.erfc(math.sqrt(0.5) * x.clamp_min(0)))
    return torch.where(x > 0, right, _log_erfcx(x) - 0.5 * x.clamp_max(0).square())


def _normal_interval(a: Tensor, b: Tensor, width: Tensor) -> Tensor:
    above = _normal_log_cdf(b)
    # (a^2 - b^2) / 2, of which far out nothing is left where both are rounded.
    left = _log_erfcx(a) - _log_erfcx(b) + 0.5 * width * (a + b)
    step = torch.where(b > 0, _normal_log_cdf(a) - above, left)
    return above + (-torch.expm1(step)).log()


def _laplace_log_cdf(x: Tensor) -> Tensor:
    right = torch.log1p(-0.5 * (-x.clamp_min(0)).exp())
    return torch.where(x > 0, right, x - math.log(2))


def _laplace_interval(a: Tensor, b: Tensor, width: Tensor) -> Tensor:
    left = b - math.log(2) + (-torch.expm1(-width)).log()
    around = torch.log1p(-0.5 * (a.clamp_max(0).exp() + (-b.clamp_min(0)).exp()))
    return torch.where(b > 0, around, left)


_Log = Callable[..., Tensor]
# log F of the standard density, and log(F(b) - F(a)) for a < b, a + b <= 0, b - a = width.
_INTERVALS: dict[type, tuple[_Log, _Log]] = {
    dist.Logistic: (F.logsigmoid, _logistic_interval),
    dist.Normal: (_normal_log_cdf, _normal_interval),
    dist.Laplace: (_laplace_log_cdf, _laplace_interval),
}
