"""Reads of a tensor's value into Python, where a graph can't follow it."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae.graph.refusal import CannotCompileError

__all__ = ["Where", "no_host_reads"]


class Where(Messenger):
    """Remembers which site a run has come to, and where in the graph that was.

    Attributes:
        site: The last site.
        marks: By the name of the last operation before a site, the site.
    """

    def __init__(self) -> None:
        super().__init__()
        self.site: str | None = None
        self.marks: dict[str, str] = {}

    def _pyro_sample(self, msg: Any) -> None:
        self.site = msg["name"]
        mode = get_proxy_mode()
        if mode is not None:
            self.marks[next(iter(reversed(mode.tracer.graph.nodes))).name] = msg["name"]

    def at(self, graph: fx.Graph, node: fx.Node) -> str:
        """The site that the run had come to at an operation of its graph."""
        site = None
        for earlier in graph.nodes:
            if earlier is node:
                break
            site = self.marks.get(earlier.name, site)
        return _after(site)

    def describe(self, frames: Any = None) -> str:
        """The site and the line of the user's code that a run has come to.

        Args:
            frames: The traceback of an error; None for the line that is running.
        """
        stack = traceback.extract_tb(frames) if frames is not None else traceback.extract_stack()
        ours = Path(__file__).parents[1].as_posix()
        for frame in reversed(stack):
            parts = Path(frame.filename).parts
            library = "site-packages" in parts or frame.filename.startswith((ours, "<"))
            if not library and "lib" not in parts:
                line = f"{Path(frame.filename).name}, line {frame.lineno}"
                break
        else:
            line = ""
        site = _after(self.site)
        return f"{site} ({line})" if line else site


def _after(site: str | None) -> str:
    return "before the first site" if site is None else f"at or after site {site!r}"


@contextmanager
def no_host_reads(where: Where) -> Iterator[None]:
    """Refuse what reads a tensor's value on the host.

    Args:
        where: Knows the site.

    Raises:
        CannotCompileError: A value is read; the message names the site, the line and the function.
    """
    with _Functions(where), _Operations(where):
        yield


_HOST_READS = {
    getattr(torch.Tensor, name): name
    for name in (
        *("item", "tolist", "numpy", "__array__", "__contains__"),
        *("__bool__", "__float__", "__int__", "__index__", "__complex__"),
    )
}
_MAKERS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


class _Functions(TorchFunctionMode):
    """Refuses functions that read values, by their names."""

    def __init__(self, where: Where) -> None:
        super().__init__()
        self.where = where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            name = _HOST_READS.get(func)
        except TypeError:  # not hashable
            name = None
        if name is not None:
            raise _refusal(self.where, f"Tensor.{name}")
        if func in _MAKERS:  # of a list that holds tensors
            data = args[func is torch.Tensor.new_tensor :]
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(data) if leaf not in data[:1]):
                raise _refusal(self.where, f"a tensor among the values of {func.__name__}")
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Refuses the read of a tensor that stands where a number belongs: torch.full(shape, t)."""

    def __init__(self, where: Where) -> None:
        super().__init__()
        self.where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise _refusal(self.where, "a tensor where a number belongs")
        return func(*args, **(kwargs or {}))


def _refusal(where: Where, by: str) -> CannotCompileError:
    return CannotCompileError(
        f"{where.describe()}: reads a tensor's value on the host ({by}), which a graph would do "
        "only once"
    )
