"""Which steps are taken by a graph, and by which one.

The first step of an ``SVI`` is taken by the uncompiled program, which checks the pair and makes the
optimizer's state. Compiled and uncompiled steps may follow one another in any order.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from pyro_vae.graph.arguments import flatten, frozen_settings
from pyro_vae.graph.refusal import CannotCompileError, ThisTimeError, warn_uncompiled
from pyro_vae.inference.handlers import Program, active_weight
from pyro_vae.inference.objectives import Objective, Terms
from pyro_vae.inference.parameters import Parameters
from pyro_vae.inference.step_graph import StepGraph

__all__ = ["Compile", "CompiledSteps"]

Compile = bool | Literal["auto"]

# Minibatches of another size (an epoch's last one) are compiled once there were so many of them.
_OTHER_SHAPES = 5000
_MOST_GRAPHS = 4
_MOST_KINDS = 1000


class CompiledSteps:
    """Takes the steps that can be compiled.

    Args:
        model: A Pyro model.
        guide: Its guide.
        objective: The objective, prepared.
        parameters: The pair's parameters.
        optimizer: The optimizer, after its first step.
        patience: Number of steps of one kind that are left uncompiled.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: Objective,
        parameters: Parameters,
        optimizer: Optimizer | PyroOptim,
        *,
        patience: int,
    ) -> None:
        self._pair = (model, guide, objective, parameters, optimizer)
        self._device = next(iter(parameters.named.values())).device
        self.patience = patience
        self.gave_up: str | None = None
        self._told: set[str] = set()
        self._graphs: dict[Any, list[StepGraph]] = {}
        self._asked: Counter[Any] = Counter()
        self._last: tuple[StepGraph, list[tuple[Any, ...]]] | None = None

    def step(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], max_grad_norm: float | None
    ) -> Terms | None:
        """Take a step by a graph.

        Args:
            args: Arguments of the pair.
            kwargs: Likewise.
            max_grad_norm: Norm at which gradients are clipped, or None.

        Returns:
            The terms; None where this step has to be taken uncompiled.
        """
        self.forget()
        if self.gave_up is not None or not torch.is_grad_enabled():
            return None
        data: list[Tensor] = []
        try:
            weight = active_weight()
            key = (
                flatten(args, data),
                flatten(kwargs, data) if kwargs else None,
                weight is None,
                max_grad_norm,
                frozen_settings(self._device.type),
            )
            graph = self._find(key)
            if graph is None:
                self._asked[key] += 1
                if len(self._asked) > _MOST_KINDS:
                    raise CannotCompileError(
                        "the arguments differ at nearly every step in shape, or in values that are "
                        "no tensors; hand numbers over as tensors"
                    )
                patience = _OTHER_SHAPES if self._graphs else self.patience
                if self._asked[key] <= patience:
                    return None
                if len(self._graphs) >= _MOST_GRAPHS:
                    raise ThisTimeError(
                        f"the arguments came in more than {_MOST_GRAPHS} shapes or surroundings, "
                        "and the others go uncompiled"
                    )
                graph = StepGraph(
                    *self._pair, args, kwargs, data, weight=weight, max_grad_norm=max_grad_norm
                )
                self._graphs.setdefault(key, []).append(graph)
        except ThisTimeError as error:
            if str(error) and str(error) not in self._told:
                self._told.add(str(error))
                warn_uncompiled("SVI goes on without compiling the step", error)
            return None
        except CannotCompileError as error:
            if self._pair[3].not_finite():  # the step without a graph says so
                return None
            self.gave_up = str(error)
            self._graphs.clear()
            warn_uncompiled("SVI goes on without compiling the step", error)
            return None
        graph.bring_up(weight)
        if not kwargs and all(isinstance(a, Tensor) for a in args):
            self._last = (graph, [(a.shape, a.dtype) for a in args])
        return graph.run(data)

    def forget(self) -> None:
        """Look at everything at the next step."""
        self._last = None

    def again(self, args: tuple[Any, ...]) -> Terms | None:
        """Take the step before once more on other tensors, without a look at anything else.

        Args:
            args: Tensors for the pair.

        Returns:
            The terms; None where they are of other kinds, or the step before was not compiled.
        """
        if self._last is None:
            return None
        graph, kinds = self._last
        if len(args) != len(kinds) or any(
            (a.shape, a.dtype) != kind for a, kind in zip(args, kinds, strict=True)
        ):
            return None
        return graph.run(args)

    def _find(self, key: Any) -> StepGraph | None:
        """The graph for these arguments and the pair's state of this moment."""
        graphs = self._graphs.get(key, [])
        for graph in graphs:
            if graph.fits():
                return graph
        if len(graphs) >= _MOST_GRAPHS:
            changed = graphs[-1].watch.changed()
            advice = "keep numbers that change in tensors, such as buffers"
            if changed is None:
                changed = f"what the optimizer trains, or an option of it ({_differing(graphs)})"
                advice = "a schedule of the learning rate alone needs no new graph"
            raise CannotCompileError(
                f"{changed} has changed {_MOST_GRAPHS} times since compiling; {advice}"
            )
        if graphs:
            self._asked[key] = max(self.patience, _OTHER_SHAPES)  # compile anew at once
        return None


def _differing(graphs: Sequence[StepGraph]) -> str:
    """The names of the options in which the graphs' optimizers differ."""
    groups = [group for graph in graphs for options in graph.options for group in options]
    names = {name for group in groups for name in group}
    found = sorted(n for n in names if any(g.get(n) != groups[0].get(n) for g in groups))
    return ", ".join(map(repr, found)) or "its state"
