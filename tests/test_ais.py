"""Annealed importance sampling: exact where it must be, honest elsewhere, for any pair."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import torch
from helpers import LinearGaussian, library_pair, masked_pair, vampprior_pair
from torch import Tensor
from weights import WEIGHABLE

import pyro_vae as pv
from pyro_vae.evidence import target
from pyro_vae.evidence.particles import Pair
from pyro_vae.evidence.path import resting, sigmoid_schedule

# --- exact values


def test_chains_from_the_exact_posterior_have_the_weight_log_p_whatever_they_do():
    pair = LinearGaussian.random()
    x = pair.sample(7)
    estimate = pv.ais(pair.model, pair.guide, x, num_chains=5, temperatures=12, leapfrog_steps=2)
    torch.testing.assert_close(estimate.value, pair.log_evidence(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(estimate.elbo, estimate.value, rtol=0, atol=1e-10)
    assert estimate.acceptance.min() > 0.1  # they moved


def test_one_step_is_importance_sampling():
    model, guide, (x,) = library_pair()
    estimate = pv.ais(model, guide, x, num_chains=13, temperatures=1, seed=4)
    pair = Pair(model, guide, (x,), None)
    with resting(pair, "ais", 4, 0, "up", 0):
        log_w = pair.log_weights(13, 13)
    exact = torch.logsumexp(log_w, 0) - math.log(13)
    torch.testing.assert_close(estimate.value, exact, rtol=0, atol=1e-10)
    assert estimate.num_moves == 0
    assert estimate.gradients == 13 * len(x)


@pytest.mark.parametrize("inflation", [0.3, 2.0])
def test_it_finds_log_p_from_a_guide_that_is_too_narrow_or_too_wide(inflation):
    pair = LinearGaussian.random(dim=8, latent_dim=4)
    x = pair.sample(100)

    def guide(x: Tensor) -> None:
        pair.guide(x, inflation)

    estimate = pv.ais(pair.model, guide, x, num_chains=16, temperatures=120, leapfrog_steps=2)
    error = (estimate.value - pair.log_evidence(x)) / estimate.standard_error
    assert (error.abs() > 4).double().mean() <= 0.01
    assert abs(error.mean()) < 4 / math.sqrt(100) + 0.1
    assert estimate.standard_error.median() < 0.3


def test_it_finds_log_p_from_the_prior():
    pair = LinearGaussian.random(dim=8, latent_dim=4, scale=0.3)
    x = pair.sample(50)
    estimate = pv.ais(pair.model, pv.from_prior(pair.model), x, temperatures=120, leapfrog_steps=3)
    exact = pair.log_evidence(x)
    assert abs(estimate.mean - exact.mean().item()) < 4 * estimate.mean_standard_error
    simple = pv.log_evidence(pair.model, pv.from_prior(pair.model), x, num_particles=120 * 16)
    gap = (estimate.value - exact).abs().median()
    assert gap < (simple.value - exact).abs().median() / 2


def test_more_temperatures_bring_the_bound_closer():
    pair = LinearGaussian.random(dim=8, latent_dim=4)
    x = pair.sample(100)
    options: dict[str, Any] = {"num_chains": 8, "leapfrog_steps": 2}
    start = pv.from_prior(pair.model)
    bounds = [
        pv.ais(pair.model, start, x, temperatures=t, **options).elbo.mean() for t in (4, 12, 40)
    ]
    assert bounds[0] < bounds[1] < bounds[2] < pair.log_evidence(x).mean()


# --- latents of every kind


def integrated(log_joint: Any, low: float, high: float) -> float:
    value, _ = scipy.integrate.quad(
        lambda z: math.exp(log_joint(torch.tensor(z).double()).item()), low, high, limit=200
    )
    return math.log(value)


CONSTRAINED: dict[str, tuple[Any, float, float]] = {
    "positive": (dist.Gamma(torch.tensor(2.0).double(), 1.5), 0.0, math.inf),
    "unit interval": (dist.Beta(torch.tensor(2.0).double(), 3.0), 0.0, 1.0),
    "interval": (dist.Uniform(torch.tensor(-1.0).double(), 2.0), -1.0, 2.0),
    "mixture": (
        dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([0.3, 0.7]).double()),
            dist.Normal(torch.tensor([-2.0, 1.0]).double(), 0.5),
        ),
        -math.inf,
        math.inf,
    ),
}


@pytest.mark.parametrize("kind", CONSTRAINED)
def test_constrained_latents_move_through_their_transforms(kind):
    prior, low, high = CONSTRAINED[kind]
    x = torch.tensor([0.2, 1.4]).double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    estimate = pv.ais(
        model, pv.from_prior(model), x, num_chains=100, temperatures=30, leapfrog_steps=3
    )
    for value, error, datum in zip(estimate.value, estimate.standard_error, x, strict=True):

        def log_joint(z: Tensor, datum: Tensor = datum) -> Tensor:
            return prior.log_prob(z) + dist.Normal(z, 0.5).log_prob(datum)

        assert abs(value - integrated(log_joint, low, high)) < 4 * error + 1e-3


def test_a_simplex_moves_too():
    """Dirichlet and multinomial: log p(x) is known."""
    counts = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 6.0]]).double()
    alpha = torch.tensor([1.5, 0.8, 2.0]).double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Dirichlet(alpha))
            pyro.sample("x", dist.Multinomial(1, probs=p, validate_args=False), obs=x)

    exact = torch.stack(
        [dist.DirichletMultinomial(alpha, int(n.sum())).log_prob(n) for n in counts]
    )
    estimate = pv.ais(
        model, pv.from_prior(model), counts, num_chains=100, temperatures=30, leapfrog_steps=3
    )
    assert ((estimate.value - exact).abs() < 4 * estimate.standard_error + 1e-3).all()


@pytest.mark.parametrize("make", WEIGHABLE, ids=lambda make: make.__name__)
def test_it_agrees_with_importance_weighting_on_any_pair(make):
    pyro.set_rng_seed(0)
    model, guide, args = make()
    plate = "data" if make is masked_pair else None
    options: dict[str, Any] = {"temperatures": 8, "leapfrog_steps": 2, "data_plate": plate}
    annealed = pv.ais(model, guide, *args, num_chains=32, **options)
    weighted = pv.log_evidence(model, guide, *args, num_particles=20_000, data_plate=plate)
    error = (annealed.standard_error.square() + weighted.standard_error.square()).sqrt()
    assert ((annealed.value - weighted.value).abs() < 4.5 * error).all()
    assert annealed.data == weighted.data


def test_discrete_latents_of_the_model_are_summed_out():
    """Two components with means -3 and 3, and a latent shift."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + 6 * k - 3, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    x = torch.tensor([-2.5, 0.1, 3.2]).double()
    one, other = (dist.Normal(x.new_tensor(m), 1.25**0.5).log_prob(x) for m in (-3.0, 3.0))
    exact = torch.logaddexp(one + math.log(0.7), other + math.log(0.3))
    estimate = pv.ais(model, guide, x, num_chains=100, temperatures=30, leapfrog_steps=3)
    assert ((estimate.value - exact).abs() < 4 * estimate.standard_error + 1e-3).all()


# --- options


def test_the_schedule_rises_slowly_at_both_ends():
    betas = sigmoid_schedule(10)
    assert betas[0] == 0
    assert betas[-1] == 1
    torch.testing.assert_close(betas, 1 - betas.flip(0))
    steps = betas.diff()
    assert (steps[:5].diff() > 0).all()


def test_a_schedule_of_ones_own():
    pair = LinearGaussian.random()
    x = pair.sample(3)
    betas = torch.tensor([0.0, 0.1, 0.5, 1.0])
    estimate = pv.ais(pair.model, pair.guide, x, num_chains=2, temperatures=betas)
    assert estimate.num_moves == 2


def test_seeds_repeat_and_leave_the_callers_noise_alone():
    model, guide, (x,) = library_pair()
    options: dict[str, Any] = {"num_chains": 20, "temperatures": 4, "leapfrog_steps": 2}
    before = torch.get_rng_state()
    one = pv.ais(model, guide, x, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.value, pv.ais(model, guide, x, **options).value)
    assert not torch.equal(one.value, pv.ais(model, guide, x, seed=1, **options).value)


def test_progress_adds_up():
    model, guide, (x,) = library_pair()
    done: list[int] = []
    pv.ais(model, guide, x, num_chains=20, temperatures=6, leapfrog_steps=1, progress=done.append)
    # Five moves of 20 chains; before them one place, four times the pilot's moves, of 16 chains.
    assert sum(done) == len(x) * (20 * 5 + 16 * 4 * 5)


def test_parameters_get_no_gradient_and_modules_keep_their_mode():
    model, guide, (x,) = library_pair()
    model.train()
    pv.ais(model, guide, x, num_chains=2, temperatures=3)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("make", "constant"), [(library_pair, False), (vampprior_pair, True)])
def test_the_compiled_chains_are_the_uncompiled_ones(make, constant, monkeypatch):
    captured: list[Any] = []

    def interpret(graph: Any, static: Any, data: Any) -> Any:
        captured.append(graph)
        return torch.no_grad()(lambda given: graph.module(*static, *given, *graph.reached))

    monkeypatch.setattr(target, "lower", interpret)
    model, guide, (x,) = make()
    x = torch.cat([x] * 30)  # blocks of 100, 100 and 10
    options: dict[str, Any] = {"num_chains": 18, "temperatures": 5, "leapfrog_steps": 2}
    compiled = pv.ais(model, guide, x, compile=True, **options)
    eager = pv.ais(model, guide, x, compile=False, **options)
    assert len(captured) == 4  # two shapes of chains, two of data
    for graph in captured:
        names = [node.name for node in graph.module.graph.nodes if node.op == "placeholder"]
        assert any(name.startswith("constant_") for name in names) == constant
    torch.testing.assert_close(compiled.value, eager.value, rtol=0, atol=1e-10)
    torch.testing.assert_close(compiled.acceptance, eager.acceptance, rtol=0, atol=1e-10)


def test_a_compiled_kernel_is_the_pair():
    model, guide, (x,) = library_pair()
    options: dict[str, Any] = {"num_chains": 3, "temperatures": 4, "leapfrog_steps": 2}
    compiled = pv.ais(model, guide, x, compile=True, **options)
    eager = pv.ais(model, guide, x, compile=False, **options)
    torch.testing.assert_close(compiled.value, eager.value, rtol=0, atol=1e-9)
