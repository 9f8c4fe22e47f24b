"""What every estimator of evidence returns."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_vae.evidence.pareto import FEWEST, pooled, tail_size, threshold

__all__ = ["Estimate", "PredictiveEstimate"]

# The effective number of particles below which an error bar is not believed, whatever k is.
FEWEST_EFFECTIVE = 20.0
NAMED = 5  # of the data not to be trusted


@dataclass(frozen=True, eq=False)
class Estimate:
    """An estimate of log p(x) per datum, in nats, with what is needed to judge it.

    Two errors of the mean are told apart: ``mean_standard_error`` is the estimator's, and shrinks
    with particles; ``sampling_error`` is the test set's, and shrinks with data. The mean is besides
    too low by about ``bias``. Error bars can lie where few particles carry the weight: ``trusted``
    says for which data they don't, and ``advice`` what to do about the others.

    Attributes:
        value: Estimates of log p(x), ``(N,)``, float64.
        standard_error: Their Monte Carlo standard errors by the delta method, ``(N,)``.
        ess: Effective number of particles, (sum w)^2 / sum w^2, ``(N,)``, between 1 and K.
        elbo: The Monte Carlo evidence lower bound from the same particles, ``(N,)``.
        num_particles: Number of particles K per datum.
        data: A digest of the data, by which ``compare`` knows estimates of the same.
        pareto_k: The shape of the tail of the weights, ``(N,)``: see ``pareto_k``. None where the
            estimator has no weights.
        kind: The estimator in words, by which ``compare`` refuses a mixture.
        caveat: Why no datum is to be trusted, whatever its weights look like; in words.

    Example:
        >>> columns = torch.tensor([[-1.0, -3.0], [0.3, 0.4], [9.0, 8.0], [-2.0, -4.0]]).double()
        >>> e = pv.Estimate(*columns, num_particles=10)
        >>> f"{e.mean:.2f} {e.mean_standard_error:.2f} {e.sampling_error:.2f}"
        '-2.00 0.25 1.00'
    """

    value: Tensor
    standard_error: Tensor
    ess: Tensor
    elbo: Tensor
    num_particles: int
    data: str = ""
    pareto_k: Tensor | None = None
    kind: str = "importance weighting"
    caveat: str = ""

    @property
    def mean(self) -> float:
        """The mean over the data, nats per datum."""
        return self.value.mean().item()

    @property
    def mean_standard_error(self) -> float:
        """The Monte Carlo standard error of the mean; the data's errors are independent."""
        return self.standard_error.square().sum().sqrt().item() / len(self.value)

    @property
    def shared_error(self) -> float:
        """The standard error that all data have in common, which more data do not average out."""
        return 0.0

    @property
    def bias(self) -> float:
        """About how far the mean lies below the truth for these data: -E[standard_error^2] / 2.

        The logarithm of an average is too low on average (Jensen), by this much to second order;
        unlike ``mean_standard_error`` it does not shrink with more data, only with particles.
        """
        return -self.standard_error.square().mean().item() / 2

    @property
    def sampling_error(self) -> float:
        """The standard error of the mean as an estimate for new data; NaN for one datum."""
        n = len(self.value)
        if n == 1:
            return math.nan
        return math.hypot(self.value.std().item() / n**0.5, self.shared_error)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The interval that holds log p(x) with some probability, for each datum.

        By Student's t with K - 1 degrees of freedom. It says nothing where ``trusted`` is False,
        and leaves out ``bias``.

        Args:
            level: The probability, between 0 and 1.

        Returns:
            The lower and the upper ends, both ``(N,)``, in nats; NaN for one particle.

        Raises:
            ValueError: ``level`` is no probability.

        Example:
            >>> columns = torch.tensor([[-1.0], [0.1], [9.0], [-2.0]]).double()
            >>> lower, upper = pv.Estimate(*columns, num_particles=1000).interval()
            >>> f"{lower.item():.3f} {upper.item():.3f}"
            '-1.196 -0.804'
        """
        if not 0 < level < 1:
            raise ValueError(f"interval: expected a level between 0 and 1, got {level}.")
        from scipy.special import stdtrit  # late: importing it adds filters of warnings

        freedom = self._freedom.clamp_min(1).numpy()  # one weight has no error to begin with
        half = self.standard_error * torch.as_tensor(stdtrit(freedom, (1 + level) / 2))
        return self.value - half, self.value + half

    @property
    def threshold(self) -> float:
        """The Pareto k up to which so many particles can be trusted."""
        return threshold(self._num_weights)

    @property
    def trusted(self) -> Tensor:
        """For which data an error bar can be believed, ``(N,)``, bool.

        Two things have to hold. The effective number of particles is at least 20, or half of K
        where that is less. And the Pareto k is no more than ``threshold``: that of the datum, and
        that of all data where theirs differ by no more than noise does, since a datum whose largest
        weights were not drawn has a low k and a short error bar. With K < 21 there is no k to ask.
        """
        enough = self.ess >= min(FEWEST_EFFECTIVE, self._num_weights / 2)
        enough = enough & self.standard_error.isfinite() & self.value.isfinite()
        if self.caveat:
            return torch.zeros_like(enough)
        if self.pareto_k is None or not self._has_tail:
            return enough
        k = torch.maximum(self.pareto_k, pooled(self.pareto_k, self._num_weights))
        return enough & (k <= self.threshold)  # NaN is not

    @property
    def untrusted(self) -> float:
        """The share of the data that are not to be trusted, 0 to 1."""
        return (~self.trusted).double().mean().item()

    @property
    def advice(self) -> str:
        """Which data are not to be trusted, and what to do about them, in words."""
        return self._advice(torch.arange(len(self.value)))

    def _advice(self, names: Tensor) -> str:
        """The same, with numbers ``(N,)`` of the data that stand for their places."""
        size, bad = len(self.value), ~self.trusted
        if self.caveat:
            return f"None of {size} data is to be trusted: {self.caveat}"
        if not bad.any():
            checked = self.pareto_k is not None and self._has_tail
            by = "" if checked else ", as far as the effective sample size tells"
            return f"The error bars of all {size} data can be trusted{by}."
        rows = bad.nonzero().squeeze(1)
        unknown = torch.full_like(self.value, math.inf)
        k = unknown if self.pareto_k is None else self.pareto_k.nan_to_num(math.inf)
        # By k, and by the effective sample size where that is equal.
        by_ess = self.ess[rows].nan_to_num(0.0).argsort(stable=True)
        rows = rows[by_ess][k[rows[by_ess]].argsort(descending=True, stable=True)]
        worst = ", ".join(str(i) for i in names[rows[:NAMED]].tolist())
        which = f"the worst are {worst}" if len(rows) > NAMED else f"namely {worst}"
        said = f"{len(rows)} of {size} data are not to be trusted ({which})."
        if size == 1:
            said = "The datum is not to be trusted."
        return f"{said} {self._remedy(k[bad])}"

    def __str__(self) -> str:
        ess = self.ess.median().item()
        tail = ""
        if self.pareto_k is not None and self._has_tail:
            above = (~(self.pareto_k <= self.threshold)).double().mean().item()
            tail = f", Pareto k above {self.threshold:.2f} for {above:.0%}"
        return (
            f"{self.mean:.3f} nats per datum, +- {self.mean_standard_error:.3f} (estimator) "
            f"+- {self.sampling_error:.2f} (test set), bias about {self.bias:.3f}; "
            f"{len(self.value)} data, "
            f"{self._drawn()}, median ESS {ess:.0f}, "
            f"lowest {self.ess.min().item():.1f}{tail}; ELBO {self.elbo.mean().item():.3f}"
        )

    @property
    def _num_weights(self) -> int:
        """Number of weights that an estimate averages."""
        return self.num_particles

    @property
    def _freedom(self) -> Tensor:
        """The degrees of freedom of each standard error, ``(N,)``."""
        return torch.full_like(self.value, self._num_weights - 1)

    @property
    def _has_tail(self) -> bool:
        return tail_size(self._num_weights) >= FEWEST

    def _remedy(self, k: Tensor) -> str:
        if self._num_weights == 1:
            return "One particle has no error bar: give more."
        if self.pareto_k is None or not self._has_tail or (k <= 0.7).all():
            return "More particles are likely to do."
        return (
            "Beyond a Pareto k of 0.7 more particles help slowly: anneal (pv.ais), or give the "
            "guide a wider tail."
        )

    def _drawn(self) -> str:
        return f"{self.num_particles} particles"


@dataclass(frozen=True, eq=False)
class PredictiveEstimate(Estimate):
    r"""An estimate of log p(x|X) per datum: an average over S draws of what all data share.

    The draws are the same for all data, so the errors of two data are correlated, and the error of
    the mean is that of the mean, not of independent parts. With the shares
    :math:`s_{sn} = \hat p_{sn} / \sum_r \hat p_{rn}` of the draws in the average of each datum,

    .. math:: \mathrm{se}(\bar\ell)^2 = \frac{1}{S(S-1)}
              \sum_{s=1}^S \Big(\frac1N \sum_n S\, s_{sn} - 1\Big)^2

    by the delta method. It holds both sources of noise: the draws of the global latents, and the
    particles of the local ones.

    Attributes:
        share: The share of each draw in the average, ``(S, N)``, float64; sums to one over S.
        ess: Here the effective number of draws of the global latents, between 1 and S.
        elbo: Here the bound given those draws, averaged over them: E_q[ELBO(x|theta)].
        num_particles: Number of particles K of the local latents, for each draw and datum.
        pareto_k: Here of the S shares of the draws.

    Example:
        >>> shares = torch.tensor([[0.5, 0.6], [0.5, 0.4]]).double()
        >>> e = pv.PredictiveEstimate(*torch.zeros(4, 2), num_particles=10, share=shares)
        >>> e.num_global, f"{e.mean_standard_error:.2f}"
        (2, '0.10')
    """

    share: Tensor = field(kw_only=True)

    @property
    def num_global(self) -> int:
        """Number of draws S of the global latents."""
        return len(self.share)

    @property
    def mean_standard_error(self) -> float:
        """The Monte Carlo standard error of the mean, whose data share draws; NaN for one draw."""
        s = self.num_global
        return s**0.5 * self.share.mean(1).std().item() if s > 1 else math.nan

    @property
    def shared_error(self) -> float:
        """The square root of the mean covariance of the errors of two data; 0 if negative."""
        n = len(self.value)
        if n == 1:
            return 0.0
        whole = (n * self.mean_standard_error) ** 2
        excess = whole - self.standard_error.square().sum().item()
        return math.sqrt(max(excess, 0.0) / (n * (n - 1)))

    @property
    def _num_weights(self) -> int:
        return self.num_global

    def _remedy(self, k: Tensor) -> str:
        return "Give more draws of the global latents, or more particles for each."

    def _drawn(self) -> str:
        return f"{self.num_global} draws of the global latents, {self.num_particles} particles each"
