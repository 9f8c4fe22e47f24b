"""What every estimator of evidence returns."""

import math
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Estimate", "PredictiveEstimate"]


@dataclass(frozen=True, eq=False)
class Estimate:
    """An estimate of log p(x) per datum, in nats, with what is needed to judge it.

    Two errors of the mean are told apart: ``mean_standard_error`` is the estimator's, and shrinks
    with particles; ``sampling_error`` is the test set's, and shrinks with data. The mean is besides
    too low by about ``bias``.

    Attributes:
        value: Estimates of log p(x), ``(N,)``, float64.
        standard_error: Their Monte Carlo standard errors by the delta method, ``(N,)``. They are
            too small where few particles carry the weight: look at ``ess``.
        ess: Effective number of particles, (sum w)^2 / sum w^2, ``(N,)``, between 1 and K.
        elbo: The Monte Carlo evidence lower bound from the same particles, ``(N,)``.
        num_particles: Number of particles K per datum.
        data: A digest of the data, by which ``compare`` knows estimates of the same.

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

    def __str__(self) -> str:
        ess = self.ess.median().item()
        return (
            f"{self.mean:.3f} nats per datum, +- {self.mean_standard_error:.3f} (estimator) "
            f"+- {self.sampling_error:.2f} (test set), bias about {self.bias:.3f}; "
            f"{len(self.value)} data, "
            f"{self._drawn()}, median ESS {ess:.0f}, "
            f"lowest {self.ess.min().item():.1f}; ELBO {self.elbo.mean().item():.3f}"
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

    def _drawn(self) -> str:
        return f"{self.num_global} draws of the global latents, {self.num_particles} particles each"
