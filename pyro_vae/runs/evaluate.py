"""Judge a run: the log-evidence of its held-out data, kept in its folder."""

import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.context import bare, seeded
from pyro_vae.data import PARTS, Kind, Split, restore
from pyro_vae.evidence.evaluate import evaluate
from pyro_vae.evidence.evaluation import Evaluation
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.handlers import Program
from pyro_vae.runs.arrays import ArrayFolder
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
    budget: float = 1.0,
    num_chains: int = 16,
    temperatures: int = 1000,
    leapfrog_steps: int = 10,
    part: str = "test",
    limit: int | None = None,
    data: Split | Tensor | Sequence[Tensor] | None = None,
    model: Program | None = None,
    guide: Program | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    compile: Compile = "auto",
    progress: bool = True,
) -> Evaluation:
    """Evaluate a run's held-out data by ``evaluate``, and keep what is found in the run.

    Writes ``evidence.json`` (the summary), ``evidence.npz`` (per datum), ``evidence.png`` and
    ``trust.png``, and the report anew. Finished blocks of data are kept in the folder
    ``evaluation``: a call that was killed goes on by being made again, on the same kind of device,
    and one with a larger budget adds to it. The blocks of other parts, limits and options stay.

    Args:
        run: The run directory.
        num_particles: Number of importance weights K per datum.
        budget: What annealing of untrusted data may cost, in units of what weighting costs; 0 for
            importance weighting alone, as published figures are. See ``evaluate``.
        num_chains: Number of annealed chains per datum.
        temperatures: Number of steps of each.
        leapfrog_steps: Leapfrog steps of each move.
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
        The evaluation, in nats per datum of the data as they were before their preparation: that of
        ``evaluate`` plus ``data.log_jacobian``. For dequantized levels it bounds log P(levels).

    Raises:
        FileNotFoundError: The directory holds no run, or the data's files are gone.
        OSError: The directory can't be written to. Where that shows at the end, as on a full disk,
            the error has what was found as a note.
        ValueError: The data have changed or don't fit the pair; or what ``load`` and ``evaluate``
            say.
    """
    folder = Run.open(run)
    config = folder.config
    _check_writable(folder)
    if data is None:
        data = restore(config["data"])
    _check_prepared_alike(data, config["data"])
    pair = load(run, model=model, guide=guide)
    # Not what the metrics say: a training that was killed may have told more than it saved.
    epochs = len(folder.load_checkpoint("cpu")["records"])
    target = resolve_device(device, *pair)
    for program in map(bare, pair):
        if isinstance(program, nn.Module):
            program.to(target)
    args = tuple(a.to(target) for a in _rows(data, part, limit, seed))
    told = _Told(len(args[0]), shown=progress)
    blocks = ArrayFolder(folder.path / "evaluation")
    started = time.perf_counter()
    try:
        # Scores are of values outside the support: that was declared when the data were prepared.
        density = not isinstance(data, Split) or data.is_density
        with pyro.validation_enabled(is_validate=density):
            found = evaluate(
                *pair,
                *args,
                num_particles=num_particles,
                budget=budget,
                num_chains=num_chains,
                temperatures=temperatures,
                leapfrog_steps=leapfrog_steps,
                seed=seed,
                compile=compile,
                progress=told,
                kept=blocks,
            )
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"stopped; what is finished is kept in {blocks.path}, and the same call goes on with it"
        ) from stop
    finally:
        told.close()
        seconds = time.perf_counter() - started
        clock = f"seconds-{part}-{len(args[0])}-{num_particles}-{seed}"
        if told.restored and clock in blocks:
            seconds += blocks[clock].item()
        if told.begun:  # a mistake leaves the folder as it was
            blocks[clock] = torch.tensor(seconds)
    jacobian = data.log_jacobian if isinstance(data, Split) else 0.0
    found = found.plus(jacobian)
    summary = {
        "part": part if isinstance(data, Split) else "given",
        "epochs": epochs,
        **_figures(found, data),
        "seed": seed,
        "budget": budget,
        "seconds": seconds,  # of all calls that it took
        "machine": machine(target),
        "preparation": list(data.preparation) if isinstance(data, Split) else [],
        "versions": versions(),
    }
    arrays = {
        **{key: getattr(found, key) for key in ("value", "standard_error", "ess", "elbo")},
        "pareto_k": found.pareto_k,
        "weighted": found.weighted.value,
        "annealed_rows": found.rows,
        "gain": found.gain,
    }
    try:
        folder.write_arrays("evidence.npz", **{k: v.numpy() for k, v in arrays.items()})
        folder.write_json("evidence.json", summary)
        draw_evidence(folder, found, summary)
        write_report(folder.path)
    except OSError as error:
        error.add_note(f"What was found, in nats per datum:\n{found}")
        raise
    return found


def _check_writable(run: Run) -> None:
    """Say before hours of work that nothing of it can be kept."""
    try:
        with tempfile.TemporaryFile(dir=run.path):
            pass
    except OSError as error:
        raise OSError(
            f"run: can't write to {run.path} ({error.strerror}), where the evaluation is kept; "
            "copy the run to a disk that is writable."
        ) from error


class _Told:
    """What an evaluation tells of itself, in one bar after another."""

    def __init__(self, size: int, *, shown: bool) -> None:
        self._size, self._shown = size, shown
        self._what, self._bar = "", Progress(0, what="", label="", shown=False)
        self.restored = False

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self.close()
            self._what = what
            self.restored |= done > 0  # what is told first was there before
            self._bar = Progress(
                total,
                what="weight" if what == "weighing" else "move",
                label=f"{what} {self._size} data" if what == "weighing" else what,
                shown=self._shown,
                done=done,
            )
        self._bar.advance(done - self._bar.done)

    @property
    def begun(self) -> bool:
        """Whether anything was told."""
        return bool(self._what)

    def close(self) -> None:
        self._bar.close()


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


def _figures(found: Evaluation, data: Any) -> dict[str, Any]:
    """The figures of ``evidence.json``; every nat in it is per datum."""
    of_pair = found.to_dict()
    figures = {"quantity": "log p(x)", **of_pair, "fingerprint": of_pair.pop("data")}
    del figures["data"]
    if isinstance(data, Split):
        if not data.is_density:
            figures["quantity"] = "score"
        dequantized = any(step == "dequantize" for step, _ in data.steps)
        if dequantized:
            figures["quantity"] = "bound on log P(x)"
        if data.kind is Kind.LEVELS or dequantized:
            figures["bits_per_dim"] = -found.mean / (data.dim * math.log(2))
    return figures
