"""A guide whose support is a part of the prior's: weights look fine, and the value is too low."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import bernoulli_latents, library_pair
from torch import Tensor

import pyro_vae as pv

X = torch.tensor([0.0, 0.5, 1.0]).double()
ONE = torch.ones(()).double()


def model(x: Tensor) -> None:
    """p(x) is N(0, 2), and the posterior N(x / 2, 1 / 2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0 * x, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of(make: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", make(x))

    return guide


@pytest.mark.parametrize(
    "make",
    [
        lambda x: dist.HalfNormal(1.0 + 0 * x),
        lambda x: dist.Uniform(0 * x, 3.0 + 0 * x),
        lambda x: dist.LogNormal(0 * x, 1.0),
    ],
    ids=["half line", "interval", "transformed"],
)
def test_what_lies_outside_is_missing_and_it_is_said(make):
    found = pv.log_evidence(model, guide_of(make), X, num_particles=20_000)
    # The posterior's share above zero: what the guide can reach (all but 1e-4 of it below 3).
    reached = dist.Normal(X / 2, 0.5**0.5).cdf(0 * X).neg().add(1).log()
    exact = dist.Normal(0 * X, 2**0.5).log_prob(X) + reached
    assert ((found.value - exact).abs() < 5 * found.standard_error + 1e-3).all()
    assert found.pareto_k is not None
    assert (found.ess > 1000).all()  # nothing about the weights is odd
    assert not found.trusted.any()
    assert "site 'z': the guide's" in found.advice
    assert "is missing in p(x), and no weight tells how much" in found.advice
    bound = pv.upper_bound(model, guide_of(make), X, num_particles=1000)
    assert not bound.trusted.any()
    assert "No upper bound for any of 3 data: site 'z'" in str(bound)
    judged = pv.evaluate(model, guide_of(make), X, num_particles=1000, budget=1e9)
    assert judged.annealed is None
    assert "would never reach the rest" in judged.advice


@pytest.mark.parametrize(
    "make",
    [lambda x: dist.Normal(x / 2, 0.8), lambda x: dist.StudentT(5.0 + 0 * x, x / 2, 0.8)],
    ids=["normal", "student"],
)
def test_a_guide_on_all_of_the_support_has_no_caveat(make):
    found = pv.log_evidence(model, guide_of(make), X, num_particles=2000)
    assert found.caveat == ""
    assert found.trusted.all()


def test_bounds_that_are_equal_or_wider_are_none_and_others_are_not_asked():
    def on_interval(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0 * x, ONE))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    beta = guide_of(lambda x: dist.Beta(2.0 + 0 * x, 2.0))
    assert pv.log_evidence(on_interval, beta, X, num_particles=100).caveat == ""
    half = guide_of(lambda x: dist.Uniform(0 * x, 0.5 + 0 * x))
    found = pv.log_evidence(on_interval, half, X, num_particles=1000)
    assert "Uniform is over" in found.caveat
    truth = (dist.Normal(X, 1.0).cdf(ONE) - dist.Normal(X, 1.0).cdf(0 * X)).log()
    assert (found.value < truth - 0.3).all()
    for pair in (library_pair(), bernoulli_latents()):
        *programs, args = pair
        assert pv.log_evidence(*programs, *args, num_particles=30).caveat == ""


def test_points_and_priors_without_a_density_give_no_evidence():
    point = guide_of(lambda x: dist.Delta(x / 2))
    found = pv.log_evidence(model, point, X, num_particles=30)
    assert not found.trusted.any()
    assert "site 'z': the guide gives it a fixed value (Delta)" in found.advice

    def flat(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            prior = dist.ImproperUniform(dist.constraints.real, x.shape, ())
            pyro.sample("x", dist.Normal(pyro.sample("z", prior), 1.0), obs=x)

    normal = guide_of(lambda x: dist.Normal(x, 1.0))
    found = pv.log_evidence(flat, normal, X, num_particles=30)
    assert "the prior (ImproperUniform) has no density, so p(x) is none" in found.advice


def test_the_prior_as_a_guide_reaches_everything():
    found = pv.log_evidence(model, pv.from_prior(model), X, num_particles=20_000)
    assert found.caveat == ""
    exact = dist.Normal(0 * X, math.sqrt(2)).log_prob(X)
    assert ((found.value - exact).abs() < 5 * found.standard_error).all()
