"""Mixture guides: exact shares of the components, against integrals and against draws."""

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_runs import assert_alike
from helpers import double_bits
from objective_runs import estimate, gradients
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyro_vae as pv

COMPONENTS = 3


def mixture_pair() -> Any:
    torch.manual_seed(0)
    family = partial(pv.families.mixture, num_components=COMPONENTS)
    encoder = pv.Conditional(pv.networks.mlp(9, (3 * COMPONENTS, 2)), family)
    likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
    model = pv.Model(pv.priors.StandardNormal(2), likelihood)
    return model.double(), pv.Guide(encoder).double(), (double_bits(),)


LOC = torch.tensor([-1.5, 0.5, 1.2]).double()
SCALE = torch.tensor([0.4, 0.6, 0.3]).double()


def two_sided(x: Tensor) -> None:
    """p(x|z) sees |z| alone, so the posterior has two modes."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.square(), 0.5), obs=x)


def three_normals(x: Tensor) -> None:
    logits = pyro.param("logits", torch.tensor([0.2, -0.3, 0.4]).double())
    loc = pyro.param("loc", LOC.clone())
    with pyro.plate("data", len(x)):
        components = dist.Normal(loc, SCALE)
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=logits), components))


def bound_by_integral(x: Tensor, logits: Tensor, loc: Tensor) -> Tensor:
    """The ELBO of ``two_sided`` and ``three_normals``, on a grid."""
    grid = torch.linspace(-7, 7, 20_001).double()
    mixture = dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(loc, SCALE))
    log_q = mixture.log_prob(grid)
    log_p = dist.Normal(0.0, 1.0).log_prob(grid)
    log_p = log_p + dist.Normal(grid.square(), 0.5).log_prob(x[:, None])
    return torch.trapezoid(log_q.exp() * (log_p - log_q), grid).sum()


def test_value_and_gradient_are_those_of_the_integral():
    pyro.clear_param_store()
    x = torch.tensor([0.5, 2.0]).double()
    pair = two_sided, three_normals, (x,)
    logits = torch.tensor([0.2, -0.3, 0.4]).double().requires_grad_()
    loc = LOC.clone().requires_grad_()
    exact = -bound_by_integral(x, logits, loc)
    expected: dict[str, Tensor] = dict(
        zip(["logits", "loc"], torch.autograd.grad(exact, [logits, loc]), strict=True)
    )
    loss = pv.Stratified(num_particles=20_000)
    pyro.set_rng_seed(0)
    assert estimate(loss, pair).loss.item() == pytest.approx(exact.item(), abs=0.05)
    found = gradients(loss, pair)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name.split(".")[-1]], rtol=0.0, atol=0.1)


@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_it_agrees_with_plain_draws_on_average(alpha):
    pair = mixture_pair()
    plain = pv.ImportanceWeighted(num_particles=2_000, alpha=alpha)
    plain.pathwise = False
    with torch.no_grad():
        strata = estimate(pv.Stratified(num_particles=700, alpha=alpha), pair)
        draws = estimate(plain, pair)
    assert strata.loss.item() == pytest.approx(draws.loss.item(), rel=0.01)
    assert strata.rate.item() == pytest.approx(draws.rate.item(), rel=0.05)
    assert strata.distortion.item() == pytest.approx(draws.distortion.item(), rel=0.01)


def test_of_one_component_it_is_the_elbo():
    torch.manual_seed(0)
    family = partial(pv.families.mixture, num_components=1)
    encoder = pv.Conditional(pv.networks.mlp(9, (3, 2)), family)
    likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
    model = pv.Model(pv.priors.StandardNormal(2), likelihood).double()
    pair = model, pv.Guide(encoder).double(), (double_bits(),)
    for alpha in (0.0, 1.0):
        found = estimate(pv.Stratified(alpha=alpha), pair)
        torch.testing.assert_close(found.loss, found.distortion + found.rate)


def test_compiled_and_uncompiled_steps_are_alike(interpreted):
    assert_alike(interpreted, mixture_pair, loss=pv.Stratified)


def test_pathwise_mixtures_take_any_objective():
    """Pyro's pathwise gradient of the components agrees with the stratified one.

    That of the weights is left out: it scatters by several times its size also over 40,000 data.
    """

    def pathwise(x: Tensor) -> None:
        logits = pyro.param("logits", torch.tensor([0.2, -0.3, 0.4]).double())
        loc = pyro.param("loc", torch.stack([LOC, LOC.flip(0)], -1))
        with pyro.plate("data", len(x)):
            scale = SCALE[:, None].expand(3, 2)
            mixture = dist.MixtureOfDiagNormals(loc, scale, logits)
            pyro.sample("z", mixture)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.square().sum(-1), 0.5), obs=x)

    pyro.clear_param_store()
    x = torch.full((20_000,), 1.0).double()
    pair = model, pathwise, (x,)
    (found,) = (g for n, g in gradients(Trace_ELBO(), pair).items() if "loc" in n)
    (expected,) = (g for n, g in gradients(pv.Stratified(), pair).items() if "loc" in n)
    torch.testing.assert_close(found / len(x), expected / len(x), rtol=0.0, atol=0.3)


def test_the_library_mixtures_train_every_parameter():
    for family, loss in (
        (partial(pv.families.mixture, num_components=4), pv.Stratified()),
        (partial(pv.families.mixture_of_normals, num_components=4), Trace_ELBO()),
    ):
        torch.manual_seed(0)
        encoder = pv.Conditional(pv.networks.mlp(9, (12, 2)), family)
        likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        x = double_bits().float()
        svi = pv.SVI(model, guide, lambda params: torch.optim.Adam(params, lr=1e-2), loss)
        before = [p.clone() for p in guide.parameters()]
        assert all(svi.step(x).isfinite() for _ in range(3))
        assert all((p != b).any() for p, b in zip(guide.parameters(), before, strict=True))
        assert pv.log_evidence(model, guide, x, num_particles=10).value.isfinite().all()


def test_other_guides_are_refused():
    model, _, args = mixture_pair()
    encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
    with pytest.raises(ValueError, match=r"expected one latent site .* got none among \['z'\]"):
        estimate(pv.Stratified(), (model, pv.Guide(encoder).double(), args))


def test_the_choice_of_a_component_is_no_silent_score_function():
    model, guide, args = mixture_pair()
    svi = pv.SVI(model, guide, lambda p: torch.optim.SGD(p, lr=1e-3), compile=False)
    with pytest.warns(UserWarning, match=r"site 'z'.*MixtureSameFamily.*REINFORCE.*Stratified"):
        svi.step(*args)
