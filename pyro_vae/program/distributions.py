"""Distributions and transforms that torch and Pyro lack."""

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import Transform

__all__ = ["CountsOfTotal", "Discretized", "Levels", "Reverse", "ZeroInflatedNegativeBinomial"]


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


class ZeroInflatedNegativeBinomial(dist.ZeroInflatedNegativeBinomial):
    """Pyro's, which can be expanded also after it was drawn from."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with a larger batch shape."""
        # What drawing has cached, Pyro takes for a second parameter.
        self.__dict__.pop("gate", None)
        return super().expand(batch_shape, _instance)


class CountsOfTotal(TorchDistribution):
    r"""Multinomial counts given their total, which may be another for each datum.

    .. math:: \log P(x | n) = \log n! - \sum_d \log x_d! + \sum_d x_d \log \pi_d, \quad
              n = \sum_d x_d

    Args:
        logits: ``(*batch, D)``.
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


class Reverse(Transform):
    """The dimensions in reverse order: what one autoregressive transform sees last, the next first.

    Example:
        >>> pv.distributions.Reverse()(torch.arange(3))
        tensor([2, 1, 0])
    """

    domain = codomain = constraints.real_vector
    bijective = True
    volume_preserving = True

    def __init__(self, cache_size: int = 1) -> None:
        # With a cache the inverse finds the very tensor that the transform before it has cached.
        super().__init__(cache_size=cache_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reverse)

    def __hash__(self) -> int:
        return hash(Reverse)

    def _call(self, x: Tensor) -> Tensor:
        return x.flip(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return y.flip(-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Zero, ``(*batch,)``."""
        return x.new_zeros(x.shape[:-1])
