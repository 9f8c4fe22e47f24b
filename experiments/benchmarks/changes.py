"""What each part of the compiled step gives: the step with that part left out, in turns.

One process, so that every variant has the same caches, threads and memory.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from experiments.benchmarks.contestants.pyro_vae_eager import pair
from experiments.benchmarks.steps import spread_of
from experiments.benchmarks.torch_parts import wait_for
from experiments.benchmarks.workloads import LEARNING_RATE, WORKLOADS, batch, weights
from pyro_vae.graph import lower

__all__ = ["VARIANTS", "changes"]

SECONDS = 0.15


class OutsideAdam(torch.optim.Adam):
    """An optimizer that the graph doesn't know, so that it takes its step outside."""


@contextmanager
def _own_noise() -> Iterator[None]:
    """The compiler's random numbers in place of torch's."""
    before = lower._OPTIONS["fallback_random"]
    lower._OPTIONS["fallback_random"] = False
    try:
        yield
    finally:
        lower._OPTIONS["fallback_random"] = before


def _without_onednn() -> Any:
    return torch.backends.mkldnn.flags(enabled=False)


Optimizer = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


def _adam(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=LEARNING_RATE)


def _outside(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    return OutsideAdam(params, lr=LEARNING_RATE, fused=True)


# From a name to (compiled, optimizer, contexts in which it is compiled).
VARIANTS: dict[str, tuple[bool, Optimizer, list[Callable[[], Any]]]] = {
    "as it is": (True, _adam, []),
    "products by torch alone": (True, _adam, [_without_onednn]),
    "fused Adam outside the graph": (True, _outside, []),
    "the compiler's own noise": (True, _adam, [_own_noise]),
    "not compiled": (False, _adam, []),
}


def changes(name: str, *, device: str = "cpu", rounds: int = 10) -> dict[str, Any]:
    """Seconds of a step of every variant.

    Args:
        name: The workload.
        device: "cpu" or "cuda".
        rounds: Blocks of each variant.

    Returns:
        By variant, the median and quartiles of a step in seconds and of the ratio to the step as
        it is.
    """
    workload = WORKLOADS[name]
    x = torch.from_numpy(batch(workload, 0)).to(device)
    steps: dict[str, Callable[[], Any]] = {}
    for variant, (compiled, optimizer, contexts) in VARIANTS.items():
        model, guide = pair(workload, weights(workload, 0))
        svi = pv.SVI(model.to(device), guide.to(device), optimizer, Trace_ELBO(), compile=compiled)
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            for _ in range(3):
                svi.step(x)
        steps[variant] = lambda svi=svi: svi.step(x)
    counts = {v: max(1, round(SECONDS / _time(step, 10, x.device))) for v, step in steps.items()}
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    order = list(steps)
    for turn in range(rounds):
        for i in range(len(order)):
            variant = order[(turn + i) % len(order)]
            seconds[variant].append(_time(steps[variant], counts[variant], x.device))
    first = seconds["as it is"]
    return {
        variant: {
            "seconds": asdict(spread_of(values)),
            "ratio": asdict(spread_of([a / b for a, b in zip(values, first, strict=True)])),
        }
        for variant, values in seconds.items()
    }


def _time(step: Callable[[], Any], count: int, device: torch.device) -> float:
    start = perf_counter()
    for _ in range(count):
        step()
    wait_for(device)
    return (perf_counter() - start) / count
