"""Random values of a kind, in float64."""

import torch
from torch import Tensor


def reals(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64)


def units(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def counts(*shape: int) -> Tensor:
    return torch.poisson(2 * torch.ones(*shape, dtype=torch.float64))
