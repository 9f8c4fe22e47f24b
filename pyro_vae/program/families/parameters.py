"""What all families need: their parameters out of one tensor, and maps to positive numbers."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ScaleMap", "exp", "exp_half", "inverse_softplus", "softplus", "unpack"]

ScaleMap = Callable[[Tensor], Tensor]


def softplus(unconstrained: Tensor) -> Tensor:
    r"""The scale :math:`\log(1 + e^u)`: linear for large ``u``, so one step can't blow it up."""
    return F.softplus(unconstrained)


def exp_half(unconstrained: Tensor) -> Tensor:
    r"""The scale :math:`e^{u/2}`: ``u`` is the log-variance, as in the AEVB paper's code."""
    return (0.5 * unconstrained).exp()


def exp(unconstrained: Tensor) -> Tensor:
    r"""The scale :math:`e^u`, for what multiplies: rates and dispersions of counts."""
    return unconstrained.exp()


def inverse_softplus(scale: float) -> float:
    r"""The unconstrained value whose ``softplus`` is this: :math:`\log(e^s - 1)`.

    Args:
        scale: A positive number.

    Example:
        >>> round(pv.families.inverse_softplus(1.0), 4)
        0.5413
    """
    if not scale > 0:
        raise ValueError(f"families.inverse_softplus: expected a scale > 0, got {scale}.")
    return scale + math.log(-math.expm1(-scale))


def unpack(family: str, params: Tensor, *names: str) -> tuple[Tensor, ...]:
    """The P parameters of a family out of ``(*batch, P, D)``, each ``(*batch, D)``."""
    if params.dim() < 2 or params.shape[-2] != len(names):
        dim = params.shape[-1] if params.dim() else "D"
        raise ValueError(
            f"families.{family}: expected params of shape (*batch, {len(names)}, D), which hold "
            f"{' and '.join(names)}, got {tuple(params.shape)}; build the network with "
            f"out=({len(names)}, {dim})."
        )
    return torch.unbind(params, dim=-2)
