"""Hand-written torch: the loss and its gradient compiled, then the fused Adam."""

from functools import partial

from experiments.benchmarks.contestants import torch_eager

__all__ = ["make"]

make = partial(torch_eager.make, fused=True, compile=True)
