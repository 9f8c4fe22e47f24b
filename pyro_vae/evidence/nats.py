"""A part of a bound: so many nats per datum, with the errors of each and of their mean."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Nats", "table"]


@dataclass(frozen=True, eq=False)
class Nats:
    """Estimates of one quantity for each datum, in nats; their mean is that of the set.

    Two errors of the mean are told apart, as those of an ``Estimate``: ``mean_standard_error`` is
    the estimator's, and shrinks with particles; ``sampling_error`` is the data's, and shrinks with
    data.

    Attributes:
        value: An unbiased estimate for each datum, ``(N,)``, float64.
        standard_error: Their Monte Carlo standard errors, ``(N,)``.

    Example:
        >>> print(pv.Nats(torch.tensor([1.0, 3.0]), torch.tensor([0.3, 0.4])))
        2.000 +- 0.250 (estimator) +- 1.000 (data)
    """

    value: Tensor
    standard_error: Tensor

    @classmethod
    def of_draws(cls, draws: Tensor, *, error: Tensor | None = None) -> "Nats":
        """The means of independent draws.

        Args:
            draws: ``(K, N)``, of at least two draws for each datum.
            error: A standard error from elsewhere, ``(N,)``, independent of the draws.
        """
        draws = draws.double()
        own = draws.std(0) / len(draws) ** 0.5
        if error is not None:
            own = own.hypot(error.to(own))
        return cls(draws.mean(0).cpu(), own.cpu())

    @property
    def mean(self) -> float:
        """The mean over the data, nats per datum."""
        return self.value.mean().item()

    @property
    def mean_standard_error(self) -> float:
        """The Monte Carlo standard error of the mean; the data's errors are independent."""
        return self.standard_error.square().sum().sqrt().item() / len(self.value)

    @property
    def sampling_error(self) -> float:
        """The standard error of the mean as an estimate for new data; NaN for one datum."""
        n = len(self.value)
        return self.value.std().item() / n**0.5 if n > 1 else math.nan

    def __str__(self) -> str:
        return (
            f"{self.mean:.3f} +- {self.mean_standard_error:.3f} (estimator) "
            f"+- {self.sampling_error:.3f} (data)"
        )


def table(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """Named quantities under one another, the numbers aligned.

    Args:
        title: What stands above.
        rows: Names, indented where they are parts of those above, and what is printed for them.
    """
    rows = [(name, str(shown)) for name, shown in rows]
    wide = max(len(name) for name, _ in rows) + 2
    whole = max(len(shown.partition(".")[0]) for _, shown in rows)
    lines = [f"{name:<{wide}}" + _aligned(shown, whole) for name, shown in rows]
    return "\n".join([title, *lines])


def _aligned(shown: str, whole: int) -> str:
    return " " * (whole - len(shown.partition(".")[0])) + shown
