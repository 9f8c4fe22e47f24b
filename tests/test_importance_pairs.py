"""Weights of any pair: of networks under particles, latents of the guide, hierarchies."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import (
    LinearGaussian,
    TutorialPair,
    auxiliary_pair,
    bernoulli_pair,
    bits,
    hierarchical_pair,
)
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from weights import assert_exact

import pyro_vae as pv

# --- networks under the particle plate


def test_conv_networks_keep_data_and_particles_apart():
    """Against likelihood and encoder called datum by datum, particle by particle."""
    shape, latent = (8, 6), 3
    encoder = pv.Conditional(
        pv.networks.conv_encoder(shape, (2, latent), channels=(4, 8)), pv.families.normal
    )
    likelihood = pv.Conditional(
        pv.networks.conv_decoder(latent, (1, 48), image_shape=shape, channels=(8, 4)),
        pv.families.bernoulli,
    )
    model = pv.Model(pv.priors.StandardNormal(latent), likelihood).double()
    inner = pv.Guide(encoder).double()
    drawn: dict[str, Tensor] = {}

    def guide(x: Tensor) -> None:
        drawn["z"] = inner(x)

    x = bits(3, 48).double()
    log_w = pv.log_weights(model, guide, x, num_particles=4)
    z = drawn["z"]
    assert z.shape == (4, 3, latent)
    prior = torch.distributions.Normal(0.0, 1.0)
    with torch.no_grad():
        for k in range(4):
            for n in range(3):
                point, datum = z[k, n : n + 1], x[n : n + 1]
                expected = likelihood(point).log_prob(datum) - encoder(datum).log_prob(point)
                expected = expected + prior.log_prob(point).sum(-1)
                torch.testing.assert_close(log_w[k, n], expected[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("flatten", [lambda z: z.reshape(-1, 2), lambda z: z.reshape(len(z), -1)])
def test_a_decoder_that_flattens_particles_is_told_of_them(flatten):
    decoder = nn.Linear(2, 9)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = decoder(flatten(z))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    _, guide = bernoulli_pair()
    with pytest.raises((ValueError, RuntimeError)) as caught:
        pv.log_weights(model, guide, bits(7), num_particles=3)
    assert any("with 3 particles on the left" in note for note in caught.value.__notes__)


def test_a_conditional_whose_network_flattens_particles_is_named():
    network = nn.Sequential(nn.Flatten(0, -2), nn.Linear(2, 9), nn.Unflatten(-1, (1, 9)))
    model = pv.Model(pv.priors.StandardNormal(2), pv.Conditional(network, pv.families.bernoulli))
    _, guide = bernoulli_pair()
    with pytest.raises(ValueError, match=r"\(3, 7, 2\) to params of shape \(21, 1, 9\).*particles"):
        pv.log_weights(model, guide, bits(7), num_particles=3)


# --- any pair


def test_a_latent_of_the_guide_alone_is_refused():
    """E_q[p(x, z) / q(a, z|x)] is the integral of p(x) over a, which is infinite."""
    model, guide, args = auxiliary_pair()
    with pytest.raises(ValueError, match=r"site 'a' is a latent of the guide alone"):
        pv.log_weights(model, guide, *args, num_particles=10)


def test_a_latent_of_the_guide_that_the_model_is_given_too_is_integrated_out():
    """q(a) q(z|a) with the posterior as its marginal of z, and r(a|z) its exact reversal."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("a", dist.Normal(z / 2 + x / 4, 0.125**0.5))

    def guide(x: Tensor) -> None:  # z = a + noise, a ~ N(x/2, 1/4), noise ~ N(0, 1/4)
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(x / 2, 0.5))
            pyro.sample("z", dist.Normal(a, 0.5))

    x = torch.randn(7, dtype=torch.float64)
    exact = torch.distributions.Normal(x.new_zeros(()), 2**0.5).log_prob(x)
    assert_exact(pv.log_weights(model, guide, x, num_particles=9), exact)


def test_a_guide_that_transforms_a_latent_of_its_own_is_exact():
    """As Pyro's autoguides do: z = 2 u is fixed by u, with the Jacobian in its log-density."""
    pair = LinearGaussian.random()

    def guide(x: Tensor) -> None:
        posterior = pair.posterior(x)
        half = dist.MultivariateNormal(posterior.loc / 2, posterior.covariance_matrix / 4)
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", half, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(2 * u, -2 * math.log(2), event_dim=1))

    x = pair.sample(7)
    assert_exact(pv.log_weights(pair.model, guide, x, num_particles=9), pair.log_evidence(x))


def test_a_hierarchical_pair_needs_nothing_special():
    """Against draws from the prior, which no guide has touched."""
    model, guide, args = hierarchical_pair()
    many = pv.log_evidence(model, guide, *args, num_particles=5_000)
    with torch.no_grad():
        z2 = torch.randn(20_000, 1, 2, dtype=torch.float64)
        log_p = model.likelihood(model.lower_prior(z2).sample()).log_prob(args[0])
    from_prior = log_p.logsumexp(0) - math.log(20_000)
    error = (log_p - from_prior).exp().std(0) / 20_000**0.5
    assert ((many.value - from_prior).abs() < 4 * (error**2 + many.standard_error**2).sqrt()).all()


def test_the_tutorials_pair_goes_the_whole_way():
    pair, x = TutorialPair(), bits(120)
    svi = pv.SVI(
        pair.model, pair.guide, lambda p: torch.optim.Adam(p, lr=1e-2), loss=TraceMeanField_ELBO()
    )
    before = pv.log_evidence(pair.model, pair.guide, x, num_particles=200)
    for _ in range(200):
        svi.step(x)
    log_w = pv.log_weights(pair.model, pair.guide, x, num_particles=200)
    after = pv.log_evidence(pair.model, pair.guide, x, num_particles=200)
    assert log_w.shape == (200, 120)
    assert after.mean > before.mean + 10 * (before.mean_standard_error + after.mean_standard_error)
    assert after.mean > after.elbo.mean()
    bound = torch.stack([-svi.evaluate_loss(x) / 120 for _ in range(50)])
    assert abs(after.elbo.mean() - bound.mean()) < 5 * bound.std()
    # The best that bits without structure allow is their entropy, 9 log 2, in sample a bit less.
    assert -9 * math.log(2) - 0.1 < after.mean < -9 * math.log(2) + 1.5
