"""Train several pairs on the same data, judge them, and hold them against the first."""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pyro_vae.data import Split
from pyro_vae.evidence.compare import fingerprint
from pyro_vae.inference.svi import DivergedError
from pyro_vae.runs.compare import RunComparison, compare_runs
from pyro_vae.runs.directory import Run
from pyro_vae.runs.evaluate import evaluate_run
from pyro_vae.runs.fit import fit

__all__ = ["compare_swaps"]


def compare_swaps(
    swaps: Mapping[str, Callable[[], tuple[Any, Any]]],
    data: Split,
    *,
    out: str | Path,
    num_particles: int = 5000,
    budget: float = 0.0,
    losses: Mapping[str, Any] | None = None,
    total_seconds: float | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool = True,
    **options: Any,
) -> RunComparison:
    """Train and judge each swap alike, and compare them with the first.

    Each swap has a run directory of its own below ``out``. A call that was stopped goes on where it
    stopped: what was trained is resumed, with the checks of ``fit``, and what was judged as it is
    now is not judged again. With ``total_seconds=``, or ``max_seconds=`` for each, a swap trains so
    long and is judged as it is then; the next call goes on with those that have epochs left and
    judges them anew, and the column ``epochs`` says how far each has come. One that diverges is
    named in a warning and left out; the first alone can't be missed.

    Args:
        swaps: From a name to a function that makes the pair, called under
            ``torch.manual_seed(seed)``; the first is the baseline.
        data: What all are trained and judged on.
        out: The folder; ``comparison.json`` and ``comparison.png`` come to lie in it.
        num_particles: Importance weights per held-out datum.
        budget: What annealing may cost, in units of that; 0, as published figures are, anneals
            nothing. See ``evaluate``.
        losses: The loss of those swaps that have one of their own, by name.
        total_seconds: What this call may take, in equal parts for those that have epochs left;
            judging counts, and what one doesn't need goes to the next. Each trains for one epoch
            at least.
        seed: Seed of initial weights, training and particles.
        device: "auto", "cpu", "cuda"...
        progress: Show bars on a terminal, lines elsewhere.
        options: Of ``fit``, for all: ``epochs``, ``batch_size``, ``loss``, ``max_seconds``...

    Returns:
        The comparison. Print it.

    Raises:
        ValueError: There are less than two swaps; or what ``fit`` and ``evaluate_run`` say.
        DivergedError: The first swap diverged, or all others.

    Example:
        >>> import tempfile
        >>> def pair(prior):
        ...     encoder = pv.Conditional(pv.networks.mlp(64, (2, 2)), pv.families.normal)
        ...     likelihood = pv.Conditional(pv.networks.mlp(2, (1, 64)), pv.families.bernoulli)
        ...     return pv.Model(prior, likelihood), pv.Guide(encoder)
        >>> swaps = {
        ...     "N(0, I)": lambda: pair(pv.priors.StandardNormal(2)),
        ...     "mixture": lambda: pair(pv.priors.Mixture(pv.families.normal, 5, (2, 2))),
        ... }
        >>> data = pv.load_data("digits").binarize()
        >>> quick = {"epochs": 1, "num_particles": 10, "pictures": False, "progress": False}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = pv.compare_swaps(swaps, data, out=folder, **quick)
        >>> list(found.differences)
        ['mixture']
    """
    if len(swaps) < 2:
        raise ValueError(f"compare_swaps: expected at least two swaps, got {len(swaps)}.")
    folders = {name: Path(out) / _folder(name) for name in swaps}
    if len(set(folders.values())) < len(folders):
        raise ValueError(
            f"compare_swaps: expected names that differ in their letters and digits, got "
            f"{list(swaps)}."
        )
    if total_seconds is not None and not total_seconds > 0:
        raise ValueError(f"total_seconds: expected more than 0 seconds, got {total_seconds}.")
    end = time.monotonic() + (math.inf if total_seconds is None else total_seconds)
    diverged: dict[str, DivergedError] = {}
    for number, (name, make) in enumerate(swaps.items()):
        run = folders[name]
        if total_seconds is not None:
            left = sum(_has_epochs_left(run, options) for run in list(folders.values())[number:])
            options["max_seconds"] = max((end - time.monotonic()) / max(left, 1), 1e-9)
        before = _judged(run, data, num_particles, budget, seed)
        torch.manual_seed(seed)
        model, guide = make()
        own = {"loss": losses[name]} if losses is not None and name in losses else {}
        try:
            history = fit(
                model,
                guide,
                data,
                out=run,
                resume=(run / "config.json").is_file(),
                seed=seed,
                device=device,
                progress=progress,
                **{**options, **own},
            )
        except DivergedError as error:
            diverged[name] = error
            if number == 0 or len(diverged) == len(swaps) - 1:
                raise
            warnings.warn(f"{name} is left out: {error}", UserWarning, stacklevel=2)
            continue
        if before == len(history.records):
            continue
        evaluate_run(
            run,
            num_particles=num_particles,
            budget=budget,
            data=data,
            model=model,
            guide=guide,
            seed=seed,
            device=device,
            progress=progress,
        )
    found = compare_runs({n: run for n, run in folders.items() if n not in diverged}, out=out)
    return replace(found, diverged={name: str(error) for name, error in diverged.items()})


def _has_epochs_left(folder: Path, options: Mapping[str, Any]) -> bool:
    """Whether training would go on, as far as the number of epochs tells."""
    if not (folder / "config.json").is_file():
        return True
    wanted = options.get("epochs", Run(folder).config["options"]["epochs"])
    return len(Run(folder).read_metrics()[0]) < wanted


def _folder(name: str) -> str:
    """A name as one of a folder."""
    kept = "".join(c if c.isalnum() else "-" for c in name.lower())
    return "-".join(part for part in kept.split("-") if part) or "swap"


def _judged(folder: Path, data: Split, num_particles: int, budget: float, seed: int) -> int | None:
    """After how many epochs a run was judged in this way; None if it was not."""
    if not (folder / "evidence.json").is_file():
        return None
    summary = Run(folder).read_json("evidence.json")
    spent = summary.get("budget", 0.0)
    there = (summary["num_particles"], math.inf if spent is None else spent, summary["seed"])
    if there != (num_particles, budget, seed) or summary["part"] != "test":
        return None
    if summary.get("fingerprint") != fingerprint((data.test,)):  # some of them, or others
        return None
    return summary.get("epochs")  # not what metrics say: a call may have died between the two
