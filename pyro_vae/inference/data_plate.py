"""Where a pair's data stand: the plate over them, and the log-density of each datum."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from pyro_vae.inference.handlers import (
    Site,
    Trace,
    latent_sites,
    observed_sites,
    unscaled_log_prob,
)
from pyro_vae.inference.structure import Structure, kind_of

__all__ = [
    "add_up",
    "check_auxiliary",
    "data_dim",
    "data_frame",
    "data_size",
    "outside_latents",
    "per_datum",
]


def data_dim(structure: Structure, size: int, name: str | None = None) -> int:
    """Find the plate over the data, and check that log-weights per datum exist.

    Args:
        structure: What an inspection of the pair found.
        size: Number of data among the arguments.
        name: The plate's name; None for the only plate that all observed sites share.

    Returns:
        Its dimension, negative.

    Raises:
        ValueError: There is no such plate, it holds another number of data, a latent stands
            outside it, or the guide has a latent that the model lacks.
    """
    frame = data_frame(structure, size, name)
    for trace in (structure.guide_trace, structure.model_trace):
        for site_name in outside_latents(trace, frame.name):
            raise ValueError(
                f"site {site_name!r} is a latent outside the plate {frame.name!r}: it is shared by "
                "all data, so there is no weight per datum. For evidence use log_predictive (held-"
                "out data) or joint_log_weights (the whole set), for training an ELBO; or move it "
                "into the plate."
            )
    check_auxiliary(
        dict(latent_sites(structure.model_trace)), dict(latent_sites(structure.guide_trace))
    )
    return frame.dim


def data_frame(structure: Structure, size: int, name: str | None = None) -> Any:
    """Find the plate over the data; takes and raises what ``data_dim`` does, latents aside.

    Returns:
        The plate's frame, with its ``name`` and ``dim``.
    """
    observed = dict(observed_sites(structure.model_trace))
    if not observed:
        raise ValueError("the model observes nothing: there is no evidence to estimate.")
    shared = [{f.name: f for f in s["cond_indep_stack"] if f.vectorized} for s in observed.values()]
    plates = {n: f for n, f in shared[0].items() if all(n in others for others in shared)}
    if name is not None and name not in plates:
        raise ValueError(
            f"data_plate: no plate {name!r} is shared by all observed sites ({sorted(observed)}); "
            f"they share {sorted(plates) or 'none'}."
        )
    if not plates:
        raise ValueError(
            f"the observed sites ({sorted(observed)}) share no plate, so nothing tells one datum "
            "from the next; wrap them in `with pyro.plate('data', len(x), dim=-1):`."
        )
    if name is None and len(plates) > 1:
        raise ValueError(
            f"the observed sites share the plates {sorted(plates)}; say with data_plate= which one "
            "runs over the data."
        )
    name = name or next(iter(plates))
    if plates[name].size != size:
        raise ValueError(
            f"the plate {name!r} holds {plates[name].size} data, but the arguments hold {size}. "
            "Hand over the data in the first tensor, one datum a row, and let the plate take all "
            "of them (subsample_size=len(x)): data that a plate draws by itself have no weights."
        )
    return plates[name]


def outside_latents(trace: Trace, plate: str) -> dict[str, Site]:
    """The latent sites of a trace that stand outside a plate: all data share them."""
    return {
        name: site
        for name, site in latent_sites(trace)
        if plate not in {frame.name for frame in site["cond_indep_stack"]}
    }


def check_auxiliary(in_model: Mapping[str, Site], in_guide: Mapping[str, Site]) -> None:
    """Refuse latents of the guide alone, unless the others are functions of them alone.

    The weights p(x, z) / q(a, z|x) average to no p(x).

    Args:
        in_model: The model's latent sites.
        in_guide: The guide's, which hold the same names.

    Raises:
        ValueError: The guide has a latent that the model lacks; the message names it.
    """
    drawn = [name for name in in_model if name in in_guide]  # the others are summed out
    fixed = all(kind_of(in_guide[name]["fn"]) == "Delta" for name in drawn)
    for name in in_guide:
        if name not in in_model and not fixed:
            raise ValueError(
                f"site {name!r} is a latent of the guide alone, so the weights do not average to "
                f"p(x). Give the model a site {name!r} too: any distribution of it given the other "
                "latents will do, and the closer to the guide's the better."
            )


def per_datum(
    sites: Iterable[tuple[str, Site]], particles: int, *, nesting: int, dim: int
) -> Tensor:
    """The sites' unscaled log-densities, summed over all dims but particles and data.

    Args:
        sites: Names and sites of a trace in a plate of particles.
        particles: Number of particles K.
        nesting: The deepest plate; the particles stand left of it.
        dim: The dimension of the data's plate, negative.

    Returns:
        Log-densities ``(K, N)`` in nats; a site that stands for all data alike is ``(K, 1)``.

    Raises:
        ValueError: A site has lost its particles.
    """
    return add_up(
        ((name, unscaled_log_prob(site)) for name, site in sites),
        particles,
        nesting=nesting,
        dim=dim,
    )


def add_up(
    log_probs: Iterable[tuple[str, Tensor]], particles: int, *, nesting: int, dim: int
) -> Tensor:
    """``per_datum`` of log-densities that are known, each with the name of its site."""
    total: Any = 0.0
    lead = -1 - nesting
    for name, log_prob in log_probs:
        if log_prob.dim() < -lead or log_prob.shape[lead] != particles:
            raise ValueError(
                f"site {name!r}: expected its batch shape to have {particles} particles at "
                f"dimension {lead}, got {tuple(log_prob.shape)}; a network that flattens its "
                "input has to keep the dimensions on its left."
            )
        others = [d for d in range(-log_prob.dim(), 0) if d not in (lead, dim)]
        total = total + (log_prob.sum(others) if others else log_prob)
    return total


def data_size(args: tuple[Any, ...]) -> int:
    """Number of data N among the arguments of a pair."""
    for arg in args:
        if isinstance(arg, Tensor) and arg.dim() > 0:
            if len(arg) == 0:
                raise ValueError("the data are empty: expected at least one datum.")
            return len(arg)
    raise ValueError(
        "expected data: at least one tensor of shape (N, ...) among the arguments of the pair, "
        f"such as data.test of a Split; got {', '.join(type(a).__name__ for a in args) or 'none'}."
    )
