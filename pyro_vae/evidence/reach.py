"""Latents that a guide can't reach: what it leaves out is in none of its weights."""

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
    """Say which latents of a pair have a guide whose support is narrower than the prior's.

    The mean of the weights is then the part of p(x) that lies within the guide's support, and
    nothing that the weights do can tell how much that is.

    Returns:
        A sentence, or nothing where no bound of the guide's lies within the prior's.
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
