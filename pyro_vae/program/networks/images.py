"""Convolutional networks."""

from collections.abc import Callable, Sequence
from math import prod

from torch import nn

from pyro_vae.program.networks.flat import Flat, size_of
from pyro_vae.program.recipe import recorded

__all__ = ["conv_decoder", "conv_encoder", "downward", "upward"]

Layers = list[nn.Module]


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
    return downward("conv_encoder", image_shape, out, channels, activation, lambda _: [])


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
    return upward("conv_decoder", in_dim, out, image_shape, channels, activation, lambda _: [])


def downward(
    name: str,
    image_shape: tuple[int, int],
    out: tuple[int, int],
    channels: Sequence[int],
    activation: Callable[[], nn.Module],
    at_each_size: Callable[[int], Layers],
) -> nn.Module:
    """An encoder of images, with further layers for so many feature maps at each size."""
    height, width = _halved(image_shape, len(channels))[-1]
    layers: Layers = [nn.Unflatten(-1, (1, *image_shape))]
    for narrow, wide in zip([1, *channels[:-1]], channels, strict=True):
        layers.append(nn.Conv2d(narrow, wide, 4, stride=2, padding=1))
        layers += [*at_each_size(wide), activation()]
    layers += [nn.Flatten(), nn.Linear(channels[-1] * height * width, size_of(name, out))]
    return Flat(name, prod(image_shape), nn.Sequential(*layers), tuple(out))


def upward(
    name: str,
    in_dim: int,
    out: tuple[int, int],
    image_shape: tuple[int, int],
    channels: Sequence[int],
    activation: Callable[[], nn.Module],
    at_each_size: Callable[[int], Layers],
) -> nn.Module:
    """A decoder to images, with further layers for so many feature maps at each size."""
    if size_of(name, out) != out[0] * prod(image_shape):
        raise ValueError(
            f"networks.{name}: out={tuple(out)} asks for {out[1]} dimensions, but "
            f"image_shape={tuple(image_shape)} has {prod(image_shape)} pixels; make them agree."
        )
    sizes = _halved(image_shape, len(channels))[::-1]
    layers: Layers = [
        nn.Linear(in_dim, channels[0] * prod(sizes[0])),
        nn.Unflatten(-1, (channels[0], *sizes[0])),
    ]
    narrower = [*channels[1:], out[0]]
    for wide, narrow, small, large in zip(channels, narrower, sizes, sizes[1:], strict=False):
        odd = (large[0] - 2 * small[0], large[1] - 2 * small[1])
        layers += [*at_each_size(wide), activation()]
        layers.append(nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1, output_padding=odd))
    return Flat(name, in_dim, nn.Sequential(*layers), tuple(out))


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
