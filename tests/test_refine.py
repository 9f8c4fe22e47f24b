"""Refined guides: against the best diagonal normal, which linear-Gaussian models know exactly."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import LinearGaussian, bernoulli_latents, bernoulli_pair, bits, library_pair
from pyro.distributions import transforms
from torch import Tensor

import pyro_vae as pv


def prior_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))


def best_bound(pair: LinearGaussian, x: Tensor) -> Tensor:
    """The ELBO of the best diagonal normal: its precisions are the posterior's diagonal ones."""
    posterior = pair.posterior(x)
    precision = posterior.precision_matrix
    q = dist.Normal(posterior.loc, precision.diagonal(dim1=-2, dim2=-1).rsqrt()).to_event(1)
    covariance = torch.diag_embed(q.variance)
    log_det = torch.logdet(posterior.covariance_matrix) - q.variance.log().sum(-1)
    trace = torch.diagonal(precision @ covariance, dim1=-2, dim2=-1).sum(-1)
    return pair.log_evidence(x) - 0.5 * (trace - 2 + log_det)


@pytest.mark.parametrize("batch_size", [100, 40])
def test_it_finds_the_best_diagonal_normal_of_each_datum(batch_size):
    torch.manual_seed(0)
    pair = LinearGaussian.random()
    x = pair.sample(70)
    refined = pv.refine(
        pair.model, prior_guide, x, steps=600, num_particles=8, batch_size=batch_size, compile=False
    )
    found = pv.log_evidence(*refined, num_particles=2_000)
    best = best_bound(pair, x)
    # A bound of 2,000 draws scatters by a few hundredths around a bound that is the best.
    assert (found.elbo - best).abs().max() < 0.15
    assert (found.elbo - best).mean().item() == pytest.approx(0.0, abs=0.02)
    assert ((found.value - pair.log_evidence(x)).abs() < 6 * found.standard_error + 1e-3).all()


def test_at_the_start_the_guide_is_what_it_was():
    model, guide = bernoulli_pair()
    x = bits(7)
    refined = pv.refine(model, guide, x, steps=1, learning_rate=0.0)
    found = pv.log_weights(*refined, num_particles=5)
    torch.testing.assert_close(found, pv.log_weights(model, guide, x, num_particles=5))


def assert_refined_alike(x: Tensor, model: Any, guide: Any) -> None:
    tables = []
    for compile in (False, True):
        refined = pv.refine(model, guide, x, steps=6, batch_size=7, compile=compile)
        tables.append(refined[1].state_dict())
    torch.testing.assert_close(*tables, rtol=1e-8, atol=1e-10)
    assert all(t.any() for name, t in tables[0].items() if name.startswith(("shift", "log_scale")))


def test_compiled_and_uncompiled_refinements_are_alike():
    model, guide, (x,) = library_pair()
    assert_refined_alike(torch.cat([x, 1 - x]), model, guide)


def test_a_last_and_smaller_batch_has_a_graph_of_its_own(interpreted):
    model, guide, (x,) = library_pair()
    assert_refined_alike(torch.cat([x, 1 - x, x[:2]]), model, guide)
    assert len(interpreted) == 2


def test_the_pair_is_left_as_it_was_and_can_be_trained_on():
    model, guide = bernoulli_pair()
    guide.train()
    before = {k: v.clone() for k, v in (*model.state_dict().items(), *guide.state_dict().items())}
    x = bits(7)
    state = torch.get_rng_state()
    *_, index = pv.refine(model, guide, x, steps=5)
    assert torch.equal(index, torch.arange(7))
    after = {**model.state_dict(), **guide.state_dict()}
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(
        p.requires_grad and p.grad is None for p in (*model.parameters(), *guide.parameters())
    )
    assert guide.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_flow_is_refined_too():
    torch.manual_seed(0)
    model, _ = bernoulli_pair()
    base = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
    make = transforms.conditional_affine_autoregressive
    guide = pv.Guide(pv.ConditionalFlow(base, pv.networks.mlp(9, (1, 4)), make, (2, 4)))
    x = bits(40)
    before = pv.log_evidence(model, guide, x, num_particles=500)
    after = pv.log_evidence(*pv.refine(model, guide, x, steps=150), num_particles=500)
    assert (after.elbo - before.elbo).mean() > 0.01
    assert abs(after.mean - before.mean) < 0.1


def test_two_levels_in_plates_of_their_own():
    """The latents of the upper level depend on those of the lower one, which are moved."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("parts", 3, dim=-1):
                u = pyro.sample("u", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(u, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("parts", 3, dim=-1):
                pyro.sample("u", dist.Normal(z, 1.0))

    x = torch.randn(12, 3).double() + 3
    options: Any = {"num_particles": 400, "data_plate": "data"}
    before = pv.log_evidence(model, guide, x, **options)
    refined = pv.refine(model, guide, x, steps=300, data_plate="data", batch_size=5)
    after = pv.log_evidence(*refined, **options)
    assert (after.elbo > before.elbo + 5).all()
    assert refined[1].shift[1].shape == (12, 3)


def test_what_can_not_be_moved_is_refused():
    model, guide, args = bernoulli_latents()
    with pytest.raises(ValueError, match=r"site 'z': expected real latents.*Bernoulli"):
        pv.refine(model, guide, *args)
    with pytest.raises(ValueError, match="refine: expected steps >= 1, got 0"):
        pv.refine(*bernoulli_pair(), bits(3), steps=0)
