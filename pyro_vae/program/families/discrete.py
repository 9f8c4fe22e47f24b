"""Families of discrete latents, and their relaxations.

Latents that take few values can be summed exactly (``TraceEnum_ELBO`` and Pyro's
``config_enumerate``); relaxed ones are continuous, and have a pathwise gradient.
"""

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_vae.program.distributions import RelaxedOneHot
from pyro_vae.program.families.parameters import unpack

__all__ = ["one_hot", "relaxed_bernoulli", "relaxed_one_hot"]


def one_hot(params: Tensor) -> TorchDistribution:
    r"""One of D classes, as a vector with a single one: :math:`\log p(e_k) = \log \pi_k`.

    Args:
        params: ``(*batch, 1, D)``: logits.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-probability in
        nats.

    Raises:
        ValueError: ``params`` has another ``P``.

    Example:
        >>> p = pv.families.one_hot(torch.zeros(1, 4))
        >>> p.log_prob(torch.tensor([0.0, 0.0, 1.0, 0.0])).exp().item()
        0.25
    """
    (logits,) = unpack("one_hot", params, "logits")
    return dist.OneHotCategorical(logits=logits)


def relaxed_one_hot(params: Tensor, *, temperature: float) -> TorchDistribution:
    r"""A density on the simplex that tends to ``one_hot`` as the temperature falls: Concrete.

    .. math:: x = \mathrm{softmax}((u + g) / T), \quad g_k \sim \mathrm{Gumbel}(0, 1)

    Prior and guide are relaxed together: then the bound is one on a model with continuous latents,
    whose density is exact.

    Args:
        params: ``(*batch, 1, D)``: logits u.
        temperature: T > 0; below one, draws lie near the corners.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-density in nats.

    Raises:
        ValueError: ``params`` has another ``P``, or the temperature is not positive.

    References: Maddison, Mnih and Teh, "The concrete distribution" (2017); Jang, Gu and Poole,
    "Categorical reparameterization with Gumbel-softmax" (2017).

    Example:
        >>> p = pv.families.relaxed_one_hot(torch.zeros(7, 1, 3), temperature=0.5)
        >>> p.rsample().sum(-1).shape, p.has_rsample
        (torch.Size([7]), True)
    """
    (logits,) = unpack("relaxed_one_hot", params, "logits")
    _check_temperature("relaxed_one_hot", temperature)
    return RelaxedOneHot(logits.new_full((), temperature), logits)


def relaxed_bernoulli(params: Tensor, *, temperature: float) -> TorchDistribution:
    r"""Densities on (0, 1) that tend to bits as the temperature falls: binary Concrete.

    .. math:: x = \mathrm{sigmoid}((u + l) / T), \quad l \sim \mathrm{Logistic}(0, 1)

    Args:
        params: ``(*batch, 1, D)``: logits u.
        temperature: T > 0; see ``relaxed_one_hot``.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-density in nats.

    Raises:
        ValueError: ``params`` has another ``P``, or the temperature is not positive.

    Reference: Maddison, Mnih and Teh, "The concrete distribution" (2017).

    Example:
        >>> p = pv.families.relaxed_bernoulli(torch.zeros(7, 1, 3), temperature=0.5)
        >>> p.rsample().shape, p.has_rsample
        (torch.Size([7, 3]), True)
    """
    (logits,) = unpack("relaxed_bernoulli", params, "logits")
    _check_temperature("relaxed_bernoulli", temperature)
    return dist.RelaxedBernoulli(logits.new_full((), temperature), logits=logits).to_event(1)


def _check_temperature(family: str, temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"families.{family}: expected temperature > 0, got {temperature}.")
