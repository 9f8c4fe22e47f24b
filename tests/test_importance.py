"""Log-weights and log-evidence: exact where exactness is known, with honest errors."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from helpers import LinearGaussian, bernoulli_pair, bits, library_pair, masked_pair
from torch import Tensor
from weights import WEIGHABLE, assert_exact, weights_of

import pyro_vae as pv

logsumexp: Any = scipy.special.logsumexp


# --- exact values


@pytest.mark.parametrize(("num_data", "latent_dim"), [(1, 1), (7, 2), (230, 3)])
def test_the_weights_of_the_exact_posterior_are_log_evidence(num_data, latent_dim):
    pair = LinearGaussian.random(latent_dim=latent_dim)
    x = pair.sample(num_data)
    log_w = pv.log_weights(pair.model, pair.guide, x, num_particles=60)
    assert log_w.shape == (60, num_data)
    assert log_w.dtype == torch.float64
    assert_exact(log_w, pair.log_evidence(x))


def test_the_exact_posterior_has_no_error_and_every_particle_counts():
    pair = LinearGaussian.random()
    x = pair.sample(7)
    estimate = pv.log_evidence(pair.model, pair.guide, x, num_particles=60)
    torch.testing.assert_close(estimate.value, pair.log_evidence(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(estimate.elbo, estimate.value, rtol=0, atol=1e-10)
    torch.testing.assert_close(estimate.ess, torch.full((7,), 60.0).double(), rtol=1e-9, atol=0)
    assert estimate.standard_error.max() < 1e-7


def test_the_two_level_chain_with_its_posterior_bottom_up_is_exact():
    """docs/mathematics.md, section 5: the order in which a guide factorizes is its own affair."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(()), 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(2 * x / 3, (2 / 3) ** 0.5))
            pyro.sample("z2", dist.Normal(z1 / 2, 0.5**0.5))

    x = torch.randn(7, dtype=torch.float64)
    exact = torch.distributions.Normal(x.new_zeros(()), 3**0.5).log_prob(x)
    assert_exact(pv.log_weights(model, guide, x, num_particles=9), exact)


def test_the_mean_of_the_weights_logarithms_is_the_bound_of_pyro():
    model, guide, (x,) = library_pair()
    totals = pv.log_weights(model, guide, x, num_particles=4_000).sum(1)
    pyro.set_rng_seed(3)
    loss = pyro.infer.Trace_ELBO(num_particles=4_000, vectorize_particles=True, max_plate_nesting=1)
    bound = -loss.loss(model, guide, x)
    assert abs(totals.mean() - bound) < 4 * totals.std() * (2 / 4_000) ** 0.5


# --- numerical integration


def nonlinear_pair(latent_dim: int) -> tuple[Any, Any, np.ndarray]:
    weight = np.random.default_rng(0).normal(size=(latent_dim, 6)) * 2
    decoder = torch.tensor(weight)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            zeros = x.new_zeros(latent_dim)
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            logits = (z @ decoder).sin() * 3 + z.square().sum(-1, keepdim=True) - 1
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), latent_dim), 1.2).to_event(1))

    return model, guide, weight


def joint(z: np.ndarray, x: np.ndarray, weight: np.ndarray) -> Any:
    """p(x, z) for points z (..., Z)."""
    logits = np.sin(z @ weight) * 3 + (z**2).sum(-1, keepdims=True) - 1
    log_likelihood = (x * logits - np.logaddexp(0, logits)).sum(-1)
    return np.exp(log_likelihood + scipy.stats.norm.logpdf(z).sum(-1))


def test_log_evidence_is_the_integral_in_one_dimension():
    model, guide, weight = nonlinear_pair(1)
    x = torch.rand(8, 6, dtype=torch.float64).round()
    estimate = pv.log_evidence(model, guide, x, num_particles=20_000)
    for n, datum in enumerate(x.numpy()):
        exact, _ = scipy.integrate.quad(
            lambda z, datum=datum: joint(np.array([z]), datum, weight), -9, 9, limit=400
        )
        assert abs(estimate.value[n] - math.log(exact)) < 4 * estimate.standard_error[n]
        assert estimate.standard_error[n] < 0.02


def test_log_evidence_is_the_integral_in_two_dimensions():
    model, guide, weight = nonlinear_pair(2)
    x = torch.rand(4, 6, dtype=torch.float64).round()
    estimate = pv.log_evidence(model, guide, x, num_particles=20_000)
    axis = np.linspace(-8, 8, 801)
    grid = np.stack(np.meshgrid(axis, axis), -1)
    for n, datum in enumerate(x.numpy()):
        exact = joint(grid, datum, weight).sum() * (axis[1] - axis[0]) ** 2
        assert abs(estimate.value[n] - math.log(exact)) < 4 * estimate.standard_error[n]
        assert estimate.standard_error[n] < 0.05


# --- the estimate and its error


@pytest.mark.parametrize("make", WEIGHABLE)
@pytest.mark.parametrize("num_particles", [1, 2, 50, 120])
def test_log_evidence_is_what_its_own_weights_say(make, num_particles):
    options: Any = {"data_plate": "data"} if make is masked_pair else {}
    log_w = weights_of(make, num_particles, **options).numpy()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args = make()
    estimate = pv.log_evidence(model, guide, *args, num_particles=num_particles, **options)
    value = logsumexp(log_w, axis=0) - math.log(num_particles)
    np.testing.assert_allclose(estimate.value, value, rtol=1e-13, atol=1e-12)
    np.testing.assert_allclose(estimate.elbo, log_w.mean(0), rtol=1e-12)
    relative = np.exp(log_w - value)
    ess = relative.sum(0) ** 2 / (relative**2).sum(0)
    np.testing.assert_allclose(estimate.ess, ess, rtol=1e-10)
    assert (estimate.ess >= 1 - 1e-12).all()
    assert (estimate.ess <= num_particles * (1 + 1e-12)).all()
    assert estimate.num_particles == num_particles
    if num_particles == 1:
        assert estimate.standard_error.isnan().all()
        return
    error = relative.std(0, ddof=1) / num_particles**0.5
    np.testing.assert_allclose(estimate.standard_error, error, rtol=1e-8, atol=1e-12)
    # docs/mathematics.md, section 10: an exact relation.
    k = num_particles
    exact = k / (k - 1) * (1 / ess - 1 / k)
    np.testing.assert_allclose(estimate.standard_error**2, exact, rtol=1e-8, atol=1e-14)


def test_intervals_cover_log_evidence_as_often_as_they_say():
    """A guide with the posterior's covariance times 1.3: the weights have every moment."""
    pair = LinearGaussian.random(dim=4, latent_dim=2)
    x = pair.sample(300)

    def guide(x: Tensor) -> None:
        pair.guide(x, inflation=1.3)

    estimate = pv.log_evidence(pair.model, guide, x, num_particles=1_000)
    z = (estimate.value - pair.log_evidence(x)) / estimate.standard_error
    assert 0.91 <= (z.abs() < 1.96).double().mean() <= 0.98
    assert abs(z.mean()) < 4 / 300**0.5
    assert abs(z.std() - 1) < 4 / 600**0.5
    error = estimate.mean - pair.log_evidence(x).mean().item()
    assert abs(error) < 4 * estimate.mean_standard_error


def test_the_effective_number_of_particles_is_the_one_of_theory():
    """docs/mathematics.md, section 10, with tau^2 = 1.3 and Z = 2."""
    pair = LinearGaussian.random(dim=4, latent_dim=2)

    def guide(x: Tensor) -> None:
        pair.guide(x, inflation=1.3)

    ess = pv.log_evidence(pair.model, guide, pair.sample(20), num_particles=5_000).ess
    expected = 5_000 / (1.3 / (2 * 1.3 - 1) ** 0.5) ** 2
    torch.testing.assert_close(ess, torch.full_like(ess, expected), rtol=0.02, atol=0)


def test_more_particles_tighten_the_bound():
    pair = LinearGaussian.random()
    x = pair.sample(200)

    def guide(x: Tensor) -> None:
        pair.guide(x, inflation=4.0)

    means = [
        pv.log_evidence(pair.model, guide, x, num_particles=k, seed=k).mean for k in (1, 5, 50, 500)
    ]
    assert means == sorted(means)
    assert means[-1] == pytest.approx(pair.log_evidence(x).mean().item(), abs=0.02)


def test_the_extremes_of_floating_point_are_survived():
    """Weights of e^-3000 and impossible data: no underflow, no NaN."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)
            pyro.sample("y", dist.Uniform(x.new_zeros(()), 1.0), obs=x.abs() / 100)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 0.05))

    x = torch.tensor([80.0, 0.5, 500.0], dtype=torch.float64)
    with pyro.validation_enabled(is_validate=False):
        estimate = pv.log_evidence(model, guide, x, num_particles=20_000)
    exact = torch.distributions.Normal(0.0, (1 + 0.1**2) ** 0.5).log_prob(x)
    assert estimate.value[0] < -3000
    assert abs(estimate.value[1] - exact[1]) < 4 * estimate.standard_error[1] + 0.05
    assert estimate.value[2] == -math.inf


# --- precision


def test_a_float32_pair_loses_no_digits_that_matter():
    """784 dimensions are summed in float32, weights in float64.

    Guaranteed: a float32 pair's weights are those of its float64 copy at the same latents to
    1e-3 nats, and no digit is lost after that.
    """
    model, guide = bernoulli_pair(784, 20, (50,))
    x = bits(30, 784)
    noise: dict[str, Tensor] = {}

    def remembering(x: Tensor) -> None:
        noise["z"] = guide(x)

    log_w = pv.log_weights(model, remembering, x, num_particles=50)
    assert log_w.dtype == torch.float32
    double_model, double_guide = bernoulli_pair(784, 20, (50,))
    double_model.load_state_dict(model.state_dict())
    double_guide.load_state_dict(guide.state_dict())
    z, y = noise["z"].double(), x.double()
    likelihood, encoder = double_model.double().likelihood, double_guide.double().encoder
    with torch.no_grad():
        expected = likelihood(z).log_prob(y) - encoder(y).log_prob(z)
    expected = expected + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(log_w.double(), expected, rtol=0, atol=1e-3)


def test_float32_weights_are_summed_in_float64():
    model, guide = bernoulli_pair(64, 3)
    x = bits(5, 64)
    log_w = pv.log_weights(model, guide, x, num_particles=5_000).numpy()
    estimate = pv.log_evidence(model, guide, x, num_particles=5_000)
    assert estimate.value.dtype == torch.float64
    exact = logsumexp(log_w.astype(np.float64), axis=0) - math.log(5_000)
    np.testing.assert_allclose(estimate.value, exact, rtol=0, atol=1e-12)
