"""Discrete latents, their relaxations, and mixtures: densities against formulas and integrals."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints, kl_divergence

import pyro_vae as pv
from pyro_vae import distributions, families


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def concrete(x: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """The Concrete density as Maddison, Mnih and Teh (2017) write it, equation 10."""
    n, alpha = len(logits), logits.exp()
    power = alpha * x ** (-temperature)
    constant = math.factorial(n - 1) * temperature ** (n - 1)
    return (constant * (power / x).prod(-1) / power.sum(-1) ** n).log()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_the_relaxed_one_hot_is_the_concrete_density(temperature):
    params = torch.randn(1, 4).double()
    p = families.relaxed_one_hot(params, temperature=temperature)
    x = p.sample((200,))
    expected = concrete(x, params[0], temperature)
    torch.testing.assert_close(p.log_prob(x), expected, rtol=1e-6, atol=1e-6)


def test_the_relaxed_one_hot_integrates_to_one():
    p = families.relaxed_one_hot(torch.tensor([[0.7, -0.4]]).double(), temperature=0.8)
    u = torch.linspace(-30, 30, 20_001).double()  # log-odds resolve the corners
    x = torch.stack([torch.sigmoid(u), torch.sigmoid(-u)], -1)
    density = p.log_prob(x).exp() * x.prod(-1)
    assert torch.trapezoid(density, u).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.02, 0.1])
def test_cold_draws_keep_finite_densities_and_gradients(temperature):
    params = (5 * torch.randn(300, 1, 10)).requires_grad_()
    for family in (families.relaxed_one_hot, families.relaxed_bernoulli):
        q = family(params, temperature=temperature)
        p = family(torch.zeros(1, 10), temperature=temperature)
        z = q.rsample()
        log_ratio = q.log_prob(z) - p.log_prob(z)
        assert log_ratio.isfinite().all()
        (gradient,) = torch.autograd.grad(log_ratio.sum(), params)
        assert gradient.isfinite().all()


def test_cold_draws_are_nearly_corners_with_the_probabilities_of_the_classes():
    params = torch.tensor([[0.5, -1.0, 0.2]]).double()
    z = families.relaxed_one_hot(params, temperature=0.01).sample((40_000,))
    shares = torch.nn.functional.one_hot(z.argmax(-1), 3).double().mean(0)
    error = 4 * (0.25 / len(z)) ** 0.5
    torch.testing.assert_close(shares, params[0].softmax(0), rtol=0.0, atol=error)
    assert (z.amax(-1) > 0.99).double().mean() > 0.9


def test_one_hot_is_a_categorical():
    params = torch.randn(7, 1, 5)
    p = families.one_hot(params)
    expected = torch.log_softmax(params[:, 0], -1)
    torch.testing.assert_close(torch.stack([p.log_prob(e) for e in torch.eye(5)], -1), expected)


def test_bits_enumerate_every_pattern_once():
    p = families.bernoulli(torch.randn(7, 1, 4).double())
    patterns = p.enumerate_support()
    assert patterns.shape == (16, 7, 4)
    assert len({tuple(row.tolist()) for row in patterns[:, 0]}) == 16
    torch.testing.assert_close(p.log_prob(patterns).logsumexp(0), torch.zeros(7).double())
    assert p.enumerate_support(expand=False).shape == (16, 1, 4)
    wider = p.expand(torch.Size([3, 7]))
    assert isinstance(wider, distributions.Bits)
    assert wider.enumerate_support().shape == (16, 3, 7, 4)
    other = families.bernoulli(torch.zeros(7, 1, 4).double())
    by_sum = (p.log_prob(patterns).exp() * (p.log_prob(patterns) - other.log_prob(patterns))).sum(0)
    torch.testing.assert_close(kl_divergence(p, other), by_sum)


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        (partial(families.mixture, num_components=3), 9),
        (partial(families.mixture_of_normals, num_components=3), 9),
        (partial(families.mixture, num_components=3, family=families.fixed_laplace), 6),
    ],
)
def test_mixtures_are_the_sums_of_their_members(family: Any, rows: int):
    params = torch.randn(7, rows, 2).double()
    p = family(params)
    x = torch.randn(7, 2).double()
    members = params[:, 3:].reshape(7, 3, -1, 2)
    member = families.fixed_laplace if rows == 6 else families.normal
    each = member(members).log_prob(x[:, None])
    weights = torch.log_softmax(params[:, :3].mean(-1), -1)
    torch.testing.assert_close(p.log_prob(x), (weights + each).logsumexp(-1))
    assert p.expand(torch.Size([5, 7])).log_prob(x).shape == (5, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: families.relaxed_one_hot(torch.zeros(1, 3), temperature=0.0), "temperature > 0"),
        (lambda: families.one_hot(torch.zeros(2, 3)), r"expected params of shape \(\*batch, 1, D"),
        (lambda: families.mixture(torch.zeros(8, 3), num_components=3), r"out=\(3 \* \(1 \+ P'"),
        (lambda: families.mixture(torch.zeros(3, 3), num_components=3), r"out=\(3 \* \(1 \+ P'"),
        (lambda: families.mixture(torch.zeros(3, 3), num_components=0), "num_components >= 1"),
        (lambda: families.mixture_of_normals(torch.zeros(3, 3), num_components=1), "at least 2"),
        (lambda: families.mixture_of_normals(torch.zeros(6, 1), num_components=2), "at least 2"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_relaxations_say_where_they_live():
    p = families.relaxed_one_hot(torch.zeros(7, 1, 300), temperature=0.5)
    assert constraints.simplex.check(p.sample()).all()
    assert isinstance(p, distributions.RelaxedOneHot)
    assert p.expand(torch.Size([2, 7])).sample().shape == (2, 7, 300)
    assert pv.families.relaxed_bernoulli(torch.zeros(1, 3), temperature=0.5).event_shape == (3,)
