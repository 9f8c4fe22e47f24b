"""How fast this machine could be at best: its own matrix products, and its own memory.

A step has three products for every affine map (forward, and the gradients of input and weight), and
an Adam update that reads parameter, gradient and two moments and writes three of them.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.torch_parts import wait_for
from experiments.benchmarks.workloads import Workload

__all__ = ["floor"]

_ADAM_TENSORS = 7


def floor(workload: Workload, *, device: str = "cpu", repeats: int = 60) -> dict[str, Any]:
    """Milliseconds that a step takes at least.

    Args:
        workload: Its networks.
        device: "cpu" or "cuda".
        repeats: Measurements of each product, of which the median counts.

    Returns:
        ``products_torch_ms`` by the products that torch runs by itself, ``products_ms`` by the
        faster of those and oneDNN's for each shape, ``adam_ms`` for the bytes of the update at the
        rate of copying as many, and ``floor_ms``, the sum of the last two.
    """
    layers = [*workload.layers("encoder"), *workload.layers("decoder")]
    by_torch = fastest = 0.0
    for i, (narrow, wide) in enumerate(layers):
        x = torch.randn(workload.batch_size, narrow, device=device)
        weight = torch.randn(wide, narrow, device=device)
        gradient = torch.randn(workload.batch_size, wide, device=device)
        # The first layer's input needs no gradient.
        shapes = [(x, weight), (gradient.t(), x.t()), *([(gradient, weight.t())] if i else [])]
        for left, right in shapes:
            plain = _seconds(lambda a=left, b=right: torch.mm(a, b.t()), device, repeats)
            by_torch += plain
            if device == "cpu" and torch.backends.mkldnn.is_available():
                plain = min(plain, _seconds(lambda a=left, b=right: _onednn(a, b), device, repeats))
            fastest += plain
    parameters = sum(narrow * wide + wide for narrow, wide in layers)
    source = torch.randn(_ADAM_TENSORS * parameters // 2, device=device)
    target = torch.empty_like(source)
    adam = _seconds(lambda: target.copy_(source), device, repeats)
    return {
        "parameters": parameters,
        "products_torch_ms": 1e3 * by_torch,
        "products_ms": 1e3 * fastest,
        "adam_ms": 1e3 * adam,
        "floor_ms": 1e3 * (fastest + adam),
    }


def _onednn(left: Tensor, right: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


def _seconds(call: Callable[[], Any], device: str, repeats: int) -> float:
    for _ in range(5):
        call()
    seconds = []
    for _ in range(repeats):
        wait_for(torch.device(device))
        start = perf_counter()
        call()
        wait_for(torch.device(device))
        seconds.append(perf_counter() - start)
    return median(seconds)
