"""What one run of a pair tells: its sites, its plates, and whether model and guide fit."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.inspect import get_dependencies
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.context import device_of, seeded
from pyro_vae.inference.handlers import (
    Program,
    Site,
    Trace,
    latent_sites,
    observed_sites,
    sample_sites,
    traces,
)

__all__ = ["Structure", "inspect"]


@dataclass(frozen=True)
class Structure:
    """The static facts about a pair on given arguments.

    Attributes:
        latents: Names of the guide's latent sites, in the guide's order.
        observed: Names of the model's observed sites, in the model's order.
        max_plate_nesting: Number of batch dimensions that the deepest plate needs.
        reparameterized: Whether every latent is drawn with a pathwise gradient.
        analytic: Names of the latent sites whose KL has a closed form that is unbiased here.
        model_trace: The trace of the model, one particle.
        guide_trace: The trace of the guide, one particle.
    """

    latents: tuple[str, ...]
    observed: tuple[str, ...]
    max_plate_nesting: int
    reparameterized: bool
    analytic: frozenset[str]
    model_trace: Trace
    guide_trace: Trace


def inspect(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    analytic_kl: bool = False,
) -> Structure:
    """Run a pair once, check that model and guide fit each other and the data, and look at it.

    The caller's random state is left alone. Values are checked against supports unless the user
    has switched Pyro's validation off.

    Args:
        model: A Pyro model.
        guide: Its guide.
        args: What both take.
        kwargs: Likewise.
        analytic_kl: Find the sites with an unbiased closed-form KL, and warn of the others.

    Returns:
        The structure of the pair.

    Raises:
        ValueError: A latent of one is missing in the other, shapes disagree, or an observed value
            lies outside its distribution's support; the message names the site.
    """
    with torch.no_grad(), seeded(0, device=device_of(model, guide)):
        try:
            model_trace, guide_trace = traces(model, guide, args, kwargs)
        except Exception as error:
            shapes = ", ".join(str(tuple(a.shape)) for a in args if isinstance(a, Tensor))
            error.add_note(f"(while running guide and model on arguments of shapes {shapes})")
            raise
        _check_match(model_trace, guide_trace)
        for name, site in observed_sites(model_trace):
            _check_observed(name, site)
        analytic = (
            _analytic_sites(model, guide, args, kwargs, model_trace, guide_trace)
            if analytic_kl
            else frozenset[str]()
        )
    frames = [
        frame
        for trace in (model_trace, guide_trace)
        for _, site in sample_sites(trace)
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    return Structure(
        latents=tuple(name for name, _ in latent_sites(guide_trace)),
        observed=tuple(name for name, _ in observed_sites(model_trace)),
        max_plate_nesting=max((-frame.dim for frame in frames), default=0),
        reparameterized=all(site["fn"].has_rsample for _, site in latent_sites(guide_trace)),
        analytic=analytic,
        model_trace=model_trace,
        guide_trace=guide_trace,
    )


def _check_match(model_trace: Trace, guide_trace: Trace) -> None:
    in_model = dict(latent_sites(model_trace))
    in_guide = dict(latent_sites(guide_trace))
    for name, site in in_model.items():
        if name not in in_guide:
            raise ValueError(
                f"the guide has no latent site {name!r}, which the model draws; the guide draws "
                f"{sorted(in_guide) or 'nothing'}. Give latent sites equal names in both."
            )
        expected, given = tuple(site["fn"].shape()), tuple(in_guide[name]["value"].shape)
        if _without_leading_ones(expected) != _without_leading_ones(given):
            raise ValueError(
                f"site {name!r}: the guide draws values of shape {given}, but the model expects "
                f"{expected} (batch shape {tuple(site['fn'].batch_shape)}, event shape "
                f"{tuple(site['fn'].event_shape)}). Make the encoder's output and the prior agree."
            )
    for name, site in in_guide.items():
        if name not in in_model and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"the guide draws the latent site {name!r}, which the model does not have; the "
                f"model draws {sorted(in_model) or 'nothing'}. Give latent sites equal names in "
                "both, or mark it with infer={'is_auxiliary': True}."
            )


def _check_observed(name: str, site: Site) -> None:
    fn, value = site["fn"], site["value"]
    expected = tuple(fn.shape())
    if fn.event_shape != value.shape[value.dim() - fn.event_dim :]:
        raise ValueError(
            f"site {name!r}: the observed value has shape {tuple(value.shape)}, but its "
            f"distribution is over {expected}. Make the decoder's output as wide as the data."
        )
    if site["mask"] is not None or not getattr(fn, "_validate_args", False):
        return
    if value.is_floating_point() and not value.isfinite().all():
        raise ValueError(f"site {name!r}: the observed value has NaN or infinite entries.")
    inside = fn.support.check(value)
    if not inside.all():
        raise ValueError(
            f"site {name!r}: {int((~inside).sum())} of {inside.numel()} observed values lie "
            f"outside the support {fn.support} of {_kind(fn)}; they range from "
            f"{value.min().item():g} to {value.max().item():g}. Use a likelihood that is a density "
            "for such data, or prepare the data (binarize, dequantize). Under "
            "pyro.validation_enabled(False) they are scored all the same, but not by log p(x)."
        )


def _analytic_sites(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    model_trace: Trace,
    guide_trace: Trace,
) -> frozenset[str]:
    """The sites at which integrating one latent out under the guide leaves no bias.

    E_q[log q(z_i|.) - log p(z_i|.)] may be integrated over z_i alone if no parent of z_i in the
    model descends from z_i in the guide (docs/mathematics.md, section 5).
    """
    in_model = [name for name, _ in latent_sites(model_trace)]
    in_guide = [name for name, _ in latent_sites(guide_trace)]
    found = set()
    for i, name in enumerate(in_guide):
        if name not in in_model:
            continue
        before = set(in_model[: in_model.index(name)])
        conflict = before & set(in_guide[i + 1 :])
        if conflict:  # the orders differ: look at what really depends on what
            above, below = _family_tree(model, guide, args, kwargs, name)
            conflict = above & below
        if conflict:
            warnings.warn(
                f"site {name!r}: in the guide {sorted(conflict)} depends on it, in the model it "
                "depends on them, so the analytic KL would be biased; the Monte Carlo estimate is "
                "used at this site.",
                UserWarning,
                stacklevel=2,
            )
            continue
        q, p = guide_trace.nodes[name]["fn"], model_trace.nodes[name]["fn"]
        try:
            kl_divergence(q, p)
        except NotImplementedError:
            warnings.warn(
                f"site {name!r}: no analytic KL of {_kind(q)} against {_kind(p)} is registered; "
                "the Monte Carlo estimate is used at this site.",
                UserWarning,
                stacklevel=2,
            )
            continue
        found.add(name)
    return frozenset(found)


def _family_tree(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> tuple[set[str], set[str]]:
    """The site's parents in the model, and its descendants in the guide."""

    def upstream(program: Program) -> dict[str, set[str]]:
        found: Any = get_dependencies(program, args, kwargs, include_deterministic=True)
        return {d: set(u) - {d} for d, u in found["prior_dependencies"].items()}

    descendants: set[str] = set()
    for downstream, above in upstream(guide).items():  # in the order of sampling
        if name in above or above & descendants:
            descendants.add(downstream)
    return upstream(model).get(name, set()), descendants


def _kind(fn: Any) -> str:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape
