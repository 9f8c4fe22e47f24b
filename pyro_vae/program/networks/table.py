"""Params of their own for each datum, learned and not computed from it."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.program.networks.flat import size_of
from pyro_vae.program.recipe import recorded

__all__ = ["per_datum"]


@recorded
def per_datum(num_data: int, out: tuple[int, int], *, around: nn.Module | None = None) -> nn.Module:
    r"""Free params for each datum, :math:`T_n`, or :math:`f(x_n) + T_n` around a network f.

    As an encoder's network it gives every datum a q of its own: variational inference without
    amortization, the reference for what amortization costs. The pair is called with the number n
    of each datum, ``guide(x, index)``; a likelihood that shall not see it is wrapped in
    ``networks.first``. Data that were not trained on have no params of theirs yet. Adam's momentum
    moves a datum's params also in the steps between its minibatches.

    Args:
        num_data: Number of data N.
        out: ``(P, D)``, what the family at the other end takes.
        around: Network of all inputs but the index, ``(*batch, in_dim) -> (*batch, P, D)``; the
            table starts at zero, so training starts from what this network says.

    Returns:
        A module ``(x (*batch, C), *context, index (*batch, 1)) -> (*batch, P, D)``, where the index
        holds integers from 0 to N - 1, as a long tensor or as floating-point numbers.

    Raises:
        ValueError: ``num_data`` is not positive; later on, the index has another shape, numbers
            that are no integers, or a dtype that can't count to N; the network around which the
            table lies gives other params. Values are looked at while Pyro's validation is on, as
            in the first step and in all that ``fit`` checks before training.
        IndexError: A number is not among 0 to N - 1.

    References: Hoffman et al., "Stochastic variational inference" (2013); Cremer, Li and Duvenaud,
    "Inference suboptimality in variational autoencoders" (2018), on the price of amortization; Kim
    et al., "Semi-amortized variational autoencoders" (2018), whose free part also starts from a
    network.

    Example:
        >>> network = pv.networks.per_datum(1000, (2, 50))
        >>> network(torch.zeros(7, 784), torch.arange(7)[:, None]).shape
        torch.Size([7, 2, 50])
    """
    if num_data < 1:
        raise ValueError(f"networks.per_datum: expected num_data >= 1, got {num_data}.")
    size_of("per_datum", out)
    return _PerDatum(num_data, tuple(out), around)


class _PerDatum(nn.Module):
    def __init__(self, num_data: int, out: tuple[int, ...], around: nn.Module | None) -> None:
        super().__init__()
        self.around = around
        self.table = nn.Parameter(torch.zeros(num_data, *out))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Params ``(*batch, P, D)`` of the data whose numbers are the last input."""
        params = self.table[self._numbers(inputs)]
        batch = torch.broadcast_shapes(*(i.shape[:-1] for i in inputs))
        if self.around is not None:
            centre = self.around(*inputs[:-1])
            if centre.shape[-2:] != params.shape[-2:]:
                raise ValueError(
                    "networks.per_datum: expected a network around it that gives params of shape "
                    f"(*batch, {', '.join(map(str, params.shape[-2:]))}), got "
                    f"{tuple(centre.shape)}; build both with the same out=."
                )
            params = centre + params
        return params.expand(*batch, *params.shape[-2:])

    def _numbers(self, inputs: tuple[Tensor, ...]) -> Tensor:
        index, size = inputs[-1], len(self.table)
        if len(inputs) < 2 or index.shape[-1:] != (1,) or index.dtype == torch.bool:
            raise ValueError(
                "networks.per_datum: expected the numbers of the data as the last of several "
                f"inputs, of shape (*batch, 1), got {index.dtype} of shape {tuple(index.shape)}; "
                "call the pair with torch.arange(len(x))[:, None] beside x."
            )
        if index.is_floating_point() and size > 2 / torch.finfo(index.dtype).eps:
            raise ValueError(
                f"networks.per_datum: {index.dtype} can't tell all of {size} data apart; give the "
                "index as a long tensor."
            )
        numbers = index.squeeze(-1).long()
        # To look at values waits for the device, so a step never does.
        if dist.is_validation_enabled():
            if (numbers != index.squeeze(-1)).any():
                raise ValueError("networks.per_datum: the index has values that are no integers.")
            outside = numbers[(numbers < 0) | (numbers >= size)]
            if len(outside):
                raise IndexError(
                    f"networks.per_datum: expected numbers of data from 0 to {size - 1}, got "
                    f"{int(outside[0])}; give num_data for all data, those of validation too."
                )
        return numbers
