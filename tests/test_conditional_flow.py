"""A flow guide is a density, is exact as a proposal, and can be learned and compiled."""

from functools import partial
from typing import Any

import pytest
import torch
from compiled_runs import assert_alike
from helpers import bits
from pyro.distributions import transforms
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

import pyro_vae as pv
from pyro_vae.program.recipe import build, describe

TRANSFORMS: dict[str, Any] = {
    "inverse autoregressive": transforms.conditional_affine_autoregressive,
    "neural autoregressive": partial(
        transforms.conditional_affine_autoregressive, hidden_dims=[6], stable=True
    ),
    "spline": partial(transforms.conditional_spline, hidden_dims=[6]),
}
every_flow = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


def flow(transform: Any, min_scale: float = 1e-6) -> pv.ConditionalFlow:
    normal = partial(pv.families.normal, min_scale=min_scale)
    base = pv.Conditional(pv.networks.mlp(9, (2, 2), hidden_dims=(8,)), normal)
    return pv.ConditionalFlow(base, pv.networks.mlp(9, (1, 3)), transform, (2, 3))


def pair(transform: Any, min_scale: float = 1e-6) -> tuple[Any, Any, tuple[Tensor]]:
    torch.manual_seed(0)
    likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9), hidden_dims=(8,)), pv.families.bernoulli)
    model = pv.Model(pv.priors.StandardNormal(2), likelihood)
    guide = pv.Guide(flow(transform, min_scale))
    return model.double(), guide.double(), (bits(6).double(),)


@every_flow
@pytest.mark.parametrize("batch", [(7,), (3, 7)], ids=str)
def test_draws_and_their_density_have_the_batch_of_the_input(transform, batch):
    q = flow(transform)(torch.randn(*batch, 9))
    z = q.rsample()
    assert z.shape == (*batch, 2)
    assert q.log_prob(z).shape == batch
    assert q.expand((4, *batch)).rsample().shape == (4, *batch, 2)


@pytest.mark.parametrize("name", ["inverse autoregressive", "neural autoregressive"])
def test_the_density_integrates_to_one_and_is_that_of_the_draws(name):
    q = flow(TRANSFORMS[name])(torch.randn(9))  # Pyro's inverses know float32 alone
    z = q.rsample((5,))
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()), rtol=1e-4, atol=1e-4)
    size, limit = 600, 15.0
    side = (torch.arange(size) + 0.5) * (2 * limit / size) - limit
    with torch.no_grad():
        total = q.log_prob(torch.cartesian_prod(side, side)).exp().sum() * (2 * limit / size) ** 2
    assert total.item() == pytest.approx(1.0, abs=1e-3)


@every_flow
def test_every_parameter_learns(transform):
    model, guide, args = pair(transform)
    svi = pv.SVI(model, guide, lambda params: torch.optim.Adam(params, lr=1e-2))
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    for _ in range(3):
        assert svi.step(*args).isfinite()
    for name, parameter in guide.named_parameters():
        assert not parameter.equal(before[name]), name


@every_flow
def test_the_evidence_is_the_integral(transform):
    model, guide, (x,) = pair(transform, min_scale=1.5)  # wide, so that no weight is large
    estimate = pv.log_evidence(model, guide, x, num_particles=20_000, compile=False)
    size, limit = 400, 8.0
    side = (torch.arange(size, dtype=torch.float64) + 0.5) * (2 * limit / size) - limit
    points = torch.cartesian_prod(side, side)[:, None]
    with torch.no_grad():
        joint = model.prior().log_prob(points) + model.likelihood(points).log_prob(x)
    exact = joint.logsumexp(0) + 2 * torch.tensor(2 * limit / size).log()
    assert ((estimate.value - exact).abs() < 5 * estimate.standard_error + 1e-3).all()


@pytest.mark.parametrize("name", ["inverse autoregressive", "neural autoregressive"])
def test_compiled_steps_lead_where_eager_steps_lead(name, interpreted):
    assert_alike(interpreted, partial(pair, TRANSFORMS[name]), loss=Trace_ELBO)


def test_the_density_of_a_draw_costs_no_inverse(monkeypatch):
    q = flow(TRANSFORMS["inverse autoregressive"])(torch.randn(7, 9))
    monkeypatch.setattr(transforms.AffineAutoregressive, "_inverse", None)
    z = q.rsample()
    assert q.log_prob(z).isfinite().all()


def test_without_a_closed_form_of_the_kl_the_user_is_told():
    model, guide, args = pair(TRANSFORMS["inverse autoregressive"])
    svi = pv.SVI(model, guide, lambda p: torch.optim.Adam(p), TraceMeanField_ELBO())
    with pytest.warns(UserWarning, match="site 'z'.*Monte Carlo"):
        svi.step(*args)


def test_a_flow_is_made_again_from_its_recipe():
    q = flow(TRANSFORMS["inverse autoregressive"])
    (again,) = build(describe(q))
    again.load_state_dict(q.state_dict())
    x, z = torch.randn(5, 9), torch.randn(5, 2)
    assert torch.equal(again(x).log_prob(z), q(x).log_prob(z))


def test_other_shapes_are_refused():
    base = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
    make = TRANSFORMS["inverse autoregressive"]
    with pytest.raises(
        ValueError, match=r"expected \(Z, C\) = \(2, 4\).*got \(2,\) and \(5, 1, 3\)"
    ):
        pv.ConditionalFlow(base, pv.networks.mlp(9, (1, 3)), make, (2, 4))(torch.zeros(5, 9))
    with pytest.raises(ValueError, match="num_transforms >= 1"):
        pv.ConditionalFlow(base, pv.networks.mlp(9, (1, 3)), make, (2, 3), num_transforms=0)


@pytest.mark.parametrize("dim", [1, 9])
def test_free_parameters_see_no_input_and_learn(dim):
    network: Any = pv.networks.with_free(pv.networks.mlp(2, (1, 9)), (0.3,), dim=dim)
    conditional = pv.Conditional(network, pv.families.normal)
    z = torch.randn(4, 5, 2)
    scale = conditional(z).base_dist.scale
    assert scale.shape == (4, 5, 9)
    torch.testing.assert_close(scale, scale[:1, :1, :1].expand_as(scale))
    conditional(z).log_prob(torch.randn(9)).sum().backward()
    assert network.free.shape == (1, dim)
    assert network.free.grad.abs().min() > 0
    (again,) = build(describe(network))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(z), network(z))


def test_free_parameters_of_another_size_are_refused():
    network = pv.networks.with_free(pv.networks.mlp(2, (1, 9)), (0.3,), dim=4)
    with pytest.raises(ValueError, match=r"expected dim to be 1 or 9, .* got 4"):
        network(torch.zeros(5, 2))
