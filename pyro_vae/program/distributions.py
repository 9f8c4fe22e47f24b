"""Distributions that torch and Pyro lack."""

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["Levels"]


class Levels(dist.Categorical):
    """A categorical over the numbers 0..L-1: unlike torch's, its mean is the expected level.

    Args:
        logits: ``(*batch, L)``.

    Example:
        >>> pv.distributions.Levels(logits=torch.zeros(5, 3)).mean
        tensor([1., 1., 1., 1., 1.])
    """

    @property
    def mean(self) -> Tensor:
        """The expected level, ``(*batch,)``."""
        return (self.probs * self._levels()).sum(-1)

    @property
    def variance(self) -> Tensor:
        """The variance of the level, ``(*batch,)``."""
        return (self.probs * (self._levels() - self.mean[..., None]).square()).sum(-1)

    def _levels(self) -> Tensor:
        probs = self.probs
        return torch.arange(probs.shape[-1], dtype=probs.dtype, device=probs.device)
