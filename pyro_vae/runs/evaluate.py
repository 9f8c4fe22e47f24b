"""Judge a run: the log-evidence of its held-out data, kept in its folder."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.context import bare, seeded
from pyro_vae.data import PARTS, Kind, Split, restore
from pyro_vae.evidence.estimate import Estimate
from pyro_vae.evidence.importance import log_evidence
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.handlers import Program
from pyro_vae.runs.device import resolve_device
from pyro_vae.runs.directory import Run, machine, versions
from pyro_vae.runs.load import load
from pyro_vae.runs.pictures import draw_evidence
from pyro_vae.runs.progress import Progress
from pyro_vae.runs.report import write_report

__all__ = ["evaluate_run"]


def evaluate_run(
    run: str | Path,
    *,
    num_particles: int = 5000,
    part: str = "test",
    limit: int | None = None,
    data: Split | Tensor | Sequence[Tensor] | None = None,
    model: Program | None = None,
    guide: Program | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    compile: Compile = "auto",
    progress: bool = True,
) -> Estimate:
    """Estimate the log-evidence of a run's held-out data, and keep it in the run.

    Writes ``evidence.json`` (the summary), ``evidence.npz`` (per datum), ``evidence.png``, and the
    report anew.

    Args:
        run: The run directory.
        num_particles: Number of importance weights K per datum.
        part: "test", "valid", "train", or "all" of a ``Split``.
        limit: Judge so many data, spread evenly over the part; all by default.
        data: The data, where the run can't load them again: a ``Split``, or the tensors to judge.
        model: For a pair with parts of your own, as in ``load``.
        guide: Likewise.
        seed: Seed of the particles.
        device: "auto", "cpu", "cuda"...
        compile: Compile the log-weights; see ``log_weights``.
        progress: Show a bar on a terminal, lines elsewhere (on standard error).

    Returns:
        The estimate, in nats per datum of the data as they were before their preparation: that of
        ``log_evidence`` plus ``data.log_jacobian``. For dequantized levels it bounds log P(levels).

    Raises:
        FileNotFoundError: The directory holds no run, or the data's files are gone.
        ValueError: The data have changed or don't fit the pair; or what ``load`` and
            ``log_evidence`` say.
    """
    folder = Run.open(run)
    config = folder.config
    if data is None:
        data = restore(config["data"])
    _check_prepared_alike(data, config["data"])
    pair = load(run, model=model, guide=guide)
    target = resolve_device(device, *pair)
    for program in map(bare, pair):
        if isinstance(program, nn.Module):
            program.to(target)
    args = tuple(a.to(target) for a in _rows(data, part, limit, seed))
    total = len(args[0]) * num_particles
    bar = Progress(total, what="weight", label=f"judging {len(args[0])} data", shown=progress)
    started = time.perf_counter()
    try:
        # Scores are of values outside the support: that was declared when the data were prepared.
        density = not isinstance(data, Split) or data.is_density
        with pyro.validation_enabled(is_validate=density):
            estimate = log_evidence(
                *pair,
                *args,
                num_particles=num_particles,
                seed=seed,
                compile=compile,
                progress=bar.advance,
            )
    finally:
        bar.close()
    jacobian = data.log_jacobian if isinstance(data, Split) else 0.0
    estimate = replace(estimate, value=estimate.value + jacobian, elbo=estimate.elbo + jacobian)
    summary = {
        "part": part if isinstance(data, Split) else "given",
        "num_data": len(args[0]),
        **_figures(estimate, data),
        "fingerprint": estimate.data,
        "num_particles": num_particles,
        "epochs": len(folder.read_metrics()[0]),
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "machine": machine(target),
        "preparation": list(data.preparation) if isinstance(data, Split) else [],
        "versions": versions(),
    }
    keys = ("value", "standard_error", "ess", "elbo", "pareto_k")
    arrays = {key: getattr(estimate, key) for key in keys}
    folder.write_arrays("evidence.npz", **{k: v.numpy() for k, v in arrays.items()})
    folder.write_json("evidence.json", summary)
    draw_evidence(folder, estimate.value, summary)
    write_report(folder.path)
    return estimate


def _rows(
    data: Split | Tensor | Sequence[Tensor], part: str, limit: int | None, seed: int
) -> tuple[Tensor, ...]:
    if part not in (*PARTS, "all"):
        raise ValueError(f"part: expected one of {', '.join(PARTS)}, all; got {part!r}.")
    if isinstance(data, Split):
        values = {name: getattr(data, name) for name in (PARTS if part == "all" else (part,))}
        if "train" in values and data.refresh is not None:
            with seeded(seed, "train"):
                values["train"] = data.refresh(values["train"])
        tensors = (torch.cat(list(values.values())),)
    else:
        tensors = (data,) if isinstance(data, Tensor) else tuple(data)
    if limit is None or limit >= len(tensors[0]):
        return tensors
    if limit < 1:
        raise ValueError(f"limit: expected at least 1 datum, got {limit}.")
    # Evenly spread, not the first ones: test images may be sorted by class.
    rows = torch.linspace(0, len(tensors[0]) - 1, limit).round().long()
    return tuple(t[rows] for t in tensors)


def _check_prepared_alike(data: Any, described: dict[str, Any]) -> None:
    """Figures of data that were prepared otherwise than the run's would be of another quantity."""
    steps = described.get("steps", [])
    if isinstance(data, Split) and json.loads(json.dumps(data.steps)) != steps:
        given, trained = ([name for name, _ in s] or "nothing" for s in (data.steps, steps))
        raise ValueError(
            f"data: the run was trained on data prepared by {trained}, these are prepared by "
            f"{given}, or by the same with other numbers; prepare them by the steps in the run's "
            "config.json."
        )


def _figures(estimate: Estimate, data: Any) -> dict[str, Any]:
    """The figures of ``evidence.json``; every nat in it is per datum."""
    figures = {
        "quantity": "log p(x)",
        "log_evidence": estimate.mean,
        "mean_standard_error": estimate.mean_standard_error,
        "sampling_error": estimate.sampling_error,
        "bias": estimate.bias,
        "elbo": estimate.elbo.mean().item(),
        "ess_median": estimate.ess.median().item(),
        "ess_min": estimate.ess.min().item(),
        "kind": estimate.kind,
        "untrusted": estimate.untrusted,
        "advice": estimate.advice,
    }
    if isinstance(data, Split):
        if not data.is_density:
            figures["quantity"] = "score"
        dequantized = any(step == "dequantize" for step, _ in data.steps)
        if dequantized:
            figures["quantity"] = "bound on log P(x)"
        if data.kind is Kind.LEVELS or dequantized:
            figures["bits_per_dim"] = -estimate.mean / (data.dim * math.log(2))
    return figures
