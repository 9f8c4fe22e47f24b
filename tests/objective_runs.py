"""Estimates of objectives and their gradients under one seed."""

from typing import Any

import pyro
import torch
from helpers import leaves
from torch import Tensor

from pyro_vae.inference.losses import objective_of
from pyro_vae.inference.objectives import Terms


def estimate(loss: Any, pair: Any, seed: int = 1, **options: Any) -> Terms:
    model, guide, args = pair
    objective = objective_of(loss)
    pyro.set_rng_seed(0)
    objective.prepare(model, guide, args, options)
    pyro.set_rng_seed(seed)
    return objective.terms(model, guide, args, options)


def gradients(loss: Any, pair: Any, seed: int = 1) -> dict[str, Tensor]:
    terms = estimate(loss, pair, seed)
    named = leaves(*pair[:2])
    found = torch.autograd.grad(terms.loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}
