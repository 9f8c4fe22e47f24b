"""Latents that all data share: one weight for the whole set, autoguides, and what is refused."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import bernoulli_pair, bits
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from shared_mean import SharedMean
from torch import Tensor
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.evidence.given import GlobalLatents

# --- one weight for the whole set


def test_every_joint_weight_of_the_exact_posterior_is_the_evidence():
    truth = SharedMean.random(230)  # three blocks
    log_w = pv.joint_log_weights(truth.model, truth.guide, truth.x, num_particles=4)
    assert log_w.shape == (4,)
    torch.testing.assert_close(log_w, truth.log_evidence().expand(4), rtol=1e-11, atol=0)


def test_their_mean_is_the_bound_of_the_whole_set_and_that_of_the_weights_is_tighter():
    truth = SharedMean.random(7)
    guide = partial(truth.guide, shared=1.5, own=1.3)
    log_w = pv.joint_log_weights(truth.model, guide, truth.x, num_particles=150)
    local = replace(truth.local, bias=torch.zeros(3).double())
    gaps = [
        kl_divergence(truth.posterior(1.5), truth.posterior()),
        kl_divergence(local.posterior(truth.x, 1.3), local.posterior(truth.x)).sum(),
    ]
    bound = truth.log_evidence() - sum(gaps)
    assert abs(log_w.mean() - bound) < 4 * log_w.std() / 150**0.5
    tighter = log_w.logsumexp(0) - math.log(150)
    assert bound < tighter
    relative = (log_w - tighter).exp().std() / 150**0.5
    assert abs(tighter - truth.log_evidence()) < 4 * relative


def test_scales_and_kl_weights_never_leak_in():
    truth = SharedMean.random(7)
    plain = pv.joint_log_weights(truth.model, truth.guide, truth.x, num_particles=3)
    scaled = poutine.scale(truth.model, scale=3.0), poutine.scale(truth.guide, scale=0.1)
    minibatch = [partial(program, size=1000) for program in (truth.model, truth.guide)]
    # A plate over 1,000 data draws its own random rows first, so the noise is another.
    for pair, exact in ((scaled, plain), (minibatch, truth.log_evidence().expand(3))):
        log_w = pv.joint_log_weights(*pair, truth.x, num_particles=3)
        torch.testing.assert_close(log_w, exact, rtol=1e-11, atol=0)
    with pv.kl_weight(0.1):
        log_w = pv.joint_log_weights(truth.model, truth.guide, truth.x, num_particles=3)
        assert torch.equal(log_w, plain)


def test_masked_data_do_not_count():
    x, seen = torch.randn(9).double(), torch.arange(9) < 5

    def model(x: Tensor, seen: Any) -> None:
        theta = pyro.sample("theta", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    def guide(x: Tensor, seen: Any) -> None:
        pyro.sample("theta", dist.Normal(x.new_tensor(total / 6), 6**-0.5))

    total = x[seen].sum().item()
    log_w = pv.joint_log_weights(model, guide, x, seen, num_particles=3)
    covariance = torch.eye(5).double() + 1
    exact = dist.MultivariateNormal(torch.zeros(5).double(), covariance).log_prob(x[seen])
    torch.testing.assert_close(log_w, exact.expand(3), rtol=1e-11, atol=0)


def test_more_particles_extend_fewer_and_seeds_differ():
    truth = SharedMean.random(7)
    guide = partial(truth.guide, own=1.3)
    few, many, other = (
        pv.joint_log_weights(truth.model, guide, truth.x, num_particles=k, seed=seed)
        for k, seed in ((3, 0), (5, 0), (3, 1))
    )
    assert torch.equal(many[:3], few)
    assert len({*many.tolist(), *other.tolist()}) == 8


# --- guides of Pyro's


def test_the_density_of_an_autoguide_is_that_of_the_value_with_its_jacobian():
    """An AutoNormal that equals a log-normal prior: prior and guide cancel at every draw."""

    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    x = torch.tensor([0.5, 1.0, -2.0])
    start = partial(init_to_value, values={"scale": torch.ones(())})
    unseen = poutine.block(model, hide=["x"])
    guide = AutoNormal(unseen, init_loc_fn=start, init_scale=1.0)
    latents = GlobalLatents(model, guide, (x,), None)
    for seed in range(3):
        draw = latents.draw(seed)
        assert set(draw.values) == {"scale", "scale_unconstrained"}
        assert abs(draw.log_weight) < 1e-5
    log_w = pv.joint_log_weights(model, guide, x, num_particles=500)
    grid = torch.linspace(-6, 6, 2001).double().unsqueeze(-1)
    likelihood = dist.Normal(0.0, grid.exp()).log_prob(x.double()).sum(-1)
    density = dist.Normal(0.0, 1.0).log_prob(grid.squeeze(-1)) + likelihood
    exact = torch.logsumexp(density, 0) + math.log(12 / 2000)
    found = log_w.logsumexp(0) - math.log(500)
    assert abs(found - exact) < 4 * (log_w - found).exp().std() / 500**0.5


def test_a_value_without_a_density_has_no_bound():
    truth = SharedMean.random(5)
    at = AutoDelta(poutine.block(truth.model, hide=["z", "x"]))

    def guide(x: Tensor) -> None:
        at(x)
        truth.local.guide(x)

    with pytest.raises(ValueError, match=r"site 'theta': the guide gives it a value \(Delta\)"):
        pv.joint_log_weights(truth.model, guide, truth.x, num_particles=3)
    assert (
        pv.log_predictive(truth.model, guide, truth.x, num_global=2, num_particles=3)
        .value.isfinite()
        .all()
    )


# --- what is refused


def test_without_global_latents_the_weights_per_datum_are_pointed_to():
    for estimate in (
        partial(pv.joint_log_weights, num_particles=3),
        partial(pv.log_predictive, num_global=3, num_particles=3),
    ):
        with pytest.raises(ValueError, match=r"no latent outside the plate 'data'.*log_evidence"):
            estimate(*bernoulli_pair(), bits())


def test_weights_per_datum_of_such_a_pair_are_refused_with_a_pointer():
    truth = SharedMean.random(5)
    for estimate in (pv.log_weights, pv.log_evidence):
        with pytest.raises(ValueError, match=r"site 'theta' .* log_predictive .* joint_log_weight"):
            estimate(truth.model, truth.guide, truth.x, num_particles=3)


def test_a_guide_that_looks_at_the_data_handed_over_is_refused():
    truth = SharedMean.random(6)

    def guide(x: Tensor) -> None:
        replace(truth, x=x).guide(x)

    with pytest.raises(ValueError, match=r"densities of the latents \['theta'\].*in parameters"):
        pv.joint_log_weights(truth.model, guide, truth.x, num_particles=3)


def test_a_site_that_is_global_in_one_program_alone_is_refused():
    def model(x: Tensor) -> None:
        pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"site 'z' .* inside in both"):
        pv.joint_log_weights(model, guide, torch.zeros(4), num_particles=3)


def test_a_global_latent_of_the_guide_alone_is_refused():
    truth = SharedMean.random(5)

    def guide(x: Tensor) -> None:
        pyro.sample("a", dist.Normal(torch.zeros(()), 1.0), infer={"is_auxiliary": True})
        truth.guide(x)

    with pytest.raises(ValueError, match=r"site 'a' is a latent of the guide alone"):
        pv.log_predictive(truth.model, guide, truth.x, num_global=3, num_particles=3)


def test_numbers_below_one_are_refused():
    truth = SharedMean.random(5)
    with pytest.raises(ValueError, match="num_global: expected at least 1, got 0"):
        pv.log_predictive(truth.model, truth.guide, truth.x, num_global=0, num_particles=3)
    with pytest.raises(ValueError, match="num_particles: expected at least 1, got 0"):
        pv.joint_log_weights(truth.model, truth.guide, truth.x, num_particles=0)
