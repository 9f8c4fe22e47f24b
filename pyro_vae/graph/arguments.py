"""The arguments of a program, taken apart into tensors and everything else."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_vae.graph.refusal import CannotCompileError

__all__ = ["flatten", "frozen_settings", "rebuild"]


def flatten(thing: Any, tensors: list[Tensor]) -> Any:
    """A key of everything about the arguments that a graph freezes: all but tensors' values.

    Args:
        thing: A tensor, or tuples, lists and dicts of tensors and hashable values.
        tensors: Receives the tensors.

    Returns:
        A hashable key.

    Raises:
        CannotCompileError: A value can't be compared with that of another call.
    """
    if isinstance(thing, Tensor):
        if thing.layout is not torch.strided or thing.requires_grad:
            kind = "requires a gradient" if thing.requires_grad else "is a sparse tensor"
            raise CannotCompileError(f"an argument of the step {kind}")
        tensors.append(thing)
        return (thing.shape, thing.dtype, thing.device)
    if isinstance(thing, tuple | list):
        return (type(thing), *(flatten(item, tensors) for item in thing))
    if isinstance(thing, dict):
        return (dict, *((key, flatten(item, tensors)) for key, item in thing.items()))
    try:
        hash(thing)
    except TypeError as error:
        raise CannotCompileError(
            f"an argument is of type {type(thing).__name__}, of which nothing tells whether it has "
            "changed; hand it over as a tensor"
        ) from error
    return (type(thing), thing)


def rebuild(thing: Any, tensors: Iterator[Tensor]) -> Any:
    """The same arguments with other tensors in place of their own."""
    if isinstance(thing, Tensor):
        return next(tensors)
    if isinstance(thing, tuple | list):
        items = [rebuild(item, tensors) for item in thing]
        return type(thing)(*items) if hasattr(thing, "_fields") else type(thing)(items)
    if isinstance(thing, dict):
        return {key: rebuild(item, tensors) for key, item in thing.items()}
    return thing


def frozen_settings(device_type: str) -> tuple[Any, ...]:
    """Torch's settings of this moment that a graph freezes."""
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        torch.are_deterministic_algorithms_enabled(),
    )
