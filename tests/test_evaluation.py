"""Weighting where it can be trusted, annealing a sample of the rest: the mean is right."""

import json
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import LinearGaussian, bernoulli_latents, library_pair, masked_pair
from test_trust import mean_field
from torch import Tensor

import pyro_vae as pv

CHEAP: dict[str, Any] = {"num_chains": 16, "temperatures": 60, "leapfrog_steps": 2}
TINY: dict[str, Any] = {"num_chains": 4, "temperatures": 6, "leapfrog_steps": 1}


def hard_pair(size: int) -> tuple[LinearGaussian, Any, Tensor]:
    torch.manual_seed(0)
    pair = LinearGaussian.random(dim=20, latent_dim=10)
    return pair, mean_field(pair), pair.sample(size)


def test_what_weighting_can_do_is_left_to_it():
    pair = LinearGaussian.random()
    x = pair.sample(30)
    found = pv.evaluate(pair.model, partial(pair.guide, inflation=1.2), x, num_particles=500)
    assert found.annealed is None
    assert found.num_untrusted == 0
    assert found.mean == found.weighted.mean
    assert found.mean_standard_error == pytest.approx(found.weighted.mean_standard_error)
    assert "can be trusted" in str(found)


def test_a_sample_corrects_the_mean_within_its_error():
    pair, guide, x = hard_pair(200)
    found = pv.evaluate(pair.model, guide, x, num_particles=100, budget=20.0, **CHEAP)
    truth = pair.log_evidence(x).mean().item()
    assert found.weighted.mean < truth - 5 * found.weighted.mean_standard_error
    assert 2 <= len(found.rows) < found.num_untrusted
    assert abs(found.mean - truth) < 4 * found.mean_standard_error
    assert found.mean_standard_error < 0.15
    assert f"{len(found.rows)} of them were annealed and stand for the others" in found.advice
    assert found.value.mean().item() == pytest.approx(found.mean)
    assert found.annealed is not None
    lacks = found.annealed.value - found.weighted.value[found.rows]
    assert found.mean == pytest.approx(
        found.weighted.mean + found.num_untrusted / 200 * lacks.mean().item()
    )


def test_the_error_of_what_is_missing_counts_noise_once():
    """The error of the mean is that of U / N of what is missing, and of the trusted data."""
    weighted = pv.Estimate(*torch.zeros(4, 50).double(), num_particles=10)  # an ess of zero
    rows = torch.arange(10)
    columns = torch.stack([torch.linspace(1, 3, 10), torch.full((10,), 0.4), *torch.ones(2, 10)])
    facts: dict[str, Any] = {"acceptance": columns[2], "divergent": 0 * columns[2]}
    annealed = pv.ChainEstimate(
        *columns.double(), num_particles=16, num_moves=9, gradients=1, **facts
    )
    found = pv.Evaluation.of(weighted, rows, annealed, budget_for_all=1.0)
    assert found.num_untrusted == 50
    assert found.to_dict()["missing_error"] == pytest.approx(found.mean_standard_error)


@pytest.mark.slow
def test_its_error_is_the_scatter_over_samples():
    """Twenty evaluations, each with its own sample of the same data."""
    pair, guide, x = hard_pair(60)
    options: dict[str, Any] = {"num_particles": 100, "budget": 50.0, **CHEAP}
    truth = pair.log_evidence(x).mean().item()
    found = [pv.evaluate(pair.model, guide, x, seed=seed, **options) for seed in range(20)]
    assert all(2 <= len(one.rows) < one.num_untrusted for one in found)
    z = torch.tensor([(one.mean - truth) / one.mean_standard_error for one in found])
    assert 0.6 < z.square().mean().sqrt() < 1.6


def test_with_budget_enough_every_untrusted_datum_is_annealed():
    pair, guide, x = hard_pair(20)
    found = pv.evaluate(pair.model, guide, x, num_particles=100, budget=1e6, **CHEAP)
    assert found.annealed is not None
    assert len(found.rows) == found.num_untrusted
    torch.testing.assert_close(found.value[found.rows], found.annealed.value)
    assert found.mean == pytest.approx(found.value.mean().item())
    again = pv.evaluate(
        pair.model, guide, x, num_particles=100, budget=found.budget_for_all, **CHEAP
    )
    assert len(again.rows) == again.num_untrusted


@pytest.mark.parametrize("rows", [150, 151])
def test_an_argument_as_long_as_the_sample_is_still_handed_over_whole(rows):
    """Half of the data, and so many rows of no data, whose sum is the model's mean."""

    def model(x: Tensor, parts: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(parts.sum(), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor, parts: Tensor) -> None:
        with pyro.plate("data", len(x)):
            far = torch.where(x > 1.5, 2.0, 0.0)
            posterior = dist.Normal(0.8 * x + 0.2 * parts.sum() + far, 0.2**0.5)
            pyro.sample("z", posterior)

    x = torch.linspace(-1, 1, 300).double()
    x[150:] += 1.5
    parts = torch.full((rows,), 1.0 / rows).double()
    options: dict[str, Any] = {"num_chains": 8, "temperatures": 200, "leapfrog_steps": 3}
    found = pv.evaluate(model, guide, x, parts, num_particles=100, budget=1e6, **options)
    exact = dist.Normal(1.0, 1.25**0.5).log_prob(x)
    assert found.num_untrusted == 150
    assert found.annealed is not None
    truth = exact[found.rows].mean().item()
    assert found.annealed.value.mean().item() == pytest.approx(truth, abs=0.1)
    assert len(found.rows) == 150 - (rows == 150)


def test_a_budget_that_is_too_small_is_said():
    pair, guide, x = hard_pair(20)
    found = pv.evaluate(pair.model, guide, x, num_particles=100, budget=0.0, **CHEAP)
    assert found.annealed is None
    assert found.num_untrusted > 0
    assert "the budget is too small to anneal a sample" in found.advice
    # What it names is enough for ten, and less is not.
    enough = float(found.advice.split("budget=")[1].split(" anneals 10")[0])
    options: dict[str, Any] = {"num_particles": 100, **CHEAP}
    assert len(pv.evaluate(pair.model, guide, x, budget=enough, **options).rows) == 10
    assert not len(pv.evaluate(pair.model, guide, x, budget=0.9 * enough, **options).rows)
    assert "too low by an unknown amount" in str(found)


def test_a_pair_that_can_not_be_annealed_says_so():
    model, guide, (x,) = bernoulli_latents()
    found = pv.evaluate(model, guide, x, num_particles=8, budget=1e9)
    assert found.num_untrusted
    assert found.annealed is None
    assert found.mean == found.weighted.mean
    assert found.kind == "importance weighting"
    assert "annealing can't be had" in found.advice
    assert "'z' is discrete" in str(found)


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
    assert figures["num_annealed"] == len(found.rows) > 0
    assert figures["missing"] == found.missing
    assert found.annealed is not None
    assert figures["gradients"] == found.annealed.gradients


def test_a_constant_moves_every_figure_alike():
    pair, guide, x = hard_pair(20)
    found = pv.evaluate(pair.model, guide, x, num_particles=50, budget=150.0, **CHEAP)
    assert found.annealed is not None
    assert 10 <= len(found.rows) < found.num_untrusted
    moved = found.plus(-7.0)
    assert moved.mean == pytest.approx(found.mean - 7)
    assert moved.weighted.mean == pytest.approx(found.weighted.mean - 7)
    assert moved.missing == pytest.approx(found.missing)
    assert moved.mean_standard_error == pytest.approx(found.mean_standard_error)


def test_two_models_are_compared_by_what_annealing_corrected():
    pair, guide, x = hard_pair(200)
    options: dict[str, Any] = {"num_particles": 100, "budget": 20.0, **CHEAP}
    corrected = pv.evaluate(pair.model, guide, x, **options)
    exact = pv.evaluate(pair.model, pair.guide, x, num_particles=100)
    assert exact.num_untrusted == 0
    found = pv.compare(exact, corrected)
    assert abs(found.mean) < 4 * found.estimator_error
    assert found.mean_standard_error > corrected.shared_error > 0
    weighing_only = pv.evaluate(pair.model, guide, x, num_particles=100, budget=0.0)
    with pytest.raises(ValueError, match=r"by weighting, and annealing where it fails, the other"):
        pv.compare(exact, weighing_only)


def test_what_makes_no_sense_is_refused_before_anything_is_weighed():
    model, guide, (x,) = library_pair()
    told = []
    for chains in (0, -1):
        with pytest.raises(ValueError, match=r"num_chains: expected at least 1, got"):
            pv.evaluate(
                model, guide, x, num_chains=chains, progress=lambda *said: told.append(said)
            )
    assert told == []


def test_advice_names_data_by_their_place_among_all():
    pair, guide, x = hard_pair(150)
    found = pv.evaluate(pair.model, guide, x, num_particles=50, budget=2.0, **TINY)
    assert found.annealed is not None
    bad = found.rows[~found.annealed.trusted].tolist()
    named = found.advice.partition("(namely ")[2].partition(")")[0]
    assert 0 < len(bad) <= 5
    assert sorted(int(row) for row in named.split(", ")) == sorted(bad)


def test_a_guide_out_of_reach_is_said_though_nothing_was_to_be_annealed():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0 * x, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.HalfNormal(1 + 0 * x))

    found = pv.evaluate(model, guide, torch.zeros(5), num_particles=50, budget=0.0)
    assert "What of the posterior lies outside is missing" in found.advice
    assert "budget" not in found.advice


def test_data_without_any_weight_are_named_and_spoil_no_others():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0 * x, 1.0))
            narrow = dist.Normal(z, 0.01).log_prob(x)
            pyro.factor("x", torch.where(x > 50, -torch.inf, narrow))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x, 1.0))

    x = torch.linspace(-1, 1, 30)
    x[7] = 99.0
    found = pv.evaluate(model, guide, x, num_particles=40, budget=1e6, **TINY)
    assert 7 not in found.rows.tolist()
    assert len(found.rows) >= 10
    assert found.gain.isfinite().all()
    assert "1 of 30 data, 7 first, have no weight above zero" in found.advice
    assert found.value[torch.arange(30) != 7].isfinite().all()


def test_the_budget_that_is_named_anneals_all():
    weighted = pv.Estimate(*torch.ones(4, 100).double(), num_particles=1000)
    none = torch.tensor([], dtype=torch.long)
    for budget, said in ((6.41, "6.5"), (0.0613, "0.062"), (1234.0, "1300"), (0.5, "0.5")):
        found = pv.Evaluation.of(weighted, none, None, budget_for_all=budget)
        assert f"budget={said} anneals all" in found.advice


def test_intervals_have_the_freedom_of_what_a_value_comes_from():
    pair, guide, x = hard_pair(30)
    found = pv.evaluate(pair.model, guide, x, num_particles=1000, budget=1e6, **TINY)
    assert found.annealed is not None
    lower, upper = found.interval()
    wide, _ = found.annealed.interval()
    torch.testing.assert_close(lower[found.rows], wide)
    assert ((upper - lower) / found.standard_error)[found.rows].min() > 2 * 3.18  # t, 3 degrees


def test_a_negative_budget_is_refused():
    model, guide, (x,) = library_pair()
    with pytest.raises(ValueError, match=r"budget: expected a number that is not negative"):
        pv.evaluate(model, guide, x, budget=-1.0)


def test_noise_of_the_caller_is_left_alone():
    pair, guide, x = hard_pair(20)
    before = torch.get_rng_state()
    pv.evaluate(pair.model, guide, x, num_particles=30, budget=1e6, **CHEAP)
    assert torch.equal(torch.get_rng_state(), before)
