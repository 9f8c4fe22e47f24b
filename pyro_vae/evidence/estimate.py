"""What every estimator of evidence returns."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Estimate"]


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
        return self.value.std().item() / n**0.5 if n > 1 else float("nan")

    def __str__(self) -> str:
        ess = self.ess.median().item()
        return (
            f"{self.mean:.3f} nats per datum, +- {self.mean_standard_error:.3f} (estimator) "
            f"+- {self.sampling_error:.2f} (test set), bias about {self.bias:.3f}; "
            f"{len(self.value)} data, "
            f"{self.num_particles} particles, median ESS {ess:.0f}, "
            f"lowest {self.ess.min().item():.1f}; ELBO {self.elbo.mean().item():.3f}"
        )
