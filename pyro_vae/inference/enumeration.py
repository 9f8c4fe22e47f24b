r"""Exact sums over discrete latents, by Pyro's parallel enumeration.

A site marked ``infer={"enumerate": "parallel"}`` takes all its values at once, along a dimension of
its own left of all plates. A marked site of the **guide** is summed with its probabilities,

.. math:: E_q[f(z)] = \sum_z q(z|x)\,f(z),

one that stands in the **model** alone is summed out of the joint density,

.. math:: p(x, z) = \sum_c p(c, x, z).

Pyro does the bookkeeping of dimensions and the sums of products; a tensor here is *packed*: its
dimensions have names (``_pyro_dims``), and those of size one are left out.
"""

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LinearRing
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from pyro_vae.inference.handlers import (
    Program,
    Site,
    Trace,
    latent_sites,
    sample_sites,
    unscaled_log_prob,
    unweighted_scale,
)

__all__ = [
    "Factor",
    "enumerated_traces",
    "expectation",
    "factors",
    "is_marked",
    "sums_out",
    "unpacked",
]


class Factor(NamedTuple):
    """A log-density of a trace, or what is left of several after a sum.

    Attributes:
        names: The sites in it.
        log_prob: Unscaled log-density in nats, packed.
        plates: Names of the dimensions of the plates around it.
        scale: The sites' scale, with the KL weight where they have one.
        unweighted: And without.
    """

    names: tuple[str, ...]
    log_prob: Any
    plates: frozenset[str]
    scale: Any
    unweighted: Any


def is_marked(site: Site) -> bool:
    """Whether the site is to be enumerated in parallel, over its whole support."""
    infer = site["infer"]
    return infer.get("enumerate") == "parallel" and infer.get("num_samples") is None


def sums_out(program: Program, nesting: int) -> Program:
    """Let marked sites that are not replayed take all their values, left of so many plates."""
    return EnumMessenger(first_available_dim=-1 - nesting)(program)


def enumerated_traces(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], nesting: int
) -> tuple[Trace, Trace]:
    """The model's trace and the guide's, every marked site at all its values.

    Args:
        model: A Pyro model.
        guide: Its guide.
        args: What both take.
        kwargs: Likewise.
        nesting: The deepest plate of both; values stand left of it.
    """
    guide_trace = poutine.trace(sums_out(guide, nesting)).get_trace(*args, **kwargs)
    # Without a first dimension of its own it goes on left of the guide's; replaying comes last.
    replayed = poutine.replay(EnumMessenger()(model), trace=guide_trace)
    model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    model_trace, guide_trace = (
        poutine.util.prune_subsample_sites(t) for t in (model_trace, guide_trace)
    )
    guide_trace.symbolize_dims()
    model_trace.symbolize_dims(guide_trace.plate_to_symbol)
    return model_trace, guide_trace


def factors(trace: Trace, given: frozenset[str]) -> list[Factor]:
    """The log-densities of a trace, with the sites that are not given summed out.

    Args:
        trace: A trace whose dimensions have symbols (``Trace.symbolize_dims``).
        given: Names of the sites that are not to be summed out: the guide's.

    Returns:
        One factor for each site, but for the sites that a sum joins one in all.

    Raises:
        ValueError: Sites that a sum joins have other scales.
    """
    found: list[Factor] = []
    joined: list[Factor] = []
    summed = {
        site["infer"]["_enumerate_symbol"]
        for name, site in latent_sites(trace)
        if name not in given and "_enumerate_symbol" in site["infer"]
    }
    for name, site in sample_sites(trace):
        plates = frozenset(
            trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized
        )
        log_prob: Any = packed.pack(unscaled_log_prob(site), site["infer"]["_dim_to_symbol"])
        weight = site["scale"], unweighted_scale(site)
        factor = Factor((name,), log_prob, plates, *weight)
        (found if summed.isdisjoint(log_prob._pyro_dims) else joined).append(factor)
    if not joined:
        return found
    names = tuple(name for factor in joined for name in factor.names)
    scale = joined[0].unweighted
    if any(factor.unweighted is not scale and factor.unweighted != scale for factor in joined):
        raise ValueError(
            f"sites {', '.join(map(repr, names))}: a sum over all values joins them, so their "
            "scales (poutine.scale, subsampling plates) have to be equal."
        )
    tree: OrderedDict[frozenset[str], list[Any]] = OrderedDict()
    for factor in joined:
        tree.setdefault(factor.plates, []).append(factor.log_prob)
    left = contract_tensor_tree(tree, summed)
    return found + [
        Factor(names, term, plates, scale, scale)
        for plates, terms in left.items()
        for term in terms
    ]


def expectation(factor: Factor, summed: list[Factor], symbols: frozenset[str]) -> Tensor:
    r"""The sum over plates of :math:`\sum_z q(z|x) \log p`, a 0-d tensor.

    Args:
        factor: What to take the expectation of; unscaled.
        summed: The log-probabilities of the guide's sites that take all their values.
        symbols: The dimensions along which they do.

    Raises:
        ValueError: The factor depends on a value that was drawn in a deeper plate.
    """
    cost = factor.log_prob
    pending = symbols.intersection(cost._pyro_dims)
    if not pending:
        return cost.sum()
    # Only what is tied to the factor through values: the rest sums to one.
    weights, rest = [], [q for q in summed if q.plates <= factor.plates]
    while tied := [q for q in rest if pending.intersection(q.log_prob._pyro_dims)]:
        weights += tied
        rest = [q for q in rest if all(q is not t for t in tied)]
        pending = pending.union(*(symbols.intersection(q.log_prob._pyro_dims) for q in tied))
    reached = frozenset("".join(q.log_prob._pyro_dims for q in weights))
    if missing := symbols.intersection(cost._pyro_dims) - reached:
        raise ValueError(
            f"site {factor.names[0]!r} depends on {len(missing)} enumerated sites of a plate that "
            "it does not stand in; move it into that plate."
        )
    probabilities = [packed.exp(q.log_prob) for q in weights]
    weight = LinearRing().sumproduct(probabilities, pending - set(cost._pyro_dims))
    weight, cost = packed.broadcast_all(weight, cost)
    # A value of probability zero counts for nothing, also where its log-density is -infinity.
    return (weight * torch.where(weight > 0, cost, torch.zeros_like(cost))).sum()


def unpacked(trace: Trace, factor: Factor, particles: int, nesting: int) -> Tensor:
    """A factor with its dimensions where they were, and so many particles left of all plates."""
    log_prob: Tensor = packed.unpack(factor.log_prob, trace.symbol_to_dim)
    missing = nesting + 1 - log_prob.dim()
    log_prob = log_prob.reshape((1,) * missing + tuple(log_prob.shape))
    return log_prob.expand(particles, *log_prob.shape[1:])
