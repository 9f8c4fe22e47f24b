"""What depends on parameters alone is computed once: what counts as that, and its values."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_vae.graph.capture import capture
from pyro_vae.graph.constant import folded

WEIGHT = torch.randn(30, 30, dtype=torch.float64)
COUNTER = torch.zeros(())


def of_parameters(x: Tensor) -> list[Tensor]:
    norm = torch.linalg.solve(WEIGHT @ WEIGHT.T + torch.eye(30, dtype=x.dtype), WEIGHT)
    return [x @ norm.tanh(), norm.sum()]


def of_several_results(x: Tensor) -> list[Tensor]:
    values, vectors = torch.linalg.eigh(WEIGHT @ WEIGHT.T)
    return [x @ vectors.abs() * values]


def of_an_expanded_one(x: Tensor) -> list[Tensor]:
    return [x + (WEIGHT @ WEIGHT)[0].expand(len(x), 30)]


def without_products(x: Tensor) -> list[Tensor]:
    return [x @ WEIGHT.exp().T]


def with_noise(x: Tensor) -> list[Tensor]:
    return [x @ (WEIGHT @ torch.randn(30, 30, dtype=x.dtype))]


def that_counts(x: Tensor) -> list[Tensor]:
    COUNTER.add_(1)
    return [x @ (WEIGHT @ WEIGHT) + COUNTER]


def with_memory_of_its_own(x: Tensor) -> list[Tensor]:
    own = torch.empty_like(x).copy_(x).relu_()
    return [own @ (WEIGHT @ WEIGHT)]


def written_to(x: Tensor) -> list[Tensor]:
    square = WEIGHT @ WEIGHT
    square.t().add_(1.0)
    return [x @ square]


def of_arguments(x: Tensor) -> list[Tensor]:
    return [x @ (x.T @ x)]


@pytest.mark.parametrize(
    ("function", "constants"),
    [
        (of_parameters, 2),
        (of_several_results, 2),
        (of_an_expanded_one, 1),
        (without_products, 0),
        (with_noise, 0),
        (that_counts, 1),
        (with_memory_of_its_own, 1),
        (written_to, 0),
        (of_arguments, 0),
    ],
)
def test_only_what_no_argument_and_no_noise_reaches_is_computed_once(function, constants):
    x, other = torch.randn(2, 5, 30, dtype=torch.float64)
    captured = capture(function, [x], others=[other])
    reached = len(captured.reached)
    after = folded(captured)
    assert len(after.reached) - reached == constants
    for tensor in after.reached:  # as the recording of a GPU's kernels puts them back
        tensor.copy_(tensor.clone())
    for _ in range(2):
        torch.manual_seed(0)
        found = after.module(other, *after.reached)
        torch.manual_seed(0)
        for a, b in zip(found, function(other), strict=True):
            torch.testing.assert_close(a, b + (function is that_counts) * -1.0)


def test_a_lower_precision_around_it_is_not_its_own():
    x = torch.randn(5, 30)
    weight = torch.randn(30, 30)

    def product(x: Tensor) -> list[Tensor]:
        return [x + weight @ weight]

    captured: Any = capture(product, [x[:1]], others=[x[1:2]])
    with torch.autocast("cpu", torch.bfloat16):
        after = folded(captured)
    assert after.reached[-1].dtype == torch.float32
    torch.testing.assert_close(after.reached[-1], weight @ weight)
