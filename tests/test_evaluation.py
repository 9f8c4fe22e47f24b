"""Weighting where it can be trusted, annealing a sample of the rest: the mean is right."""

from functools import partial
from typing import Any

import pytest
import torch
from helpers import LinearGaussian
from test_trust import mean_field
from torch import Tensor

import pyro_vae as pv

CHEAP: dict[str, Any] = {"num_chains": 16, "temperatures": 60, "leapfrog_steps": 2}


def hard_pair(size: int) -> tuple[LinearGaussian, Any, Tensor]:
    torch.manual_seed(0)
    pair = LinearGaussian.random(dim=20, latent_dim=10)
    return pair, mean_field(pair), pair.sample(size)


def test_what_weighting_can_do_is_left_to_it():
    pair = LinearGaussian.random()
    x = pair.sample(30)
    found = pv.evaluate(pair.model, partial(pair.guide, inflation=1.2), x, num_particles=500)
    assert found.annealed is None
    assert found.wanted == 0
    assert found.mean == found.weighted.mean
    assert found.mean_standard_error == pytest.approx(found.weighted.mean_standard_error)
    assert "can be trusted" in str(found)


def test_a_sample_corrects_the_mean_within_its_error():
    pair, guide, x = hard_pair(200)
    found = pv.evaluate(pair.model, guide, x, num_particles=100, budget=20.0, **CHEAP)
    truth = pair.log_evidence(x).mean().item()
    assert found.weighted.mean < truth - 5 * found.weighted.mean_standard_error
