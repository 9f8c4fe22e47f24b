r"""Families: plain functions from a parameter tensor to a distribution.

A family takes ``params`` of shape ``(*batch, P, D)`` and returns a Pyro distribution with
``batch_shape (*batch,)`` and ``event_shape (D,)``. The same family serves as q(z|x), as p(x|z)
and as p(z1|z2). Options are bound with ``functools.partial``::

    seeds_normal = partial(families.normal, to_scale=families.exp_half)
    pixels = partial(families.binomial, total_count=16)

====================  =====  ===========================================  =====================
family                P      parameters                                   values
====================  =====  ===========================================  =====================
``normal``            2      loc, unconstrained scale                     reals
``fixed_normal``      1      loc (squared error)                          reals
``laplace``           2      loc, unconstrained scale                     reals
``fixed_laplace``     1      loc (absolute error)                         reals
``bernoulli``         1      logits                                       0, 1
``binomial``          1      logits                                       0 .. total_count
``categorical``       L      logits of the levels                         0 .. L - 1
====================  =====  ===========================================  =====================
"""

from collections.abc import Callable

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_vae.program.distributions import Levels

__all__ = [
    "bernoulli",
    "binomial",
    "categorical",
    "exp_half",
    "fixed_laplace",
    "fixed_normal",
    "laplace",
    "normal",
    "softplus",
]

ScaleMap = Callable[[Tensor], Tensor]


def softplus(unconstrained: Tensor) -> Tensor:
    r"""The scale :math:`\log(1 + e^u)`: linear for large ``u``, so one step can't blow it up."""
    return F.softplus(unconstrained)


def exp_half(unconstrained: Tensor) -> Tensor:
    r"""The scale :math:`e^{u/2}`: ``u`` is the log-variance, as in the AEVB paper's code."""
    return (0.5 * unconstrained).exp()


def normal(
    params: Tensor, *, to_scale: ScaleMap = softplus, min_scale: float = 1e-6
) -> TorchDistribution:
    r"""Independent normals, :math:`N(x; \mu, \sigma^2)` with :math:`\sigma = s_0 + s(u)`.

    As a likelihood of a learned scale its density is unbounded: a pixel that never changes drives
    its scale to ``min_scale`` and log p(x) up without limit, so choose ``min_scale`` for what is
    measured, e.g. half a grey level.

    Args:
        params: ``(*batch, 2, D)``: loc and unconstrained scale.
        to_scale: The map from the unconstrained second parameter to a scale: ``softplus``,
            ``exp_half``, or any function to positive numbers.
        min_scale: What is added to the scale.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-density in nats.

    Raises:
        ValueError: ``params`` has another ``P``.

    Example:
        >>> params = torch.zeros(7, 2, 3)
        >>> q = pv.families.normal(params, to_scale=pv.families.exp_half, min_scale=0.0)
        >>> q.batch_shape, q.event_shape, q.base_dist.scale[0, 0].item()
        (torch.Size([7]), torch.Size([3]), 1.0)
    """
    loc, unconstrained = _unpack("normal", params, "loc", "unconstrained scale")
    return dist.Normal(loc, min_scale + to_scale(unconstrained)).to_event(1)


def fixed_normal(params: Tensor, *, scale: float = 1.0) -> TorchDistribution:
    r"""Independent normals of one fixed scale: squared error, :math:`-(x-\mu)^2/2s^2` + constant.

    Args:
        params: ``(*batch, 1, D)``: loc.
        scale: The standard deviation of every dimension.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-density in nats.

    Raises:
        ValueError: ``params`` has another ``P``.

    Example:
        >>> pv.families.fixed_normal(torch.zeros(1, 2), scale=0.5).log_prob(torch.zeros(2)).shape
        torch.Size([])
    """
    (loc,) = _unpack("fixed_normal", params, "loc")
    return dist.Normal(loc, loc.new_full((), scale)).to_event(1)


def laplace(
    params: Tensor, *, to_scale: ScaleMap = softplus, min_scale: float = 1e-6
) -> TorchDistribution:
    r"""Independent Laplace distributions, :math:`e^{-|x-\mu|/b} / 2b` with :math:`b = s_0 + s(u)`.

    Args:
        params: ``(*batch, 2, D)``: loc and unconstrained scale.
        to_scale: The map from the unconstrained second parameter to a scale.
        min_scale: What is added to the scale; see ``normal``.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-density in nats.

    Raises:
        ValueError: ``params`` has another ``P``.

    Example:
        >>> pv.families.laplace(torch.zeros(7, 2, 3)).batch_shape
        torch.Size([7])
    """
    loc, unconstrained = _unpack("laplace", params, "loc", "unconstrained scale")
    return dist.Laplace(loc, min_scale + to_scale(unconstrained)).to_event(1)


def fixed_laplace(params: Tensor, *, scale: float = 1.0) -> TorchDistribution:
    r"""Independent Laplace distributions of one fixed scale: absolute error (L1) + constant.

    Args:
        params: ``(*batch, 1, D)``: loc.
        scale: The scale of every dimension (the standard deviation is ``scale * sqrt(2)``).

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-density in nats.

    Raises:
        ValueError: ``params`` has another ``P``.

    Example:
        >>> pv.families.fixed_laplace(torch.zeros(7, 1, 3), scale=0.5).mean.shape
        torch.Size([7, 3])
    """
    (loc,) = _unpack("fixed_laplace", params, "loc")
    return dist.Laplace(loc, loc.new_full((), scale)).to_event(1)


def bernoulli(params: Tensor) -> TorchDistribution:
    r"""Independent bits: :math:`\log p(x) = x \log\pi + (1-x) \log(1-\pi)`, minus the BCE.

    A density for values 0 and 1 only; grey levels need another likelihood or a binarization.

    Args:
        params: ``(*batch, 1, D)``: logits.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-probability in
        nats.

    Raises:
        ValueError: ``params`` has another ``P``.

    Example:
        >>> pv.families.bernoulli(torch.zeros(1, 2)).log_prob(torch.ones(2)).exp().item()
        0.25
    """
    (logits,) = _unpack("bernoulli", params, "logits")
    return dist.Bernoulli(logits=logits).to_event(1)


def binomial(params: Tensor, *, total_count: int) -> TorchDistribution:
    r"""Independent counts of ``total_count`` trials, for integer grey levels 0..total_count.

    .. math:: \log p(x) = \log\binom{n}{x} + x \log\pi + (n-x) \log(1-\pi)

    Args:
        params: ``(*batch, 1, D)``: logits.
        total_count: The largest level, e.g. 16 for scikit-learn's digits.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-probability in
        nats.

    Raises:
        ValueError: ``params`` has another ``P``.

    Example:
        >>> p = pv.families.binomial(torch.zeros(1, 1), total_count=2)
        >>> p.log_prob(torch.ones(1)).exp().item()
        0.5
    """
    (logits,) = _unpack("binomial", params, "logits")
    return dist.Binomial(total_count, logits=logits).to_event(1)


def categorical(params: Tensor) -> TorchDistribution:
    r"""Independent levels with one softmax each: :math:`\log p(x) = u_x - \log\sum_l e^{u_l}`.

    Args:
        params: ``(*batch, L, D)``: logits of the ``L`` levels.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)`` over the levels
        0..L-1; log-probability in nats. Its mean is the expected level.

    Raises:
        ValueError: ``params`` has fewer than two levels.

    Example:
        >>> pv.families.categorical(torch.zeros(4, 3)).log_prob(torch.zeros(3)).exp().item()
        0.015625
    """
    if params.dim() < 2 or params.shape[-2] < 2:
        raise ValueError(
            "families.categorical: expected params of shape (*batch, L, D) with the logits of "
            f"L >= 2 levels, got {tuple(params.shape)}; build the network with out=(L, D)."
        )
    return Levels(logits=params.transpose(-1, -2)).to_event(1)


def _unpack(family: str, params: Tensor, *names: str) -> tuple[Tensor, ...]:
    if params.dim() < 2 or params.shape[-2] != len(names):
        dim = params.shape[-1] if params.dim() else "D"
        raise ValueError(
            f"families.{family}: expected params of shape (*batch, {len(names)}, D), which hold "
            f"{' and '.join(names)}, got {tuple(params.shape)}; build the network with "
            f"out=({len(names)}, {dim})."
        )
    return torch.unbind(params, dim=-2)
