"""Bounds from both sides, and the estimator by posterior draws."""

import math
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import torch
from helpers import LinearGaussian, hierarchical_pair, library_pair, masked_pair, tutorial_pair
from torch import Tensor

import pyro_vae as pv


def wide(pair: LinearGaussian, inflation: float = 1.6) -> Any:
    def guide(x: Tensor) -> None:
        pair.guide(x, inflation)

    return guide


def test_the_truth_lies_between_the_bounds():
    pair = LinearGaussian.random(dim=10, latent_dim=5)
    x = torch.zeros(300, 10).double()
    bounds = pv.bidirectional(pair.model, wide(pair, 3.0), x, temperatures=8, leapfrog_steps=2)
    (simulated,) = bounds.data
    assert simulated.shape == x.shape
    exact = pair.log_evidence(simulated)
    # The means of the log-weights are bounds of a simple average, so they lie on their own sides.
    below, above = exact - bounds.lower.elbo, bounds.upper.elbo - exact
    for side in (below, above):
        assert side.mean() > 3 * side.std() / math.sqrt(300)
    assert bounds.lower.mean < exact.mean() + 3 * bounds.lower.mean_standard_error
    assert bounds.upper.mean > exact.mean() - 3 * bounds.upper.mean_standard_error
    assert bounds.mean_gap < (below + above).mean()


def test_more_temperatures_close_the_gap():
    pair = LinearGaussian.random(dim=10, latent_dim=5)
    x = torch.zeros(50, 10).double()
    gaps = [
        pv.bidirectional(
            pair.model, wide(pair, 3.0), x, num_chains=4, temperatures=t, leapfrog_steps=2
        ).mean_gap
        for t in (3, 30)
    ]
    assert gaps[1] < gaps[0] / 3


def test_simulated_data_have_the_models_moments():
    pair = LinearGaussian.random(dim=4, latent_dim=2)
    x = torch.zeros(3_000, 4).double()
    bounds = pv.bidirectional(pair.model, pair.guide, x, num_chains=1, temperatures=1)
    (simulated,) = bounds.data
    covariance = pair.weight @ pair.weight.T + pair.scale**2 * torch.eye(4).double()
    assert (simulated.mean(0) - pair.bias).abs().max() < 5 * covariance.max().sqrt() / 3_000**0.5
    assert (simulated.T.cov() / covariance - 1).abs().diagonal().max() < 0.15
    torch.testing.assert_close(bounds.upper.value, pair.log_evidence(simulated))


@pytest.mark.parametrize("make", [library_pair, tutorial_pair, hierarchical_pair, masked_pair])
def test_any_pair_has_bounds(make):
    model, guide, args = make()
    plate = "data" if make is masked_pair else None
    bounds = pv.bidirectional(
        model, guide, *args, temperatures=12, leapfrog_steps=2, data_plate=plate
    )
    assert bounds.gap.shape == (7,)
    assert abs(bounds.mean_gap) < 0.3 + 4 * bounds.mean_standard_error
    for given, simulated in zip(args, bounds.data, strict=True):
        assert given.shape == simulated.shape
        assert given.dtype == simulated.dtype
    assert torch.equal(bounds.data[0], bounds.data[0].round())  # bits, as the model makes them
    for given, simulated in zip(args[1:], bounds.data[1:], strict=True):
        assert torch.equal(given, simulated)


def test_an_observed_value_that_is_no_argument_is_refused():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    with pytest.raises(ValueError, match="'x': the observed value is none of the arguments"):
        pv.bidirectional(model, guide, torch.randn(4))


def test_it_prints_both_sides():
    pair = LinearGaussian.random()
    bounds = pv.bidirectional(pair.model, pair.guide, pair.sample(5), temperatures=3)
    assert "a gap of" in str(bounds)
    assert "5 simulated data" in str(bounds)


# --- appendix D


@pytest.mark.parametrize("latent_dim", [2, 3])
def test_reciprocal_evidence_agrees_with_numerical_integration(latent_dim):
    """A likelihood that is far from normal in z: bits whose logits are a curved function."""
    weight = torch.randn(latent_dim, 8).double()
    x = torch.rand(4, 8).round().double()

    def logits(z: Tensor) -> Tensor:
        return 2 * torch.tanh(z) @ weight + z.square().sum(-1, keepdim=True) / 4

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            zeros = x.new_zeros(latent_dim)
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=logits(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(latent_dim), 1.0).to_event(1))

    # Gauss and Hermite are exact enough here for 80 points a dimension.
    points, mass = (torch.tensor(a) for a in scipy.special.roots_hermitenorm(80))
    grid = torch.cartesian_prod(*[points] * latent_dim)
    share = torch.cartesian_prod(*[mass.log()] * latent_dim).sum(-1)
    share = share - latent_dim * 0.5 * math.log(2 * math.pi)
    log_likelihood = torch.stack(
        [dist.Bernoulli(logits=logits(grid)).log_prob(datum).sum(-1) for datum in x], 1
    )
    exact = torch.logsumexp(share.unsqueeze(-1) + log_likelihood, 0)
    # Many short chains: what a draw costs is mostly calls of the pair, whatever their number.
    estimate = pv.reciprocal_evidence(
        model, guide, x, num_chains=256, num_draws=15, leapfrog_steps=4
    )
    assert (estimate.value - exact).abs().max() < 0.05
    assert estimate.standard_error.max() < 0.05


def test_reciprocal_evidence_of_a_normal_posterior_is_nearly_exact():
    pair = LinearGaussian.random(latent_dim=2)
    x = pair.sample(5)
    estimate = pv.reciprocal_evidence(
        pair.model, wide(pair), x, num_chains=96, num_draws=10, leapfrog_steps=3
    )
    assert (estimate.value - pair.log_evidence(x)).abs().max() < 0.05


def test_above_five_dimensions_it_warns():
    options: dict[str, Any] = {"num_chains": 4, "num_draws": 2, "leapfrog_steps": 1}
    pair = LinearGaussian.random(dim=8, latent_dim=6)
    with pytest.warns(UserWarning, match="6 dimensions; above 5"):
        pv.reciprocal_evidence(pair.model, pair.guide, pair.sample(2), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few = LinearGaussian.random(dim=8, latent_dim=5)
        pv.reciprocal_evidence(few.model, few.guide, few.sample(2), **options)
