"""An autoregressive likelihood is exact: sums over all values, its order, its draws."""

from functools import partial
from itertools import product

import pyro
import pytest
import torch
from compiled_runs import assert_alike
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from pyro_vae.program.recipe import build, describe

D = 4
FAMILIES = {
    "bits": (pv.families.bernoulli, 1, 2),
    "levels": (partial(pv.families.discretized, num_levels=3), 2, 3),
}
every_family = pytest.mark.parametrize(
    ("family", "size", "levels"), FAMILIES.values(), ids=FAMILIES
)


def likelihood(family=pv.families.bernoulli, size=1, in_dim=2) -> pv.Autoregressive:
    return pv.Autoregressive(pv.networks.masked_mlp(D, in_dim, size), family, D).double()


def everything(levels: int) -> torch.Tensor:
    return torch.tensor(list(product(range(levels), repeat=D)), dtype=torch.float64)


@every_family
def test_probabilities_sum_to_one(family, size, levels):
    p = likelihood(family, size)(torch.randn(3, 1, 2, dtype=torch.float64))
    total = p.log_prob(everything(levels)).logsumexp(-1)
    torch.testing.assert_close(total, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


@every_family
def test_draws_come_as_often_as_they_are_probable(family, size, levels):
    p = likelihood(family, size)(3 * torch.randn(2, dtype=torch.float64))
    n = 20_000
    place = levels ** torch.arange(D - 1, -1, -1, dtype=torch.float64)
    counts = torch.bincount((p.sample((n,)) @ place).long(), minlength=levels**D)
    probs = p.log_prob(everything(levels)).exp().detach()
    error = (probs * (1 - probs) / n).sqrt()
    assert ((counts / n - probs).abs() < 5 * error + 1e-4).all()


def test_params_see_what_came_before_and_nothing_else():
    network = pv.networks.masked_mlp(D, 2, 3).double()
    z = torch.randn(2, dtype=torch.float64)
    slopes = torch.autograd.functional.jacobian(
        lambda x: network(x, z), torch.randn(D, dtype=torch.float64)
    )
    sees = slopes.abs().sum(0) > 0  # (D of the params, D of x)
    assert sees.equal(torch.ones(D, D).tril(-1).bool())


@pytest.mark.parametrize("batch", [(), (7,), (3, 7)], ids=str)
def test_dimensions_are_one_event_and_the_rest_is_batch(batch):
    p = likelihood()(torch.randn(*batch, 2, dtype=torch.float64))
    assert p.batch_shape == batch
    assert p.event_shape == (D,)
    x = p.sample((5,))
    assert x.shape == (5, *batch, D)
    assert p.log_prob(x).shape == (5, *batch)
    assert p.expand((2, *batch)).log_prob(x[0]).shape == (2, *batch)
    assert p.support.check(x).all()


def pair():
    torch.manual_seed(0)
    model = pv.Model(pv.priors.StandardNormal(2), likelihood()).double()
    encoder = pv.Conditional(pv.networks.mlp(D, (2, 2)), pv.families.normal)
    return model, pv.Guide(encoder).double(), (everything(2)[[1, 5, 6, 11, 12]],)


def test_its_evidence_is_the_integral():
    model, _, (x,) = pair()
    wide = pv.Conditional(pv.networks.mlp(D, (2, 2)), partial(pv.families.normal, min_scale=2.0))
    guide = pv.Guide(wide.double())
    estimate = pv.log_evidence(model, guide, x, num_particles=20_000, compile=False)
    side = torch.linspace(-8, 8, 401, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)[:, None]
    with torch.no_grad():
        joint = model.prior().log_prob(points) + model.likelihood(points).log_prob(x)
    exact = joint.logsumexp(0) + 2 * torch.tensor(16 / 400).log()
    assert ((estimate.value - exact).abs() < 5 * estimate.standard_error + 1e-3).all()


def test_compiled_steps_lead_where_eager_steps_lead(interpreted):
    assert_alike(interpreted, pair, loss=Trace_ELBO)


def test_without_inputs_it_is_a_model_without_latents():
    """Fitted to data by the same SVI, it learns their frequencies."""
    p = likelihood(in_dim=0)

    def model(x):
        pyro.module("p", p)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", p(), obs=x)

    torch.testing.assert_close(
        p().log_prob(everything(2)).logsumexp(0), torch.zeros((), dtype=torch.float64)
    )
    x = everything(2)[[3, 3, 3, 9]]
    svi = pv.SVI(model, lambda x: None, lambda params: torch.optim.Adam(params, lr=0.05))
    for _ in range(300):
        svi.step(x)
    found = p().log_prob(everything(2)[[3, 9]]).exp()
    torch.testing.assert_close(found, torch.tensor([0.75, 0.25]).double(), rtol=0, atol=0.02)


def test_it_is_made_again_from_its_recipe():
    p = likelihood()
    (again,) = build(describe(p))
    again.double().load_state_dict(p.state_dict())
    z, x = torch.randn(5, 2, dtype=torch.float64), everything(2)[:5]
    assert torch.equal(again(z).log_prob(x), p(z).log_prob(x))


def test_layers_that_are_too_narrow_are_refused():
    with pytest.raises(ValueError, match=r"hidden layers of at least 4 units, .* got \(3,\) and 1"):
        pv.networks.masked_mlp(4, 2, 1, hidden_dims=(3,))
