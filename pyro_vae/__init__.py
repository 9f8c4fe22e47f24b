"""Variational autoencoders as Pyro programs: say, fit, judge."""

from pyro_vae.evidence.estimate import Estimate
from pyro_vae.evidence.importance import log_evidence, log_weights
from pyro_vae.inference.handlers import kl_weight
from pyro_vae.inference.svi import SVI
from pyro_vae.program import distributions, families, networks, priors
from pyro_vae.program.conditional import Conditional
from pyro_vae.program.vae import Guide, Model, decode, encode, generate, reconstruct

__version__ = "0.1.0"

__all__ = [
    "SVI",
    "Conditional",
    "Estimate",
    "Guide",
    "Model",
    "decode",
    "distributions",
    "encode",
    "families",
    "generate",
    "kl_weight",
    "log_evidence",
    "log_weights",
    "networks",
    "priors",
    "reconstruct",
]
