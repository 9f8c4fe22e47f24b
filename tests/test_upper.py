"""The chi upper bound: its closed form, its two sides, and where it says that it is none."""

import itertools
import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import LinearGaussian, bernoulli_pair, bits, masked_pair
from torch import Tensor
from weights import WEIGHABLE, weights_of

import pyro_vae as pv


def exact_bound(pair: LinearGaussian, x: Tensor, inflation: float, order: float) -> Tensor:
    """log p(x) plus (1/n) log E_q[(p(z|x) / q(z))^n], for q with an inflated covariance."""
    dims, n, a = pair.weight.shape[1], order, inflation
    slack = (n - 1) / 2 * math.log(a) - math.log(n - (n - 1) / a) / 2
    return pair.log_evidence(x) + dims / n * slack


@pytest.mark.parametrize("inflation", [1.3, 2.0, 0.9])
@pytest.mark.parametrize("order", [1.5, 2.0, 3.0])
def test_the_bound_is_the_one_of_theory(inflation, order):
    pair = LinearGaussian.random(dim=4, latent_dim=2)
    x = pair.sample(40)
    guide = partial(pair.guide, inflation=inflation)
    bound = pv.upper_bound(pair.model, guide, x, num_particles=4_000, order=order)
    exact = exact_bound(pair, x, inflation, order)
    z = (bound.value - exact) / bound.standard_error
    assert z.abs().max() < 5
    assert abs(z.mean()) < 4 / 40**0.5 + 0.2
    assert 0.6 < z.std() < 1.5
    assert (exact > pair.log_evidence(x)).all()


def test_the_truth_lies_between_it_and_log_evidence():
    pair = LinearGaussian.random(dim=4, latent_dim=2)
    x = pair.sample(50)
    options: Any = {"num_particles": 2_000, "seed": 3}
    guide = partial(pair.guide, inflation=2.0)
    bound = pv.upper_bound(pair.model, guide, x, **options)
    estimate = pv.log_evidence(pair.model, guide, x, **options)
    truth = pair.log_evidence(x)
    assert bound.trusted.all()
    assert "settled for all 50 data" in bound.advice
    assert (bound.value - 4 * bound.standard_error > truth).all()
    assert (estimate.value - 4 * estimate.standard_error < truth).all()
    assert torch.equal(bound.lower, estimate.value)  # the same particles
    assert torch.equal(bound.elbo, estimate.elbo)
    assert bound.data == estimate.data
    with pytest.raises(ValueError, match="by chi bound, the other by importance weighting"):
        pv.compare(bound, estimate)


def test_the_exact_posterior_leaves_no_slack():
    pair = LinearGaussian.random()
    x = pair.sample(7)
    bound = pv.upper_bound(pair.model, pair.guide, x, num_particles=60)
    torch.testing.assert_close(bound.value, pair.log_evidence(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(bound.ess, torch.full((7,), 60.0).double(), rtol=1e-9, atol=0)
    assert bound.standard_error.max() < 1e-7
    assert bound.trusted.all()


@pytest.mark.parametrize("inflation", [0.2, 0.4])
def test_a_guide_without_a_second_moment_is_told_of(inflation):
    """Of posterior N(0, I) and guide N(0, a I), E[w^2] is infinite for a <= 1/2."""
    pair = LinearGaussian.random(dim=4, latent_dim=3)
    x = pair.sample(100)
    guide = partial(pair.guide, inflation=inflation)
    bound = pv.upper_bound(pair.model, guide, x, num_particles=2_000)
    assert bound.trusted.double().mean() < 0.05
    assert f"No upper bound for {int((~bound.trusted).sum())} of 100 data" in bound.advice
    assert bound.advice in str(bound)


def test_the_prior_as_guide_is_told_of_where_data_say_much():
    pair = LinearGaussian.random(dim=40, latent_dim=5, scale=0.1)
    x = pair.sample(20)
    bound = pv.upper_bound(pair.model, pv.from_prior(pair.model), x, num_particles=1_000)
    assert not bound.trusted.any()
    assert (bound.value < pair.log_evidence(x)).all()  # what the words warn of


def test_what_the_guide_never_visits_is_missing_and_nothing_tells():
    """The posterior of z given z^2 has two modes; the guide knows of one, and log 2 is lost."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.square(), 0.1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.sqrt(), 0.06 / x.sqrt()))

    x = torch.linspace(3, 5, 9, dtype=torch.float64)
    bound = pv.upper_bound(model, guide, x, num_particles=2_000)
    z = torch.linspace(-6, 6, 200_001, dtype=torch.float64).unsqueeze(-1)
    joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z.square(), 0.1).log_prob(x)
    truth = joint.logsumexp(0) + math.log(12 / 200_000)
    assert bound.trusted.all()
    assert ((truth - bound.lower) - math.log(2)).abs().max() < 0.05
    assert (bound.value < truth - 0.5).all()


@pytest.mark.parametrize("make", WEIGHABLE)
@pytest.mark.parametrize("order", [1.25, 2.0])
def test_it_is_what_its_own_weights_say(make, order):
    options: Any = {"data_plate": "data"} if make is masked_pair else {}
    log_w = weights_of(make, 120, **options)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args = make()
    bound = pv.upper_bound(model, guide, *args, num_particles=120, order=order, **options)
    powers = log_w * order
    value = powers.logsumexp(0) - math.log(120)
    torch.testing.assert_close(bound.value, value / order, rtol=1e-12, atol=1e-12)
    relative = (powers - value).exp()
    error = relative.std(0) / 120**0.5 / order
    torch.testing.assert_close(bound.standard_error, error, rtol=1e-8, atol=1e-12)
    ess = relative.sum(0).square() / relative.square().sum(0)
    torch.testing.assert_close(bound.ess, ess, rtol=1e-10, atol=0)
    torch.testing.assert_close(bound.elbo, log_w.mean(0), rtol=1e-12, atol=0)
    assert (bound.value >= bound.lower).all()
    assert bound.order == order


def test_a_higher_order_is_never_lower_and_no_chunk_changes_it():
    model, guide = bernoulli_pair()
    x = bits(130)
    options: Any = {"num_particles": 150, "seed": 2}
    values = [
        pv.upper_bound(model, guide, x, order=n, **options).value for n in (1.01, 1.5, 2.0, 4.0)
    ]
    for lower, higher in itertools.pairwise(values):
        assert (higher >= lower).all()
    chunked = pv.upper_bound(model, guide, x, order=2.0, chunk_size=7, **options)
    torch.testing.assert_close(chunked.value, values[2], rtol=1e-6, atol=1e-6)
    assert chunked.pareto_k is not None
    assert chunked.pareto_k.shape == chunked.value.shape == (130,)


def test_the_bias_is_that_of_the_logarithm_of_an_average():
    """Uniform weights, many times over: log E[w^2] is known."""
    generator = torch.Generator().manual_seed(0)
    w = 0.5 + torch.rand(30, 40_000, generator=generator, dtype=torch.float64)
    power = w.square()
    value = power.mean(0).log() / 2
    error = power.std(0) / power.mean(0) / 30**0.5 / 2
    bound = pv.UpperBound(
        value, error, error, value, 30, order=2.0, lower=value, pareto_k=torch.zeros(40_000)
    )
    exact = math.log(1.0 + 1 / 12) / 2
    spread = value.std().item() / 40_000**0.5
    assert bound.bias < -3 * spread
    assert abs(bound.mean - bound.bias - exact) < 4 * spread


def test_too_few_particles_for_a_tail_are_not_trusted():
    model, guide = bernoulli_pair()
    bound = pv.upper_bound(model, guide, bits(5), num_particles=9)
    assert not bound.trusted.any()
    assert "No upper bound for 5 of 5 data" in bound.advice


def test_a_weight_of_zero_counts_for_nothing():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Uniform(x.new_zeros(()), 1.0))
            # Half of the particles make the data impossible.
            inside = torch.where(z < 0.5, 0.0, -math.inf)
            pyro.factor("inside", inside)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = torch.randn(4, dtype=torch.float64)
    bound = pv.upper_bound(model, pv.from_prior(model), x, num_particles=2_000)
    # w is p(x) half of the time and 0 otherwise, so E[w^2] is p(x)^2 / 2.
    exact = dist.Normal(0.0, 1.0).log_prob(x).double() + math.log(0.5) / 2
    assert ((bound.value - exact).abs() < 4 * bound.standard_error).all()


def test_no_particles_are_refused():
    model, guide = bernoulli_pair()
    with pytest.raises(ValueError, match="num_particles: expected at least 1, got 0"):
        pv.upper_bound(model, guide, bits(5), num_particles=0)


@pytest.mark.parametrize("order", [1.0, 0.5, -2.0, math.nan, math.inf])
def test_an_order_that_gives_no_upper_bound_is_refused(order):
    model, guide = bernoulli_pair()
    with pytest.raises(ValueError, match="upper_bound: expected an order above 1"):
        pv.upper_bound(model, guide, bits(5), num_particles=9, order=order)
