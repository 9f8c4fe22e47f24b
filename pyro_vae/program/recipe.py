"""How a module was made, as JSON: so that a run can be loaded without executing a pickle.

``recorded`` remembers the arguments with which a factory or a class of this package was called.
``describe`` turns a tree of such objects into a JSON value, ``build`` makes the tree again.
What can stand in a recipe: objects made by recorded factories, this package's public functions
(families, with or without bound arguments), activations out of ``torch.nn``, distributions and
transforms of Pyro's, numbers, strings, dtypes, and sequences of these. A tensor stands for its
shape and one of its values, since what a factory makes of it is among the saved parameters. An
object that stands in two places (a shared encoder) is made once.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["NotDescribedError", "build", "describe", "recorded"]

_MODULES = ("networks", "families", "conditional", "autoregressive", "masked", "priors", "vae")
_PYRO = {"pyro.distributions": dist, "pyro.distributions.transforms": dist.transforms}

T = TypeVar("T", bound=Callable[..., Any])


class NotDescribedError(TypeError):
    """A pair has a part that this package did not make, so no recipe can be written for it."""


def recorded(make: T) -> T:
    """Let what ``make`` returns (or, for a class, its instances) remember how it was made."""
    signature = inspect.signature(make)
    name = f"{_home(make.__module__)}.{make.__name__}"

    def remember(made: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        object.__setattr__(made, "_recipe", (name, dict(bound.arguments)))

    if inspect.isclass(make):
        init = make.__init__

        @functools.wraps(init)
        def remembering_init(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            # A subclass of the user's passes its own arguments: it has no recipe.
            if type(self) is make:
                remember(self, args, kwargs)

        make.__init__ = remembering_init  # type: ignore[assignment]
        return make  # type: ignore[return-value]

    @functools.wraps(make)
    def remembering(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        remember(made, args, kwargs)
        return made

    return remembering  # type: ignore[return-value]


def describe(*objects: Any) -> dict[str, Any]:
    """Write objects made by recorded factories as one JSON value.

    Args:
        objects: E.g. a ``Model`` and a ``Guide``.

    Returns:
        ``{"nodes": [...], "objects": [...]}``: each node is one call; parts refer to nodes by
        their number, so shared parts stay shared.

    Raises:
        NotDescribedError: Some part was not made by this package; the message names it.
    """
    nodes: list[dict[str, Any]] = []
    numbers: dict[int, int] = {}

    def value(thing: Any, where: str) -> Any:
        if thing is None or isinstance(thing, bool | int | float | str):
            return thing
        if isinstance(thing, list | tuple):
            return [value(item, f"{where}[{i}]") for i, item in enumerate(thing)]
        if isinstance(thing, torch.dtype):
            return {"dtype": str(thing).removeprefix("torch.")}
        if isinstance(thing, Tensor):
            return {
                "shape": list(thing.shape),
                **value(thing.dtype, where),
                "fill": thing.flatten()[0].item(),
            }
        if hasattr(thing, "_recipe"):
            if id(thing) not in numbers:
                name, arguments = thing._recipe
                _check_unchanged(thing, arguments, where)
                node = {
                    "make": name,
                    "with": {k: value(v, f"{where}.{k}") for k, v in arguments.items()},
                }
                numbers[id(thing)] = len(nodes)
                nodes.append(node)
            return {"node": numbers[id(thing)]}
        if isinstance(thing, functools.partial) and not thing.args:
            bound = {k: value(v, f"{where}.{k}") for k, v in thing.keywords.items()}
            return {"function": _function_name(thing.func, where), "with": bound}
        if callable(thing) and not isinstance(thing, nn.Module):
            return {"function": _function_name(thing, where)}
        raise NotDescribedError(
            f"{where} is a {type(thing).__name__}, which pyro_vae did not make: no recipe of this "
            "pair can be saved. Its parameters are; pass model= and guide= when loading."
        )

    written = [value(thing, type(thing).__name__) for thing in objects]
    return {"nodes": nodes, "objects": written}


def build(recipe: dict[str, Any]) -> list[Any]:
    """Make the objects of a recipe, freshly initialised.

    Args:
        recipe: What ``describe`` returned.

    Returns:
        The objects, in the order in which they were described.

    Raises:
        ValueError: The recipe names something that this version does not have, or calls it with
            arguments that it does not take.
    """
    made: list[Any] = []

    def value(thing: Any) -> Any:
        if isinstance(thing, list):
            return tuple(value(item) for item in thing)
        if not isinstance(thing, dict):
            return thing
        if "node" in thing:
            return made[thing["node"]]
        if "shape" in thing:
            dtype = getattr(torch, thing["dtype"])
            return torch.full(thing["shape"], thing["fill"], dtype=dtype)
        if "dtype" in thing:
            return getattr(torch, thing["dtype"])
        function = _find(thing["function"])
        bound = {k: value(v) for k, v in thing.get("with", {}).items()}
        return functools.partial(function, **bound) if bound else function

    try:
        for node in recipe["nodes"]:
            made.append(_call(_find(node["make"]), {k: value(v) for k, v in node["with"].items()}))
        return [value(thing) for thing in recipe["objects"]]
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the recipe of the pair can't be followed ({error}): it was written by another "
            "version of pyro_vae or changed by hand. Pass model= and guide= instead."
        ) from error


def _check_unchanged(thing: Any, arguments: dict[str, Any], where: str) -> None:
    """A part that was replaced after the object was made would be saved as the old one."""
    for name, given in arguments.items():
        if callable(given) and getattr(thing, name, given) is not given:
            raise NotDescribedError(
                f"{where}.{name} was replaced after {where} was made: no recipe of this pair can "
                "be saved. Make the object anew with its new part, or pass model= and guide= when "
                "loading."
            )


def _call(make: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call with arguments by name, but those of a ``*args`` parameter by position."""
    positional: list[Any] = []
    for parameter in inspect.signature(make).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += arguments.pop(parameter.name)
    return make(*positional, **arguments)


def _home(module: str) -> str:
    """The file or folder of this package's programs in which a module stands."""
    return module.removeprefix("pyro_vae.program.").partition(".")[0]


def _function_name(function: Any, where: str) -> str:
    # What was made by exec, or in C, may have None for a module.
    module, name = getattr(function, "__module__", None) or "", getattr(function, "__name__", "")
    if module.startswith("torch.nn.modules.") and getattr(nn, name, None) is function:
        return f"torch.nn.{name}"
    for home, members in _PYRO.items():
        if getattr(members, name, None) is function:
            return f"{home}.{name}"
    short = f"{_home(module)}.{name}"
    try:
        if _find(short) is function:
            return short
    except AttributeError:
        pass
    raise NotDescribedError(
        f"{where} is the function {name!r}, which is neither pyro_vae's, nor an activation of "
        "torch.nn, nor a distribution or transform of Pyro's: no recipe of this pair can be saved. "
        "Its parameters are; pass model= and guide= when loading."
    )


def _find(name: str) -> Any:
    """Look a name up among the public names of this package, torch.nn, and Pyro's distributions."""
    module, _, attribute = name.rpartition(".")
    if module == "torch.nn":
        found = getattr(nn, attribute)
        if inspect.isclass(found) and issubclass(found, nn.Module):
            return found
    elif module in _PYRO:
        found = getattr(_PYRO[module], attribute)
        density = inspect.isclass(found) and issubclass(found, torch.distributions.Distribution)
        # Not what else stands there, such as switches of validation.
        if attribute in _PYRO[module].__all__ and (density or module.endswith("transforms")):
            return found
    elif module in _MODULES:
        home = importlib.import_module(f"pyro_vae.program.{module}")
        if attribute in home.__all__:
            return getattr(home, attribute)
    raise AttributeError(f"{name!r} is not a public name of pyro_vae or a module of torch.nn")
