"""Networks around networks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_vae.program.recipe import recorded

__all__ = ["first", "rescaled", "with_free", "without_missing"]


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


@recorded
def first(network: nn.Module) -> nn.Module:
    """Show a network its first input alone: ``network(z)``, whatever comes with it.

    ``Model`` hands the likelihood all that the pair is called with, also what is for the guide
    alone, such as the index of ``per_datum``.

    Args:
        network: Any module ``(*batch, in_dim) -> (*batch, P, D)``.

    Returns:
        A module ``(z (*batch, in_dim), *others) -> (*batch, P, D)``.

    Example:
        >>> network = pv.networks.first(pv.networks.mlp(8, (1, 64)))
        >>> network(torch.zeros(5, 8), torch.arange(5)[:, None]).shape
        torch.Size([5, 1, 64])
    """
    return _First(network)


@recorded
def without_missing(network: nn.Module) -> nn.Module:
    r"""Hide missing entries from an encoder: ``network(where(mask, x, 0), mask, *context)``.

    The network sees zeros in their place, and the mask, which tells such zeros from others.
    Whatever stands in missing entries, NaN too, reaches neither params nor gradients.

    Args:
        network: Any module ``(*batch, 2 * D + C) -> (*batch, P, Z)``, of context of size C.

    Returns:
        A module ``(x (*batch, D), mask (*batch, D), *context) -> (*batch, P, Z)``; the mask is
        bool, or 0 and 1.

    Reference: Nazábal et al., "Handling incomplete heterogeneous data using VAEs" (2020).

    Example:
        >>> network = pv.networks.without_missing(pv.networks.mlp(2 * 3, (2, 8)))
        >>> x = torch.tensor([1.0, torch.nan, 0.0])
        >>> network(x, x.isfinite()).isfinite().all()
        tensor(True)
    """
    return _WithoutMissing(network)


@recorded
def with_free(network: nn.Module, start: Sequence[float], *, dim: int = 1) -> nn.Module:
    """Give a family parameters that are learned but see no input, below those of a network.

    With ``families.normal`` after a network of ``out=(1, D)``: one learned scale for all pixels
    (``dim=1``), or one for each (``dim=D``).

    Args:
        network: Any module ``(*batch, in_dim) -> (*batch, P, D)``.
        start: The values at which the free parameters start, one for each.
        dim: 1 to share them among all dimensions, or D.

    Returns:
        A module ``(*batch, in_dim) -> (*batch, P + len(start), D)``.

    Reference: Rybkin, Daniilidis and Levine, "Simple and effective VAE training with calibrated
    decoders" (2021).

    Example:
        >>> network = pv.networks.with_free(pv.networks.mlp(8, (1, 64)), [0.5413])
        >>> network(torch.zeros(5, 8)).shape
        torch.Size([5, 2, 64])
    """
    return _WithFree(network, torch.tensor(list(start)).unsqueeze(-1).repeat(1, dim))


class _Rescaled(nn.Module):
    def __init__(self, network: nn.Module, loc: float, scale: float) -> None:
        super().__init__()
        self.network = network
        self.loc = loc
        self.scale = scale

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.network((x - self.loc) / self.scale, *context)


class _First(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, *others: Tensor) -> Tensor:
        return self.network(z)


class _WithoutMissing(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, mask: Tensor, *context: Tensor) -> Tensor:
        if mask.shape[-1:] != x.shape[-1:]:
            raise ValueError(
                f"networks.without_missing: expected a mask of shape (*batch, {x.shape[-1]}), one "
                f"for each entry of x, as the second input, got {tuple(mask.shape)}."
            )
        return self.network(torch.where(mask.bool(), x, 0.0), mask.to(x.dtype), *context)


class _WithFree(nn.Module):
    def __init__(self, network: nn.Module, free: Tensor) -> None:
        super().__init__()
        self.network = network
        self.free = nn.Parameter(free)

    def forward(self, *inputs: Tensor) -> Tensor:
        params = self.network(*inputs)
        dim = params.shape[-1]
        if self.free.shape[-1] not in (1, dim):
            raise ValueError(
                f"networks.with_free: expected dim to be 1 or {dim}, as many as the network has "
                f"dimensions, got {self.free.shape[-1]}."
            )
        free = self.free.expand(*params.shape[:-2], -1, dim)
        return torch.cat([params, free], dim=-2)
