"""One contestant in a process of its own, which answers JSON lines.

    python -m experiments.benchmarks.worker NAME WORKLOAD OBJECTIVE [--threads N] [--device cpu]

The first line that it says is ``{"ready": ..., "make_seconds": ...}``, or ``{"unavailable": ...}``,
after which it ends. Then it answers each line on its standard input:

======================================  ============================================
``{"do": "losses", "count": n}``        ``{"losses": [...]}``, n estimates, no update
``{"do": "steps", "count": n}``         ``{"done": n}`` after n steps
``{"do": "time", "count": n}``          ``{"seconds": s}`` per step, in a block of n
``{"do": "quit"}``                      nothing; it ends
======================================  ============================================

Between requests it is blocked on its input, so that another contestant has the machine to itself.
"""

import argparse
import json
import os
import sys
import traceback
import zlib
from time import perf_counter
from typing import IO, Any

__all__ = ["main"]

WEIGHTS_SEED, BATCH_SEED = 0, 1


def main() -> None:
    """Make the contestant that the command line names, and serve."""
    parser = argparse.ArgumentParser(description="One contestant; it answers JSON lines.")
    parser.add_argument("name")
    parser.add_argument("workload")
    parser.add_argument("objective")
    parser.add_argument("--threads", type=int, help="cores to be used; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    answers = _own_stdout()
    _limit(args.threads, args.device)
    try:
        start = perf_counter()
        contestant = _made(args.name, args.workload, args.objective, args.device)
        ready = {"ready": contestant.describe(), "make_seconds": perf_counter() - start}
    except (ImportError, NotImplementedError) as error:
        _say(answers, {"unavailable": _why(error)})
        return
    try:
        _say(answers, ready)
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "quit":
                return
            _say(answers, _answer(contestant, request["do"], request["count"]))
    except Exception:
        _say(answers, {"error": traceback.format_exc()})
        raise


def _own_stdout() -> IO[str]:
    """Keep the standard output for answers: whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _limit(threads: int | None, device: str) -> None:
    """Settings that libraries read when they are imported."""
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if sys.platform == "linux":  # XLA has no other switch for the size of its pool
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _made(name: str, workload: str, objective: str, device: str) -> Any:
    # Late: NumPy and torch read the settings above.
    from experiments.benchmarks.contestant import load, objective_named
    from experiments.benchmarks.workloads import WORKLOADS, batch, weights

    make = load(name)
    shape = WORKLOADS[workload]
    return make(
        shape,
        objective_named(objective),
        weights(shape, WEIGHTS_SEED),
        batch(shape, BATCH_SEED),
        device=device,
        # Seeds of their own make the contestants' estimates independent.
        seed=zlib.crc32(name.encode()) % 2**31,
    )


def _why(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: pip install -e '.[peers]'"
    return str(error)


def _answer(contestant: Any, do: str, count: int) -> dict[str, Any]:
    if do == "losses":
        return {"losses": [contestant.loss() for _ in range(count)]}
    if do not in ("steps", "time"):
        raise ValueError(f'do: expected "losses", "steps", "time" or "quit", got {do!r}.')
    start = perf_counter()
    for _ in range(count):
        contestant.step()
    seconds = perf_counter() - start
    return {"seconds": seconds / count} if do == "time" else {"done": count}


def _say(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
