"""The time of one training step, of contestants that take turns on the same machine.

Each contestant is a process of its own that is blocked while the others run. A round times a block
of steps of each, in an order that is rotated from round to round, so that whatever else happens to
the machine happens to all; ratios are taken within rounds.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

from experiments.benchmarks.agreement import TOLERANCES, check
from experiments.benchmarks.contestant import NAMES, REFERENCE
from experiments.benchmarks.workloads import WORKLOADS

__all__ = ["Spread", "StepTiming", "Worker", "measure_steps", "spread_of", "workers"]

BLOCK_SECONDS = 0.25
LOSSES = 200
FIRST_STEPS = 3


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds."""

    median: float
    lower: float
    upper: float


@dataclass(frozen=True)
class StepTiming:
    """How long a contestant's step takes.

    Attributes:
        description: What runs.
        make_seconds: What it took to import its libraries and set it up.
        first_steps_seconds: Its first three steps together, in which it compiles; caches on disk
            are empty.
        compile_seconds: The same without what three steps take afterwards.
        seconds: One step.
        ratio: How many times as long as the chosen contestant's, within rounds.
        block: Number of steps in a block.
        rounds: Seconds of one step in each round.
    """

    description: str
    make_seconds: float
    first_steps_seconds: float
    compile_seconds: float
    seconds: Spread
    ratio: Spread | None
    block: int
    rounds: list[float]


class Worker:
    """A contestant's process.

    Args:
        name: The contestant.
        workload: Name of the workload.
        objective: "trace" or "meanfield".
        device: "cpu" or "cuda".
        threads: Cores to be used; None for all.
        folder: An empty folder for its caches and what it says on standard error.
    """

    def __init__(
        self,
        name: str,
        workload: str,
        objective: str,
        *,
        device: str,
        threads: int | None,
        folder: Path,
    ) -> None:
        self.name = name
        self._log = folder / "stderr"
        command = [sys.executable, "-m", "experiments.benchmarks.worker", name, workload, objective]
        command += ["--device", device]
        if threads is not None:
            command += ["--threads", str(threads)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=Path(__file__).parents[2],
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")},
            )
        self.greeting = self._read()

    def ask(self, do: str, count: int) -> dict[str, Any]:
        """Have something done, and wait for the answer; see ``worker``.

        Args:
            do: "losses", "steps" or "time".
            count: How many.

        Raises:
            RuntimeError: The contestant failed.
        """
        self._write({"do": do, "count": count})
        return self._read()

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def quit(self) -> None:
        """Let the process end by itself."""
        self._write({"do": "quit"})
        self._process.wait()

    def _write(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeError(self._failure("it ended by itself")) from error

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._failure("it ended without an answer"))
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(self._failure(answer["error"]))
        return answer

    def _failure(self, what: str) -> str:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = None
        said = self._log.read_text()[-2000:]
        return f"contestant {self.name}: {what} (exit status {code})\n{said}"


@contextmanager
def workers(
    workload: str,
    objective: str,
    names: Iterable[str],
    *,
    device: str = "cpu",
    threads: int | None = None,
) -> Iterator[tuple[dict[str, Worker], dict[str, str]]]:
    """Start contestants one after the other, and end them all.

    Args:
        workload: Name of the workload.
        objective: "trace" or "meanfield".
        names: The contestants.
        device: "cpu" or "cuda".
        threads: Cores to be used by each; None for all.

    Yields:
        Those that run, and why others do not.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        running: dict[str, Worker] = {}
        unavailable: dict[str, str] = {}
        for name in names:
            (folder / name).mkdir()
            worker = Worker(
                name, workload, objective, device=device, threads=threads, folder=folder / name
            )
            stack.callback(worker.close)
            if "unavailable" in worker.greeting:
                unavailable[name] = worker.greeting["unavailable"]
            else:
                running[name] = worker
        yield running, unavailable
        for worker in running.values():
            worker.quit()


def measure_steps(
    workload: str,
    objective: str,
    *,
    rounds: int = 40,
    names: Sequence[str] = NAMES,
    device: str = "cpu",
    threads: int | None = None,
    against: str = "pyro_vae_compiled",
) -> dict[str, Any]:
    """Time the training steps of contestants that were found to agree.

    Args:
        workload: Name of the workload.
        objective: "trace" or "meanfield".
        rounds: Number of blocks of each contestant.
        names: The contestants; the reference of the agreement runs along untimed.
        device: "cpu" or "cuda".
        threads: Cores to be used by each; None for all.
        against: The contestant that ratios are taken to.

    Returns:
        What JSON can hold: the protocol, ``contestants`` (a ``StepTiming`` by name),
        ``unavailable`` (a reason by name) and ``agreement`` of the losses
        before and after some training.

    Raises:
        SystemExit: A contestant computes another loss than the reference.
        RuntimeError: A contestant failed.
    """
    everybody = list(dict.fromkeys([*names, REFERENCE]))
    with workers(workload, objective, everybody, device=device, threads=threads) as (
        running,
        unavailable,
    ):
        agreement, first_steps = _trained(running)
        timed = [name for name in names if name in running]
        blocks = {name: _block_of(running[name]) for name in timed}
        seconds = _take_turns([running[name] for name in timed], blocks, rounds)
    timings: dict[str, Any] = {}
    for name in timed:
        spread = spread_of(seconds[name])
        timing = StepTiming(
            description=running[name].greeting["ready"],
            make_seconds=running[name].greeting["make_seconds"],
            first_steps_seconds=first_steps[name],
            compile_seconds=max(0.0, first_steps[name] - FIRST_STEPS * spread.median),
            seconds=spread,
            ratio=_ratio(seconds[name], seconds[against]) if against in timed else None,
            block=blocks[name],
            rounds=seconds[name],
        )
        timings[name] = asdict(timing)
    return {
        "workload": workload,
        "networks": WORKLOADS[workload].describe(),
        "objective": objective,
        "device": device,
        "threads": threads,
        "rounds": rounds,
        "block_seconds": BLOCK_SECONDS,
        "against": against,
        "contestants": timings,
        "unavailable": unavailable,
        "agreement": agreement,
    }


def spread_of(values: Sequence[float]) -> Spread:
    """Median and quartiles.

    Args:
        values: At least one number.
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    lower, median, upper = quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


def _trained(running: dict[str, Worker]) -> tuple[dict[str, Any], dict[str, float]]:
    """Check the losses before and after training; time the first steps on the way."""
    agreement = {0: check(_losses(running))}
    first = {
        name: FIRST_STEPS * worker.ask("time", FIRST_STEPS)["seconds"]
        for name, worker in running.items()
    }
    taken = FIRST_STEPS
    for steps in sorted(TOLERANCES):
        for worker in running.values():
            worker.ask("steps", steps - taken)
        taken = steps
        agreement[steps] = check(_losses(running), steps=steps)
    return {f"after {steps} steps": report for steps, report in agreement.items()}, first


def _losses(running: dict[str, Worker]) -> dict[str, list[float]]:
    return {name: worker.ask("losses", LOSSES)["losses"] for name, worker in running.items()}


def _block_of(worker: Worker) -> int:
    """How many steps fill a block; the shortest of three trials, as others may disturb one."""
    seconds = min(worker.ask("time", 10)["seconds"] for _ in range(3))
    return max(1, round(BLOCK_SECONDS / seconds))


def _take_turns(turns: list[Worker], blocks: dict[str, int], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {worker.name: [] for worker in turns}
    for number in range(rounds):
        start = number % len(turns)
        for worker in turns[start:] + turns[:start]:
            # The one before has left its data in the caches, and its threads spin for a moment.
            worker.ask("steps", max(1, blocks[worker.name] // 10))
            seconds[worker.name].append(worker.ask("time", blocks[worker.name])["seconds"])
    return seconds


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> Spread:
    return spread_of([one / other for one, other in zip(seconds, others, strict=True)])
