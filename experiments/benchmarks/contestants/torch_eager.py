"""Hand-written torch: a module that computes the loss, autograd, and Adam."""

import numpy as np
import torch

from experiments.benchmarks.contestant import Contestant, Objective
from experiments.benchmarks.torch_parts import HandWritten, TorchSteps
from experiments.benchmarks.workloads import LEARNING_RATE, Workload

__all__ = ["make"]


def make(
    workload: Workload,
    objective: Objective,
    weights: dict[str, np.ndarray],
    batch: np.ndarray,
    *,
    device: str = "cpu",
    seed: int = 0,
    fused: bool | None = None,
    compile: bool = False,
) -> Contestant:
    """Make the contestant; see ``contestant.Make``.

    Args:
        workload: As there.
        objective: As there.
        weights: As there.
        batch: As there.
        device: As there.
        seed: As there.
        fused: Whether Adam is the fused one; None for what torch picks by itself.
        compile: Whether the loss and its gradient are compiled.
    """
    torch.manual_seed(seed)
    pair = HandWritten(workload, objective, weights).to(device)
    optimizer = torch.optim.Adam(pair.parameters(), lr=LEARNING_RATE, fused=fused)
    x = torch.from_numpy(batch).to(device)
    how = "torch.compile of the loss" if compile else "eager"
    return TorchSteps(
        pair,
        optimizer,
        x,
        f"hand-written, {how}, {'fused Adam' if fused else 'Adam'}",
        step_loss=torch.compile(pair, fullgraph=True, dynamic=False) if compile else None,
    )
