"""The dimensions of latents one by one: their densities, and how much the data move them."""

from typing import Any

import pyro.distributions as dist
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import AffineTransform, Independent, TransformedDistribution

from pyro_vae.inference.handlers import Site

__all__ = ["activity", "log_probs", "means", "spread"]


def log_probs(site: Site, dim: int) -> Tensor | None:
    """The site's unscaled log-density, dimension by dimension.

    Args:
        site: A site of a trace in a plate of particles, whose value holds all particles and data.
        dim: The dimension of the data's plate, negative.

    Returns:
        ``(K, N, D)``, which sums over D to the site's log-density per datum; None where its
        dimensions are not independent, or nothing tells that they are.
    """
    fn = _single(site["fn"])
    if fn is None:
        return None
    event_dim = site["fn"].event_dim
    mask = site["mask"]
    if isinstance(mask, Tensor):
        mask = mask.reshape(*mask.shape, *(1,) * event_dim)
    return spread(scale_and_mask(fn.log_prob(site["value"]), 1.0, mask), event_dim, dim)


def _single(fn: Any) -> Any:
    """The distribution of each dimension alone, or None."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    if isinstance(fn, TransformedDistribution) and fn.event_shape:  # shifted and scaled, by refine
        base = _single(fn.base_dist)
        affine = [t for t in fn.transforms if isinstance(t, AffineTransform)]
        if base is None or len(affine) < len(fn.transforms):
            return None
        return dist.TransformedDistribution(base, [AffineTransform(t.loc, t.scale) for t in affine])
    return None if fn.event_shape else fn


def means(site: Site, dim: int) -> Tensor:
    """The mean of each draw's distribution (K, N, D), or the draw where that is not known.

    Given the latents above it, the mean says the same of E_q[z] with less noise.
    """
    value = site["value"]
    try:
        mean = site["fn"].mean.expand_as(value)
    except (NotImplementedError, AttributeError, RuntimeError):
        mean = value
    if not mean.isfinite().all():
        mean = value
    return spread(mean.double(), site["fn"].event_dim, dim)


def spread(tensor: Tensor, event_dim: int, dim: int) -> Tensor:
    """A tensor of particles, plates and event dimensions as ``(K, N, D)``."""
    tensor = tensor.movedim(tensor.dim() - event_dim + dim, 1)
    return tensor.reshape(*tensor.shape[:2], -1)


def activity(mean: Tensor, variance: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    r"""The variance over the data of each latent's mean, :math:`\mathrm{Var}_n\, E_q[z_d|x_n]`.

    Args:
        mean: Estimates of the means ``(N, D)``.
        variance: The variances of these estimates ``(N, D)``, by which theirs is too large.
        draws: Number of draws that both are from.

    Returns:
        The variances ``(D,)`` without that bias, and their standard errors for normal draws.

    Reference: Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders" (2016).
    """
    found = mean.var(0) - variance.mean(0)
    square = (mean - mean.mean(0)).square()
    # Var(m^2 - v) = 4 mu^2 u + 2 u^2 K / (K - 1) for a mean m of normal draws with E[v] = u; both
    # terms by their unbiased estimates.
    squared = variance.square() * (draws - 1) / (draws + 1)
    noise = 4 * (square * variance - squared) + 2 * squared * draws / (draws - 1)
    return found, noise.sum(0).clamp_min(0).sqrt() / len(mean)
