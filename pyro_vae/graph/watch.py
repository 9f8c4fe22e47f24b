"""What a captured graph has frozen of a program's Python state, and whether it has changed since.

A graph holds the values that attributes, globals and closures had when it was captured. They are
found by walking from the programs through modules, functions and objects of the user's; tensors
are live in a graph, so only which tensor stands where is watched, not what it holds.
"""

import argparse
import functools
import random
import sys
from collections.abc import Mapping
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_vae.graph.refusal import CannotCompileError

__all__ = ["Watch"]

_LIBRARIES = sys.stdlib_module_names | {"torch", "pyro", "numpy", "scipy", "pyro_vae"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_MODULE_INTERNALS = set(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NAMESPACES = (Messenger, SimpleNamespace, argparse.Namespace)
_MISSING = object()
_LARGEST_ARRAY = 1 << 16


class Watch:
    """A record of the Python state that programs can reach by name.

    Args:
        programs: A model, a guide, and what else they read: a loss, arguments.

    Raises:
        CannotCompileError: A NumPy array is too large to be compared at each call.
    """

    def __init__(self, *programs: Any) -> None:
        # (mapping, key, value then, label): compared by identity first, so a look costs little.
        self._entries: list[tuple[Mapping[Any, Any], Any, Any, str]] = []
        self._cells: list[tuple[Any, Any, str]] = []
        self._copies: list[tuple[Any, Any, str]] = []
        self._hookless: list[tuple[Mapping[Any, Any], str]] = []
        self._no_hooks: list[Mapping[Any, Any]] = []
        self._keys: list[tuple[Mapping[Any, Any], list[Any], str]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        self._looked_up: set[tuple[int, str]] = set()
        self._alive: list[Any] = []
        roles = ("the model", "the guide", "the loss", "the arguments")
        for role, program in zip(roles, programs, strict=False):
            self._walk(program, role)

    def changed(self) -> str | None:
        """What has changed since, in words; None if nothing has."""
        for mapping, key, then, label in self._entries:
            now = mapping.get(key, _MISSING)
            if now is not then and not _same(now, then):
                return label
        for cell, then, label in self._cells:
            now = _contents(cell)
            if now is not then and not _same(now, then):
                return label
        for thing, copy, label in self._copies:
            if not _same(_copy(thing), copy):
                return label
        if any(self._no_hooks):
            return next(label for hooks, label in self._hookless if hooks)
        for mapping, keys, label in self._keys:
            if len(mapping) != len(keys) or list(mapping) != keys:
                return label
        return None

    def restore(self) -> None:
        """Put back what has changed since, as far as Python lets it be put back."""
        for mapping, key, then, _ in self._entries:
            if isinstance(mapping, dict) and mapping.get(key, _MISSING) is not then:
                if then is _MISSING:
                    del mapping[key]
                else:
                    mapping[key] = then
        for cell, then, _ in self._cells:
            if then is not _MISSING and _contents(cell) is not then:
                cell.cell_contents = then
        for thing, copy, _ in self._copies:
            if isinstance(thing, list):
                thing[:] = copy
        for generator, state in self._generators:
            if isinstance(generator, torch.Generator):
                generator.set_state(state)
            elif isinstance(generator, random.Random):
                generator.setstate(state)
            else:
                generator.bit_generator.state = state

    def _walk(self, thing: Any, label: str) -> None:
        if isinstance(thing, (*_PLAIN, Tensor, type)) or id(thing) in self._seen:
            return
        self._seen.add(id(thing))
        self._alive.append(thing)  # an id is only unique among the living
        if isinstance(thing, nn.Module):
            self._walk_module(thing, label)
        elif isinstance(thing, torch.Generator):
            self._generators.append((thing, thing.get_state()))
        elif isinstance(thing, random.Random):
            self._generators.append((thing, thing.getstate()))
        elif isinstance(thing, np.random.Generator):
            self._generators.append((thing, thing.bit_generator.state))
        elif isinstance(thing, FunctionType):
            self._walk_function(thing, label)
        elif isinstance(thing, MethodType):
            self._walk(thing.__self__, label)
            self._walk(thing.__func__, label)
        elif isinstance(thing, functools.partial):
            for part in (thing.func, *thing.args, *thing.keywords.values()):
                self._walk(part, label)
        elif isinstance(thing, list | tuple | dict | set):
            if not isinstance(thing, tuple):
                self._copies.append((thing, _copy(thing), f"{label} ({type(thing).__name__})"))
            for item in thing.values() if isinstance(thing, dict) else thing:
                self._walk(item, label)
        elif isinstance(thing, np.ndarray):
            if thing.nbytes > _LARGEST_ARRAY:
                raise CannotCompileError(
                    f"{label} is a NumPy array of {thing.nbytes} bytes, whose values a graph would "
                    "freeze; register it as a buffer of a module"
                )
            self._copies.append((thing, _copy(thing), label))
        elif isinstance(thing, _NAMESPACES) or _is_users(type(thing)):
            self._walk_object(thing, label)

    def _walk_module(self, module: nn.Module, label: str) -> None:
        owner = f"{type(module).__name__} in {label}"
        training = f"attribute 'training' of {owner}"
        self._entries.append((vars(module), "training", module.training, training))
        for name, child in module._modules.items():
            self._entries.append((module._modules, name, child, f"module {name!r} of {owner}"))
            self._walk(child, label)
        if module._modules:
            self._keys.append((module._modules, list(module._modules), f"the modules of {owner}"))
        for table in (module._parameters, module._buffers, getattr(module, "_pyro_samples", {})):
            for name, value in table.items():
                self._entries.append((table, name, value, f"tensor {name!r} of {owner}"))
        for name, value in vars(module).items():
            internal = name in _MODULE_INTERNALS or name.startswith(("_pyro", "_recipe"))
            # Transforms keep their last values and a weak reference to their inverse.
            cache = isinstance(module, Transform) and name.startswith(("_cached", "_inv"))
            if not internal and not cache:
                self._enter(vars(module), name, value, f"attribute {name!r} of {owner}")
        for name in _HOOKS:
            hooks = getattr(module, name)
            if hooks:
                self._keys.append((hooks, list(hooks), f"the hooks of {owner}"))
            else:
                self._hookless.append((hooks, f"the hooks of {owner}"))
                self._no_hooks.append(hooks)
        self._walk_class(type(module), owner, vars(module))

    def _walk_object(self, thing: Any, label: str) -> None:
        owner = f"{type(thing).__name__} in {label}"
        own: Mapping[str, Any] = getattr(thing, "__dict__", {})
        for name, value in own.items():
            self._enter(own, name, value, f"attribute {name!r} of {owner}")
        if _slots(thing):
            self._copies.append((thing, _copy(thing), f"an attribute of {owner}"))
            for value in _copy(thing):
                self._walk(value, owner)
        self._walk_class(type(thing), owner, own)

    def _walk_class(self, cls: type, owner: str, own: Mapping[str, Any]) -> None:
        for base in cls.__mro__:
            if not _is_users(base):
                continue
            for name, value in vars(base).items():
                for function in (getattr(value, "fget", value), getattr(value, "__func__", value)):
                    if isinstance(function, FunctionType):
                        self._walk(function, owner)
                if name.startswith("__") or hasattr(value, "__get__"):
                    continue
                self._enter(vars(base), name, value, f"{base.__name__}.{name}")
                if name not in own:  # an instance may get an attribute of that name later
                    label = f"attribute {name!r} of {owner}"
                    self._entries.append((own, name, _MISSING, label))

    def _walk_function(self, function: FunctionType, label: str) -> None:
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self._walk(wrapped, label)
        cells = function.__closure__ or ()
        names = _names(function.__code__) if _is_users(function) else set()
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
            value = _contents(cell)
            where = f"the variable {name!r} around {function.__name__}()"
            self._cells.append((cell, value, where))
            self._walk(value, where)
            self._walk_namespace(value, names, name, function.__name__)
        if _is_users(function):
            self._keys.append((vars(function), list(vars(function)), f"{function.__name__}()"))
        for name, value in vars(function).items():
            self._enter(vars(function), name, value, f"{function.__name__}.{name}")
        for part in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._walk(part, f"a default of {function.__name__}()")
        for name in names & function.__globals__.keys():
            value = function.__globals__[name]
            where = f"the global {name!r} of {function.__module__}"
            self._enter(function.__globals__, name, value, where)
            self._walk_namespace(value, names, name, function.__name__)

    def _walk_namespace(self, value: Any, names: set[str], path: str, reader: str) -> None:
        """The names that a function looks up in a module or class, as in ``config.BETA``."""
        if not isinstance(value, ModuleType | type) or not _is_users(value):
            return
        for space in value.__mro__ if isinstance(value, type) else (value,):
            for key in names & vars(space).keys():
                inner = vars(space)[key]
                if _is_users(space) and (id(vars(space)), key) not in self._looked_up:
                    self._looked_up.add((id(vars(space)), key))
                    label = f"{path}.{key}, which {reader}() may read"
                    self._enter(vars(space), key, inner, label)
                    self._walk_namespace(inner, names, f"{path}.{key}", reader)

    def _enter(self, mapping: Mapping[str, Any], key: str, value: Any, label: str) -> None:
        self._entries.append((mapping, key, value, label))
        self._walk(value, label)


def _same(a: Any, b: Any) -> bool:
    """Equal plain values; anything else has to be the same object."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, _PLAIN):
        return a == b or (a != a and b != b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):  # made anew at each call, as by autoguides
        return len(a) == len(b) and all(key in b and _same(a[key], b[key]) for key in a)
    return False


def _copy(thing: Any) -> Any:
    if isinstance(thing, np.ndarray):
        return (thing.dtype.str, *thing.shape, thing.tobytes())
    if isinstance(thing, dict):
        return [*thing.keys(), *thing.values()]
    if isinstance(thing, list | set):
        return sorted(thing, key=id) if isinstance(thing, set) else list(thing)
    return [getattr(thing, name, _MISSING) for name in _slots(thing)]


def _slots(thing: Any) -> list[str]:
    """The attributes of an object that stand in no ``__dict__``."""
    found = (getattr(base, "__slots__", ()) for base in type(thing).__mro__)
    return [n for names in found for n in ([names] if isinstance(names, str) else names)]


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a cell that is still empty
        return _MISSING


def _names(code: CodeType) -> set[str]:
    """The names that a function and the functions inside it look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _is_users(thing: Any) -> bool:
    """Whether a function, class or module is neither Python's, nor a library's, nor ours."""
    name = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None)
    return isinstance(name, str) and name.partition(".")[0] not in _LIBRARIES
