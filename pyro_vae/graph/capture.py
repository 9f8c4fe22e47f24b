"""From a function over tensors to one graph of tensor operations, or a reason why there is none.

The function is run twice on different values, and every tensor operation is written down
(``make_fx``). What it reaches by closure and not by argument, such as buffers, becomes an input of
the graph. What a graph can't follow is refused: values read on the host, results whose shape
depends on values, noise from elsewhere than torch, and anything that differs between the two runs.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen

from pyro_vae.context import forked
from pyro_vae.graph.reads import Where, no_host_reads
from pyro_vae.graph.refusal import CannotCompileError
from pyro_vae.graph.undo import undone

__all__ = ["Captured", "capture"]

Function = Callable[..., Sequence[Tensor]]


@dataclass
class Captured:
    """A graph and the tensors that it takes after its arguments.

    Attributes:
        module: The graph; takes the arguments of the function, then ``reached``.
        reached: Tensors that the function reached by closure; live, not copies.
    """

    module: fx.GraphModule
    reached: list[Tensor]


def capture(
    function: Function,
    inputs: Sequence[Tensor],
    *,
    others: Sequence[Tensor],
) -> Captured:
    """Capture a function as a graph.

    Args:
        function: Takes the inputs, returns tensors; what it changes in place is put back.
        inputs: Tensors to capture it on. Those that the function also reaches by closure, such as
            parameters, are the same inputs there.
        others: Inputs of the same shapes but with other values, for the second run.

    Returns:
        The graph.

    Raises:
        CannotCompileError: The function can't be captured.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        first = _trace(function, inputs)
        # Another place in the stream of noise: who seeds torch itself still ends where it ended.
        second = _trace(function, others, skip=1)
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
    _compare(first, second)
    if (first.draws or second.draws) and torch.equal(first.state_after, second.state_after):
        raise CannotCompileError(
            "the pair seeds torch's generator itself, which a graph would do only once"
        )
    _check_shapes(first)
    return _with_reached_as_inputs(first.module)


@dataclass
class _Run:
    module: fx.GraphModule
    where: Where
    state_after: Tensor
    draws: bool

    def place(self, node: fx.Node) -> str:
        return self.where.at(self.module.graph, node)


def _trace(function: Function, inputs: Sequence[Tensor], *, skip: int = 0) -> _Run:
    with forked(), undone():
        torch.rand(skip)
        return _traced(function, inputs)


def _traced(function: Function, inputs: Sequence[Tensor]) -> _Run:
    before = torch.get_rng_state()
    where = Where()

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        with where, no_host_reads(where), pyro.validation_enabled(is_validate=False):
            return function(*tensors)

    try:
        # Without a context of its own every operation would make a mode for its shapes anew.
        with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
            module = make_fx(run, tracing_mode="real")(*inputs)
    except CannotCompileError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if "tracing tensor" in reason:
            reason = "reads a tensor's value on the host"
        raise CannotCompileError(f"{where.describe(error.__traceback__)}: {reason}") from error
    after = torch.get_rng_state()
    return _Run(module, where, after, not torch.equal(before, after))


def _compare(first: _Run, second: _Run) -> None:
    """Refuse a function that does another thing at each call."""
    a, b = list(first.module.graph.nodes), list(second.module.graph.nodes)
    for x, y in zip(a, b, strict=False):  # the results end both, so none is the other's beginning
        if _text(x) != _text(y):
            raise CannotCompileError(
                f"{first.place(x)}: two runs of the pair differed in their operations or numbers: "
                "it draws noise from elsewhere than torch (NumPy, random), counts its calls, or "
                "branches on data; draw with pyro.sample or torch, and keep numbers that change in "
                "tensors"
            )
    for node in a:
        if node.op == "get_attr":
            x, y = getattr(first.module, node.target), getattr(second.module, node.target)
            if not isinstance(x, Tensor):
                raise CannotCompileError(
                    f"{first.place(node)}: the pair draws from a generator of its own "
                    f"({type(x).__name__}), which a graph can't hold; draw from torch's default one"
                )
            same_kind = x.shape == y.shape and x.dtype == y.dtype
            if x is not y and not (same_kind and torch.allclose(x, y, 0.0, 0.0, equal_nan=True)):
                raise CannotCompileError(
                    f"{first.place(node)}: two runs of the pair differed in a tensor that it "
                    "makes: it draws noise from elsewhere than torch (NumPy, random), or makes "
                    "tensors of values read from the data; draw with pyro.sample or torch"
                )


def _text(node: fx.Node) -> tuple[str, ...]:
    return (node.op, str(node.target), repr(node.args), repr(node.kwargs))


def _check_shapes(run: _Run) -> None:
    """Refuse results whose shape depends on values: a graph would freeze the shape."""
    module = run.module
    for node in module.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.dynamic_output_shape not in tags:
            continue
        if node.target == torch.ops.aten.index.Tensor:
            indices = [i for i in node.args[1] if isinstance(i, fx.Node)]
            dtypes = {_meta_of(module, i).dtype for i in indices}
            if not dtypes & {torch.bool, torch.uint8}:
                continue
        raise CannotCompileError(
            f"{run.place(node)}: the shape of a result depends on values ({node.target}); use "
            "masks (pyro.poutine.mask, torch.where) in place of selecting data"
        )


def _meta_of(module: fx.GraphModule, node: fx.Node) -> Any:
    return getattr(module, str(node.target)) if node.op == "get_attr" else node.meta["val"]


_FRESH = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default)


def _with_reached_as_inputs(module: fx.GraphModule) -> Captured:
    """Make inputs of the tensors that live outside the function, and leave its literals inside."""
    module.graph.set_codegen(CodeGen())  # flat inputs
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    reached: dict[int, tuple[Tensor, fx.Node]] = {}
    for node in list(module.graph.nodes):
        if node.op != "get_attr" or all(user.target in _FRESH for user in node.users):
            continue
        tensor = getattr(module, str(node.target))
        if id(tensor) not in reached:
            last = [*placeholders, *(p for _, p in reached.values())][-1]
            with module.graph.inserting_after(last):
                new = module.graph.placeholder(f"reached_{len(reached)}")
            new.meta["val"] = tensor
            reached[id(tensor)] = (tensor, new)
        node.replace_all_uses_with(reached[id(tensor)][1])
        module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return Captured(module, [tensor for tensor, _ in reached.values()])
