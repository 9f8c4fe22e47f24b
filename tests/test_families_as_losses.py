"""Families as losses: cross-entropies, squared and absolute errors, extreme logits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vae import families

LEVELS = 4


def test_bernoulli_is_minus_the_binary_cross_entropy():
    logits, x = 20 * torch.randn(50, 1, 9), torch.rand(50, 9).round()
    bce = F.binary_cross_entropy_with_logits(logits[:, 0], x, reduction="none").sum(-1)
    torch.testing.assert_close(families.bernoulli(logits).log_prob(x), -bce)


def test_categorical_is_minus_the_cross_entropy():
    logits, x = 20 * torch.randn(50, LEVELS, 9), torch.randint(LEVELS, (50, 9))
    # Torch's cross entropy has its classes in dimension 1, as the families have them.
    entropy = F.cross_entropy(logits, x, reduction="none").sum(-1)
    torch.testing.assert_close(families.categorical(logits).log_prob(x), -entropy)


@pytest.mark.parametrize(
    "family",
    [families.bernoulli, partial(families.binomial, total_count=16)],
    ids=["bernoulli", "binomial"],
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_logits_cost_what_they_should(family, sign):
    count = 1 if family is families.bernoulli else 16
    p = family(torch.full((1, 1), sign * 200.0))
    sure, wrong = (count, 0) if sign > 0 else (0, count)
    assert p.log_prob(torch.tensor([float(sure)])).item() == pytest.approx(0.0, abs=1e-4)
    assert p.log_prob(torch.tensor([float(wrong)])).item() == pytest.approx(-200.0 * count)


def test_the_gradient_of_a_fixed_normal_is_that_of_squared_error():
    scale = 0.3
    params = torch.randn(7, 1, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 5, dtype=torch.float64)
    loss = -families.fixed_normal(params, scale=scale).log_prob(x).sum()
    squared_error = F.mse_loss(params[:, 0], x, reduction="sum") / (2 * scale**2)
    gradients = [torch.autograd.grad(f, params)[0] for f in (loss, squared_error)]
    torch.testing.assert_close(*gradients)
    constant = 35 * np.log(scale * np.sqrt(2 * np.pi))
    assert (loss - squared_error).item() == pytest.approx(constant)


def best_of_grid(family: Callable[[Tensor], Any], x: Tensor, grid: Tensor) -> float:
    """The location on a grid under which the data (N,) have the highest log-density."""
    log_prob = family(grid[:, None, None, None]).log_prob(x[:, None]).sum(-1)
    return grid[log_prob.argmax()].item()


def test_the_optimum_of_a_fixed_normal_is_the_mean_and_of_a_fixed_laplace_the_median():
    # Skewed, so that mean and median lie far apart.
    x = torch.randn(101, dtype=torch.float64).exp()
    grid = torch.linspace(0, 4, 4001, dtype=torch.float64)
    squared = (grid[:, None] - x).square().sum(-1)
    normal = partial(families.fixed_normal, scale=0.3)
    assert best_of_grid(normal, x, grid) == grid[squared.argmin()].item()
    assert best_of_grid(normal, x, grid) == pytest.approx(x.mean().item(), abs=1e-3)
    laplace = partial(families.fixed_laplace, scale=0.3)
    assert best_of_grid(laplace, x, grid) == pytest.approx(x.median().item(), abs=1e-3)
    assert abs(x.mean() - x.median()) > 0.3
