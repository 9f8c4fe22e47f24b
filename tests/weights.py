"""Log-weights of any pair, and what those of an exact posterior are."""

import functools
from typing import Any

import pyro
import torch
from helpers import PAIRS, auxiliary_pair
from pyro import poutine
from torch import Tensor

import pyro_vae as pv
from pyro_vae.inference.handlers import observed_sites, unscaled_log_prob

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


class Spied:
    """A model of which the log-likelihoods of the last whole run are kept, (K, N)."""

    log_p: Tensor

    def __init__(self, model: Any) -> None:
        def spied(*args: Any) -> None:
            trace = poutine.trace(model).get_trace(*args)
            found = [unscaled_log_prob(site) for _, site in observed_sites(trace)]
            self.log_p = add_up(t.flatten(2).sum(-1) if t.dim() > 2 else t for t in found)

        self.model = spied


def add_up(terms: Any) -> Any:
    return functools.reduce(torch.add, terms)
