"""Weighting where it can be trusted, annealing a sample of the rest: the mean is right."""

import json
import math
from functools import partial
from typing import Any

import pytest
import torch
from helpers import LinearGaussian, bernoulli_latents, library_pair, masked_pair
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
    assert 2 <= len(found.rows) < found.wanted
    assert abs(found.mean - truth) < 4 * found.mean_standard_error
    assert found.mean_standard_error < 0.15
    assert f"{len(found.rows)} of them were annealed (all with budget=" in found.advice


@pytest.mark.slow
def test_its_error_is_the_scatter_over_samples():
    """Twenty evaluations, each with its own sample of the same data."""
    pair, guide, x = hard_pair(60)
    options: dict[str, Any] = {"num_particles": 100, "budget": 50.0, **CHEAP}
    truth = pair.log_evidence(x).mean().item()
    found = [pv.evaluate(pair.model, guide, x, seed=seed, **options) for seed in range(20)]
    assert all(2 <= len(one.rows) < one.wanted for one in found)
    z = torch.tensor([(one.mean - truth) / one.mean_standard_error for one in found])
    assert 0.6 < z.square().mean().sqrt() < 1.6


def test_with_budget_enough_every_untrusted_datum_is_annealed():
    pair, guide, x = hard_pair(20)
    found = pv.evaluate(pair.model, guide, x, num_particles=100, budget=1e6, **CHEAP)
    assert found.annealed is not None
    assert len(found.rows) == found.wanted
    torch.testing.assert_close(found.value[found.rows], found.annealed.value)
    assert found.mean == pytest.approx(found.value.mean().item())
    again = pv.evaluate(
        pair.model, guide, x, num_particles=100, budget=found.budget_for_all, **CHEAP
    )
    assert len(again.rows) == again.wanted


def test_a_budget_that_is_too_small_is_said():
    pair, guide, x = hard_pair(20)
    found = pv.evaluate(pair.model, guide, x, num_particles=100, budget=0.0, **CHEAP)
    assert found.annealed is None
    assert found.wanted > 0
    assert "the budget is too small to anneal any" in found.advice
    assert "too low by an unknown amount" in str(found)


def test_a_pair_that_can_not_be_annealed_says_so():
    model, guide, (x,) = bernoulli_latents()
    found = pv.evaluate(model, guide, x, num_particles=8, budget=0.0)
    assert math.isfinite(found.mean)
    assert found.wanted
    with pytest.raises(ValueError, match="'z' is discrete"):
        pv.evaluate(model, guide, x, num_particles=8, budget=1e9)


def test_every_argument_of_the_data_is_cut_alike():
    model, guide, args = masked_pair()
    found = pv.evaluate(
        model, guide, *args, num_particles=25, budget=1e6, data_plate="data", **CHEAP
    )
    assert found.value.shape == (7,)
    assert found.value.isfinite().all()


def test_figures_go_into_json():
    pair, guide, x = hard_pair(20)
    found = pv.evaluate(pair.model, guide, x, num_particles=50, budget=1e6, **CHEAP)
    figures = json.loads(json.dumps(found.to_dict()))
    assert figures["log_evidence"] == found.mean
    assert figures["annealed"] == len(found.rows) > 0
    assert figures["missing"] == found.missing


def test_a_negative_budget_is_refused():
    model, guide, (x,) = library_pair()
    with pytest.raises(ValueError, match=r"budget: expected a number that is not negative"):
        pv.evaluate(model, guide, x, budget=-1.0)


def test_noise_of_the_caller_is_left_alone():
    pair, guide, x = hard_pair(20)
    before = torch.get_rng_state()
    pv.evaluate(pair.model, guide, x, num_particles=30, budget=1e6, **CHEAP)
    assert torch.equal(torch.get_rng_state(), before)
