"""Conditional distributions: a network bound to a family."""

from collections.abc import Callable

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.program.recipe import recorded

__all__ = ["Conditional", "Family"]

Family = Callable[[Tensor], TorchDistribution]


@recorded
class Conditional(nn.Module):
    """A distribution given its inputs: ``family(network(*inputs))``.

    One module serves as q(z|x), as p(x|z) and as p(z1|z2).

    Args:
        network: Module ``(*batch, in_dim) -> (*batch, P, D)``, for any number of batch
            dimensions; it may take several inputs.
        family: Function from ``params (*batch, P, D)`` to a distribution with
            ``batch_shape (*batch,)`` and ``event_shape (D,)``; see ``pyro_vae.families``.

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(784, (2, 50)), pv.families.normal)
        >>> encoder(torch.zeros(13, 7, 784)).batch_shape
        torch.Size([13, 7])
    """

    def __init__(self, network: nn.Module, family: Family) -> None:
        super().__init__()
        self.network = network
        self.family = family

    def forward(self, *inputs: Tensor) -> TorchDistribution:
        """Return the distribution given the inputs.

        Args:
            inputs: ``(*batch, in_dim)`` each; the batch dimensions broadcast.

        Returns:
            A distribution with ``batch_shape (*batch,)`` and ``event_shape (D,)``.

        Raises:
            ValueError: The network lost or changed a batch dimension.
        """
        params = self.network(*inputs)
        batch = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        if params.shape[:-2] != batch:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise ValueError(
                f"Conditional: the network ({type(self.network).__name__}) maps inputs of shape "
                f"{shapes} to params of shape {tuple(params.shape)}; expected "
                f"({', '.join(map(str, batch))}, P, D): it has to keep every batch dimension, "
                "also the one that particles add on the left."
            )
        return self.family(params)
