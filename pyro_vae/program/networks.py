r"""Networks: plain ``nn.Module`` s from inputs to the parameters of a distribution.

Every network maps ``(*batch, in_dim)`` to ``(*batch, P, D)`` for any number of batch
dimensions, because the particle plate of an estimator adds one on the left. A network of
your own only has to do the same.

Several inputs (``network(z, y)``) are broadcast against each other and joined along the
last dimension; ``in_dim`` is then the total.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from pyro_vae.program.recipe import recorded

__all__ = ["conv_decoder", "conv_encoder", "gated_mlp", "mlp", "rescaled"]


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
    layers.append(nn.Linear(widths[-1], _size("mlp", out)))
    return _Flat("mlp", in_dim, nn.Sequential(*layers), tuple(out))


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
    layers.append(nn.Linear(widths[-1], _size("gated_mlp", out)))
    return _Flat("gated_mlp", in_dim, nn.Sequential(*layers), tuple(out))


@recorded
def conv_encoder(
    image_shape: tuple[int, int],
    out: tuple[int, int],
    *,
    channels: Sequence[int] = (32, 64),
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Module:
    """Convolutions that halve an image at each layer, then an affine map.

    Args:
        image_shape: ``(height, width)`` of the flattened input image.
        out: ``(P, D)``, what the family at the other end takes.
        channels: Number of feature maps of each 4x4 convolution of stride 2.
        activation: Makes the module after each convolution.

    Returns:
        A module ``(*batch, height * width) -> (*batch, P, D)``.

    Raises:
        ValueError: There are no channels, or more than the image can be halved.

    Example:
        >>> pv.networks.conv_encoder((28, 28), (2, 50))(torch.zeros(3, 7, 784)).shape
        torch.Size([3, 7, 2, 50])
    """
    height, width = _halved(image_shape, len(channels))[-1]
    layers: list[nn.Module] = [nn.Unflatten(-1, (1, *image_shape))]
    for narrow, wide in zip([1, *channels[:-1]], channels, strict=True):
        layers += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), activation()]
    layers += [nn.Flatten(), nn.Linear(channels[-1] * height * width, _size("conv_encoder", out))]
    return _Flat("conv_encoder", prod(image_shape), nn.Sequential(*layers), tuple(out))


@recorded
def conv_decoder(
    in_dim: int,
    out: tuple[int, int],
    *,
    image_shape: tuple[int, int],
    channels: Sequence[int] = (64, 32),
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Module:
    """An affine map, then transposed convolutions that double an image at each layer.

    Args:
        in_dim: Size of the last dimension of the input (of all inputs together).
        out: ``(P, D)`` with ``D = height * width``; each of the ``P`` parameters is a feature
            map of the last layer.
        image_shape: ``(height, width)`` of the image.
        channels: Number of feature maps before each 4x4 transposed convolution of stride 2.
        activation: Makes the module before each transposed convolution.

    Returns:
        A module ``(*batch, in_dim) -> (*batch, P, height * width)``.

    Raises:
        ValueError: ``D`` is not ``height * width``; there are no channels, or more than the image
            can be halved.

    Example:
        >>> network = pv.networks.conv_decoder(50, (1, 784), image_shape=(28, 28))
        >>> network(torch.zeros(3, 7, 50)).shape
        torch.Size([3, 7, 1, 784])
    """
    if _size("conv_decoder", out) != out[0] * prod(image_shape):
        raise ValueError(
            f"networks.conv_decoder: out={tuple(out)} asks for {out[1]} dimensions, but "
            f"image_shape={tuple(image_shape)} has {prod(image_shape)} pixels; make them agree."
        )
    sizes = _halved(image_shape, len(channels))[::-1]
    layers: list[nn.Module] = [
        nn.Linear(in_dim, channels[0] * prod(sizes[0])),
        nn.Unflatten(-1, (channels[0], *sizes[0])),
    ]
    narrower = [*channels[1:], out[0]]
    for wide, narrow, small, large in zip(channels, narrower, sizes, sizes[1:], strict=False):
        odd = (large[0] - 2 * small[0], large[1] - 2 * small[1])
        layers += [
            activation(),
            nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1, output_padding=odd),
        ]
    return _Flat("conv_decoder", in_dim, nn.Sequential(*layers), tuple(out))


@recorded
def rescaled(network: nn.Module, *, loc: float = 0.0, scale: float = 1.0) -> nn.Module:
    """Show a network its first input shifted and scaled: ``network((x - loc) / scale, ...)``.

    Grey levels 0..255 train badly as they are; the likelihood still scores the levels.

    Args:
        network: Any module ``(*batch, in_dim) -> (*batch, P, D)``.
        loc: What is subtracted.
        scale: What is divided by.

    Returns:
        A module of the same shapes.

    Example:
        >>> network = pv.networks.rescaled(pv.networks.mlp(64, (2, 8)), scale=16.0)
        >>> network(torch.full((5, 64), 16.0)).shape
        torch.Size([5, 2, 8])
    """
    return _Rescaled(network, loc, scale)


class _Flat(nn.Module):
    """Run a network of one batch dimension under any number of them, and unflatten its output."""

    def __init__(self, name: str, in_dim: int, layers: nn.Sequential, out: tuple[int, ...]) -> None:
        super().__init__()
        self.name = name
        self.in_dim = in_dim
        self.out = out
        self.layers = layers

    def forward(self, *inputs: Tensor) -> Tensor:
        x = inputs[0] if len(inputs) == 1 else _joined(inputs)
        if x.shape[-1] != self.in_dim:
            raise ValueError(
                f"networks.{self.name}: expected input of shape (*batch, {self.in_dim}), got "
                f"{tuple(x.shape)}; build it with {x.shape[-1]} input dimensions or check the data."
            )
        batch = x.shape[:-1]
        flat = self.layers(x.reshape(-1, self.in_dim))
        return flat.view(*batch, *self.out)


class _Rescaled(nn.Module):
    def __init__(self, network: nn.Module, loc: float, scale: float) -> None:
        super().__init__()
        self.network = network
        self.loc = loc
        self.scale = scale

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.network((x - self.loc) / self.scale, *context)


def _size(name: str, out: tuple[int, int]) -> int:
    """The number of values in an output of shape (P, D)."""
    if not isinstance(out, tuple | list) or len(out) != 2 or min(out) < 1:
        raise ValueError(
            f"networks.{name}: expected out=(P, D), P parameters for each of D dimensions, got "
            f"{out}."
        )
    return prod(out)


def _joined(inputs: Sequence[Tensor]) -> Tensor:
    batch = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
    return torch.cat([x.expand(*batch, x.shape[-1]) for x in inputs], dim=-1)


def _halved(shape: tuple[int, int], times: int) -> list[tuple[int, int]]:
    """The image's size before and after each 4x4 convolution of stride 2 and padding 1."""
    if times < 1:
        raise ValueError("networks: channels is empty; give at least one number of feature maps.")
    sizes = [(shape[0], shape[1])]
    for _ in range(times):
        height, width = sizes[-1]
        sizes.append((height // 2, width // 2))
    if min(sizes[-1]) < 1:
        raise ValueError(
            f"networks: an image of shape {tuple(shape)} cannot be halved {times} times; "
            "give fewer channels."
        )
    return sizes
