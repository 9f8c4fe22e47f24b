"""Log-weights and log-evidence: exact where exactness is known, for any pair, in any chunks."""

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
from helpers import (
    PAIRS,
    LinearGaussian,
    TutorialPair,
    auxiliary_pair,
    bernoulli_pair,
    bits,
    hierarchical_pair,
    library_pair,
    masked_pair,
    store_pair,
)
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vae as pv

logsumexp: Any = scipy.special.logsumexp

# The weights of a guide with a latent of its own do not average to p(x).
WEIGHABLE = tuple(make for make in PAIRS if make is not auxiliary_pair)


def weights_of(make: Any, num_particles: int = 120, **options: Any) -> Tensor:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args = make()
    return pv.log_weights(model, guide, *args, num_particles=num_particles, **options)


def assert_exact(log_w: Tensor, exact: Tensor, atol: float = 1e-10) -> None:
    """Every weight of every datum is its evidence."""
    torch.testing.assert_close(log_w, exact.expand(len(log_w), -1), rtol=0, atol=atol)


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


# --- blocks and chunks


@pytest.mark.parametrize("chunk_size", [1, 7, 50])
@pytest.mark.parametrize("make", WEIGHABLE)
def test_chunks_change_nothing(make, chunk_size):
    options: Any = {"data_plate": "data"} if make is masked_pair else {}
    whole = weights_of(make, **options)
    chunked = weights_of(make, chunk_size=chunk_size, **options)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)


def test_a_chunk_larger_than_a_block_is_a_block():
    assert torch.equal(weights_of(library_pair, chunk_size=1_000), weights_of(library_pair))


def test_more_particles_extend_fewer():
    """Whole blocks of 50 agree bit for bit."""
    few, many = (weights_of(library_pair, k) for k in (100, 230))
    assert torch.equal(many[:100], few)
    assert not torch.equal(many[:50], many[50:100])


def test_more_data_extend_fewer():
    """Whole blocks of 100 data agree, wherever the data end."""
    model, guide = bernoulli_pair()
    x = bits(330)
    longer, shorter = (
        pv.log_weights(model, guide, part, num_particles=20) for part in (x, x[:200])
    )
    torch.testing.assert_close(longer[:, :200], shorter, rtol=0, atol=1e-5)


def test_seeds_are_independent_and_reproducible():
    a, b, c = (weights_of(library_pair, seed=seed) for seed in (0, 1, 0))
    assert torch.equal(a, c)
    assert (a != b).all()
    noise = torch.stack([(w - w.mean(0)).flatten() for w in (a, b)])
    assert abs(torch.corrcoef(noise)[0, 1]) < 4 / a.numel() ** 0.5


def test_progress_adds_up_to_all_particles_of_all_data():
    done: list[int] = []
    pv.log_evidence(*bernoulli_pair(), bits(130), num_particles=120, progress=done.append)
    assert sum(done) == 130 * 120
    assert len(done) == 2 * 3


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else (made,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


def test_memory_does_not_grow_with_particles_or_data():
    model, guide = bernoulli_pair()
    for num_particles, num_data in ((50, 100), (2_000, 100), (50, 1_000)):
        x = bits(num_data)
        with LargestTensor() as seen:
            pv.log_evidence(model, guide, x, num_particles=num_particles)
        assert seen.numel == 50 * 100 * 9


def test_smaller_chunks_need_less_memory():
    model, guide = bernoulli_pair(latent_dim=1)
    x = bits(100)
    with LargestTensor() as seen:
        pv.log_evidence(model, guide, x, num_particles=100, chunk_size=10)
    assert seen.numel == 10 * 100 * 9


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


# --- scales, weights and masks


def test_scales_and_kl_weights_never_leak_in():
    model, guide, (x,) = store_pair()
    scaled = poutine.scale(model, scale=3.0), poutine.scale(guide, scale=0.1)
    plain = pv.log_weights(model, guide, x, num_particles=20)
    assert torch.equal(pv.log_weights(*scaled, x, num_particles=20), plain)
    for context in (pv.kl_weight(0.1), pv.kl_weight(0.0), poutine.scale(scale=2.0)):
        with context:
            assert torch.equal(pv.log_weights(model, guide, x, num_particles=20), plain)


def test_the_scale_of_a_subsampling_plate_never_leaks_in():
    pair = LinearGaussian.random()

    def plate(x: Tensor) -> Any:
        return pyro.plate("minibatch", 1_000, subsample_size=len(x), dim=-1)

    def model(x: Tensor) -> None:
        zeros = x.new_zeros(2)
        with plate(x):
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            loc = z @ pair.weight.T + pair.bias
            pyro.sample("x", dist.Normal(loc, pair.scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with plate(x):
            pyro.sample("z", pair.posterior(x))

    x = pair.sample(7)
    assert_exact(pv.log_weights(model, guide, x, num_particles=5), pair.log_evidence(x))


def test_masked_entries_are_integrated_out():
    """With some dimensions unseen, the exact posterior given the rest has exact weights."""
    pair = LinearGaussian.random(dim=6)
    x, seen = pair.sample(7), torch.rand(7, 6) < 0.6

    def model(x: Tensor, seen: Any) -> None:
        with pyro.plate("data", len(x), dim=-2):
            zeros = x.new_zeros(2)
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            loc = (z @ pair.weight.T + pair.bias).squeeze(-2)
            with pyro.plate("dimensions", 6, dim=-1), poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(loc, pair.scale), obs=x)

    exact, posteriors = [], []
    for datum, known in zip(x, seen, strict=True):
        part = LinearGaussian(pair.weight[known], pair.bias[known], pair.scale)
        exact.append(part.log_evidence(datum[known].unsqueeze(0)))
        posteriors.append(part.posterior(datum[known].unsqueeze(0)))
    loc = torch.cat([p.loc for p in posteriors]).unsqueeze(-2)
    covariance = torch.stack([p.covariance_matrix.squeeze(0) for p in posteriors]).unsqueeze(-3)

    def guide(x: Tensor, seen: Any) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.MultivariateNormal(loc, covariance_matrix=covariance))

    x = torch.where(seen, x, torch.full_like(x, 1e3))  # what is not seen does not matter
    log_w = pv.log_weights(model, guide, x, seen, num_particles=11, data_plate="data")
    assert_exact(log_w, torch.cat(exact))


# --- plates


def pixel_pair(data_dim: int) -> tuple[Any, Any]:
    """Data at one dimension, pixels at the other, as independent observations."""
    pixel_dim = -3 - data_dim
    logits = torch.linspace(-1, 1, 4, dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=data_dim):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("pixels", 4, dim=pixel_dim):
                level = logits if pixel_dim == -1 else logits.unsqueeze(-1)
                value = x if pixel_dim == -1 else x.T
                pyro.sample("x", dist.Bernoulli(logits=z * level), obs=value)

    def guide(x: Tensor) -> None:
        loc = x.mean(-1)
        with pyro.plate("data", len(x), dim=data_dim):
            pyro.sample("z", dist.Normal(loc.unsqueeze(-1) if data_dim == -2 else loc, 0.8))

    return model, guide


def test_the_datas_dimension_may_stand_on_either_side():
    x = torch.rand(7, 4, dtype=torch.float64).round()
    right, left = (
        pv.log_weights(*pixel_pair(dim), x, num_particles=60, data_plate="data") for dim in (-1, -2)
    )
    assert right.shape == (60, 7)
    torch.testing.assert_close(right, left, rtol=0, atol=1e-12)


def test_one_of_several_plates_has_to_be_named():
    model, guide = pixel_pair(-2)
    x = torch.rand(7, 4, dtype=torch.float64).round()
    with pytest.raises(ValueError, match=r"plates \['data', 'pixels'\]; say with data_plate="):
        pv.log_weights(model, guide, x, num_particles=3)
    with pytest.raises(ValueError, match=r"no plate 'rows' .* they share \['data', 'pixels'\]"):
        pv.log_weights(model, guide, x, num_particles=3, data_plate="rows")


def test_several_observed_sites_share_the_plate_of_the_data():
    """Labels beside an image: only the plate over the data is shared, and both count."""

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y.unsqueeze(-1))
            with pyro.plate("pixels", 3, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        loc = (x.sum(-1) + y) / 5
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(loc.unsqueeze(-1), 5**-0.5))

    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    covariance = torch.eye(4, dtype=torch.float64) + 1
    exact = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance)
    log_w = pv.log_weights(model, guide, x, y, num_particles=5)
    assert_exact(log_w, exact.log_prob(torch.cat([x, y.unsqueeze(-1)], -1)))


def test_observed_sites_without_a_plate_are_refused():
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(7), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"\(\['x'\]\) share no plate.*pyro.plate"):
        pv.log_weights(model, guide, torch.zeros(7), num_particles=3)


def test_a_model_that_observes_nothing_is_refused():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="observes nothing"):
        pv.log_weights(model, model, torch.zeros(7), num_particles=3)


def test_a_latent_that_all_data_share_is_refused():
    def model(x: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("weight", dist.Normal(0.5, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match=r"site 'weight' is a latent outside the plate 'data'"):
        pv.log_weights(model, guide, torch.zeros(7), num_particles=3)


def test_a_plate_that_draws_a_part_of_the_data_by_itself_is_refused():
    """Its weights would be of other data in every block, and in no order."""

    def plate(x: Tensor) -> Any:
        return pyro.plate("data", len(x), subsample_size=3)

    def model(x: Tensor) -> None:
        with plate(x) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x: Tensor) -> None:
        with plate(x) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))

    with pytest.raises(ValueError, match=r"plate 'data'.* 3 .* 7"):
        pv.log_weights(model, guide, torch.randn(7), num_particles=5)


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


# --- arguments


def test_tensors_of_the_datas_length_are_cut_and_everything_else_is_handed_over_whole():
    pair = LinearGaussian.random()
    x = pair.sample(130)
    shift = torch.arange(130, dtype=torch.float64).unsqueeze(-1)
    table = torch.ones(3, dtype=torch.float64)
    sizes: list[tuple[int, ...]] = []

    def model(x: Tensor, shift: Tensor, table: Tensor, name: str, factor: float) -> None:
        sizes.append((len(x), len(shift), len(table)))
        assert name == "kept"
        pair.model(x - factor * shift * table.sum() / 3)

    def guide(x: Tensor, shift: Tensor, table: Tensor, name: str, factor: float) -> None:
        pair.guide(x - factor * shift * table.sum() / 3)

    args = (x + 2 * shift, shift, table, "kept", 2.0)
    log_w = pv.log_weights(model, guide, *args, num_particles=3)
    assert_exact(log_w, pair.log_evidence(x), atol=1e-9)
    assert set(sizes) == {(100, 100, 3), (30, 30, 3)}


@pytest.mark.parametrize("args", [(), ("x", 3), (torch.tensor(1.0),)])
def test_without_data_nothing_is_estimated(args):
    with pytest.raises(ValueError, match="expected data: at least one tensor"):
        pv.log_weights(lambda *a: None, lambda *a: None, *args, num_particles=3)


def test_empty_data_are_refused():
    with pytest.raises(ValueError, match="the data are empty"):
        pv.log_evidence(*bernoulli_pair(), torch.zeros(0, 9), num_particles=3)


@pytest.mark.parametrize("num_particles", [0, -1])
def test_no_particles_are_refused(num_particles):
    with pytest.raises(ValueError, match=r"num_particles: expected at least 1"):
        pv.log_weights(*bernoulli_pair(), bits(), num_particles=num_particles)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_empty_chunks_are_refused(chunk_size):
    with pytest.raises(ValueError, match=r"chunk_size: expected at least 1"):
        pv.log_evidence(*bernoulli_pair(), bits(), num_particles=3, chunk_size=chunk_size)


# --- what is wrong is named


def test_a_latent_that_the_guide_lacks_is_named():
    model, _ = bernoulli_pair()
    with pytest.raises(ValueError, match="no latent site 'z'"):
        pv.log_evidence(model, lambda x: None, bits(), num_particles=3)


def test_data_outside_the_support_are_named_by_their_site():
    with pytest.raises(ValueError, match=r"site 'x': .* outside the support"):
        pv.log_evidence(*bernoulli_pair(), 0.5 * bits(), num_particles=3)


@pytest.mark.parametrize(("where", "site"), [("model", "'x'"), ("guide", "'z'")])
@pytest.mark.parametrize("validation", [True, False])
def test_parameters_that_are_nan_are_named_by_their_site(where, site, validation):
    pair = dict(zip(("model", "guide"), bernoulli_pair(), strict=True))
    with torch.no_grad():
        for parameter in pair[where].parameters():
            parameter.fill_(math.nan)
    with (
        pyro.validation_enabled(is_validate=validation),
        pytest.raises(ValueError, match=f"site {site}"),
    ):
        pv.log_evidence(pair["model"], pair["guide"], bits(), num_particles=3)


def test_a_guide_that_draws_infinite_values_is_named():
    model, _, (x,) = store_pair()

    def broken(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = x.new_zeros(len(x), 2)
            pyro.sample("z", dist.Delta(loc + math.inf, event_dim=1))

    with pytest.raises(ValueError, match="site 'z' of the guide: its value is NaN or infinite"):
        pv.log_weights(model, broken, x, num_particles=3)


# --- what is left alone


def test_the_random_state_is_left_alone():
    model, guide, args = library_pair()
    pyro.set_rng_seed(11)
    before = torch.get_rng_state()
    pv.log_evidence(model, guide, *args, num_particles=60)
    assert torch.equal(torch.get_rng_state(), before)


def test_modules_are_at_rest_while_judged_and_as_before_afterwards():
    model, guide = bernoulli_pair()
    network: Any = guide.encoder.network
    network.layers.insert(1, nn.Dropout(0.9))
    guide.train()
    model.eval()
    modes = [m.training for m in (*model.modules(), *guide.modules())]
    x = bits()
    training = pv.log_weights(model, guide, x, num_particles=4)
    assert [m.training for m in (*model.modules(), *guide.modules())] == modes
    guide.eval()
    assert torch.equal(training, pv.log_weights(model, guide, x, num_particles=4))
    assert not training.requires_grad
    assert torch.is_grad_enabled()


def test_modules_are_as_before_after_an_error():
    model, guide = bernoulli_pair()
    with pytest.raises(ValueError, match="expected input of shape"):
        pv.log_weights(model, guide, bits(dim=8), num_particles=4)
    assert model.training
    assert guide.training
    assert torch.is_grad_enabled()


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
