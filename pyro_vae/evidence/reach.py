"""Pairs whose weights look like any others and mean something else: points, parts of a support."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import AffineTransform, TransformedDistribution, constraints

from pyro_vae.context import at_rest, device_of, on_device
from pyro_vae.evidence.blocks import data_blocks
from pyro_vae.evidence.particles import Arguments, Pair
from pyro_vae.evidence.target import PERIODIC
from pyro_vae.inference.handlers import Program
from pyro_vae.inference.matching import kind_of
from pyro_vae.inference.structure import latent_sites

__all__ = ["out_of_reach"]

Bounds = tuple[Tensor, Tensor]


def out_of_reach(
    model: Program, guide: Program, args: Arguments, data_plate: str | None = None
) -> str:
    """Say which latents of a pair are such that the mean of the weights is not p(x).

    Where the guide's support is narrower than the prior's it is a part of p(x), and nothing that
    the weights do can tell how much. Where the guide has no density, or the prior none that
    integrates to one, it is no probability of x at all.

    Returns:
        A sentence for each such latent, or nothing.
    """
    with at_rest(model, guide):
        first = next(data_blocks(on_device(args, device_of(model, guide))))
        structure = Pair(model, guide, first, data_plate).structure
    in_model = dict(latent_sites(structure.model_trace))
    said = []
    for name, site in latent_sites(structure.guide_trace):
        if name not in in_model:
            continue
        prior, drawn = in_model[name]["fn"], site["fn"]
        if kind_of(prior) == "ImproperUniform":
            said.append(
                f"site {name!r}: the prior ({kind_of(prior)}) has no density, so p(x) is none."
            )
            continue
        if kind_of(drawn) == "Delta" and kind_of(prior) != "Delta":
            said.append(
                f"site {name!r}: the guide gives it a fixed value (Delta), so that a weight is "
                "p(x, z) at one point and no estimate of p(x). Give it a distribution, or use "
                "pv.from_prior(model)."
            )
            continue
        whole, part = _bounds(prior), _bounds(drawn)
        if whole is None or part is None:
            continue
        ends = torch.broadcast_tensors(*part, *whole)
        low, high, lowest, highest = (end.reshape(-1) for end in ends)
        # Bounds of two computations may differ by rounding.
        narrower = ((low > lowest) & ~low.isclose(lowest)) | (
            (high < highest) & ~high.isclose(highest)
        )
        if narrower.any():
            at = int(narrower.nonzero()[0])
            said.append(
                f"site {name!r}: the guide's {kind_of(drawn)} is over {low[at]:g} to {high[at]:g}, "
                f"a part of {lowest[at]:g} to {highest[at]:g}, where the prior ({kind_of(prior)}) "
                "is. What of the posterior lies outside is missing in p(x), and no weight tells "
                "how much. Use a guide on the prior's support, or pv.from_prior(model)."
            )
    return " ".join(said)


def _bounds(fn: Any) -> Bounds | None:
    """The lower and the upper bound of a distribution on the reals; None if it has no such."""
    each = fn
    while True:  # angles are as angles are, whatever is around them
        inner = getattr(each, "component_distribution", getattr(each, "base_dist", None))
        if type(each).__name__ in PERIODIC or kind_of(each) == "Delta":
            return None
        if inner is None:
            break
        each = inner
    while hasattr(fn, "base_dist") and not isinstance(fn, TransformedDistribution):
        fn = fn.base_dist
    if isinstance(fn, TransformedDistribution) and _is_of_transforms(fn):
        bounds = _bounds(fn.base_dist)
        for transform in fn.transforms:
            bounds = None if bounds is None else _moved(bounds, transform)
        return bounds
    try:
        return _limits(fn.support)
    except NotImplementedError:
        return None


def _is_of_transforms(fn: TransformedDistribution) -> bool:
    """Whether its support is what torch says of any: the last transform's codomain."""
    return type(fn).support is TransformedDistribution.support


def _moved(bounds: Bounds, transform: Any) -> Bounds | None:
    """The bounds of what a transform makes of values; None if that is not known."""
    if isinstance(transform, AffineTransform):  # its codomain is the reals, whatever it moves
        loc, scale = (torch.as_tensor(t).double().cpu() for t in (transform.loc, transform.scale))
        one, other = (loc + scale * end for end in bounds)
        return torch.minimum(one, other), torch.maximum(one, other)
    domain = _limits(transform.domain)
    if domain is None or not all(map(torch.equal, domain, bounds)):
        return None
    return _limits(transform.codomain)


def _limits(support: Any) -> Bounds | None:
    """The ends of a support of single numbers; None for others."""
    mixed = False
    while hasattr(support, "base_constraint"):
        mixed |= isinstance(support, constraints.MixtureSameFamilyConstraint)
        support = support.base_constraint
    if support.is_discrete or support.event_dim:
        return None
    if support is not constraints.real and not (
        hasattr(support, "lower_bound") or hasattr(support, "upper_bound")
    ):
        return None
    low, high = (
        torch.as_tensor(getattr(support, name, end)).double().cpu()
        for name, end in (("lower_bound", -math.inf), ("upper_bound", math.inf))
    )
    if mixed:  # a component's bounds are not the mixture's, unless all have the same
        if not all((end == end.reshape(-1)[0]).all() for end in (low, high)):
            return None
        low, high = (end.reshape(-1)[0] for end in (low, high))
    return low, high
