"""What all networks need: any number of batch dimensions, and outputs of shape (P, D)."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

__all__ = ["Flat", "joined", "size_of"]


class Flat(nn.Module):
    """Run a network of one batch dimension under any number of them, and unflatten its output."""

    def __init__(self, name: str, in_dim: int, layers: nn.Sequential, out: tuple[int, ...]) -> None:
        super().__init__()
        self.name = name
        self.in_dim = in_dim
        self.out = out
        self.layers = layers

    def forward(self, *inputs: Tensor) -> Tensor:
        """Params ``(*batch, P, D)`` of inputs ``(*batch, C)``, whose sizes C add up to in_dim."""
        x = inputs[0] if len(inputs) == 1 else joined(inputs)
        if x.shape[-1] != self.in_dim:
            raise ValueError(
                f"networks.{self.name}: expected input of shape (*batch, {self.in_dim}), got "
                f"{tuple(x.shape)}; build it with {x.shape[-1]} input dimensions or check the data."
            )
        batch = x.shape[:-1]
        flat = self.layers(x.reshape(-1, self.in_dim))
        return flat.view(*batch, *self.out)


def size_of(name: str, out: tuple[int, int]) -> int:
    """The number of values in an output of shape (P, D)."""
    if not isinstance(out, tuple | list) or len(out) != 2 or min(out) < 1:
        raise ValueError(
            f"networks.{name}: expected out=(P, D), P parameters for each of D dimensions, got "
            f"{out}."
        )
    return prod(out)


def joined(inputs: Sequence[Tensor]) -> Tensor:
    """The inputs beside one another, ``(*batch, in_dim)``; their batch dimensions broadcast."""
    batch = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
    return torch.cat([x.expand(*batch, x.shape[-1]) for x in inputs], dim=-1)
