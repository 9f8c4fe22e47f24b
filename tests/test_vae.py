"""Model and guide are plain Pyro programs, the prior is a standard normal."""

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from helpers import bernoulli_pair, bits, logits, same_normal
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import kl_divergence

import pyro_vae as pv


def traced(program: Any, *args: Any) -> Any:
    return poutine.trace(program).get_trace(*args)


def test_the_model_is_a_plain_pyro_program():
    model, _ = bernoulli_pair()
    x = bits(7)
    trace = traced(model, x)
    trace.compute_log_prob()
    z, site = trace.nodes["z"], trace.nodes["x"]
    assert list(trace.stochastic_nodes) == ["data", "z"]
    assert list(trace.observation_nodes) == ["x"]
    assert z["value"].shape == (7, 2)
    assert site["value"] is x
    assert site["is_observed"]
    for node in (z, site):
        assert [(f.name, f.dim, f.size) for f in node["cond_indep_stack"]] == [("data", -1, 7)]
        assert node["log_prob"].shape == (7,)
    by_hand = dist.Normal(0.0, 1.0).log_prob(z["value"]).sum(-1)
    torch.testing.assert_close(z["log_prob"], by_hand)
    by_hand = dist.Bernoulli(logits=logits(model.likelihood(z["value"]))).log_prob(x).sum(-1)
    torch.testing.assert_close(site["log_prob"], by_hand)


def test_the_guide_is_a_plain_pyro_program():
    _, guide = bernoulli_pair()
    x = bits(7)
    trace = traced(guide, x)
    z = trace.nodes["z"]
    assert list(trace.stochastic_nodes) == ["data", "z"]
    assert not trace.observation_nodes
    assert z["value"].shape == (7, 2)
    assert trace.nodes["_RETURN"]["value"] is z["value"]
    assert [(f.name, f.dim, f.size) for f in z["cond_indep_stack"]] == [("data", -1, 7)]
    assert same_normal(z["fn"], guide.encoder(x))


def test_a_model_under_a_particle_plate_keeps_particles_on_the_left():
    model, guide = bernoulli_pair()
    x = bits(7)
    with pyro.plate("particles", 13, dim=-2):
        guide_trace = traced(guide, x)
        trace = traced(poutine.replay(model, trace=guide_trace), x)
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].shape == (13, 7, 2)
    assert trace.nodes["x"]["log_prob"].shape == (13, 7)


def test_a_model_called_with_a_number_draws_so_many_data():
    model, _ = bernoulli_pair()
    trace = traced(model, 5)
    x = trace.nodes["x"]["value"]
    assert x.shape == (5, 9)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert not trace.nodes["x"]["is_observed"]
    # Averaged over many draws, x has the mean of the mean of p(x|z).
    many = traced(model, 20_000)
    difference = many.nodes["x"]["value"] - many.nodes["x"]["fn"].mean
    assert difference.mean(0).abs().max() < 4 * 0.5 / 20_000**0.5


def test_the_closed_form_kl_of_the_seeds_is_that_of_the_families():
    seeds_normal = partial(pv.families.normal, to_scale=pv.families.exp_half, min_scale=0.0)
    params = torch.randn(7, 2, 5, dtype=torch.float64)
    loc, log_variance = params.unbind(-2)
    variance = log_variance.exp()
    by_hand = 0.5 * (loc**2 + variance - 1 - variance.log()).sum(-1)
    prior = pv.priors.StandardNormal(5).double()
    torch.testing.assert_close(kl_divergence(seeds_normal(params), prior()), by_hand)


def test_the_prior_is_a_standard_normal():
    prior = pv.priors.StandardNormal(5).double()
    p, z = prior(), torch.randn(7, 5, dtype=torch.float64)
    assert p.batch_shape == ()
    assert p.event_shape == (5,)
    exact = dist.MultivariateNormal(z.new_zeros(5), torch.eye(5, dtype=z.dtype))
    torch.testing.assert_close(p.log_prob(z), exact.log_prob(z))
    assert not prior.state_dict()
    assert not list(prior.parameters())
    assert prior.to("meta").loc.is_meta


def gradients(value: Tensor, module: nn.Module) -> list[Tensor | None]:
    return list(
        torch.autograd.grad(value, list(module.parameters()), allow_unused=True, retain_graph=True)
    )


def test_the_decoder_gets_no_gradient_from_the_kl():
    model, guide = bernoulli_pair()
    x = bits(7)
    guide_trace = traced(guide, x)
    trace = traced(poutine.replay(model, trace=guide_trace), x)
    trace.compute_log_prob()
    guide_trace.compute_log_prob()
    q, p, log_likelihood = (
        guide_trace.nodes["z"]["fn"],
        trace.nodes["z"]["fn"],
        trace.nodes["x"]["log_prob"],
    )
    analytic = kl_divergence(q, p).sum()
    drawn = (guide_trace.nodes["z"]["log_prob"] - trace.nodes["z"]["log_prob"]).sum()
    for kl in (analytic, drawn):
        assert all(g is None for g in gradients(kl, model))
        assert all(g is not None and g.abs().max() > 0 for g in gradients(kl, guide))
    # The reconstruction term trains both.
    for program in (model, guide):
        assert all(
            g is not None and g.abs().max() > 0 for g in gradients(log_likelihood.sum(), program)
        )
