"""Measure everything on this machine, and write docs/performance.md with its picture.

    python -m experiments.benchmarks --device cpu

Takes about half an hour on two cores. Contestants run in processes of their own and take turns;
nothing else may run on the machine. Peers that are not installed (`pip install -e '.[peers]'`) are
left out, and the page says so. What was measured is kept after every part, so that a run that was
stopped goes on with `--resume`.
"""

import argparse
import json
import platform
import tempfile
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks import probes, report
from experiments.benchmarks.evidence import measure_evidence
from experiments.benchmarks.floor import floor
from experiments.benchmarks.steps import measure_steps
from experiments.benchmarks.workloads import WORKLOADS

PROTOCOL = (
    "Contestants in processes of their own, in turns, each a block of a quarter of a second a "
    "round; medians and quartiles over {rounds} rounds, ratios within rounds; float32; before "
    "timing, their losses were found to agree."
)
PACKAGES = ("pyro-vae", "torch", "pyro-ppl", "numpyro", "jax", "pythae")


def main() -> None:
    """Measure, keep, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, help="JSON file; by default in docs/performance")
    parser.add_argument("--resume", action="store_true", help="keep the parts that are there")
    parser.add_argument("--smoke", action="store_true", help="a minute: one workload, two rounds")
    args = parser.parse_args()
    if args.smoke:
        args.rounds = 2
    out: Path = args.out or report.DOCS / "performance" / f"{_machine_name(args.device)}.json"
    figures: dict[str, Any] = json.loads(out.read_text()) if args.resume and out.exists() else {}
    figures.update(_frame(args.device, args.rounds))
    parts = _parts(args.device, args.rounds, smoke=args.smoke)
    for i, (key, name, measure) in enumerate(parts):
        done = figures.setdefault(key, [] if key == "steps" else {})
        if key == "steps":
            if any((t["workload"], t["objective"]) == name for t in done):
                continue
        elif name in done or (key == "evidence" and done):
            continue
        print(f"{i + 1}/{len(parts)} {key} {name}", flush=True)
        result = measure()
        if key == "steps":
            done.append(result)
        elif key == "evidence":
            figures[key] = result
        else:
            done[name] = result
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=1) + "\n")
    if args.out is None and not args.smoke:
        report.write()
        print(report.DOCS / "performance.md")


def _parts(device: str, rounds: int, *, smoke: bool) -> list[tuple[str, Any, Any]]:
    workloads = ["c"] if smoke else list(WORKLOADS)
    parts: list[tuple[str, Any, Any]] = []

    def timing(w: str, o: str) -> tuple[str, Any, Any]:
        return "steps", (w, o), lambda: measure_steps(w, o, rounds=rounds, device=device)

    steps = {(w, o): timing(w, o) for o in ("trace", "meanfield") for w in workloads}
    for w in workloads:
        parts.append(("floor", w, lambda w=w: floor(WORKLOADS[w], device=device)))
        parts.append(steps.pop((w, "trace")))
    if smoke:
        return parts
    parts.append(("evidence", "", lambda: measure_evidence(rounds=5, device=device)))
    parts.append(("probes", "memory_500", lambda: probes.middle("memory_500", device)))
    for name in probes.PROBES:
        if not name.startswith(("compiling", "changes")) and name != "memory_500":
            parts.append(("probes", name, lambda name=name: probes.run(name, device)))
    cache = tempfile.TemporaryDirectory()
    for name in (f"compiling_{w}" for w in WORKLOADS):
        for state in ("cold", "warm"):
            parts.append(
                (
                    "probes",
                    f"{name}_{state}",
                    lambda name=name: probes.run(name, device, cache=Path(cache.name) / name),
                )
            )
    for name in (f"changes_{w}" for w in WORKLOADS):
        parts.append(("probes", name, lambda name=name: probes.run(name, device)))
    return [*parts, *steps.values()]


def _machine_name(device: str) -> str:
    """A CPU is told from another by its instructions, which decide who multiplies matrices."""
    if device == "cuda":
        return "cuda"
    return f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}"


def _frame(device: str, rounds: int) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    return {
        "machine": {
            "processor": _processor(),
            "cores": torch.get_num_threads(),
            "device": name,
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
        "protocol": PROTOCOL.format(rounds=rounds),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
