"""Log-weights of any pair, and what those of an exact posterior are."""

from typing import Any

import pyro
import torch
from helpers import PAIRS, auxiliary_pair
from torch import Tensor

import pyro_vae as pv

# The weights of a guide with a latent of its own do not average to p(x).
WEIGHABLE = tuple(make for make in PAIRS if make is not auxiliary_pair)


def weights_of(make: Any, num_particles: int = 120, **options: Any) -> Tensor:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args = make()
    return pv.log_weights(model, guide, *args, num_particles=num_particles, **options)


def assert_exact(log_w: Tensor, exact: Tensor, atol: float = 1e-10) -> None:
    """Every weight of every datum is its evidence."""
    torch.testing.assert_close(log_w, exact.expand(len(log_w), -1), rtol=0, atol=atol)
