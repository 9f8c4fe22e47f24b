"""Hand-written torch: uncompiled, with the fused Adam."""

from functools import partial

from experiments.benchmarks.contestants import torch_eager

__all__ = ["make"]

make = partial(torch_eager.make, fused=True)
