"""What is measured of this library alone: memory, growth of time, compiling, and whole epochs.

    python -m experiments.benchmarks.probes NAME [--device cpu]

Each probe runs in a process of its own and prints one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyro_vae as pv
from experiments.benchmarks.changes import changes
from experiments.benchmarks.contestants.pyro_vae_eager import SVISteps, pair
from experiments.benchmarks.torch_parts import wait_for
from experiments.benchmarks.workloads import LEARNING_RATE, WORKLOADS, batch, weights
from pyro_vae.context import at_rest
from pyro_vae.evidence.blocks import MEMORY_BUDGET, PARTICLE_BLOCK
from pyro_vae.evidence.compiled import CompiledWeights
from pyro_vae.evidence.particles import Pair

__all__ = ["PROBES", "middle", "run"]

EPOCH_STEPS = 400
EPOCHS = 20


def memory(device: str, num_particles: int) -> dict[str, Any]:
    """How far ``log_evidence`` of 1,000 data raises the peak of resident memory.

    Args:
        device: "cpu" or "cuda".
        num_particles: Number of particles K.
    """
    model, guide, x = _evidence_pair(device, 1000)
    # What is loaded once, such as the compiler, is no growth.
    pv.log_evidence(model, guide, x[:100], num_particles=100, compile=True)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
    pv.log_evidence(model, guide, x, num_particles=num_particles, compile=True)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")
    return {"num_particles": num_particles, "before": before, "growth": peak - before}


def linear(device: str) -> dict[str, Any]:
    """Seconds of ``log_evidence`` for 1, 10 and 100 times the data, and the particles.

    Compiling is left out: time counts from the end of the first block of data and particles.
    """
    model, guide, x = _evidence_pair(device, 10_000)

    def seconds(size: int, num_particles: int) -> float:
        stamps: list[float] = []
        pv.log_evidence(
            model,
            guide,
            x[:size],
            num_particles=num_particles,
            compile=True,
            progress=lambda count: stamps.append(perf_counter()),
        )
        # All blocks are alike, so the first one is as long as the others are on average.
        return (stamps[-1] - stamps[0]) * len(stamps) / (len(stamps) - 1)

    least = {"data": (100, 500), "particles": (100, 500)}
    (n, k), (n2, k2) = least["data"], least["particles"]
    return {
        "data": [
            {"size": n * f, "num_particles": k, "seconds": seconds(n * f, k)} for f in (1, 10, 100)
        ],
        "particles": [
            {"size": n2, "num_particles": k2 * f, "seconds": seconds(n2, k2 * f)}
            for f in (1, 10, 100)
        ],
    }


def compiling(device: str, name: str) -> dict[str, Any]:
    """Seconds that the step which compiles takes beyond a step, with the cache as it is."""
    workload = WORKLOADS[name]
    x = torch.from_numpy(batch(workload, 0)).to(device)
    steps = SVISteps(*_pair_on(device, name), x, "trace", compile=True)
    steps.step()
    start = perf_counter()
    steps.step()
    first = perf_counter() - start
    start = perf_counter()
    for _ in range(20):
        steps.step()
    return {"workload": name, "seconds": first - (perf_counter() - start) / 20}


def epochs(device: str, name: str) -> dict[str, Any]:
    """A whole epoch of ``fit`` against its steps alone, in turns.

    The steps alone are compiled steps on minibatches that lie ready; everything else that ``fit``
    does (order, gathering, the KL weight, sums, checks for NaN, records) is what it is compared
    to.
    """
    workload = WORKLOADS[name]
    data = torch.from_numpy(batch(workload, 0)).to(device)
    x = data.repeat(EPOCH_STEPS, 1)
    model, guide = _pair_on(device, name)
    other = _pair_on(device, name)
    alone = SVISteps(*other, data, "trace", compile=True)
    for _ in range(3):
        alone.step()
    minibatches = x.split(workload.batch_size)
    whole, steps = [], []
    started = perf_counter()

    def after_epoch(record: dict[str, Any]) -> None:
        nonlocal started
        wait_for(torch.device(device))
        whole.append(perf_counter() - started)
        begin = perf_counter()
        for minibatch in minibatches:
            alone.svi.step(minibatch)
        wait_for(torch.device(device))
        steps.append(perf_counter() - begin)
        started = perf_counter()

    pv.fit(
        model,
        guide,
        x,
        loss=Trace_ELBO(),
        optimizer=lambda params: torch.optim.Adam(params, lr=LEARNING_RATE),
        epochs=EPOCHS,
        batch_size=workload.batch_size,
        device=device,
        compile=True,
        callbacks=[after_epoch],
        progress=False,
    )
    ratios = [a / b for a, b in zip(whole[2:], steps[2:], strict=True)]
    return {
        "workload": name,
        "epoch_seconds": median(whole[2:]),
        "steps_seconds": median(steps[2:]),
        "ratio": median(ratios),
        "ratios": sorted(ratios),
    }


def evidence_parts(device: str) -> dict[str, Any]:
    """Milliseconds to weigh a block of ``log_evidence``, and what they consist of, in turns.

    Args:
        device: "cpu" or "cuda".
    """
    model, guide, x = _evidence_pair(device, 100)
    rows = 100 * PARTICLE_BLOCK[device]
    hidden = torch.randn(rows, 400, device=device)
    latent = torch.randn(rows, 50, device=device)
    last, first = (torch.randn(*shape, device=device) for shape in ((400, 784), (50, 400)))
    with at_rest(model, guide), pyro.validation_enabled(is_validate=False):
        pair = Pair(model, guide, (x,), None)
        chunk = max(1, MEMORY_BUDGET[device] // (4 * x.numel()))
        chunk = max(d for d in range(1, chunk + 1) if PARTICLE_BLOCK[device] % d == 0)
        weights = CompiledWeights(pair, PARTICLE_BLOCK[device], chunk)
        *values, _ = weights.draw([x])
        calls = {
            "block_ms": lambda: weights(pair),
            "draw_ms": lambda: weights.draw([x]),
            "score_ms": lambda: weights.score(values, [x]),
            "last_product_ms": lambda: torch.mm(hidden, last),
            "other_products_ms": lambda: torch.mm(latent, first),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(40):
            for name, call in calls.items():
                start = perf_counter()
                call()
                wait_for(x.device)
                seconds[name].append(perf_counter() - start)
    found = {name: 1e3 * median(values) for name, values in seconds.items()}
    return {"particle_data": rows, "chunk": chunk, **found}


def precision(device: str) -> dict[str, Any]:
    """What a lower precision of the decoder costs and gains, on weights that have been trained."""
    data = pv.load_data("digits").binarize()
    model, guide = _digits_pair()
    pv.fit(model, guide, data, epochs=100, batch_size=50, device=device, progress=False)
    x = data.test.to(device)
    exact = pv.log_evidence(model, guide, x, num_particles=5000)
    lower = pv.log_evidence(model, guide, x, num_particles=5000, autocast=torch.bfloat16)
    difference = lower.value - exact.value
    return {
        "data": "binarized digits, test set",
        "num_particles": 5000,
        "dtype": "bfloat16",
        "mean_difference": difference.mean().item(),
        "largest_difference": difference.abs().max().item(),
        "mean_standard_error": exact.mean_standard_error,
    }


PROBES: dict[str, Callable[[str], dict[str, Any]]] = {
    "memory_500": lambda device: memory(device, 500),
    "memory_50000": lambda device: memory(device, 50_000),
    "linear": linear,
    **{f"compiling_{name}": lambda device, n=name: compiling(device, n) for name in WORKLOADS},
    **{f"changes_{name}": lambda device, n=name: changes(n, device=device) for name in WORKLOADS},
    **{f"epochs_{name}": lambda device, n=name: epochs(device, n) for name in WORKLOADS},
    "evidence_parts": evidence_parts,
    "precision": precision,
}


def middle(name: str, device: str, times: int = 3) -> dict[str, Any]:
    """The run with the median growth of several: where the heap stands differs from run to run."""
    return sorted((run(name, device) for _ in range(times)), key=lambda r: r["growth"])[times // 2]


def run(name: str, device: str, *, cache: Path | None = None) -> dict[str, Any]:
    """Run a probe in a process of its own.

    Args:
        name: One of ``PROBES``.
        device: "cpu" or "cuda".
        cache: Folder of the compiler's cache; None for an empty one.
    """
    with tempfile.TemporaryDirectory() as empty:
        process = subprocess.run(
            [sys.executable, "-m", "experiments.benchmarks.probes", name, "--device", device],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache or empty)},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(process.stdout.splitlines()[-1])


def _pair_on(device: str, name: str) -> tuple[pv.Model, pv.Guide]:
    workload = WORKLOADS[name]
    model, guide = pair(workload, weights(workload, 0))
    return model.to(device), guide.to(device)


def _evidence_pair(device: str, size: int) -> tuple[pv.Model, pv.Guide, Tensor]:
    workload = WORKLOADS["a"]
    model, guide = _pair_on(device, "a")
    rows = torch.from_numpy(batch(workload, 0))
    x = rows.repeat(size // len(rows) + 1, 1)[:size]
    return model, guide, x.to(device)


def _digits_pair() -> tuple[pv.Model, pv.Guide]:
    encoder = pv.Conditional(pv.networks.mlp(64, (2, 10)), pv.families.normal)
    likelihood = pv.Conditional(pv.networks.mlp(10, (1, 64)), pv.families.bernoulli)
    return pv.Model(pv.priors.StandardNormal(10), likelihood), pv.Guide(encoder)


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def main() -> None:
    """Run one probe here, and print what it found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=PROBES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    print(json.dumps(PROBES[args.name](args.device)))


if __name__ == "__main__":
    main()
