"""Hold judged runs against each other, datum by datum: which swap helped?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyro_vae.evidence.compare import Comparison, Comparisons, compare, row
from pyro_vae.evidence.estimate import Estimate
from pyro_vae.runs import plots
from pyro_vae.runs.directory import Run

__all__ = ["RunComparison", "compare_runs"]


@dataclass(frozen=True, eq=False)
class RunComparison(Comparisons):
    """Judged runs, and what each gains over the first; ``str`` of it is a table.

    Attributes:
        rows: One dict a run: what ``Comparisons`` has, ``bits_per_dim`` (None where data have no
            levels), ``epochs`` (those it has trained for), ``of_epochs`` (those it was to train
            for) and ``train_seconds``.
        diverged: Swaps that are left out, and how each diverged; see ``compare_swaps``.
    """

    diverged: Mapping[str, str] = field(default_factory=dict)


def compare_runs(
    runs: Mapping[str, str | Path] | Sequence[str | Path], *, out: str | Path | None = None
) -> RunComparison:
    """Compare judged runs with the first of them by paired differences of log p(x).

    Args:
        runs: Run directories that ``evaluate_run`` has judged on the same data, by name or, under
            the names of their folders, in a list. The first is the baseline.
        out: A folder for ``comparison.json`` (the rows) and ``comparison.png``; it is made.

    Returns:
        The comparison. Print it.

    Raises:
        FileNotFoundError: A directory holds no run.
        ValueError: There are less than two runs, two of one name, one that was not judged, or
            they were judged on other data, or by figures of another quantity.
        OSError: ``out`` can't be written.
    """
    named = _named(runs)
    baseline = next(iter(named))
    folders = {name: Run.open(path) for name, path in named.items()}
    judged = {name: _judged(folder) for name, folder in folders.items()}
    quantity = judged[baseline][1]["quantity"]
    differences: dict[str, Comparison] = {}
    rows = []
    for name, (estimate, summary) in judged.items():
        if summary["quantity"] != quantity:
            raise ValueError(
                f"compare_runs: {name} was judged by its {summary['quantity']}, {baseline} by its "
                f"{quantity}; a difference of the two means nothing."
            )
        if name != baseline:
            try:
                differences[name] = compare(estimate, judged[baseline][0])
            except ValueError as error:
                raise ValueError(f"compare_runs: {name} and {baseline}: {error}") from error
        rows.append(_row(name, folders[name], estimate, summary, differences.get(name)))
    found = RunComparison({name: j[0] for name, j in judged.items()}, differences, rows)
    if out is not None:
        folder = Run(out)
        folder.path.mkdir(parents=True, exist_ok=True)
        machine = judged[baseline][1].get("machine")
        kept = {"quantity": quantity, "baseline": baseline, "machine": machine, "rows": rows}
        folder.write_json("comparison.json", kept)
        plots.save(plots.differences(rows, str(quantity)), folder.path / "comparison.png")
    return found


def _named(runs: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, Path]:
    if isinstance(runs, Mapping):
        named = {name: Path(path) for name, path in runs.items()}
    else:
        named = {Path(path).resolve().name: Path(path) for path in runs}
        if len(named) < len(runs):
            raise ValueError(
                "compare_runs: two runs have folders of one name; give them names of their own, "
                "{'first': 'a/run', 'second': 'b/run'}."
            )
    if len(named) < 2:
        raise ValueError(f"compare_runs: expected at least two runs, got {len(named)}.")
    return named


def _judged(run: Run) -> tuple[Estimate, dict[str, Any]]:
    """The estimate that the last evaluation has left, and its summary."""
    arrays = run.read_arrays("evidence.npz")
    if not arrays or not (run.path / "evidence.json").is_file():
        raise ValueError(
            f"{run.path}: the run was not judged; call evaluate_run({str(run.path)!r}) or "
            f"pyro-vae evaluate {run.path} first."
        )
    summary = run.read_json("evidence.json")
    mean = summary.get("log_evidence")
    if mean is not None and not math.isclose(mean, arrays["value"].mean(), rel_tol=1e-6):
        raise ValueError(
            f"{run.path}: evidence.json and evidence.npz are of two evaluations, one of which was "
            f"stopped between them; call evaluate_run({str(run.path)!r}) or pyro-vae evaluate "
            f"{run.path} again."
        )
    names = ("value", "standard_error", "ess", "elbo", "pareto_k")
    columns = {key: torch.as_tensor(arrays[key]) for key in names if key in arrays}
    # What was judged before there were kinds names none.
    facts = {key: summary[key] for key in ("num_particles", "kind") if key in summary}
    data = summary.get("fingerprint", "")
    return _Judged(**columns, **facts, data=data, summary=summary), summary


@dataclass(frozen=True, eq=False)
class _Judged(Estimate):
    """An estimate whose errors of the mean are those that its evaluation has found.

    Where a sample of the data was annealed for all of them, they don't follow from the data's own.
    """

    summary: Mapping[str, Any] = field(kw_only=True)

    @property
    def mean_standard_error(self) -> float:
        error = self.summary["mean_standard_error"]
        return math.nan if error is None else error

    @property
    def shared_error(self) -> float:
        error = self.summary.get("shared_error", 0.0)
        return math.nan if error is None else error

    @property
    def bias(self) -> float:
        bias = self.summary["bias"]
        return math.nan if bias is None else bias

    @property
    def untrusted(self) -> float:
        return self.summary.get("untrusted", super().untrusted)


def _row(
    name: str,
    run: Run,
    estimate: Estimate,
    summary: dict[str, Any],
    difference: Comparison | None,
) -> dict[str, Any]:
    records, _ = run.read_metrics()
    return {
        **row(name, estimate, difference),
        "bits_per_dim": summary.get("bits_per_dim"),
        "epochs": len(records),
        "of_epochs": run.config["options"]["epochs"],
        "train_seconds": records[-1]["seconds"] if records else None,
    }
