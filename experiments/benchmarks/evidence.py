"""Particles scored per second: ``pv.log_evidence`` and what it is held against, in turns.

    python -m experiments.benchmarks.evidence NAME [--device cpu]

serves one contestant in a process of its own; it answers every line with the particle-data that it
scored and the seconds that this took. Workload (a), 5,000 particles.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch

import pyro_vae as pv
from experiments.benchmarks.contestants.pyro_vae_eager import pair
from experiments.benchmarks.evidence_peers import (
    Job,
    hand_written_log_weights,
    matrix_product_rate,
    pyro_importance,
    pythae_nll,
)
from experiments.benchmarks.steps import spread_of
from experiments.benchmarks.torch_parts import wait_for
from experiments.benchmarks.workloads import WORKLOADS, Workload, batch, weights

__all__ = ["NAMES", "measure_evidence"]

NUM_PARTICLES = 5000
NUM_DATA = 100
AGAINST = "pyro_vae_compiled"

_MADE: dict[str, Job] = {}

Measured = tuple[int, float, float | None]  # particle-data, seconds, mean log p(x) if any


def _ours(device: str, *, compile: bool, autocast: torch.dtype | None = None) -> Measured:
    workload = WORKLOADS["a"]
    model, guide = (p.to(device) for p in pair(workload, weights(workload, 0)))
    x = torch.from_numpy(batch(workload, 0)[:NUM_DATA]).to(device)
    stamps: list[tuple[int, float]] = []

    def progress(count: int) -> None:
        wait_for(x.device)
        stamps.append((count, perf_counter()))

    estimate = pv.log_evidence(
        model,
        guide,
        x,
        num_particles=NUM_PARTICLES if device == "cpu" else 100 * NUM_PARTICLES,
        compile=compile,
        autocast=autocast,
        progress=progress,
    )
    # The first block is compiled before it is computed: the time counts from its end.
    return sum(c for c, _ in stamps[1:]), stamps[-1][1] - stamps[0][1], estimate.mean


def _job(make: Callable[..., Job], device: str) -> Measured:
    workload = WORKLOADS["a"]
    x = torch.from_numpy(batch(workload, 0)[:NUM_DATA]).to(device)
    if device not in _MADE:  # a process serves one contestant, and compiles once
        _MADE[device] = make(workload, weights(workload, 0), x)
        _MADE[device].call()
    job = _MADE[device]
    wait_for(x.device)
    start = perf_counter()
    result = job.call()
    wait_for(x.device)
    seconds = perf_counter() - start
    log_w = result if isinstance(result, torch.Tensor) and result.dim() == 2 else None
    if log_w is None or log_w.shape[1] != NUM_DATA:
        return job.particle_data, seconds, result if isinstance(result, float) else None
    value = torch.logsumexp(log_w.double(), 0) - np.log(len(log_w))
    return job.particle_data, seconds, value.mean().item()


def _pyro(
    workload: Workload,
    given: dict[str, np.ndarray],
    x: torch.Tensor,
    num_particles: int,
    *,
    chunk_size: int | None = None,
) -> Job:
    model, guide = (p.to(x.device) for p in pair(workload, given))
    return pyro_importance(model, guide, x, num_particles, chunk_size=chunk_size)


def _product(library: Literal["torch", "onednn"], device: str) -> Measured:
    """As many products as the others' particles need, so that all are timed for as long."""
    job = matrix_product_rate(50 * NUM_DATA, library=library, device=device)
    calls = NUM_PARTICLES // 50
    start = perf_counter()
    for _ in range(calls):
        job.call()
    wait_for(torch.device(device))
    return calls * job.particle_data, perf_counter() - start, None


NAMES: dict[str, Callable[[str], Measured]] = {
    AGAINST: lambda device: _ours(device, compile=True),
    "pyro_vae_bfloat16": lambda device: _ours(device, compile=True, autocast=torch.bfloat16),
    "pyro_vae_eager": lambda device: _ours(device, compile=False),
    "torch_compiled": lambda device: _job(
        lambda w, given, x: hand_written_log_weights(w, given, x, NUM_PARTICLES, compiled=True),
        device,
    ),
    "torch_eager": lambda device: _job(
        lambda w, given, x: hand_written_log_weights(w, given, x, NUM_PARTICLES, compiled=False),
        device,
    ),
    "pyro_importance_at_once": lambda device: _job(
        lambda w, given, x: _pyro(w, given, x, NUM_PARTICLES, chunk_size=NUM_PARTICLES), device
    ),
    "pyro_vectorized_importance": lambda device: _job(
        lambda w, given, x: _pyro(w, given, x, 500), device
    ),
    "pythae_get_nll": lambda device: _job(
        lambda workload, given, x: pythae_nll(workload, given, x[:3], NUM_PARTICLES), device
    ),
    "last_product_torch": lambda device: _product("torch", device),
    "last_product_onednn": lambda device: _product("onednn", device),
}


def measure_evidence(
    *, rounds: int = 8, names: Sequence[str] | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Time the contestants, in turns.

    Args:
        rounds: Measurements of each.
        names: The contestants; None for all.
        device: "cpu" or "cuda".

    Returns:
        What JSON can hold: the protocol, and by contestant the particle-data per second over rounds
        (median and quartiles), ratios to the compiled ``log_evidence`` within rounds, and the
        estimate of the mean log p(x).
    """
    chosen = [n for n in names or NAMES if device == "cpu" or n != "last_product_onednn"]
    rates: dict[str, list[float]] = {}
    found: dict[str, float | None] = {}
    unavailable: dict[str, str] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        running = {n: stack.enter_context(_process(n, device, folder)) for n in chosen}
        for turn in range(rounds + 1):
            for i in range(len(chosen)):
                name = chosen[(turn + i) % len(chosen)]
                if name in unavailable:
                    continue
                answer = _ask(running[name])
                if "unavailable" in answer:
                    unavailable[name] = answer["unavailable"]
                elif turn > 0:  # the first round warms up
                    rates.setdefault(name, []).append(answer["particle_data"] / answer["seconds"])
                    found[name] = answer["mean"]
    _check(found)
    return {
        "workload": "a",
        "num_particles": NUM_PARTICLES,
        "rounds": rounds,
        "device": device,
        "unavailable": unavailable,
        "contestants": {
            name: {
                "rate": asdict(spread_of(values)),
                "ratio": asdict(
                    spread_of([o / v for v, o in zip(values, rates[AGAINST], strict=True)])
                ),
                "mean_log_evidence": found[name],
                "rounds": values,
            }
            for name, values in rates.items()
        },
    }


def _check(found: dict[str, float | None]) -> None:
    """Estimates of the same quantity have to agree before speed means anything."""
    mine = found[AGAINST]
    assert mine is not None
    for name, value in found.items():
        # Untrained weights: weights of 5,000 particles vary little. pythae judges three data only.
        if value is not None and name != "pythae_get_nll" and abs(value - mine) > 0.01 * abs(mine):
            raise SystemExit(f"{name} estimates {value:.3f} nats, {AGAINST} {mine:.3f}.")


def _process(name: str, device: str, folder: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "experiments.benchmarks.evidence", name, "--device", device]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / name)}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )


def _ask(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a contestant ended without an answer; see what it said above.")
    return json.loads(line)


def main() -> None:
    """Serve one contestant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to standard error
    for _ in sys.stdin:
        try:
            count, seconds, mean = NAMES[args.name](args.device)
            answer = {"particle_data": count, "seconds": seconds, "mean": mean}
        except ImportError as error:
            answer = {"unavailable": f"{error.name} is not installed: pip install -e '.[peers]'"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
