"""Networks around networks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_vae.program.recipe import recorded

__all__ = ["rescaled", "with_free"]


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
