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
from torch.distributions import AffineTransform, ExpTransform

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


def prior_of(make: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", make(x))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return program


def halves(x: Tensor) -> Any:
    """Uniform from 0 to 1, said as a mixture of its two halves."""
    low = torch.tensor([0.0, 0.5]).double().expand(len(x), 2)
    return dist.MixtureSameFamily(dist.Categorical(0 * low + 1), dist.Uniform(low, low + 0.5))


def shifted(x: Tensor) -> Any:
    """Uniform from 2 to 5; torch says of its support that it is the reals."""
    return dist.TransformedDistribution(dist.Uniform(0 * x, ONE), [AffineTransform(2.0, 3.0)])


@pytest.mark.parametrize(
    ("prior", "guide"),
    [
        (lambda x: dist.VonMises(0 * x, ONE), lambda x: dist.Uniform(0 * x - math.pi, math.pi)),
        (lambda x: dist.Uniform(0 * x, ONE), halves),
        (shifted, lambda x: dist.Uniform(0 * x + 2, 5.0)),
        (lambda x: dist.Uniform(0 * x, 1 + 1e-9 + 0 * x), lambda x: dist.Uniform(0 * x, ONE)),
        (lambda x: dist.Gumbel(0 * x, ONE), lambda x: dist.Normal(0 * x, ONE)),
    ],
    ids=["angles", "mixture of parts", "shifted prior", "rounding", "Gumbel"],
)
def test_a_guide_that_reaches_everything_is_not_blamed(prior, guide):
    found = pv.log_evidence(prior_of(prior), guide_of(guide), X, num_particles=30)
    assert found.caveat == ""


@pytest.mark.parametrize(
    ("guide", "said"),
    [
        (shifted, "is over 2 to 5, a part of -inf to inf"),
        (
            lambda x: dist.TransformedDistribution(
                dist.Normal(0 * x, ONE), [ExpTransform(), AffineTransform(0.0, -1.0)]
            ),
            "is over -inf to 0, a part of -inf to inf",
        ),
    ],
    ids=["shifted interval", "mirrored half line"],
)
def test_bounds_are_followed_through_shifts_and_scales(guide, said):
    assert said in pv.log_evidence(model, guide_of(guide), X, num_particles=30).caveat
