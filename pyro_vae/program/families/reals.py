"""Families over the reals."""

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_vae.program.families.parameters import ScaleMap, softplus, unpack

__all__ = [
    "fixed_laplace",
    "fixed_normal",
    "full_normal",
    "laplace",
    "low_rank_normal",
    "normal",
    "projected_normal",
    "student_t",
]


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
    loc, unconstrained = unpack("normal", params, "loc", "unconstrained scale")
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
    (loc,) = unpack("fixed_normal", params, "loc")
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
    loc, unconstrained = unpack("laplace", params, "loc", "unconstrained scale")
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
    (loc,) = unpack("fixed_laplace", params, "loc")
    return dist.Laplace(loc, loc.new_full((), scale)).to_event(1)


def student_t(
    params: Tensor,
    *,
    df: float | None = None,
    to_scale: ScaleMap = softplus,
    min_scale: float = 1e-6,
) -> TorchDistribution:
    r"""Independent Student-t distributions: heavy tails, for outliers and for priors.

    .. math:: p(x) \propto \Bigl(1 + \frac{(x-\mu)^2}{\nu\sigma^2}\Bigr)^{-(\nu+1)/2}

    Args:
        params: ``(*batch, 2, D)``: loc and unconstrained scale, where ``df`` is given; else
            ``(*batch, 3, D)``: and the unconstrained degrees of freedom, one plus a softplus.
        df: Degrees of freedom; None for learned ones, above 1, so that the mean exists.
        to_scale: The map from the unconstrained second parameter to a scale.
        min_scale: What is added to the scale; see ``normal``.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-density in nats.

    Raises:
        ValueError: ``params`` has another ``P``, or ``df`` is not positive.

    Example:
        >>> pv.families.student_t(torch.zeros(7, 2, 3), df=4.0).batch_shape
        torch.Size([7])
    """
    if df is not None and not df > 0:
        raise ValueError(f"families.student_t: expected df > 0 or None, got {df}.")
    names = ["loc", "unconstrained scale", *(["unconstrained df"] if df is None else [])]
    loc, unconstrained, *rest = unpack("student_t", params, *names)
    freedom = 1 + softplus(rest[0]) if df is None else loc.new_full((), df)
    return dist.StudentT(freedom, loc, min_scale + to_scale(unconstrained)).to_event(1)


def low_rank_normal(
    params: Tensor, *, to_scale: ScaleMap = softplus, min_scale: float = 1e-6
) -> TorchDistribution:
    r"""A normal of low-rank covariance: :math:`N(x; \mu, U U^\top + \mathrm{diag}(\sigma^2))`.

    Args:
        params: ``(*batch, 2 + R, D)``: loc, unconstrained scale, and the R columns of U.
        to_scale: The map from the unconstrained second parameter to a scale.
        min_scale: What is added to the scale; see ``normal``.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-density in nats.

    Raises:
        ValueError: ``params`` holds no column.

    Reference: Ong, Nott and Smith, "Gaussian variational approximation with a factor covariance
    structure" (2018).

    Example:
        >>> q = pv.families.low_rank_normal(torch.ones(7, 2 + 3, 10))
        >>> q.event_shape, q.cov_factor.shape
        (torch.Size([10]), torch.Size([7, 10, 3]))
    """
    if params.dim() < 2 or params.shape[-2] < 3:
        raise ValueError(
            "families.low_rank_normal: expected params of shape (*batch, 2 + R, D), which hold "
            f"loc, unconstrained scale and R >= 1 columns, got {tuple(params.shape)}; build the "
            "network with out=(2 + R, D)."
        )
    loc, unconstrained = params[..., 0, :], params[..., 1, :]
    scale = min_scale + to_scale(unconstrained)
    return dist.LowRankMultivariateNormal(loc, params[..., 2:, :].mT, scale.square())


def full_normal(
    params: Tensor, *, to_scale: ScaleMap = softplus, min_scale: float = 1e-6
) -> TorchDistribution:
    r"""A normal of full covariance: :math:`N(x; \mu, L L^\top)`, L lower triangular.

    Args:
        params: ``(*batch, 1 + D, D)``: loc and the rows of an unconstrained matrix, of which the
            part below the diagonal is that of L, and the diagonal goes through ``to_scale``.
        to_scale: The map from the unconstrained diagonal to a positive one.
        min_scale: What is added to the diagonal; see ``normal``.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-density in nats.

    Raises:
        ValueError: ``params`` has another ``P``.

    Example:
        >>> q = pv.families.full_normal(torch.zeros(7, 1 + 3, 3))
        >>> q.batch_shape, q.event_shape
        (torch.Size([7]), torch.Size([3]))
    """
    if params.dim() < 2 or params.shape[-2] != params.shape[-1] + 1:
        dim = params.shape[-1] if params.dim() else "D"
        raise ValueError(
            "families.full_normal: expected params of shape (*batch, 1 + D, D), which hold loc and "
            f"the rows of a matrix, got {tuple(params.shape)}; build the network with "
            f"out=(1 + {dim}, {dim})."
        )
    loc, matrix = params[..., 0, :], params[..., 1:, :]
    diagonal = min_scale + to_scale(matrix.diagonal(dim1=-2, dim2=-1))
    return dist.MultivariateNormal(loc, scale_tril=matrix.tril(-1) + torch.diag_embed(diagonal))


def projected_normal(params: Tensor) -> TorchDistribution:
    r"""Directions: the density of :math:`y / |y|` for :math:`y \sim N(\mu, I)`, on the sphere.

    Args:
        params: ``(*batch, 1, D)``: the concentration vector, for D = 2 or 3.

    Returns:
        A distribution over unit vectors with ``batch_shape (*batch,)``, ``event_shape (D,)``;
        log-density in nats with respect to length or area.

    Raises:
        ValueError: ``params`` has another ``P``, or D is neither 2 nor 3.

    Reference: Hernandez-Stumpfhauser, Breidt and van der Woerd, "The general projected normal
    distribution of arbitrary dimension" (2017).

    Example:
        >>> pv.families.projected_normal(torch.zeros(7, 1, 3)).event_shape
        torch.Size([3])
    """
    (concentration,) = unpack("projected_normal", params, "concentration")
    if concentration.shape[-1] not in (2, 3):
        raise ValueError(
            "families.projected_normal: expected D = 2 or 3, for which Pyro has the density, got "
            f"{concentration.shape[-1]}."
        )
    return dist.ProjectedNormal(concentration)
