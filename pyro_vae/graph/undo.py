"""Run something that changes tensors in place, and put them back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["undone"]

# Schemas of normalizations don't say that they change these.
_RUNNING = {"running_mean", "running_var"}


@contextmanager
def undone() -> Iterator[None]:
    """Put back, at the end, every tensor that an operation inside has changed in place."""
    changes = _Changes()
    try:
        with changes:
            yield
    finally:
        with torch.no_grad():
            for tensor, before in changes.saved.values():
                tensor.copy_(before)


class _Changes(TorchDispatchMode):
    """Copies each tensor before it is changed for the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or argument.name in _RUNNING:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, list | tuple) else (value,):
                    if isinstance(tensor, Tensor) and id(tensor) not in self.saved:
                        self.saved[id(tensor)] = (tensor, tensor.detach().clone())
        return func(*args, **kwargs)
