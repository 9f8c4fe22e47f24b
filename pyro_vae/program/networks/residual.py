r"""Residual networks: blocks that add to what they are given, :math:`h + f(h)`.

None of them normalises over the minibatch: the params of one datum, and with them its evidence,
would depend on the other data that happen to be in it.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from pyro_vae.program.networks.flat import Flat, size_of
from pyro_vae.program.networks.images import downward, upward
from pyro_vae.program.recipe import recorded

__all__ = ["residual_conv_decoder", "residual_conv_encoder", "residual_mlp"]


@recorded
def residual_mlp(
    in_dim: int,
    out: tuple[int, int],
    *,
    hidden_dim: int = 400,
    depth: int = 2,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Module:
    r"""Fully connected residual blocks between two affine maps.

    .. math:: h_0 = A x + a, \quad h_{l+1} = h_l + W_2\,s(W_1\,s(h_l) + b_1) + b_2, \quad
              \text{params} = B\,s(h_L) + b

    Without batch normalisation, which would make the evidence of one datum depend on the others.

    Args:
        in_dim: Size of the last dimension of the input (of all inputs together).
        out: ``(P, D)``, what the family at the other end takes.
        hidden_dim: Width H of the blocks.
        depth: Number of blocks L, each of ``2 * (H * H + H)`` parameters.
        activation: Makes the module s, e.g. ``torch.nn.SiLU``.

    Returns:
        A module ``(*batch, in_dim) -> (*batch, P, D)``.

    Raises:
        ValueError: ``hidden_dim`` or ``depth`` is not positive.

    Reference: He et al., "Identity mappings in deep residual networks" (2016).

    Example:
        >>> pv.networks.residual_mlp(784, (2, 50), depth=4)(torch.zeros(13, 7, 784)).shape
        torch.Size([13, 7, 2, 50])
    """
    _check_depth("residual_mlp", depth)
    if hidden_dim < 1:
        raise ValueError(f"networks.residual_mlp: expected hidden_dim >= 1, got {hidden_dim}.")

    def layer() -> nn.Module:
        return nn.Linear(hidden_dim, hidden_dim)

    blocks = [_Residual(activation(), layer(), activation(), layer()) for _ in range(depth)]
    last = nn.Linear(hidden_dim, size_of("residual_mlp", out))
    layers = nn.Sequential(nn.Linear(in_dim, hidden_dim), *blocks, activation(), last)
    return Flat("residual_mlp", in_dim, layers, tuple(out))


@recorded
def residual_conv_encoder(
    image_shape: tuple[int, int],
    out: tuple[int, int],
    *,
    channels: Sequence[int] = (32, 64),
    depth: int = 1,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Module:
    r"""``conv_encoder`` with residual blocks of 3x3 convolutions at each size.

    .. math:: h_{l+1} = h_l + W_2 * s(W_1 * s(h_l) + b_1) + b_2

    Without batch normalisation, which would make the evidence of one datum depend on the others.

    Args:
        image_shape: ``(height, width)`` of the flattened input image.
        out: ``(P, D)``, what the family at the other end takes.
        channels: Number of feature maps C of each 4x4 convolution of stride 2, and of the blocks
            after it.
        depth: Number of blocks after each of them, each of ``2 * (9 * C * C + C)`` parameters.
        activation: Makes the module s.

    Returns:
        A module ``(*batch, height * width) -> (*batch, P, D)``.

    Raises:
        ValueError: ``depth`` is not positive; there are no channels, or more than the image can be
            halved.

    Reference: He et al., "Identity mappings in deep residual networks" (2016).

    Example:
        >>> pv.networks.residual_conv_encoder((28, 28), (2, 50))(torch.zeros(3, 7, 784)).shape
        torch.Size([3, 7, 2, 50])
    """
    name = "residual_conv_encoder"
    _check_depth(name, depth)
    return downward(name, image_shape, out, channels, activation, _convolutions(depth, activation))


@recorded
def residual_conv_decoder(
    in_dim: int,
    out: tuple[int, int],
    *,
    image_shape: tuple[int, int],
    channels: Sequence[int] = (64, 32),
    depth: int = 1,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Module:
    """``conv_decoder`` with residual blocks of 3x3 convolutions at each size.

    The blocks are those of ``residual_conv_encoder``. Without batch normalisation, which would
    make the evidence of one datum depend on the others.

    Args:
        in_dim: Size of the last dimension of the input (of all inputs together).
        out: ``(P, D)`` with ``D = height * width``; each of the ``P`` parameters is a feature
            map of the last layer.
        image_shape: ``(height, width)`` of the image.
        channels: Number of feature maps C of the blocks, and before each 4x4 transposed
            convolution of stride 2.
        depth: Number of blocks before each of them, each of ``2 * (9 * C * C + C)`` parameters.
        activation: Makes the module s.

    Returns:
        A module ``(*batch, in_dim) -> (*batch, P, height * width)``.

    Raises:
        ValueError: ``depth`` is not positive; ``D`` is not ``height * width``; there are no
            channels, or more than the image can be halved.

    Reference: He et al., "Identity mappings in deep residual networks" (2016).

    Example:
        >>> network = pv.networks.residual_conv_decoder(50, (1, 784), image_shape=(28, 28))
        >>> network(torch.zeros(3, 7, 50)).shape
        torch.Size([3, 7, 1, 784])
    """
    name = "residual_conv_decoder"
    _check_depth(name, depth)
    blocks = _convolutions(depth, activation)
    return upward(name, in_dim, out, image_shape, channels, activation, blocks)


class _Residual(nn.Module):
    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.branch(h)


def _convolutions(
    depth: int, activation: Callable[[], nn.Module]
) -> Callable[[int], list[nn.Module]]:
    def blocks(wide: int) -> list[nn.Module]:
        def layer() -> nn.Module:
            return nn.Conv2d(wide, wide, 3, padding=1)

        return [_Residual(activation(), layer(), activation(), layer()) for _ in range(depth)]

    return blocks


def _check_depth(name: str, depth: int) -> None:
    if depth < 1:
        raise ValueError(
            f"networks.{name}: expected depth >= 1 residual blocks, got {depth}; without any it is "
            f"networks.{name.removeprefix('residual_')}."
        )
