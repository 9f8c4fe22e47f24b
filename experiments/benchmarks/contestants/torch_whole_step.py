"""Hand-written torch: loss, gradient and Adam in one compiled graph, as fast as torch has it.

What was found to help on a CPU: torch's own random numbers in place of the compiler's
(``fallback_random``), and no checks of the graph's assumptions once it is compiled. On a GPU the
kernels are replayed as one recording (``mode="reduce-overhead"``).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value

from experiments.benchmarks.contestant import Contestant, Objective
from experiments.benchmarks.torch_parts import HandWritten, wait_for
from experiments.benchmarks.workloads import LEARNING_RATE, Workload

__all__ = ["make"]

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


class _WholeStep:
    """Parameters and Adam's state in dicts, changed in place by one function."""

    def __init__(self, pair: HandWritten, x: Tensor) -> None:
        self.pair = pair
        self.x = x
        self.params = {name: p.detach() for name, p in pair.named_parameters()}
        self.means = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.squares = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.count = torch.zeros((), dtype=torch.float64, device=x.device)
        self.guarded = True
        options: dict[str, Any] = {"fallback_random": True}
        if x.device.type == "cuda":
            options |= torch._inductor.list_mode_options("reduce-overhead")
            state = [self.params, self.means, self.squares, {"": self.count, "x": x}]
            for tensor in (t for part in state for t in part.values()):
                torch._dynamo.mark_static_address(tensor)
        self.compiled = torch.compile(self._step, fullgraph=True, dynamic=False, options=options)

    def step(self) -> None:
        with torch.no_grad():
            self.compiled(self.params, self.means, self.squares, self.count, self.x)
        if self.guarded:
            torch.compiler.set_stance(skip_guard_eval_unsafe=True)
            self.guarded = False
        wait_for(self.x.device)

    def loss(self) -> float:
        with torch.no_grad():
            return self._loss(self.params, self.x).item()

    def describe(self) -> str:
        return (
            "hand-written, one graph of loss, gradient and Adam by torch.compile, "
            f"torch {torch.__version__}"
        )

    def _loss(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(self.pair, params, (x,))

    def _step(
        self,
        params: dict[str, Tensor],
        means: dict[str, Tensor],
        squares: dict[str, Tensor],
        count: Tensor,
        x: Tensor,
    ) -> Tensor:
        gradients, loss = grad_and_value(self._loss)(params, x)
        count.add_(1)
        rate = LEARNING_RATE / (1 - _BETA1**count)
        correction = (1 - _BETA2**count).sqrt()
        for name, gradient in gradients.items():
            mean, square = means[name], squares[name]
            mean.lerp_(gradient, 1 - _BETA1)
            square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
            params[name].sub_(rate * (mean / (square.sqrt() / correction + _EPS)))
        return loss


def make(
    workload: Workload,
    objective: Objective,
    weights: dict[str, np.ndarray],
    batch: np.ndarray,
    *,
    device: str = "cpu",
    seed: int = 0,
) -> Contestant:
    """Make the contestant; see ``contestant.Make``."""
    torch.manual_seed(seed)
    pair = HandWritten(workload, objective, weights).to(device)
    return _WholeStep(pair, torch.from_numpy(batch).to(device))
