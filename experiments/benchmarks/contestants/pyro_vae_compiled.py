"""This library's ``SVI`` on its own pair, compiled."""

from functools import partial

from experiments.benchmarks.contestants import pyro_vae_eager

__all__ = ["make"]

make = partial(pyro_vae_eager.make, compile=True)
