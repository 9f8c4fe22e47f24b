"""Borrow torch's global state and give it back: random streams, evaluation mode, devices.

Everything here is a context or a pure function; nothing stays changed behind the caller's back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["at_rest", "device_of", "on_device", "seeded"]


@contextmanager
def seeded(*seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Draw from a stream of its own, and leave the caller's stream where it was.

    Args:
        seed: One or more non-negative integers; different tuples give independent streams.
        device: The device whose stream is borrowed besides the CPU's.
    """
    devices = [device] if device is not None and device.type != "cpu" else []
    device_type = devices[0].type if devices else "cuda"
    state = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    with torch.random.fork_rng(devices=devices, device_type=device_type):
        torch.manual_seed(state)
        yield


@contextmanager
def at_rest(*programs: Callable[..., Any]) -> Iterator[None]:
    """No gradients, and every module among the programs in evaluation mode, then as before."""
    modules = [m for p in programs if isinstance(p, nn.Module) for m in p.modules()]
    training = [m.training for m in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


def device_of(*programs: Callable[..., Any]) -> torch.device | None:
    """The device of the first parameter or buffer of the programs, None where there is none."""
    for program in programs:
        if isinstance(program, nn.Module):
            for tensor in (*program.parameters(), *program.buffers()):
                return tensor.device
    return None


def on_device(args: Sequence[Any], device: torch.device | None) -> tuple[Any, ...]:
    """The arguments with every tensor moved to the device; None leaves them alone."""
    if device is None:
        return tuple(args)
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)
