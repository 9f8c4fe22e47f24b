"""The bound in both forms, against Pyro's own losses, closed forms, and exact evidence."""

import math
import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import (
    PAIRS,
    LinearGaussian,
    bernoulli_latents,
    leaves,
    library_pair,
    store_pair,
)
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.inference.losses import objective_of
from pyro_vae.inference.objectives import ELBO, Foreign

LOSSES = (Trace_ELBO, TraceMeanField_ELBO)
PARTICLES = ((1, False), (3, False), (3, True))


def ours(loss: Any, model: Any, guide: Any, args: tuple[Any, ...], seed: int = 1) -> Any:
    objective = objective_of(loss)
    objective.prepare(model, guide, args, {})
    pyro.set_rng_seed(seed)
    return objective.terms(model, guide, args, {})


def theirs(loss: Any, model: Any, guide: Any, args: tuple[Any, ...], seed: int = 1) -> Tensor:
    loss.differentiable_loss(model, guide, *args)  # guesses the plates, which draws noise
    pyro.set_rng_seed(seed)
    return loss.differentiable_loss(model, guide, *args)


def assert_equal_gradients(a: Tensor, b: Tensor, parameters: dict[str, Tensor]) -> None:
    ga = torch.autograd.grad(a, list(parameters.values()), allow_unused=True)
    gb = torch.autograd.grad(b, list(parameters.values()), allow_unused=True)
    for name, left, right in zip(parameters, ga, gb, strict=True):
        assert left is not None, name
        assert left.abs().max() > 0, name
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)


# --- against Pyro


@pytest.mark.parametrize(("num_particles", "vectorize"), PARTICLES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("make", PAIRS)
def test_value_and_gradient_are_pyros(make, loss, num_particles, vectorize):
    model, guide, args = make()
    options = {"num_particles": num_particles, "vectorize_particles": vectorize}
    terms = ours(loss(**options), model, guide, args)
    expected = theirs(loss(**options), model, guide, args)
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert terms.loss.item() == pytest.approx((terms.distortion + terms.rate).item(), rel=1e-11)
    assert_equal_gradients(terms.loss, expected, leaves(model, guide))


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_of_the_data_are_pyros(loss):
    """``poutine.scale`` takes a tensor: one weight for each datum."""
    model, guide, args = store_pair()
    weights = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    model, guide = poutine.scale(model, scale=weights), poutine.scale(guide, scale=weights)
    terms = ours(loss(), model, guide, args)
    expected = theirs(loss(), model, guide, args)
    assert terms.loss.shape == terms.rate.shape == terms.distortion.shape == ()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert_equal_gradients(terms.loss, expected, leaves(model, guide))


@pytest.mark.filterwarnings("ignore:.*REINFORCE")  # said once, see test_stratified.py
@pytest.mark.parametrize(("num_particles", "vectorize"), PARTICLES)
def test_a_guide_without_a_pathwise_gradient_gets_pyros_surrogate(num_particles, vectorize):
    model, guide, args = bernoulli_latents()
    loss = Trace_ELBO(num_particles=num_particles, vectorize_particles=vectorize)
    loss.differentiable_loss(model, guide, *args)  # guesses the plates
    terms, expected = ours(loss, model, guide, args), theirs(loss, model, guide, args)
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert_equal_gradients(terms.loss, expected, leaves(model, guide))
    with torch.no_grad():
        parts = ours(loss, model, guide, args)
    assert (parts.distortion + parts.rate).item() == pytest.approx(expected.item(), rel=1e-11)


@pytest.mark.filterwarnings("ignore:.*REINFORCE")  # said once, see test_stratified.py
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_score_function_gradient_is_that_of_the_weighted_bound_on_average(beta):
    """One latent bit: the expectation, and so its derivative, is a sum of two terms."""
    logits = torch.tensor([-1.0, 2.0], dtype=torch.float64)  # of x given the bit
    prior = torch.tensor(0.4, dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(prior))
            pyro.sample("x", dist.Bernoulli(logits=logits[z.long()]), obs=x)

    def guide(x: Tensor) -> None:
        logit = pyro.param("logit", torch.tensor(0.3, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logit))

    u = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    q = torch.stack([1 - u.sigmoid(), u.sigmoid()])
    rate = (q * (q.log() - torch.stack([1 - prior, prior]).log())).sum()
    loss = -(q * torch.nn.functional.logsigmoid(logits)).sum() + beta * rate
    (exact,) = torch.autograd.grad(loss, u)

    x = torch.ones(2_000, dtype=torch.float64)
    objective = objective_of(Trace_ELBO())
    objective.prepare(model, guide, (x,), {})
    (leaf,) = leaves(model, guide).values()
    found = []
    for _ in range(20):
        with pv.kl_weight(beta):
            terms = objective.terms(model, guide, (x,), {})
        found.append(torch.autograd.grad(terms.loss, leaf)[0] / len(x))
    gradients = torch.stack(found)
    assert gradients.std() < 0.1 * exact.abs()
    assert abs(gradients.mean() - exact) < 4 * gradients.std() / 20**0.5


def test_the_analytic_kl_refuses_a_guide_without_a_pathwise_gradient():
    model, guide, args = bernoulli_latents()
    with pytest.raises(ValueError, match=r"site 'z'.*Bernoulli.*Trace_ELBO"):
        ours(TraceMeanField_ELBO(), model, guide, args)


# --- the two forms against each other, and against closed forms


@pytest.mark.parametrize("make", PAIRS)
def test_the_two_forms_agree_in_expectation(make):
    model, guide, args = make()
    estimates = []
    for loss in LOSSES:
        objective = objective_of(loss(num_particles=500, vectorize_particles=True))
        objective.prepare(model, guide, args, {})
        with torch.no_grad():
            draws = [objective.terms(model, guide, args, {}).loss for _ in range(10)]
        draws = torch.stack(draws)
        estimates.append((draws.mean(), draws.var() / len(draws)))
    (a, var_a), (b, var_b) = estimates
    assert abs(a - b) < 4 * (var_a + var_b).sqrt() + 1e-9 * abs(a)


def diagonal_guide(loc: Tensor, scale: Tensor) -> Callable[[Tensor], None]:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return guide


def bounds_of(loss: Any, pair: LinearGaussian, guide: Any, x: Tensor) -> Tensor:
    objective = objective_of(loss(num_particles=2_000, vectorize_particles=True))
    objective.prepare(pair.model, guide, (x,), {})
    return torch.stack([-objective.terms(pair.model, guide, (x,), {}).loss for _ in range(20)])


@pytest.mark.parametrize("loss", LOSSES)
def test_elbo_plus_kl_to_the_posterior_is_log_evidence(loss):
    pair = LinearGaussian.random()
    x = pair.sample(6)
    loc, scale = torch.randn(6, 2).double(), torch.rand(6, 2).double() + 0.3
    draws = bounds_of(loss, pair, diagonal_guide(loc, scale), x)
    q = torch.distributions.MultivariateNormal(loc, scale_tril=torch.diag_embed(scale))
    gap = kl_divergence(q, pair.posterior(x)).sum()
    standard_error = draws.std() / len(draws) ** 0.5
    assert gap > 100 * standard_error
    assert abs(draws.mean() + gap - pair.log_evidence(x).sum()) < 4 * standard_error


def test_the_bound_of_a_diagonal_guide_is_the_closed_one():
    """docs/mathematics.md, section 11; the rate is section 4's sum, without noise."""
    pair = LinearGaussian.random()
    x = pair.sample(6)
    loc, scale = torch.randn(6, 2).double(), torch.rand(6, 2).double() + 0.3
    guide = diagonal_guide(loc, scale)
    rate = 0.5 * (loc**2 + scale**2 - 1 - 2 * scale.log()).sum()
    found = ours(TraceMeanField_ELBO(), pair.model, guide, (x,)).rate.item()
    assert found == pytest.approx(rate.item(), rel=1e-12)
    residual = x - pair.bias - loc @ pair.weight.T
    squares = residual.square().sum() + (scale**2 @ pair.weight.square().sum(0)).sum()
    variance = pair.scale**2
    closed = -x.numel() / 2 * math.log(2 * math.pi * variance) - squares / (2 * variance) - rate
    draws = bounds_of(TraceMeanField_ELBO, pair, guide, x)
    assert abs(draws.mean() - closed) < 4 * draws.std() / len(draws) ** 0.5


def test_with_the_exact_posterior_the_monte_carlo_bound_is_log_evidence_at_every_draw():
    pair = LinearGaussian.random()
    x = pair.sample(6)
    exact = pair.log_evidence(x).sum().item()
    for seed in range(3):
        loss = ours(Trace_ELBO(), pair.model, pair.guide, (x,), seed).loss
        assert -loss.item() == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_decoder_gets_no_gradient_from_the_rate(loss):
    model, guide, args = library_pair()
    decoder, encoder = list(model.parameters()), list(guide.parameters())

    def gradients(beta: float) -> tuple[Tensor, ...]:
        with pv.kl_weight(beta):
            return torch.autograd.grad(ours(loss(), model, guide, args).loss, decoder + encoder)

    without, with_ = gradients(0.0), gradients(1.0)
    for a, b in zip(without[: len(decoder)], with_, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert any(not torch.equal(a, b) for a, b in zip(without, with_, strict=True))


# --- which objective a loss selects


def test_pyros_bounds_select_ours():
    objective = objective_of(TraceMeanField_ELBO(num_particles=4, vectorize_particles=True))
    assert isinstance(objective, ELBO)
    assert objective.analytic_kl
    assert (objective.num_particles, objective.vectorize_particles) == (4, True)
    assert not objective_of(Trace_ELBO()).analytic_kl  # type: ignore[union-attr]


def test_a_subclass_of_a_bound_keeps_its_own_meaning():
    class Doubled(Trace_ELBO):
        def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().differentiable_loss(model, guide, *args, **kwargs)

    model, guide, args = library_pair()
    twice = ours(Doubled(), model, guide, args).loss.item()
    assert twice == pytest.approx(2 * ours(Trace_ELBO(), model, guide, args).loss.item())


@pytest.mark.parametrize("loss", [RenyiELBO(num_particles=2), TraceGraph_ELBO(), len])
def test_other_losses_are_left_to_themselves(loss):
    assert isinstance(objective_of(loss), Foreign)


@pytest.mark.parametrize("loss", [3, "elbo", None])
def test_what_is_no_loss_is_refused(loss):
    with pytest.raises(TypeError, match=re.escape(f"got {loss!r}")):
        objective_of(loss)


def test_terms_before_prepare_are_refused():
    with pytest.raises(RuntimeError, match=r"before ELBO\.prepare"):
        ELBO().terms(*library_pair()[:2], (), {})
