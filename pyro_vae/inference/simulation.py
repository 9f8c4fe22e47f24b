"""Data that a model simulates, in the place of those among its arguments that it observes."""

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.inference.handlers import Program, Trace, sample_sites
from pyro_vae.inference.matching import kind_of

__all__ = ["Place", "Places", "check_joint_draw", "observed_places", "put", "simulated"]

# Where an argument stands: its number, or its name among the keyword arguments.
Place = int | str
Places = dict[str, Place]


def simulated(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """A trace of a model that draws all its sites, also those that it observes."""
    return poutine.trace(poutine.uncondition(program)).get_trace(*args, **kwargs)


def observed_places(trace: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Places:
    """Which argument each observed site observes.

    Args:
        trace: What ``simulated`` drew.
        args: Arguments of the model.
        kwargs: Likewise.

    Returns:
        From the names of the sites to the places of the arguments.

    Raises:
        ValueError: A site is a factor, observes none of the arguments or one of several equal
            ones, or two sites observe the same one. The message names the site.
    """
    given_args = [*enumerate(args), *kwargs.items()]
    tensors = [(place, arg) for place, arg in given_args if isinstance(arg, Tensor)]
    found: Places = {}
    for name, site in sample_sites(trace):
        if "was_observed" not in site["infer"]:
            continue
        if kind_of(site["fn"]) == "Unit":
            raise ValueError(
                f"site {name!r} is a pyro.factor: a model with a factor does not say how data come "
                "about, so none can be simulated."
            )
        given = site["infer"]["obs"]
        itself = [place for place, arg in tensors if arg is given]
        places = itself or [place for place, arg in tensors if _same(arg, given)]
        if len(places) > 1:
            raise ValueError(
                f"site {name!r}: the observed value equals the arguments {places}, so nothing "
                "tells which of them it is. Hand over values that differ."
            )
        if not places:
            raise ValueError(
                f"site {name!r}: the observed value is none of the arguments (the model makes it "
                "of them), so nothing tells where simulated values belong. Hand over what is "
                "observed as an argument of its own."
            )
        if places[0] in found.values():
            other = next(site for site, place in found.items() if place == places[0])
            raise ValueError(
                f"sites {other!r} and {name!r} both observe argument {places[0]}, which can hold "
                "what only one of them simulates. Hand over what each observes as an argument of "
                "its own."
            )
        found[name] = places[0]
    return found


def put(
    trace: Trace, places: Places, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with what a trace has simulated in the place of what was observed."""
    everything: dict[Place, Any] = {**dict(enumerate(args)), **kwargs}
    for name, place in places.items():
        arg = everything[place]
        everything[place] = trace.nodes[name]["value"].reshape(arg.shape).to(arg.dtype)
    return tuple(everything[i] for i in range(len(args))), {key: everything[key] for key in kwargs}


def check_joint_draw(
    first: tuple[tuple[Any, ...], dict[str, Any]], again: tuple[tuple[Any, ...], dict[str, Any]]
) -> None:
    """Refuse a model that computes with the argument that it observes.

    It would have simulated from the template; from the simulated data it simulates others.

    Args:
        first: Arguments with simulated data.
        again: Those that the model simulates from them with the same noise.

    Raises:
        ValueError: They differ.
    """
    olds = [*enumerate(first[0]), *first[1].items()]
    news = [*again[0], *again[1].values()]
    for (place, old), new in zip(olds, news, strict=True):
        if isinstance(new, Tensor) and not _same(new, old):
            raise ValueError(
                f"argument {place}: the model computes with a value that it observes, so what it "
                "simulates depends on the data that were handed over. Use what pyro.sample returns "
                "in place of the argument."
            )


def _same(arg: Tensor, given: Tensor) -> bool:
    """Whether an observed value is an argument, in whatever shape."""
    if arg.numel() != given.numel() or arg.dtype != given.dtype:
        return False
    return torch.allclose(arg.reshape(-1), given.reshape(-1), 0.0, 0.0, equal_nan=True)
