"""Families over bits and levels."""

from collections.abc import Callable

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_vae.program.distributions import Bits, Discretized, Levels
from pyro_vae.program.families.parameters import ScaleMap, softplus, unpack

__all__ = [
    "bernoulli",
    "binomial",
    "categorical",
    "discretized",
    "discretized_mixture",
]

LocationScale = Callable[[Tensor, Tensor], TorchDistribution]


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
    (logits,) = unpack("bernoulli", params, "logits")
    return Bits(logits)


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
    (logits,) = unpack("binomial", params, "logits")
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


def discretized(
    params: Tensor,
    *,
    num_levels: int,
    base: LocationScale = dist.Logistic,
    to_scale: ScaleMap = softplus,
    min_scale: float = 1e-4,
) -> TorchDistribution:
    r"""Levels 0..L-1 that a continuous value is rounded to; the logistic by default.

    .. math:: P(l) = F\Bigl(\frac{l + \frac12 - \mu}{\sigma}\Bigr)
              - F\Bigl(\frac{l - \frac12 - \mu}{\sigma}\Bigr),

    with what lies beyond the first and the last level added to these. The parameters speak of a
    range from -1 (level 0) to 1 (level L - 1), whatever the number of levels.

    Args:
        params: ``(*batch, 2, D)``: loc and unconstrained scale.
        num_levels: Number of levels L, e.g. 256.
        base: The continuous distribution of location and scale: Pyro's ``Logistic``, ``Normal`` or
            ``Laplace``.
        to_scale: The map from the unconstrained second parameter to a scale.
        min_scale: What is added to the scale.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-probability in
        nats.

    Raises:
        ValueError: ``params`` has another ``P``, or there are fewer than two levels.

    References: Kingma et al., "Improved variational inference with inverse autoregressive flow"
    (2016); Salimans et al., "PixelCNN++" (2017).

    Example:
        >>> p = pv.families.discretized(torch.zeros(2, 1), num_levels=256)
        >>> levels = torch.arange(256.0)[:, None]
        >>> f"{p.log_prob(levels).exp().sum():.4f}"
        '1.0000'
    """
    loc, unconstrained = unpack("discretized", params, "loc", "unconstrained scale")
    return _discretized(
        "discretized", loc, min_scale + to_scale(unconstrained), base, num_levels
    ).to_event(1)


def discretized_mixture(
    params: Tensor,
    *,
    num_levels: int,
    base: LocationScale = dist.Logistic,
    to_scale: ScaleMap = softplus,
    min_scale: float = 1e-4,
) -> TorchDistribution:
    r"""A mixture of M discretized distributions for each dimension.

    Args:
        params: ``(*batch, 3 M, D)``: M logits of the weights, M locs, M unconstrained scales.
        num_levels: Number of levels L; see ``discretized``.
        base: The continuous distribution; see ``discretized``.
        to_scale: The map from the unconstrained parameters to scales.
        min_scale: What is added to the scales.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-probability in
        nats.

    Raises:
        ValueError: ``P`` is no multiple of three, or there are fewer than two levels.

    Reference: Salimans et al., "PixelCNN++" (2017).

    Example:
        >>> pv.families.discretized_mixture(torch.zeros(7, 3 * 5, 9), num_levels=256).batch_shape
        torch.Size([7])
    """
    if params.dim() < 2 or params.shape[-2] % 3 or not params.shape[-2]:
        raise ValueError(
            "families.discretized_mixture: expected params of shape (*batch, 3 M, D), which hold M "
            f"logits, M locs and M unconstrained scales, got {tuple(params.shape)}; build the "
            "network with out=(3 * M, D)."
        )
    logits, loc, unconstrained = params.mT.chunk(3, dim=-1)
    components = _discretized(
        "discretized_mixture", loc, min_scale + to_scale(unconstrained), base, num_levels
    )
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), components).to_event(1)


def _discretized(
    family: str, loc: Tensor, scale: Tensor, base: LocationScale, num_levels: int
) -> TorchDistribution:
    if num_levels < 2:
        raise ValueError(f"families.{family}: expected num_levels >= 2, got {num_levels}.")
    half = (num_levels - 1) / 2
    return Discretized(base(half * (1 + loc), half * scale), num_levels)
