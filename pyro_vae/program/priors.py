"""Priors: modules whose ``forward()`` returns a distribution with ``batch_shape ()``."""

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.program.recipe import recorded

__all__ = ["StandardNormal"]


@recorded
class StandardNormal(nn.Module):
    r"""The prior :math:`p(z) = N(z; 0, I)`.

    Args:
        dim: Number of latent dimensions Z.

    Example:
        >>> pv.priors.StandardNormal(50)().event_shape
        torch.Size([50])
    """

    loc: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        # A buffer only to follow the module to its device and dtype; nothing to save.
        self.register_buffer("loc", torch.zeros(dim), persistent=False)

    def forward(self) -> TorchDistribution:
        """Return N(0, I) with ``batch_shape ()`` and ``event_shape (Z,)``."""
        return dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)
