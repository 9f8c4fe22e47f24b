"""Distributions and transforms that torch and Pyro lack."""

from pyro_vae.program.distributions.counts import CountsOfTotal, ZeroInflatedNegativeBinomial
from pyro_vae.program.distributions.discrete import Bits, RelaxedOneHot
from pyro_vae.program.distributions.levels import Discretized, Levels
from pyro_vae.program.distributions.mixtures import NormalMixture
from pyro_vae.program.distributions.transforms import Reverse, ToSimplex

__all__ = [
    "Bits",
    "CountsOfTotal",
    "Discretized",
    "Levels",
    "NormalMixture",
    "RelaxedOneHot",
    "Reverse",
    "ToSimplex",
    "ZeroInflatedNegativeBinomial",
]
