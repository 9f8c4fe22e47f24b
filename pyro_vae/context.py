"""Borrow torch's global state and give it back: random streams, evaluation mode, devices.

Everything here is a context or a pure function; nothing stays changed behind the caller's back.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

__all__ = ["at_rest", "bare", "device_of", "forked", "modules_of", "on_device", "seeded"]


@contextmanager
def seeded(*seed: int | str, device: torch.device | None = None) -> Iterator[None]:
    """Draw from a stream of its own, and leave the caller's stream where it was.

    Args:
        seed: Numbers and words; different ones give independent streams.
        device: The device whose stream is borrowed besides the CPU's; without one, every GPU
            that is in use, since nobody knows where the draws will be made.
    """
    digest = hashlib.sha256(",".join(map(str, seed)).encode()).digest()
    state = int.from_bytes(digest[:8], "big") >> 1
    with forked(device=device) as devices:
        # Not torch.manual_seed, which seeds every GPU, also those that nobody borrowed.
        torch.default_generator.manual_seed(state)
        for borrowed in devices:
            module = torch.get_device_module(borrowed)
            with module.device(borrowed):
                module.manual_seed(state)
        yield


@contextmanager
def forked(*, device: torch.device | None = None) -> Iterator[list[torch.device]]:
    """Draw on from the caller's stream, and then put it back to where it was.

    Args:
        device: As for ``seeded``.

    Yields:
        The devices whose streams are put back besides the CPU's.
    """
    devices = _gpus_in_use() if device is None else [device] if device.type != "cpu" else []
    device_type = devices[0].type if devices else "cuda"
    with torch.random.fork_rng(devices=devices, device_type=device_type):
        yield devices


def _gpus_in_use() -> list[torch.device]:
    if not torch.cuda.is_initialized():
        return []
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


@contextmanager
def at_rest(*programs: Callable[..., Any]) -> Iterator[None]:
    """No gradients, and every module of the programs in evaluation mode, then as before."""
    modules = [m for p in programs for root in modules_of(p).values() for m in root.modules()]
    training = [m.training for m in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


def modules_of(program: Callable[..., Any]) -> dict[str, nn.Module]:
    """The modules of a program: itself, or what a function reaches by name.

    A function that registers its networks by ``pyro.module`` says nothing of them to the outside:
    they are looked for in its closure, among the globals that it names, and in the object whose
    method it is.

    Args:
        program: A Pyro program.

    Returns:
        The modules by name; "" is the program itself.
    """
    program = bare(program)
    while isinstance(program, functools.partial):
        program = program.func
    if isinstance(program, nn.Module):
        return {"": program}
    owner = getattr(program, "__self__", None)
    function = inspect.unwrap(getattr(program, "__func__", program))
    code = getattr(function, "__code__", None)
    named: dict[str, Any] = (
        {} if owner is None else {"self": owner, **getattr(owner, "__dict__", {})}
    )
    if code is not None:
        named |= {n: function.__globals__[n] for n in code.co_names if n in function.__globals__}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # a cell that is still empty
                named[name] = cell.cell_contents
    return {name: thing for name, thing in named.items() if isinstance(thing, nn.Module)}


def bare(program: Callable[..., Any]) -> Callable[..., Any]:
    """A program without the Pyro handlers around it, such as ``config_enumerate(guide)``."""
    while isinstance(program, functools.partial):
        inner = program.func
        if not isinstance(inner, functools.partial):
            if len(program.args) < 2 or not isinstance(program.args[0], Messenger):
                break  # a partial of the user's
            inner = program.args[1]
        program = inner
    return program


def device_of(*programs: Callable[..., Any]) -> torch.device | None:
    """The device of the first parameter or buffer of the programs, None where there is none."""
    for program in map(bare, programs):
        if isinstance(program, nn.Module):
            for tensor in (*program.parameters(), *program.buffers()):
                return tensor.device
    return None


def on_device(args: Sequence[Any], device: torch.device | None) -> tuple[Any, ...]:
    """The arguments with every tensor moved to the device; None leaves them alone."""
    if device is None:
        return tuple(args)
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)
