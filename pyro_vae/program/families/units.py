"""Families over the unit interval."""

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_vae.program.families.parameters import ScaleMap, softplus, unpack

__all__ = ["beta", "continuous_bernoulli"]


def continuous_bernoulli(params: Tensor) -> TorchDistribution:
    r"""The Bernoulli's form as a density on [0, 1], :math:`C(\lambda)\lambda^x(1-\lambda)^{1-x}`.

    What a BCE on grey values lacks to be a likelihood is the constant C.

    Args:
        params: ``(*batch, 1, D)``: logits of :math:`\lambda`.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-density in nats.

    Raises:
        ValueError: ``params`` has another ``P``.

    Reference: Loaiza-Ganem and Cunningham, "The continuous Bernoulli" (2019).

    Example:
        >>> pv.families.continuous_bernoulli(torch.zeros(1, 2)).log_prob(torch.rand(2)).item()
        0.0
    """
    (logits,) = unpack("continuous_bernoulli", params, "logits")
    return dist.ContinuousBernoulli(logits=logits).to_event(1)


def beta(
    params: Tensor, *, to_scale: ScaleMap = softplus, min_scale: float = 1e-3
) -> TorchDistribution:
    r"""Independent beta distributions, :math:`x^{a-1}(1-x)^{b-1} / B(a, b)` on (0, 1).

    Values of exactly 0 or 1 have density zero or infinity: rescale or dequantize them.

    Args:
        params: ``(*batch, 2, D)``: unconstrained a and b.
        to_scale: The map from the unconstrained parameters to positive numbers.
        min_scale: What is added to a and b.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-density in nats.

    Raises:
        ValueError: ``params`` has another ``P``.

    Example:
        >>> pv.families.beta(torch.zeros(7, 2, 3)).mean[0]
        tensor([0.5000, 0.5000, 0.5000])
    """
    a, b = unpack("beta", params, "unconstrained a", "unconstrained b")
    return dist.Beta(min_scale + to_scale(a), min_scale + to_scale(b)).to_event(1)
