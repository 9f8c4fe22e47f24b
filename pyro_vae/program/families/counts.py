"""Families over counts: from a network's numbers to rates, dispersions and shares."""

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_vae.program.distributions import CountsOfTotal, ZeroInflatedNegativeBinomial
from pyro_vae.program.families.parameters import ScaleMap, softplus, unpack

__all__ = ["multinomial", "negative_binomial", "poisson", "zero_inflated_negative_binomial"]


def poisson(
    params: Tensor, *, to_rate: ScaleMap = softplus, min_rate: float = 1e-6
) -> TorchDistribution:
    r"""Independent Poisson counts, :math:`\lambda^x e^{-\lambda} / x!`.

    Args:
        params: ``(*batch, 1, D)``: unconstrained rate.
        to_rate: The map from the unconstrained parameter to a rate: ``softplus`` or ``exp``.
        min_rate: What is added to the rate.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-probability in
        nats.

    Raises:
        ValueError: ``params`` has another ``P``.

    Example:
        >>> pv.families.poisson(torch.zeros(1, 3), to_rate=pv.families.exp, min_rate=0.0).mean
        tensor([1., 1., 1.])
    """
    (unconstrained,) = unpack("poisson", params, "unconstrained rate")
    return dist.Poisson(min_rate + to_rate(unconstrained)).to_event(1)


def negative_binomial(
    params: Tensor, *, to_scale: ScaleMap = softplus, min_scale: float = 1e-4
) -> TorchDistribution:
    r"""Independent counts of mean m and inverse dispersion r: variance :math:`m + m^2 / r`.

    .. math:: P(x) = \frac{\Gamma(x + r)}{x!\,\Gamma(r)}
              \Bigl(\frac{r}{r+m}\Bigr)^r \Bigl(\frac{m}{r+m}\Bigr)^x

    Args:
        params: ``(*batch, 2, D)``: log m, and unconstrained r.
        to_scale: The map from the unconstrained second parameter to r, which is positive.
        min_scale: What is added to r.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-probability in
        nats.

    Raises:
        ValueError: ``params`` has another ``P``.

    Reference: Lopez et al., "Deep generative modeling for single-cell transcriptomics" (2018).

    Example:
        >>> pv.families.negative_binomial(torch.zeros(2, 3)).mean
        tensor([1., 1., 1.])
    """
    log_mean, unconstrained = unpack("negative_binomial", params, "log mean", "unconstrained r")
    r = min_scale + to_scale(unconstrained)
    return dist.NegativeBinomial(r, logits=log_mean - r.log()).to_event(1)


def zero_inflated_negative_binomial(
    params: Tensor, *, to_scale: ScaleMap = softplus, min_scale: float = 1e-4
) -> TorchDistribution:
    r"""Independent counts, some of which were lost and read as zero: drop-outs of sequencing.

    The first two parameters are those of ``negative_binomial``, for what was not lost; the third
    says how probable a loss is. ``distributions.ZeroInflatedNegativeBinomial`` has the density.

    Args:
        params: ``(*batch, 3, D)``: log m, unconstrained r, and the logits of a loss.
        to_scale: The map from the unconstrained second parameter to r, which is positive.
        min_scale: What is added to r.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-probability in
        nats.

    Raises:
        ValueError: ``params`` has another ``P``.

    Reference: Lopez et al., "Deep generative modeling for single-cell transcriptomics" (2018).

    Example:
        >>> pv.families.zero_inflated_negative_binomial(torch.zeros(3, 2)).mean
        tensor([0.5000, 0.5000])
    """
    log_mean, unconstrained, gate = unpack(
        "zero_inflated_negative_binomial", params, "log mean", "unconstrained r", "gate logits"
    )
    r = min_scale + to_scale(unconstrained)
    return ZeroInflatedNegativeBinomial(r, logits=log_mean - r.log(), gate_logits=gate).to_event(1)


def multinomial(params: Tensor, *, total_count: int | None = None) -> TorchDistribution:
    r"""Counts given their total, such as words of a document: a share for each dimension.

    The D logits of a datum are free, and their softmax is its shares, of words or reads; so the
    dimensions depend on one another. ``distributions.CountsOfTotal`` has the density.

    Args:
        params: ``(*batch, 1, D)``: logits of the shares.
        total_count: The total of every datum, to draw from; None to score counts of any totals.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-probability in
        nats.

    Raises:
        ValueError: ``params`` has another ``P``; later on, counts of another total, or a draw
            without one.

    Reference: Liang et al., "Variational autoencoders for collaborative filtering" (2018).

    Example:
        >>> p = pv.families.multinomial(torch.zeros(1, 3))
        >>> p.log_prob(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])).exp()
        tensor([0.3333, 0.2222])
    """
    (logits,) = unpack("multinomial", params, "logits")
    return CountsOfTotal(logits, total_count)
