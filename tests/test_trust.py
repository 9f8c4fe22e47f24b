"""Error bars that hold, and a flag on those that don't: measured where log p(x) is known."""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import LinearGaussian
from torch import Tensor

import pyro_vae as pv

Guide = Callable[[Tensor], None]
Judged = dict[bool, pv.Estimate]  # from "smooth" to what it gives

# The shares that are promised are of 2,000 data, which take a minute.
SIZES = [200, pytest.param(2_000, marks=pytest.mark.slow)]


def mean_field(pair: LinearGaussian) -> Guide:
    """The best diagonal normal: the posterior's mean, and the diagonal of its precision."""

    def guide(x: Tensor) -> None:
        exact = pair.posterior(x)
        scale = exact.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(exact.loc, scale).to_event(1))

    return guide


@functools.cache
def judged(make: Callable[[LinearGaussian], Guide], size: int) -> tuple[Judged, Tensor]:
    """Plain and smoothed estimates for 50 dimensions and 20 latents, K = 1,000, and the truth."""
    torch.manual_seed(0)
    pair = LinearGaussian.random(dim=50, latent_dim=20)
    x = pair.sample(size)
    found = {}
    for smooth in (False, True):
        options: Any = {"num_particles": 1_000, "compile": False, "smooth": smooth}
        found[smooth] = pv.log_evidence(pair.model, make(pair), x, **options)
    return found, pair.log_evidence(x)


def wide(pair: LinearGaussian) -> Guide:
    """The posterior with 1.3 times its covariance."""
    return partial(pair.guide, inflation=1.3)


def covered(estimate: pv.Estimate, truth: Tensor, level: float = 0.95) -> Tensor:
    lower, upper = estimate.interval(level)
    return (lower <= truth) & (truth <= upper)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("smooth", [False, True])
def test_intervals_of_a_wide_guide_cover_as_often_as_they_say(smooth, size):
    found, truth = judged(wide, size)
    for level in (0.5, 0.95):
        share = covered(found[smooth], truth, level).double().mean().item()
        # Four standard errors: of 2,000 data the 95 % intervals cover 93 % to 97 %.
        assert abs(share - level) < 4 * (level * (1 - level) / size) ** 0.5
    assert found[smooth].untrusted < 0.01


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("smooth", [False, True])
def test_what_intervals_of_a_narrow_guide_do_not_cover_is_flagged(smooth, size):
    found, truth = judged(mean_field, size)
    estimate = found[smooth]
    missed = ~covered(estimate, truth)
    assert 0.4 < missed.double().mean() < 0.9
    assert (missed & ~estimate.trusted).sum() >= 0.95 * missed.sum()
    assert f"of {size} data are not to be trusted" in estimate.advice
    assert "pv.ais" in estimate.advice


@pytest.mark.parametrize("size", SIZES)
def test_of_equally_hard_data_those_with_the_lowest_k_are_missed(size):
    """Why k is not read datum by datum: the flag of a high k alone would miss the misses."""
    found, truth = judged(mean_field, size)
    estimate = found[False]
    assert estimate.pareto_k is not None
    missed = ~covered(estimate, truth)
    assert estimate.pareto_k[missed].mean() < estimate.pareto_k[~missed].mean()
    alone = missed & (estimate.pareto_k > estimate.threshold)
    assert alone.sum() < 0.93 * missed.sum()


def test_the_exact_posterior_is_trusted_everywhere():
    pair = LinearGaussian.random(dim=50, latent_dim=20)
    x = pair.sample(300)
    estimate = pv.log_evidence(pair.model, pair.guide, x, num_particles=100)
    assert estimate.pareto_k is not None
    assert (estimate.pareto_k == 0).all()
    assert estimate.trusted.all()
    assert estimate.untrusted == 0
    assert estimate.advice == "The error bars of all 300 data can be trusted."
    assert math.isfinite(estimate.mean)


def test_a_mode_that_the_guide_never_visits_can_not_be_seen():
    """z^2 is observed, and the guide knows the positive root alone: half of p(x) is missing."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.square(), 0.1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.sqrt(), 0.06 / x.sqrt()))

    x = torch.linspace(2.0, 4.0, 20, dtype=torch.float64)
    estimate = pv.log_evidence(model, guide, x, num_particles=1_000)
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64).unsqueeze(1)
    joint = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid**2, 0.1).log_prob(x)
    exact = joint.logsumexp(0) + math.log(1e-4)
    torch.testing.assert_close(estimate.value, exact - math.log(2), rtol=0, atol=0.03)
    assert estimate.trusted.all()
