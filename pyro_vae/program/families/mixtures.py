"""Mixtures as families: posteriors with several modes."""

from collections.abc import Callable

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_vae.program.families.parameters import ScaleMap, softplus
from pyro_vae.program.families.reals import normal

__all__ = ["mixture", "mixture_of_normals"]


def mixture(
    params: Tensor, *, num_components: int, family: Callable[[Tensor], TorchDistribution] = normal
) -> TorchDistribution:
    r"""A mixture of M members of a family, :math:`\sum_m \pi_m\,\mathrm{family}(z; \theta_m)`.

    As a guide it is trained by the objective ``Stratified``, which draws from every component;
    under ``Trace_ELBO`` the choice of a component has no pathwise gradient.

    Args:
        params: ``(*batch, M (1 + P'), D)``: M rows of logits, each averaged over the dimensions,
            then the P' parameters of each component.
        num_components: Number of components M.
        family: Of each component, of P' parameters.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-density in nats.

    Raises:
        ValueError: ``P`` is no multiple of M, or leaves nothing for the components.

    Reference: Morningstar et al., "Automatic differentiation variational inference with mixtures"
    (2021).

    Example:
        >>> q = pv.families.mixture(torch.zeros(7, 3 * (1 + 2), 4), num_components=3)
        >>> q.batch_shape, q.event_shape
        (torch.Size([7]), torch.Size([4]))
    """
    logits, components = _split("mixture", params, num_components)
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), family(components))


def mixture_of_normals(
    params: Tensor,
    *,
    num_components: int,
    to_scale: ScaleMap = softplus,
    min_scale: float = 1e-6,
) -> TorchDistribution:
    r"""A mixture of M diagonal normals whose draws have a pathwise gradient.

    It takes any objective, as one normal does. The gradient transports draws between components:
    it costs of the order of :math:`M^2 D` a datum, and that of the weights is very noisy where
    components stand apart, where ``mixture`` with ``Stratified`` is exact.

    Args:
        params: ``(*batch, 3 M, D)``: M rows of logits, each averaged over the dimensions, then
            the loc and the unconstrained scale of each component.
        num_components: Number of components M, at least 2.
        to_scale: The map from the unconstrained parameters to scales.
        min_scale: What is added to the scales.

    Returns:
        A distribution with ``batch_shape (*batch,)``, ``event_shape (D,)``; log-density in nats.

    Raises:
        ValueError: ``P`` is not 3 M, or there are fewer than two components or dimensions.

    Reference: Jankowiak and Karaletsos, "Pathwise derivatives for multivariate distributions"
    (2019).

    Example:
        >>> q = pv.families.mixture_of_normals(torch.zeros(7, 3 * 3, 4), num_components=3)
        >>> q.event_shape, q.has_rsample
        (torch.Size([4]), True)
    """
    logits, components = _split("mixture_of_normals", params, num_components)
    if num_components < 2 or params.shape[-1] < 2 or components.shape[-2] != 2:
        raise ValueError(
            "families.mixture_of_normals: expected params of shape (*batch, 3 M, D) with M and D "
            f"at least 2, got {tuple(params.shape)} for M = {num_components}; build the network "
            "with out=(3 * M, D)."
        )
    loc, unconstrained = components.unbind(-2)
    return dist.MixtureOfDiagNormals(loc, min_scale + to_scale(unconstrained), logits)


def _split(family: str, params: Tensor, num_components: int) -> tuple[Tensor, Tensor]:
    """The logits (*batch, M) and the components' parameters (*batch, M, P', D)."""
    if num_components < 1:
        raise ValueError(f"families.{family}: expected num_components >= 1, got {num_components}.")
    rows = params.shape[-2] if params.dim() > 1 else 0
    each, rest = divmod(rows, num_components)
    if each < 2 or rest:
        raise ValueError(
            f"families.{family}: expected params of shape (*batch, M (1 + P'), D) for M = "
            f"{num_components} components of P' parameters, got {tuple(params.shape)}; build the "
            f"network with out=({num_components} * (1 + P'), D)."
        )
    logits = params[..., :num_components, :].mean(-1)
    return logits, params[..., num_components:, :].unflatten(-2, (num_components, each - 1))
