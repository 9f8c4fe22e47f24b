"""Models judged on the same data."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from pyro_vae.evidence.estimate import Estimate

__all__ = ["Comparison", "Comparisons", "compare", "fingerprint", "row"]


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


@dataclass(frozen=True, eq=False)
class Comparisons:
    """Several models on the same data, and what each gains over the first; ``str`` is a table.

    Attributes:
        estimates: From the name of each model to its log-evidence; the first is the baseline.
        differences: From the name of every other model to its paired difference to the baseline.
        rows: One dict a model: ``name``, ``elbo``, ``log_evidence``, ``mean_standard_error``,
            ``sampling_error``, ``bias``, ``ess_median``, ``untrusted`` (the share of the data),
            ``difference``, ``difference_error``, ``share`` (None for the baseline); nats per datum.
    """

    estimates: dict[str, Estimate]
    differences: dict[str, Comparison]
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        with_bits = any(row.get("bits_per_dim") is not None for row in self.rows)
        head = ["", "ELBO", "log p(x)", "+-", "difference", "+-", "better on"]
        lines = [head + ["bits/dim"] * with_bits]
        for row in self.rows:
            cells = [row["name"], f"{row['elbo']:.2f}", f"{row['log_evidence']:.2f}"]
            cells.append(f"{row['mean_standard_error']:.3f}")
            if row["difference"] is None:
                cells += ["", "", ""]
            else:
                cells += [f"{row['difference']:+.2f}", f"{row['difference_error']:.3f}"]
                cells.append(f"{row['share']:.0%}")
            bits = row.get("bits_per_dim")
            lines.append(cells + ["" if bits is None else f"{bits:.4f}"] * with_bits)
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


@overload
def compare(first: Estimate, second: Estimate, *, different_kinds: bool = False) -> Comparison: ...


@overload
def compare(
    first: Estimate,
    second: Estimate,
    *others: Estimate,
    names: Sequence[str],
    different_kinds: bool = False,
) -> Comparisons: ...


def compare(
    first: Estimate,
    second: Estimate,
    *others: Estimate,
    names: Sequence[str] | None = None,
    different_kinds: bool = False,
) -> Comparison | Comparisons:
    r"""Compare models on the same data: paired differences, which say whether a swap helped.

    .. math:: \Delta_n = \log p_1(x_n) - \log p_2(x_n), \quad
              \mathrm{se}(\bar\Delta) = \mathrm{sd}(\Delta) / \sqrt N

    Args:
        first: The estimate of a model, of ``log_evidence`` or ``log_predictive``.
        second: Of another model, on the same data in the same order.
        others: Of further ones, which need names.
        names: What to call each of them; the result is a table of what each gains over the first.
        different_kinds: Compare estimates of different kinds too, such as a lower bound by
            importance weighting with one by annealing: a difference of methods is then in the
            figures, and looks like one of models.

    Returns:
        The comparison of two, of the first with the second, in nats. With names a ``Comparisons``,
        of each with the first: print it, and draw its ``rows`` by ``runs.plots.differences``.

    Raises:
        ValueError: The estimates are of other data, or of different kinds; or there is not one name
            for each.

    Example:
        >>> columns = torch.tensor([[-1.0, -3.0], [0.3, 0.4], [9.0, 8.0], [-2.0, -4.0]]).double()
        >>> a, b = (pv.Estimate(columns[0] + d, *columns[1:], num_particles=10) for d in (0.5, 0))
        >>> print(pv.compare(a, b))
        -1.500 against -2.000: +0.500 nats per datum, +- 0.000 (paired, of which 0.354 the
        estimators); better on 100% of 2 data
        >>> print(pv.compare(b, a, names=["plain", "wide"]))
                ELBO  log p(x)     +-  difference     +-  better on
        plain  -3.00     -2.00  0.250
        wide   -3.00     -1.50  0.250       +0.50  0.000       100%
    """
    if names is None:
        if others:
            raise ValueError(
                f"compare: expected names=[...] for {2 + len(others)} estimates, got none; two "
                "alone need no names."
            )
        return _pair(first, second, different_kinds=different_kinds)
    estimates = (first, second, *others)
    if len(set(names)) != len(estimates) or len(names) != len(estimates):
        raise ValueError(
            f"compare: expected a name for each of {len(estimates)} estimates, no two of them "
            f"equal, got {list(names)}."
        )
    named = dict(zip(names, estimates, strict=True))
    differences = {
        name: _pair(estimate, first, different_kinds=different_kinds)
        for name, estimate in named.items()
        if name != names[0]
    }
    rows = [row(name, estimate, differences.get(name)) for name, estimate in named.items()]
    return Comparisons(named, differences, rows)


def row(name: str, estimate: Estimate, difference: Comparison | None) -> dict[str, Any]:
    """One of the ``rows`` of ``Comparisons``; None stands for the difference of the baseline."""
    return {
        "name": name,
        "elbo": estimate.elbo.mean().item(),
        "log_evidence": estimate.mean,
        "mean_standard_error": estimate.mean_standard_error,
        "sampling_error": estimate.sampling_error,
        "bias": estimate.bias,
        "ess_median": estimate.ess.median().item(),
        "untrusted": estimate.untrusted,
        "difference": None if difference is None else difference.mean,
        "difference_error": None if difference is None else difference.mean_standard_error,
        "share": None if difference is None else difference.share,
    }


def _pair(first: Estimate, second: Estimate, *, different_kinds: bool) -> Comparison:
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
    if first.kind != second.kind and not different_kinds:
        raise ValueError(
            f"compare: one estimate is by {first.kind}, the other by {second.kind}, so a "
            "difference may be one of methods and not of models; judge both models alike, or say "
            "different_kinds=True."
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
    """A digest of the tensors among the arguments: of their shapes and every value.

    An index of all rows, as a refined guide takes, says nothing of the data and is left out.
    """
    digest = hashlib.sha256()
    for arg in args:
        if isinstance(arg, Tensor) and not _is_index(arg):
            values = arg.detach().cpu().contiguous()
            digest.update(f"{tuple(values.shape)} {values.dtype}".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _is_index(arg: Tensor) -> bool:
    rows = torch.arange(len(arg), device=arg.device) if arg.dim() == 1 else None
    return rows is not None and arg.dtype == rows.dtype and torch.equal(arg, rows)
