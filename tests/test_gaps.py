"""The gaps: against linear-Gaussian pairs, where the posterior and the best guide are known."""

import math
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import (
    LinearGaussian,
    bernoulli_latents,
    bernoulli_pair,
    bits,
    hierarchical_pair,
    masked_pair,
)
from torch import Tensor
from weights import WEIGHABLE

import pyro_vae as pv

HELD: Any = {
    "steps": 1,
    "step_particles": 1,
    "learning_rate": 0.0,
    "compile": False,
}  # refined to what it was


@pytest.fixture
def oracle() -> LinearGaussian:
    torch.manual_seed(0)
    return LinearGaussian.random()


def diagonal(pair: LinearGaussian, shift: float = 0.0, stretch: float = 1.0) -> Any:
    """The best diagonal normals, or those displaced by a shift and a stretch of their scales."""

    def guide(x: Tensor) -> None:
        posterior = pair.posterior(x)
        scale = posterior.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
        with pyro.plate("data", len(x), dim=-1):
            q = dist.Normal(posterior.loc + shift, stretch * scale).to_event(1)
            pyro.sample("z", q)

    return guide


def kl_to_posterior(pair: LinearGaussian, x: Tensor, shift: float, stretch: float) -> Tensor:
    """KL(q || p(z|x)) of such a guide, (N,): log p(x) minus its bound."""
    posterior = pair.posterior(x)
    precision = posterior.precision_matrix
    scale = stretch * precision.diagonal(dim1=-2, dim2=-1).rsqrt()
    q = torch.distributions.MultivariateNormal(
        posterior.loc + shift, covariance_matrix=torch.diag_embed(scale.square().expand(len(x), -1))
    )
    return torch.distributions.kl_divergence(q, posterior)


def exact(pair: LinearGaussian, x: Tensor) -> pv.Estimate:
    """log p(x) as an estimate without error."""
    value = pair.log_evidence(x)
    zeros = torch.zeros_like(value)
    return pv.Estimate(value, zeros, zeros, zeros, num_particles=1)


def misses(part: pv.Nats, truth: Tensor) -> Tensor:
    """Errors in units of the standard errors, (N,)."""
    return (part.value - truth) / part.standard_error


# --- against what is known


def test_with_the_exact_posterior_there_is_no_gap(oracle):
    x = oracle.sample(130)
    found = pv.gaps(oracle.model, oracle.guide, x, num_particles=50, **HELD)
    for part in (found.gap, found.approximation, found.amortization):
        assert part.value.abs().max() < 1e-9
        assert part.standard_error.max() < 1e-9
    torch.testing.assert_close(found.log_evidence.value, oracle.log_evidence(x))
    assert (
        found.log_evidence.data
        == pv.log_evidence(oracle.model, oracle.guide, x, num_particles=2).data
    )


@pytest.mark.parametrize("given", [True, False])
def test_the_best_diagonal_guide_has_an_approximation_gap_alone(oracle, given):
    x = oracle.sample(400)
    estimate = exact(oracle, x) if given else None
    best = diagonal(oracle)
    found = pv.gaps(oracle.model, best, x, log_evidence=estimate, num_particles=400, **HELD)
    truth = kl_to_posterior(oracle, x, 0.0, 1.0)
    precision = oracle.posterior(x).precision_matrix
    precision = precision if precision.dim() == 2 else precision[0]
    closed = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    torch.testing.assert_close(truth, closed.expand(400))
    assert found.exact
    assert found.amortization.value.abs().max() < 1e-10
    for part in (found.approximation, found.gap):
        assert part.mean == pytest.approx(closed.item(), abs=4 * part.mean_standard_error + 2e-3)
        # The errors are those that are made: neither too small nor too large.
        assert 0.85 < misses(part, truth).square().mean().sqrt() < 1.2
        spread = (part.value.std() / 400**0.5).item()
        assert part.mean_standard_error == pytest.approx(spread, rel=0.2)


def test_a_displaced_guide_has_the_difference_as_its_amortization_gap(oracle):
    x = oracle.sample(60)
    guide = diagonal(oracle, shift=0.4, stretch=1.5)
    found = pv.gaps(
        oracle.model, guide, x, log_evidence=exact(oracle, x), num_particles=400, compile=False
    )
    whole, best = (kl_to_posterior(oracle, x, *at) for at in ((0.4, 1.5), (0.0, 1.0)))
    for part, truth in (
        (found.gap, whole),
        (found.approximation, best),
        (found.amortization, whole - best),
    ):
        # A refinement that stops a little short moves nats between the two parts.
        slack = 0.0 if part is found.gap else 0.005
        assert part.mean == pytest.approx(
            truth.mean().item(), abs=4 * part.mean_standard_error + slack
        )
    assert found.amortization.mean > 50 * found.amortization.mean_standard_error
    torch.testing.assert_close(
        found.gap.value, found.approximation.value + found.amortization.value
    )
    torch.testing.assert_close(found.elbo.value + found.gap.value, oracle.log_evidence(x))


def test_common_draws_make_the_approximation_gap_quiet(oracle):
    """log p(x) from the draws of the bound itself, or from other draws."""
    x = oracle.sample(50)
    pair = (oracle.model, diagonal(oracle))
    estimate = pv.log_evidence(*pair, x, num_particles=100)
    apart = pv.gaps(*pair, x, log_evidence=estimate, num_particles=100, **HELD)
    paired = pv.gaps(*pair, x, num_particles=100, **HELD)
    ratio = paired.approximation.mean_standard_error / apart.approximation.mean_standard_error
    assert ratio < 0.3


def test_common_draws_make_the_amortization_gap_quiet():
    torch.manual_seed(0)
    wide = LinearGaussian.random(10, 8)  # of a gap, and so of noise, that the two guides share
    x, guide = wide.sample(50), diagonal(wide, shift=0.02)
    found = pv.gaps(wide.model, guide, x, num_particles=100, steps=200, compile=False)
    apart = math.hypot(found.elbo.mean_standard_error, found.best_elbo.mean_standard_error)
    assert found.amortization.mean_standard_error < 0.5 * apart


def test_an_estimates_error_is_part_of_the_gaps(oracle):
    x = oracle.sample(20)
    noisy = exact(oracle, x)
    noisy = replace(noisy, standard_error=noisy.standard_error + 0.3)
    found = pv.gaps(oracle.model, oracle.guide, x, log_evidence=noisy, num_particles=10, **HELD)
    torch.testing.assert_close(found.gap.standard_error, noisy.standard_error)
    assert found.amortization.standard_error.max() < 1e-9


# --- any pair


@pytest.mark.parametrize("make", WEIGHABLE, ids=lambda make: make.__name__)
def test_any_pair_has_gaps(make):
    model, guide, args = make()
    plate = "data" if make is masked_pair else None
    found = pv.gaps(
        model, guide, *args, num_particles=60, steps=60, data_plate=plate, compile=False
    )
    torch.testing.assert_close(
        found.gap.value, found.approximation.value + found.amortization.value
    )
    assert found.gap.value.shape == (7,)
    assert found.gap.standard_error.isfinite().all()
    assert found.amortization.mean > -0.05
    bound = pv.log_evidence(model, guide, *args, num_particles=2_000, data_plate=plate).elbo
    error = found.elbo.mean_standard_error
    assert found.elbo.mean == pytest.approx(bound.mean().item(), abs=5 * error + 1e-9)
    assert found.exact == (make is not hierarchical_pair)


def test_the_same_seed_gives_the_same_and_leaves_the_stream_alone():
    pair, x = bernoulli_pair(), bits(5)
    state = torch.get_rng_state()
    first, same, other = (
        pv.gaps(*pair, x, num_particles=5, steps=3, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.gap.value, same.gap.value)
    assert not torch.equal(first.gap.value, other.gap.value)


# --- in words


def test_a_diagonal_normal_is_named_and_others_are_not():
    pair, x = bernoulli_pair(), bits(5)
    printed = str(pv.gaps(*pair, x, num_particles=5, steps=3))
    lines = printed.splitlines()
    assert lines[0] == "nats per datum; 5 data, 5 particles"
    assert [line.split()[0] for line in lines[1:6]] == [
        "log", "ELBO", "gap", "approximation", "amortization",
    ]  # fmt: skip
    assert all("+-" in line for line in lines[1:6])
    assert "the best diagonal normal" in printed
    model, guide, args = hierarchical_pair()
    printed = str(pv.gaps(model, guide, *args, num_particles=5, steps=3))
    assert "at least this is the network's" in printed
    assert "diagonal" not in printed


def test_gaps_below_zero_are_blamed_on_what_can_make_them():
    found = pv.gaps(*bernoulli_pair(), bits(5), num_particles=5, steps=1, learning_rate=0.0)
    low = pv.Nats(torch.full((5,), -1.0).double(), torch.full((5,), 0.1).double())
    assert "estimated too low" in str(replace(found, approximation=low))
    assert "has not arrived" in str(replace(found, amortization=low))
    fine = pv.Nats(torch.full((5,), -1.0).double(), torch.full((5,), 9.0).double())
    assert "below zero" not in str(replace(found, approximation=fine, amortization=fine))


# --- bad input


def test_discrete_latents_have_a_whole_gap_alone():
    model, guide, args = bernoulli_latents()
    with pytest.raises(ValueError, match=r"site 'z': expected real latents(.|\n)*whole gap holds"):
        pv.gaps(model, guide, *args)


def test_latents_that_all_data_share_are_refused():
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(0.5, 0.5))

    with pytest.raises(ValueError, match="site 'mean' is a latent outside the plate"):
        pv.gaps(model, guide, torch.randn(7))


def test_a_bound_of_minus_infinity_has_no_gap():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(z.abs(), z.abs() + 2, validate_args=False), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0 * x, 1.0))

    with pytest.raises(ValueError, match="a bound is -infinity"):
        pv.gaps(model, guide, torch.full((5,), 1.0), num_particles=50, **HELD)


def test_estimates_of_something_else_are_refused(oracle):
    x = oracle.sample(6)
    pair = (oracle.model, oracle.guide)
    estimate = pv.log_evidence(*pair, x, num_particles=10)
    pv.gaps(*pair, x, log_evidence=estimate, num_particles=5, **HELD)
    refined = pv.refine(*pair, x, steps=1)
    of_refined = pv.log_evidence(*refined, num_particles=10)
    pv.gaps(*pair, x, log_evidence=of_refined, num_particles=5, **HELD)
    with pytest.raises(ValueError, match="log_evidence: the estimate is of other data"):
        pv.gaps(*pair, x.flip(0), log_evidence=estimate, **HELD)
    with pytest.raises(ValueError, match=r"expected an estimate of these 5 data, got one of 6"):
        pv.gaps(*pair, x[:5], log_evidence=estimate, **HELD)
    one = pv.log_evidence(*pair, x, num_particles=1)
    with pytest.raises(ValueError, match="expected finite values with finite errors"):
        pv.gaps(*pair, x, log_evidence=one, **HELD)
    shared = pv.PredictiveEstimate(*torch.zeros(4, 6), num_particles=2, share=torch.ones(1, 6))
    with pytest.raises(TypeError, match="got a PredictiveEstimate"):
        pv.gaps(*pair, x, log_evidence=shared, **HELD)
    with pytest.raises(ValueError, match=r"num_particles: expected at least 2 for gaps.* got 1"):
        pv.gaps(*pair, x, num_particles=1)
