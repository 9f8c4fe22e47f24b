"""Transforms between the layers of a flow, and out of the space of logarithms."""

from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Transform

__all__ = ["Reverse", "ToSimplex"]


class Reverse(Transform):
    """The dimensions in reverse order: what one autoregressive transform sees last, the next first.

    Example:
        >>> pv.distributions.Reverse()(torch.arange(3))
        tensor([2, 1, 0])
    """

    domain = codomain = constraints.real_vector
    bijective = True
    volume_preserving = True

    def __init__(self, cache_size: int = 1) -> None:
        # With a cache the inverse finds the very tensor that the transform before it has cached.
        super().__init__(cache_size=cache_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reverse)

    def __hash__(self) -> int:
        return hash(Reverse)

    def _call(self, x: Tensor) -> Tensor:
        return x.flip(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return y.flip(-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Zero, ``(*batch,)``."""
        return x.new_zeros(x.shape[:-1])


class ToSimplex(Transform):
    """The exponential, of the logarithms of a point of the simplex.

    What would underflow is kept at the smallest number, so that its logarithm exists.

    Example:
        >>> pv.distributions.ToSimplex()(torch.tensor([0.5, 0.5]).log())
        tensor([0.5000, 0.5000])
    """

    domain = constraints.real_vector
    codomain: Any = constraints.simplex
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ToSimplex)

    def __hash__(self) -> int:
        return hash(ToSimplex)

    def _call(self, x: Tensor) -> Tensor:
        # Not the exponential: far from zero, logarithms of float32 add up to one but roughly.
        return x.softmax(-1).clamp_min(torch.finfo(x.dtype).tiny)

    def _inverse(self, y: Tensor) -> Tensor:
        return y.log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of the logarithms, ``(*batch,)``."""
        return x.sum(-1)
