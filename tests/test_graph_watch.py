"""What a graph freezes of a program's Python state: every change of it is seen, and named."""

import argparse
import functools
import math
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyro_vae.graph.refusal import CannotCompileError
from pyro_vae.graph.watch import Watch

Patch = pytest.MonkeyPatch
Made = tuple[Any, Callable[[], Any]]  # a program, and a change of what it reads

LIMIT = 1.0
CONFIG = types.ModuleType("a_users_config")
vars(CONFIG).update(BETA=1.0, inner=types.ModuleType("a_users_config.inner"))
vars(CONFIG.inner).update(DEPTH=1.0)
PARSED = argparse.Namespace(beta=1.0)
SIMPLE = types.SimpleNamespace(beta=1.0)


@dataclass
class Options:
    beta: float = 1.0

    def run(self, x: Tensor) -> Tensor:
        return x * self.beta


class Child(Options):
    pass


@dataclass(slots=True)
class Slotted:
    beta: float = 1.0


OPTIONS, SLOTTED = Options(), Slotted()


def limit() -> float:
    return LIMIT


class Program(nn.Module):
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
        self.offset: Tensor
        self.register_buffer("offset", torch.zeros(3))
        self.weight = nn.Parameter(torch.ones(3))
        self.count, self.beta, self.kind, self.on, self.none = 2, 0.5, "soft", True, None
        self.betas, self.options, self.array = [1.0, 2.0], Options(), np.ones(3)
        self.table: dict[str, Any] = {"a": 1.0}
        self.tensors = [torch.ones(1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.beta * self.scale


# --- attributes of modules

ASSIGNED: dict[str, tuple[str, Any]] = {
    "int": ("count", 3),
    "float": ("beta", 0.6),
    "int to float": ("count", 2.0),
    "str": ("kind", "hard"),
    "bool": ("on", False),
    "bool to int": ("on", 1),
    "None": ("none", 0.0),
    "NaN": ("beta", math.nan),
    "list": ("betas", [1.0, 3.0]),
    "object": ("options", Options()),
}


@pytest.mark.parametrize(("name", "value"), ASSIGNED.values(), ids=ASSIGNED)
def test_an_attribute_that_is_set_anew_is_named(name, value):
    program = Program()
    watch = Watch(program, limit)
    setattr(program, name, value)
    assert watch.changed() == f"attribute {name!r} of Program in the model"
    assert Watch(limit, program).changed() is None
    setattr(program, name, getattr(Program(), name))
    assert (watch.changed() is None) is (name != "options")  # another object is a change


INSIDE: dict[str, tuple[Callable[[Program], Any], str]] = {
    "deleted": (lambda p: delattr(p, "beta"), "attribute 'beta' of Program in the model"),
    "list": (lambda p: p.betas.append(3.0), r"attribute 'betas' of Program.*\(list\)"),
    "list entry": (lambda p: p.betas.__setitem__(0, 9.0), "attribute 'betas'"),
    "dict entry": (lambda p: p.table.update(a=2.0), r"attribute 'table'.*\(dict\)"),
    "dict key": (lambda p: p.table.update(b=2.0), "attribute 'table'"),
    "config": (lambda p: setattr(p.options, "beta", 2.0), "attribute 'beta' of Options in"),
    "array": (lambda p: p.array.__setitem__(0, 2.0), "attribute 'array'"),
    "tensor in a list": (lambda p: p.tensors.__setitem__(0, torch.ones(1)), "'tensors'"),
    "eval": (lambda p: p.eval(), "attribute 'training' of Program in the model"),
    "eval of a child": (lambda p: p.layers[1].eval(), "attribute 'training' of Dropout"),
    "option of a child": (lambda p: setattr(p.layers[1], "p", 0.1), "attribute 'p' of Dropout"),
    "buffer": (lambda p: setattr(p, "offset", torch.zeros(3)), "tensor 'offset' of Program"),
    "parameter": (lambda p: setattr(p, "weight", nn.Parameter(torch.ones(3))), "'weight' of Prog"),
    "module": (lambda p: setattr(p, "layers", nn.Identity()), "module 'layers' of Program"),
    "deep module": (lambda p: p.layers.__setitem__(0, nn.Linear(3, 3)), "module '0' of Sequential"),
    "hook": (lambda p: p.layers.register_forward_hook(lambda *_: None), "the hooks of Sequential"),
    "pre-hook": (lambda p: p.register_forward_pre_hook(lambda *_: None), "the hooks of Program"),
}


@pytest.mark.parametrize(("change", "label"), INSIDE.values(), ids=INSIDE)
def test_a_change_inside_a_module_is_named(change, label):
    program = Program()
    watch = Watch(program)
    assert watch.changed() is None
    change(program)
    assert re.search(label, str(watch.changed())), watch.changed()


UNCHANGED: dict[str, Callable[[Program], Any]] = {
    "equal float": lambda p: setattr(p, "beta", float("0.5")),
    "equal str": lambda p: setattr(p, "kind", "".join(["so", "ft"])),
    "equal list": lambda p: setattr(p, "betas", [1.0, 2.0]),
    "equal entry": lambda p: p.table.update(a=float("1.0")),
    "equal array": lambda p: p.array.__setitem__(0, 1.0),
    "there and back": lambda p: p.eval().train(),
    "buffer in place": lambda p: p.offset.add_(1),
    "parameter in place": lambda p: p.weight.data.add_(1),
    "loaded": lambda p: p.load_state_dict(Program().state_dict()),
    "a run": lambda p: p(torch.ones(2, 3)).sum().backward(),
}


@pytest.mark.parametrize("do", UNCHANGED.values(), ids=UNCHANGED)
def test_what_is_equal_or_live_is_no_change(do):
    program = Program()
    watch = Watch(program)
    do(program)
    assert watch.changed() is None


def test_nan_is_no_change_of_nan():
    program = Program()
    program.beta = math.nan
    watch = Watch(program)
    program.beta = float("nan")
    assert watch.changed() is None


def test_things_that_hold_one_another_are_walked_once():
    program = Program()
    program.table["owner"] = program.table
    program.table["options"] = options = Options()
    vars(options)["owner"] = program
    watch = Watch(program, program)
    assert watch.changed() is None
    options.beta = 3.0
    assert "'beta' of Options" in str(watch.changed())


def test_a_large_array_is_refused_by_name():
    program = Program()
    program.array = np.zeros(1 << 14)
    with pytest.raises(CannotCompileError, match=r"'array' of Program.*131072 bytes.*a buffer"):
        Watch(program)


# --- what functions reach


def sets(program: Any, thing: Any, name: str) -> Callable[[Patch], Made]:
    """A change from 1 to 2."""
    return lambda patch: (program, lambda: patch.setattr(thing, name, 2.0, raising=False))


def sets_limit(program: Any) -> Callable[[Patch], Made]:
    return lambda patch: (program, lambda: patch.setitem(globals(), "LIMIT", 2.0))


def by_nested(x: Tensor) -> Any:
    def inner() -> Any:
        return [x * LIMIT for _ in range(2)]

    return inner()


def by_default(x: Tensor, options: Options = OPTIONS) -> Tensor:
    return x * options.beta


def closure(patch: Patch, *, by_helper: bool = False) -> Made:
    beta = 1.0

    def helper() -> float:
        return beta

    def change() -> None:
        nonlocal beta
        beta = 2.0

    return (lambda x: x * helper()) if by_helper else (lambda x: x * beta), change


@functools.wraps(limit)
def wrapper(x: Tensor) -> Any:
    return x


REACHED: dict[str, tuple[Callable[[Patch], Made], str]] = {
    "global": (sets_limit(lambda x: x * LIMIT), "the global 'LIMIT' of test_graph_watch"),
    "global of a helper": (sets_limit(lambda x: x * limit()), "the global 'LIMIT'"),
    "global of a nested function": (sets_limit(by_nested), "the global 'LIMIT'"),
    "global of a wrapped function": (sets_limit(wrapper), "the global 'LIMIT'"),
    "global under a handler": (
        sets_limit(pyro.poutine.scale(lambda x: x * LIMIT, scale=2.0)),
        "the global 'LIMIT'",
    ),
    "helper": (
        lambda m: (lambda x: x * limit(), lambda: m.setitem(globals(), "limit", lambda: 3.0)),
        "the global 'limit'",
    ),
    "closure": (closure, r"the variable 'beta' around <lambda>\(\)"),
    "closure of a helper": (
        lambda m: closure(m, by_helper=True),
        r"the variable 'beta' around helper\(\)",
    ),
    "module": (
        sets(lambda x: x * CONFIG.BETA, CONFIG, "BETA"),
        r"CONFIG\.BETA, which <lambda>\(\) may read",
    ),
    "class": (sets(lambda x: x * Options.beta, Options, "beta"), r"Options\.beta"),
    "attribute of the class": (sets(Program(), Program, "scale"), r"Program\.scale"),
    "global object": (sets(lambda x: x * OPTIONS.beta, OPTIONS, "beta"), "'beta' of Options"),
    "partial": (
        sets(functools.partial(lambda x, o: x * o.beta, o=OPTIONS), OPTIONS, "beta"),
        "attribute 'beta' of Options",
    ),
    "bound method": (sets(OPTIONS.run, OPTIONS, "beta"), "'beta' of Options in the guide"),
    "default": (sets(by_default, OPTIONS, "beta"), r"'beta' of Options in a default of by_default"),
}


@pytest.mark.parametrize(("make", "label"), REACHED.values(), ids=REACHED)
def test_a_change_of_what_a_function_reaches_is_named(make, label, monkeypatch):
    program, change = make(monkeypatch)
    watch = Watch(nn.Linear(1, 1), program)
    assert watch.changed() is None
    change()
    assert re.search(label, str(watch.changed())), watch.changed()


# --- what is reached on other ways


class Reader(nn.Module):
    rungs = [1.0]  # noqa: RUF012
    by_property = property(lambda self: LIMIT)
    by_static = staticmethod(lambda: LIMIT)
    by_class = classmethod(lambda cls: LIMIT)

    def __init__(self, how: Callable[["Reader"], float]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return x * self.how(self)


def random_weight(patch: Patch) -> Made:
    program = PyroModule()
    program.weight = PyroSample(dist.Normal(0.0, 1.0))  # type: ignore[assignment]
    return program, lambda: setattr(program, "weight", PyroSample(dist.Normal(0.0, 2.0)))


def remember(x: Tensor) -> Tensor:
    return x * vars(remember)["beta"]


def appended_module(patch: Patch) -> Made:
    program = nn.Sequential(nn.Linear(2, 2))
    return program, lambda: program.append(nn.Tanh())


def swapped_hook(patch: Patch) -> Made:
    program = nn.Linear(2, 2)
    handle = program.register_forward_hook(lambda *_: None)
    change = (handle.remove, lambda: program.register_forward_hook(lambda *_: torch.zeros(2)))
    return program, lambda: [do() for do in change]


def module_in_a_closure(patch: Patch) -> Made:
    config = CONFIG
    return lambda x: x * config.BETA, lambda: patch.setattr(config, "BETA", 2.0)


PROGRAM = Program()
ELSEWHERE: dict[str, Callable[[Patch], Made]] = {
    "argparse.Namespace": sets(lambda x: x * PARSED.beta, PARSED, "beta"),
    "SimpleNamespace": sets(lambda x: x * SIMPLE.beta, SIMPLE, "beta"),
    "dataclass with slots": sets(lambda x: x * SLOTTED.beta, SLOTTED, "beta"),
    "module in a module": sets(lambda x: x * CONFIG.inner.DEPTH, CONFIG.inner, "DEPTH"),
    "inherited class attribute": sets(lambda x: x * Child.beta, Options, "beta"),
    "attribute of a function": sets(remember, remember, "beta"),
    "attribute over that of its class": sets(PROGRAM, PROGRAM, "scale"),
    "property": sets_limit(Reader(lambda self: self.by_property)),
    "staticmethod": sets_limit(Reader(lambda self: self.by_static())),
    "classmethod": sets_limit(Reader(lambda self: self.by_class())),
    "list of a class": lambda m: (
        Reader(lambda self: self.rungs[0]),
        lambda: m.setattr(Reader, "rungs", [2.0]),
    ),
    "appended module": appended_module,
    "swapped hook": swapped_hook,
    "PyroSample": random_weight,
    "module in a closure": module_in_a_closure,
}


@pytest.mark.parametrize("make", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_change_off_the_beaten_track_is_seen(make, monkeypatch):
    program, change = make(monkeypatch)
    watch = Watch(program)
    assert watch.changed() is None
    change()
    assert watch.changed() is not None
