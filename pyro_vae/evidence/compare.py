"""Two models judged on the same data."""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evidence.estimate import Estimate

__all__ = ["Comparison", "compare", "fingerprint"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Differences of log p(x) between two models, datum by datum, in nats.

    The same data are easy or hard for both models, so the differences vary much less than the
    values: a tenth of a nat between two means whose sampling errors are a nat each can be certain.

    Attributes:
        difference: log p(x) under the first minus under the second, ``(N,)``, float64.
        standard_error: Monte Carlo standard error of each difference, ``(N,)``.
        first: The mean under the first model.
        second: The mean under the second.
        estimator_error: The Monte Carlo standard error of the mean difference for these data.
        shared_error: The part of it that more data do not average out, since all data share draws
            of global latents (``log_predictive``).
    """

    difference: Tensor
    standard_error: Tensor
    first: float
    second: float
    estimator_error: float
    shared_error: float = 0.0

    @property
    def mean(self) -> float:
        """The mean difference, nats per datum; above zero where the first model is better."""
        return self.difference.mean().item()

    @property
    def mean_standard_error(self) -> float:
        """The standard error of the mean difference as one for new data; NaN for one datum.

        The differences scatter by what the data are and by the estimators' noise, so both are in
        it; ``estimator_error`` is the second alone.
        """
        n = len(self.difference)
        if n == 1:
            return math.nan
        return math.hypot(self.difference.std().item() / n**0.5, self.shared_error)

    @property
    def share(self) -> float:
        """The share of the data to which the first model gives more."""
        return (self.difference > 0).double().mean().item()

    def __str__(self) -> str:
        return (
            f"{self.first:.3f} against {self.second:.3f}: {self.mean:+.3f} nats per datum, +- "
            f"{self.mean_standard_error:.3f} (paired, of which {self.estimator_error:.3f} the "
            f"estimators); better on {self.share:.0%} of {len(self.difference)} data"
        )


def compare(first: Estimate, second: Estimate) -> Comparison:
    r"""Compare two models on the same data: paired differences, which say whether a swap helped.

    .. math:: \Delta_n = \log p_1(x_n) - \log p_2(x_n), \quad
              \mathrm{se}(\bar\Delta) = \mathrm{sd}(\Delta) / \sqrt N

    Args:
        first: The estimate of a model, of ``log_evidence`` or ``log_predictive``.
        second: Of another model, on the same data in the same order.

    Returns:
        The comparison, in nats.

    Raises:
        ValueError: The estimates are of other data.

    Example:
        >>> columns = torch.tensor([[-1.0, -3.0], [0.3, 0.4], [9.0, 8.0], [-2.0, -4.0]]).double()
        >>> a, b = (pv.Estimate(columns[0] + d, *columns[1:], num_particles=10) for d in (0.5, 0))
        >>> print(pv.compare(a, b))
        -1.500 against -2.000: +0.500 nats per datum, +- 0.000 (paired, of which 0.354 the
        estimators); better on 100% of 2 data
    """
    if len(first.value) != len(second.value):
        raise ValueError(
            f"compare: expected estimates of the same data, got {len(first.value)} and "
            f"{len(second.value)} data; judge both models on the same tensor."
        )
    if first.data and second.data and first.data != second.data:
        raise ValueError(
            "compare: the estimates are of other data, or of the same in another order, so their "
            "differences mean nothing; judge both models on the same tensor."
        )
    error = (first.standard_error.square() + second.standard_error.square()).sqrt()
    return Comparison(
        first.value - second.value,
        error,
        first.mean,
        second.mean,
        estimator_error=math.hypot(first.mean_standard_error, second.mean_standard_error),
        shared_error=math.hypot(first.shared_error, second.shared_error),
    )


def fingerprint(args: tuple[Any, ...]) -> str:
    """A digest of the tensors among the arguments: of their shapes and every value."""
    digest = hashlib.sha256()
    for arg in args:
        if isinstance(arg, Tensor):
            values = arg.detach().cpu().contiguous()
            digest.update(f"{tuple(values.shape)} {values.dtype}".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
