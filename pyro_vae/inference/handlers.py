"""Effect handlers, and what can be read off the traces of a pair."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.graph.refusal import ThisTimeError

__all__ = [
    "Program",
    "Site",
    "Trace",
    "active_weight",
    "in_particles",
    "kl_weight",
    "latent_sites",
    "observed_sites",
    "sample_sites",
    "site_to_blame",
    "traces",
    "unscaled_log_prob",
    "unweighted_scale",
    "warmup",
]

Program = Callable[..., Any]
Trace = Any
Site = Any


class kl_weight(Messenger):  # noqa: N801 - a context manager, named as Pyro names its handlers
    r"""Weight the latent sites of any model and guide by beta: the KL weight.

    Inside this context an ELBO is :math:`E_q[\log p(x|z)] - \beta\,E_q[\log q(z|x) - \log p(z)]`,
    whoever computes it: ``pyro_vae.SVI``, ``pyro.infer.SVI``, or a loss called by hand. Logged
    bounds and evidence stay unweighted. Of several handlers around a step it has to be the
    outermost: a scale outside it would count as part of the weight.

    Args:
        beta: The weight, a number or a 0-d tensor, not negative.

    Raises:
        ValueError: ``beta`` is negative, or one weight stands inside another.

    Reference: Higgins et al., "beta-VAE" (2017); Bowman et al., "Generating sentences from a
    continuous space" (2016), for warm-up.

    Example:
        >>> program = pyro.poutine.trace(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
        >>> with pv.kl_weight(0.5):
        ...     trace = program.get_trace()
        >>> trace.nodes["z"]["scale"]
        0.5
    """

    def __init__(self, beta: float | Tensor) -> None:
        super().__init__()
        # To look at a tensor on another device would wait for that device.
        readable = not isinstance(beta, Tensor) or beta.device.type == "cpu"
        if readable and not beta >= 0:
            raise ValueError(f"kl_weight: expected beta >= 0, got {beta}.")
        self.beta = beta

    def __enter__(self) -> "kl_weight":
        if any(isinstance(handler, kl_weight) for handler in _PYRO_STACK):
            raise ValueError(
                "kl_weight: one KL weight stands inside another; multiply them yourself and use "
                "one context."
            )
        super().__enter__()
        return self

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            # A copy: replayed sites share this dict between the guide's trace and the model's.
            msg["infer"] = {**(msg["infer"] or {}), "unweighted_scale": msg["scale"]}
            msg["scale"] = msg["scale"] * self.beta


def warmup(epochs: int) -> Callable[[int], float]:
    """A KL weight that rises linearly from 1 / ``epochs`` to 1 over the first epochs.

    Args:
        epochs: Number of epochs until the weight is 1.

    Returns:
        A function from the epoch (1, 2, ...) to the weight, for ``fit(kl_weight=...)``.

    Example:
        >>> weight = pv.warmup(4)
        >>> [weight(epoch) for epoch in (1, 2, 4, 9)]
        [0.25, 0.5, 1.0, 1.0]
    """
    if epochs < 1:
        raise ValueError(f"warmup: expected at least one epoch, got {epochs}.")
    return lambda epoch: min(1.0, epoch / epochs)


def active_weight() -> kl_weight | None:
    """The KL weight around this call, if there is one.

    Raises:
        ThisTimeError: There are other handlers around it.
    """
    if not _PYRO_STACK:
        return None
    outer: Any = _PYRO_STACK[0]
    if len(_PYRO_STACK) > 1 or not isinstance(outer, kl_weight):
        names = [type(h).__name__ for h in _PYRO_STACK if not isinstance(h, kl_weight)]
        raise ThisTimeError(
            f"the step stands inside handlers of Pyro's ({', '.join(names)}); wrap the model or "
            "the guide in them instead"
        )
    return outer


def traces(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Trace, Trace]:
    """Run the guide, then the model on the guide's latents.

    Returns:
        The model's trace and the guide's, without the bookkeeping sites of subsampling plates.
    """
    unwrapped = poutine.unwrap(guide)
    if isinstance(unwrapped, Messenger):  # an effectful autoguide runs the model itself
        guide(*args, **kwargs)
        model_trace, guide_trace = unwrapped.get_traces()  # type: ignore[attr-defined]
    else:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    return (
        poutine.util.prune_subsample_sites(model_trace),
        poutine.util.prune_subsample_sites(guide_trace),
    )


def in_particles(program: Program, num_particles: int, max_plate_nesting: int) -> Program:
    """Run a program in a plate of particles, left of its deepest plate."""
    return pyro.plate("num_particles", num_particles, dim=-1 - max_plate_nesting)(program)


def sample_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """The sample sites of a trace, without the bookkeeping sites of plates."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield name, site


def latent_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """The sample sites of a trace that are drawn."""
    return ((name, site) for name, site in sample_sites(trace) if not site["is_observed"])


def observed_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """The sample sites of a trace that are given."""
    return ((name, site) for name, site in sample_sites(trace) if site["is_observed"])


def unscaled_log_prob(site: Site) -> Tensor:
    """The site's log-density in nats, masked but never scaled, of the site's batch shape."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, 1.0, site["mask"])


def unweighted_scale(site: Site) -> float | Tensor:
    """The site's scale (of subsampling, say) without the KL weight."""
    return site["infer"].get("unweighted_scale", site["scale"])


def site_to_blame(model_trace: Trace, guide_trace: Trace) -> str | None:
    """The first site whose value or log-density is NaN, or infinite in the wrong direction."""
    for owner, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, site in sample_sites(trace):
            if not site["value"].isfinite().all():
                return f"site {name!r} of the {owner}: its value is NaN or infinite"
            log_prob = unscaled_log_prob(site)
            # p(x) = 0 is an honest answer of a model; q(z) = infinity is none of a guide's.
            if log_prob.isnan().any() or (log_prob == math.inf).any():
                return f"site {name!r} of the {owner}: its log-density is NaN or +infinity"
            if owner == "guide" and (log_prob == -math.inf).any():
                return f"site {name!r} of the guide: it drew a value of density zero"
    return None
