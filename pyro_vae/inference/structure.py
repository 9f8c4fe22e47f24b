"""What one run of a pair tells: its sites, its plates, and whether model and guide fit."""

import warnings
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.context import device_of, forked, modules_of
from pyro_vae.inference.handlers import (
    Program,
    Site,
    Trace,
    latent_sites,
    observed_sites,
    sample_sites,
    site_to_blame,
    traces,
)
from pyro_vae.inference.matching import check_match, check_observed, kind_of

__all__ = ["Structure", "inspect", "kind_of"]


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

    def without_path(self) -> tuple[str, Site]:
        """The first latent of the guide that is drawn without a pathwise gradient."""
        latents = latent_sites(self.guide_trace)
        return next((name, site) for name, site in latents if not site["fn"].has_rsample)


def inspect(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    analytic_kl: bool = False,
    sums: bool = False,
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
        sums: Let the model have latents of its own that are marked for enumeration.

    Returns:
        The structure of the pair.

    Raises:
        ValueError: A latent of one is missing in the other, shapes disagree, or an observed value
            lies outside its distribution's support; the message names the site.
    """
    # Not under a seed of its own: parameters that start from noise are drawn in the first run.
    with torch.no_grad(), forked(device=device_of(model, guide)):
        try:
            model_trace, guide_trace = traces(model, guide, args, kwargs)
        except Exception as error:
            _explain(error, model, guide, args, kwargs)
            shapes = ", ".join(str(tuple(a.shape)) for a in args if isinstance(a, Tensor))
            error.add_note(f"(while running guide and model on arguments of shapes {shapes})")
            raise
        check_match(model_trace, guide_trace, sums=sums)
        for name, site in observed_sites(model_trace):
            check_observed(name, site)
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


def _explain(
    error: Exception,
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Raise what lies behind an error of running a pair, where that can be told."""
    finite = tuple(
        a.nan_to_num() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    )
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor) and arg.is_floating_point() and not arg.isfinite().all():
            try:  # a pair that masks them fails for another reason
                traces(model, guide, finite, kwargs)
            except Exception:
                break
            count = int((~arg.isfinite()).sum())
            raise ValueError(
                f"argument {i} of the pair has {count} NaN or infinite values; remove those data, "
                "or say by a mask which are missing (pv.Masked)."
            ) from error
    dtypes = {
        parameter.dtype
        for program in (model, guide)
        for module in modules_of(program).values()
        for parameter in module.parameters()
    }
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor) and len(dtypes) == 1 and arg.dtype not in dtypes:
            (dtype,) = dtypes
            if i == 0 or arg.is_floating_point():
                raise ValueError(
                    f"argument {i} of the pair is {arg.dtype}, but the pair's parameters are "
                    f"{dtype}; convert it by .to({dtype})."
                ) from error
    try:  # a model that breaks on the guide's latents may do well on its own
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(model).get_trace(*args, **kwargs)
    except Exception:
        pass
    else:
        try:
            check_match(model_trace, guide_trace, sums=True)
        except ValueError as mismatch:
            raise mismatch from error
    try:  # Pyro's validation names a distribution and its parameter, but not the site
        with pyro.validation_enabled(is_validate=False):
            blamed = site_to_blame(*traces(model, guide, args, kwargs))
    except Exception:
        return
    if blamed is not None:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{blamed} ({reason}).") from error


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
            conflict &= _parents(model, args, kwargs, name)
            conflict -= _non_descendants(guide, args, kwargs, name)
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
        if kind_of(q) == "Delta":
            # Monte Carlo is exact here, and the closed form loses the density that a Delta carries:
            # the Jacobian of an autoguide.
            continue
        try:
            kl_divergence(q, p)
        except NotImplementedError:
            warnings.warn(
                f"site {name!r}: no analytic KL of {kind_of(q)} against {kind_of(p)} is known; the "
                "Monte Carlo estimate is used at this site.",
                UserWarning,
                stacklevel=2,
            )
            continue
        found.add(name)
    return frozenset(found)


def _dependencies(
    program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, set[str]]:
    """From each random site, in the order of sampling, to the latents on which it depends.

    Sites that hold a fixed value (``Delta``, ``pyro.deterministic``) are looked through.
    """
    found: Any = get_dependencies(program, args, kwargs)
    return {down: set(up) - {down} for down, up in found["prior_dependencies"].items()}


def _parents(model: Program, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> set[str]:
    """The latents on which the site depends in the model."""
    return _dependencies(model, args, kwargs).get(name, set())


def _non_descendants(
    guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> set[str]:
    """The random sites that do not depend on the site in the guide, directly or through others."""
    dependencies = _dependencies(guide, args, kwargs)
    descendants = {name}
    for downstream, above in dependencies.items():
        if above & descendants:
            descendants.add(downstream)
    return set(dependencies) - descendants
