"""Pairs whose weights look like any others and mean something else: points, parts of a support."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.context import at_rest, device_of, on_device
from pyro_vae.evidence.blocks import data_blocks
from pyro_vae.evidence.particles import Arguments, Pair
from pyro_vae.inference.handlers import Program
from pyro_vae.inference.matching import kind_of
from pyro_vae.inference.structure import latent_sites

__all__ = ["out_of_reach"]


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
        if bool((part[0] > whole[0]).any()) or bool((part[1] < whole[1]).any()):
            said.append(
                f"site {name!r}: the guide's {kind_of(drawn)} is over {drawn.support}, a part of "
                f"{prior.support}, where the prior ({kind_of(prior)}) is. What of the posterior "
                "lies outside is missing in p(x), and no weight tells how much. Use a guide on the "
                "prior's support, or pv.from_prior(model)."
            )
    return " ".join(said)


def _bounds(fn: Any) -> tuple[Tensor, Tensor] | None:
    """The lower and the upper bound of a distribution on the reals; None if it has no such."""
    if kind_of(fn) == "Delta":
        return None
    try:
        support = fn.support
    except NotImplementedError:
        return None
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support.is_discrete or (support.event_dim and support is not constraints.real_vector):
        return None
    if support in (constraints.real, constraints.real_vector):
        return torch.tensor(-math.inf), torch.tensor(math.inf)
    if not (hasattr(support, "lower_bound") or hasattr(support, "upper_bound")):
        return None
    low, high = (
        torch.as_tensor(getattr(support, name, end)).cpu()
        for name, end in (("lower_bound", -math.inf), ("upper_bound", math.inf))
    )
    return low, high
