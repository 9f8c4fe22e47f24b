"""The KL weight, traces of a pair, and log-densities without scales."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import pytest
import torch
from helpers import PAIRS, LinearGaussian, library_pair, subsampled_pair
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormalMessenger

import pyro_vae as pv
from pyro_vae.inference.handlers import (
    in_particles,
    latent_sites,
    observed_sites,
    sample_sites,
    site_to_blame,
    traces,
    unscaled_log_prob,
)
from pyro_vae.inference.losses import objective_of

LOSSES = (Trace_ELBO, TraceMeanField_ELBO)
optim: Any = pyro.optim


def standard_normal():
    return dist.Normal(0.0, 1.0)


def terms_of(loss, model, guide, args, beta=None):
    objective = objective_of(loss)
    objective.prepare(model, guide, args, {})
    pyro.set_rng_seed(1)
    if beta is None:
        return objective.terms(model, guide, args, {})
    with pv.kl_weight(beta):
        return objective.terms(model, guide, args, {})


# --- the KL weight


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("make", PAIRS)
def test_the_weighted_loss_is_distortion_plus_beta_times_rate(make, loss):
    model, guide, args = make()
    plain = terms_of(loss(), model, guide, args)
    for beta in (0.0, 0.3, 1, 2.5, torch.tensor(0.3, dtype=torch.float64)):
        total, distortion, rate = terms_of(loss(), model, guide, args, beta)
        torch.testing.assert_close(distortion, plain.distortion, rtol=1e-12, atol=0)
        torch.testing.assert_close(rate, plain.rate, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(total.detach(), distortion + beta * rate, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("make", PAIRS)
def test_pyros_own_losses_obey_the_weight(make, loss):
    model, guide, args = make()
    _, distortion, rate = terms_of(loss(), model, guide, args)
    for beta in (0.0, 0.3, 2.5):
        pyro.set_rng_seed(1)
        with pv.kl_weight(beta):
            value = loss().loss(model, guide, *args)
        assert value == pytest.approx((distortion + beta * rate).item(), rel=1e-10)


def test_the_step_of_pyros_svi_is_weighted():
    model, guide, args = library_pair()
    svi = pyro.infer.SVI(model, guide, optim.SGD({"lr": 0.0}), Trace_ELBO())
    _, distortion, rate = terms_of(Trace_ELBO(), model, guide, args)
    pyro.set_rng_seed(1)
    with pv.kl_weight(0.25):
        assert svi.step(*args) == pytest.approx((distortion + 0.25 * rate).item(), rel=1e-10)


def test_the_weight_reaches_the_gradient():
    model, guide, args = library_pair()
    parameters = [*model.parameters(), *guide.parameters()]

    def gradient(beta):
        loss = terms_of(Trace_ELBO(), model, guide, args, beta).loss
        return torch.autograd.grad(loss, parameters)

    at_zero, at_one, at_third = gradient(0.0), gradient(1.0), gradient(1 / 3)
    for zero, one, third in zip(at_zero, at_one, at_third, strict=True):
        torch.testing.assert_close(third, zero + (one - zero) / 3, rtol=1e-9, atol=1e-12)


def test_the_gradient_in_a_weight_that_is_a_tensor_is_the_rate():
    model, guide, args = library_pair()
    beta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    terms = terms_of(Trace_ELBO(), model, guide, args, beta)
    (slope,) = torch.autograd.grad(terms.loss, beta)
    torch.testing.assert_close(slope, terms.rate, rtol=1e-12, atol=0)
    assert not terms.rate.requires_grad
    assert not terms.distortion.requires_grad


def test_the_weight_multiplies_the_scales_of_plates_and_programs():
    model, guide, args = subsampled_pair()
    plain = terms_of(Trace_ELBO(), model, guide, args)
    model, guide = poutine.scale(model, scale=2.0), poutine.scale(guide, scale=2.0)
    loss, distortion, rate = terms_of(Trace_ELBO(), model, guide, args, 0.5)
    assert loss.item() == pytest.approx((distortion + 0.5 * rate).item(), rel=1e-12)
    assert rate.item() == pytest.approx(2 * plain.rate.item(), rel=1e-12)


def test_the_scale_of_a_subsampling_plate_is_its_share_of_the_data():
    model, guide, args = subsampled_pair()
    distortion = terms_of(Trace_ELBO(), model, guide, args).distortion
    pyro.set_rng_seed(1)
    trace, _ = traces(model, guide, args, {})
    log_likelihood = unscaled_log_prob(trace.nodes["x"]).sum()
    assert distortion.item() == pytest.approx(-50 / 7 * log_likelihood.item(), rel=1e-12)


def test_one_weight_inside_another_is_refused():
    with pv.kl_weight(0.5), pytest.raises(ValueError, match="one KL weight stands inside another"):
        pv.kl_weight(0.5).__enter__()


def test_a_weight_can_be_used_again_after_an_error():
    with pytest.raises(RuntimeError, match="mine"), pv.kl_weight(0.5):
        raise RuntimeError("mine")
    with pv.kl_weight(0.5):
        trace: Any = poutine.trace(lambda: pyro.sample("z", standard_normal())).get_trace()
    assert trace.nodes["z"]["scale"] == 0.5


@pytest.mark.parametrize("beta", [-0.1, math.nan, torch.tensor(-0.1)])
def test_a_negative_weight_is_refused(beta):
    with pytest.raises(ValueError, match="expected beta >= 0"):
        pv.kl_weight(beta)


# --- traces


def test_the_model_is_replayed_on_the_guides_latents():
    model, guide, args = library_pair()
    model_trace, guide_trace = traces(model, guide, args, {})
    assert model_trace.nodes["z"]["value"] is guide_trace.nodes["z"]["value"]
    torch.testing.assert_close(model_trace.nodes["x"]["value"], args[0])


def test_an_effectful_autoguide_gives_the_same_traces_as_pyro_takes():
    model, _, args = library_pair()
    guide = AutoNormalMessenger(model)
    guide(*args)  # makes its parameters
    ours = terms_of(Trace_ELBO(), model, guide, args).loss
    pyro.set_rng_seed(1)
    assert ours.item() == pytest.approx(Trace_ELBO().loss(model, guide, *args), rel=1e-10)


def test_sites_are_told_apart_and_plates_are_left_out():
    model, guide, args = subsampled_pair()
    model_trace = poutine.trace(model).get_trace(*args)
    assert "data" in model_trace.nodes
    assert [name for name, _ in sample_sites(model_trace)] == ["z", "x"]
    assert [name for name, _ in latent_sites(model_trace)] == ["z"]
    assert [name for name, _ in observed_sites(model_trace)] == ["x"]
    assert not list(observed_sites(poutine.trace(guide).get_trace(*args)))


def test_particles_stand_left_of_the_deepest_plate():
    program = in_particles(lambda: pyro.sample("a", standard_normal()), 4, 2)
    assert program().shape == (4, 1, 1)


def test_unscaled_log_densities_are_masked_but_not_scaled():
    mask: Any = torch.tensor([True, False, True])

    def program():
        with poutine.scale(scale=7.0), pyro.plate("data", 3), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(torch.zeros(3, 2), 1.0).to_event(1))

    site: Any = poutine.trace(program).get_trace().nodes["z"]
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(site["value"]).sum(-1) * mask
    torch.testing.assert_close(unscaled_log_prob(site), expected)


# --- who is to blame


def blamed(guide_site, model_site, observed):
    def guide():
        pyro.sample("z", guide_site())

    def model():
        pyro.sample("z", standard_normal())
        pyro.sample("x", model_site(), obs=observed)

    with pyro.validation_enabled(is_validate=False):
        return site_to_blame(*traces(model, guide, (), {}))


@pytest.mark.parametrize(
    ("guide_site", "model_site", "expected"),
    [
        (lambda: dist.Normal(math.nan, 1.0), standard_normal, "'z' of the guide: its value"),
        (lambda: dist.Delta(torch.tensor(0.0), math.inf), standard_normal, "'z' of the guide: its"),
        (lambda: dist.Delta(torch.tensor(0.0), -math.inf), standard_normal, "density zero"),
        (standard_normal, lambda: dist.Normal(0.0, math.nan), "'x' of the model: its log-density"),
        (standard_normal, lambda: dist.Normal(0.0, -1.0), "'x' of the model: its log-density"),
    ],
)
def test_the_first_site_that_is_not_finite_is_named(guide_site, model_site, expected):
    found = blamed(guide_site, model_site, torch.tensor(0.5))
    assert found is not None
    assert expected in found


def test_an_impossible_datum_is_no_fault():
    assert blamed(standard_normal, lambda: dist.Uniform(0.0, 1.0), torch.tensor(2.0)) is None
    pair, x = LinearGaussian.random(), torch.zeros(3, 5, dtype=torch.float64)
    assert site_to_blame(*traces(pair.model, pair.guide, (x,), {})) is None
