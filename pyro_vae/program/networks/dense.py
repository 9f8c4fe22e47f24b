"""Fully connected networks."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from torch import Tensor, nn

from pyro_vae.program.networks.flat import Flat, joined, size_of
from pyro_vae.program.recipe import recorded

__all__ = ["gated_mlp", "masked_mlp", "mlp"]


@recorded
def mlp(
    in_dim: int,
    out: tuple[int, int],
    *,
    hidden_dims: Sequence[int] = (400,),
    activation: Callable[[], nn.Module] = nn.Softplus,
) -> nn.Module:
    """Fully connected layers with an activation between them.

    Args:
        in_dim: Size of the last dimension of the input (of all inputs together).
        out: ``(P, D)``, what the family at the other end takes, e.g. ``(2, 50)`` for a normal
            over 50 dimensions.
        hidden_dims: Width of each hidden layer; ``()`` gives an affine map.
        activation: Makes the module between two layers, e.g. ``torch.nn.ReLU``.

    Returns:
        A module ``(*batch, in_dim) -> (*batch, P, D)``.

    Example:
        >>> pv.networks.mlp(784, (2, 50))(torch.zeros(13, 7, 784)).shape
        torch.Size([13, 7, 2, 50])
    """
    widths = [in_dim, *hidden_dims]
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(widths):
        layers += [nn.Linear(narrow, wide), activation()]
    layers.append(nn.Linear(widths[-1], size_of("mlp", out)))
    return Flat("mlp", in_dim, nn.Sequential(*layers), tuple(out))


@recorded
def gated_mlp(
    in_dim: int, out: tuple[int, int], *, hidden_dims: Sequence[int] = (300, 300)
) -> nn.Module:
    r"""Gated fully connected layers, :math:`h = (A x + a) \odot \sigma(B x + b)`.

    The layer of Tomczak and Welling, "VAE with a VampPrior" (2018), after Dauphin et al.,
    "Language modeling with gated convolutional networks" (2017).

    Args:
        in_dim: Size of the last dimension of the input (of all inputs together).
        out: ``(P, D)``, what the family at the other end takes.
        hidden_dims: Width of each gated layer.

    Returns:
        A module ``(*batch, in_dim) -> (*batch, P, D)``.

    Example:
        >>> pv.networks.gated_mlp(40, (1, 784))(torch.zeros(7, 40)).shape
        torch.Size([7, 1, 784])
    """
    widths = [in_dim, *hidden_dims]
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(widths):
        layers += [nn.Linear(narrow, 2 * wide), nn.GLU(dim=-1)]
    layers.append(nn.Linear(widths[-1], size_of("gated_mlp", out)))
    return Flat("gated_mlp", in_dim, nn.Sequential(*layers), tuple(out))


@recorded
def masked_mlp(
    dim: int,
    in_dim: int,
    num_params: int,
    *,
    hidden_dims: Sequence[int] | None = None,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Module:
    """Masked layers for ``Autoregressive``: params of dimension d see x below d, and the inputs.

    Args:
        dim: Number of dimensions D of x.
        in_dim: Size of the last dimension of the inputs beside x, together; 0 for none.
        num_params: Number of parameters P for each dimension.
        hidden_dims: Width of each hidden layer, at least D; one of 2 D by default.
        activation: Makes the module between two layers.

    Returns:
        A module ``(x (*batch, D), *inputs) -> (*batch, P, D)``.

    Raises:
        ValueError: A hidden layer is narrower than D.

    Reference: Germain et al., "MADE: masked autoencoder for distribution estimation" (2015).

    Example:
        >>> pv.networks.masked_mlp(9, 2, 1)(torch.zeros(7, 9), torch.zeros(7, 2)).shape
        torch.Size([7, 1, 9])
    """
    widths = (2 * dim,) if hidden_dims is None else tuple(hidden_dims)
    if min(widths, default=dim) < dim or num_params < 1 or dim < 1:
        raise ValueError(
            f"networks.masked_mlp: expected hidden layers of at least {dim} units, as many as "
            f"there are dimensions, and num_params >= 1, got {widths} and {num_params}."
        )
    return _Masked(dim, in_dim, num_params, widths, activation())


class _Masked(nn.Module):
    def __init__(
        self, dim: int, in_dim: int, num_params: int, widths: tuple[int, ...], between: nn.Module
    ) -> None:
        super().__init__()
        order = torch.arange(dim)
        sizes = {"param_dims": [num_params], "permutation": order, "nonlinearity": between}
        self.layers: nn.Module = (
            ConditionalAutoRegressiveNN(dim, in_dim, list(widths), **sizes)
            if in_dim
            else AutoRegressiveNN(dim, list(widths), **sizes)
        )

    def forward(self, x: Tensor, *inputs: Tensor) -> Tensor:
        given = [] if not inputs else [inputs[0] if len(inputs) == 1 else joined(inputs)]
        params = self.layers(x, *given)
        return params if params.dim() > x.dim() else params.unsqueeze(-2)
