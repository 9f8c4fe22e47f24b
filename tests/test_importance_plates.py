"""Scales, masks and plates: weights are unscaled, and one for each datum."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import LinearGaussian, store_pair
from pyro import poutine
from torch import Tensor
from weights import assert_exact

import pyro_vae as pv

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
