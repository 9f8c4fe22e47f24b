"""Where a pair's data stand: the plate over them, and whether each datum has a weight."""

from pyro_vae.inference.handlers import latent_sites, observed_sites
from pyro_vae.inference.structure import Structure, kind_of

__all__ = ["data_dim"]


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
    for trace in (structure.guide_trace, structure.model_trace):
        for site_name, site in latent_sites(trace):
            if name not in {f.name for f in site["cond_indep_stack"]}:
                raise ValueError(
                    f"site {site_name!r} is a latent outside the plate {name!r}: it is shared by "
                    "all data, so there is no weight per datum. Move it into the plate, or "
                    "condition on a value for it (pyro.poutine.condition)."
                )
    _check_auxiliary(structure)
    return plates[name].dim


def _check_auxiliary(structure: Structure) -> None:
    """The weights p(x, z) / q(a, z|x) average to no p(x), unless z is a function of a alone."""
    in_model = dict(latent_sites(structure.model_trace))
    in_guide = dict(latent_sites(structure.guide_trace))
    fixed = all(kind_of(in_guide[name]["fn"]) == "Delta" for name in in_model)
    for name in in_guide:
        if name not in in_model and not fixed:
            raise ValueError(
                f"site {name!r} is a latent of the guide alone, so the weights do not average to "
                f"p(x). Give the model a site {name!r} too: any distribution of it given the other "
                "latents will do, and the closer to the guide's the better."
            )
