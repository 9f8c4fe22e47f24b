"""Conditional distributions: a network bound to a family, and what a flow makes of one."""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.program.distributions import Reverse
from pyro_vae.program.recipe import recorded

__all__ = ["Conditional", "ConditionalFlow", "Family"]

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
        autocast: ``torch.bfloat16`` lets a float32 network multiply in that precision while it is
            trained, which is faster on GPUs and on processors that have instructions for it.
            Params and densities are float32 all the same, and so is everything in eval mode, in
            which pairs are validated and judged.

    Raises:
        ValueError: ``autocast`` is another precision.

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(784, (2, 50)), pv.families.normal)
        >>> encoder(torch.zeros(13, 7, 784)).batch_shape
        torch.Size([13, 7])
    """

    def __init__(
        self, network: nn.Module, family: Family, *, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if autocast not in (None, torch.bfloat16):
            raise ValueError(
                f"Conditional: expected autocast to be torch.bfloat16 or None, got {autocast}"
                + (", whose gradients vanish unless they are scaled" * (autocast is torch.float16))
                + "."
            )
        self.network = network
        self.family = family
        self.autocast = autocast

    def forward(self, *inputs: Tensor) -> TorchDistribution:
        """Return the distribution given the inputs.

        Args:
            inputs: ``(*batch, in_dim)`` each; the batch dimensions broadcast.

        Returns:
            A distribution with ``batch_shape (*batch,)`` and ``event_shape (D,)``.

        Raises:
            ValueError: The network lost or changed a batch dimension.
        """
        params = self._params(*inputs)
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

    def _params(self, *inputs: Tensor) -> Tensor:
        if self.autocast is None or not self.training:
            return self.network(*inputs)
        with torch.autocast(inputs[0].device.type, self.autocast):
            params = self.network(*inputs)
        return params.float() if params.dtype is self.autocast else params


@recorded
class ConditionalFlow(nn.Module):
    r"""A conditional distribution and flows that see the inputs: :math:`z = f(z_0; h(x))`.

    .. math:: \log q(z|x) = \log q_0(z_0|x) - \log |\det \partial f / \partial z_0|

    Draws cost one pass, and so does the density of a draw; with autoregressive transforms the
    density of any other value takes Z passes. Between transforms the dimensions are reversed.

    Args:
        base: Module ``(*batch, in_dim) -> q_0(z_0|x)``, e.g. a ``Conditional`` of normals.
        context: Network ``(*batch, in_dim) -> (*batch, 1, C)``: what the transforms see, h(x).
        transform: Makes one of Pyro's conditional transforms from Z and C, e.g.
            ``pyro.distributions.transforms.conditional_affine_autoregressive``; bind its options
            by ``functools.partial``.
        shape: ``(Z, C)``: number of latent dimensions and size of the context.
        num_transforms: How many.

    Raises:
        ValueError: ``num_transforms`` is not positive; later on, the context has another shape.

    Reference: Kingma et al., "Improved variational inference with inverse autoregressive flow"
    (2016).

    Example:
        >>> from pyro.distributions import transforms
        >>> base = pv.Conditional(pv.networks.mlp(9, (2, 4)), pv.families.normal)
        >>> seen = pv.networks.mlp(9, (1, 8))
        >>> make = transforms.conditional_affine_autoregressive
        >>> q = pv.ConditionalFlow(base, seen, make, (4, 8))
        >>> q(torch.zeros(7, 9)).rsample().shape
        torch.Size([7, 4])
    """

    def __init__(
        self,
        base: nn.Module,
        context: nn.Module,
        transform: Callable[[int, int], nn.Module],
        shape: tuple[int, int],
        *,
        num_transforms: int = 2,
    ) -> None:
        super().__init__()
        if num_transforms < 1:
            raise ValueError(
                f"ConditionalFlow: expected num_transforms >= 1, got {num_transforms}."
            )
        self.base = base
        self.context = context
        self.shape = (shape[0], shape[1])
        self.transforms = nn.ModuleList(transform(*shape) for _ in range(num_transforms))

    def forward(self, *inputs: Tensor) -> TorchDistribution:
        """Return the distribution given the inputs.

        Args:
            inputs: ``(*batch, in_dim)`` each; the batch dimensions broadcast.

        Returns:
            A distribution with ``batch_shape (*batch,)`` and ``event_shape (Z,)``.

        Raises:
            ValueError: Base or context have other sizes than were said.
        """
        base, context = self.base(*inputs), self.context(*inputs)
        expected = (*base.batch_shape, 1, self.shape[1])
        if base.event_shape != self.shape[:1] or context.shape != expected:
            raise ValueError(
                f"ConditionalFlow: expected (Z, C) = {self.shape}: a base of event_shape "
                f"({self.shape[0]},) and a context of shape {expected}, got "
                f"{tuple(base.event_shape)} and {tuple(context.shape)}."
            )
        seen = context.squeeze(-2)
        transforms: Any = self.transforms
        parts = [part for t in transforms for part in (t.condition(seen), Reverse())]
        return _Flow(base, parts[:-1])


class _Flow(dist.TransformedDistribution):
    """Scores values that lack batch dimensions of what its transforms see, as a mixture's do."""

    def log_prob(self, value: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        # Left as it is where nothing is missing: transforms know a draw again by its identity.
        return super().log_prob(value if value.shape[:-1] == batch else value.expand(*batch, -1))
