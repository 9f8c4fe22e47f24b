"""One step as one graph: loss, gradients, clipping and optimizer.

The graph works on the pair's parameters and on the optimizer's own state, and draws the noise that
the uncompiled step would draw.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map, tree_map_

from pyro_vae.graph.arguments import rebuild
from pyro_vae.graph.capture import capture
from pyro_vae.graph.lower import lower
from pyro_vae.graph.refusal import CannotCompileError
from pyro_vae.graph.watch import Watch
from pyro_vae.inference.handlers import Program, kl_weight
from pyro_vae.inference.objectives import Objective, Terms
from pyro_vae.inference.parameters import Parameters
from pyro_vae.inference.update_rules import (
    apply_rule,
    changing_of,
    frozen_options,
    rule_of,
    state_tensors,
    to_device,
    torch_optimizers,
)

__all__ = ["StepGraph"]


class StepGraph:
    """A compiled step, good for arguments of one shape and one state of the pair.

    Args:
        model: A Pyro model.
        guide: Its guide.
        objective: The objective, prepared.
        parameters: The pair's parameters.
        optimizer: The optimizer, after its first step.
        args: Arguments of the pair.
        kwargs: Likewise.
        data: The tensors among the arguments.
        weight: The KL weight around the step, if there is one.
        max_grad_norm: Norm at which gradients are clipped, or None.

    Attributes:
        watch: What the graph has frozen of the pair's Python state.
        options: What it has frozen of the options of each optimizer's parameter groups.

    Raises:
        CannotCompileError: The step can't become a graph, or the compiler failed.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: Objective,
        parameters: Parameters,
        optimizer: Optimizer | PyroOptim,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        data: Sequence[Tensor],
        *,
        weight: kl_weight | None,
        max_grad_norm: float | None,
    ) -> None:
        objective.check_compilable()
        self._optimizer = optimizer
        self._parameters = list(parameters.named.values())
        self._kinds = [_kind(p) for p in self._parameters]
        self._device = self._parameters[0].device
        trained = [p for p in self._parameters if p.requires_grad]
        optimizers = torch_optimizers(optimizer)
        rules = [rule_of(o) for o in optimizers]
        inside = bool(optimizers) and all(rule is not None for rule in rules)
        if not inside:
            optimizers, rules = [], []
        to_device(optimizers, self._device)
        self._optimizers = optimizers
        self.options = [frozen_options(o) for o in optimizers]
        self._states = [(o.state, len(o.state)) for o in optimizers]
        self._numbers = [
            [tree_map(self._number, changing_of(group)) for group in o.param_groups]
            for o in optimizers
        ]
        self._known: list[list[Any]] = [[None for _ in groups] for groups in self._numbers]
        self._beta = self._number()
        owners: list[Tensor] = []  # of the gradients, where the optimizer takes its step outside

        def function(*tensors: Tensor) -> Sequence[Tensor]:
            given = iter(tensors[len(tensors) - len(data) :])
            inputs = rebuild(args, given), rebuild(kwargs, given)
            terms = self._terms(objective, model, guide, *inputs, weight)
            if not terms.loss.requires_grad:
                raise CannotCompileError("the loss depends on no parameter")
            found = torch.autograd.grad(terms.loss, trained, allow_unused=True)
            gradients = {p: g for p, g in zip(trained, found, strict=True) if g is not None}
            if max_grad_norm is not None:
                gradients = _clipped(gradients, max_grad_norm)
            for rule, o, changing in zip(rules, optimizers, self._numbers, strict=True):
                assert rule is not None
                apply_rule(rule, o, gradients, changing)
            owners[:] = gradients
            results = [terms.loss.detach(), terms.distortion, terms.rate]
            return results if inside else [*results, *gradients.values()]

        state = [tensor for o in optimizers for tensor in state_tensors(o)]
        self._static = [*trained, *state, *tree_leaves(self._numbers), self._beta]
        self._state_at = (len(trained), len(trained) + len(state))
        copies = [d.detach().clone(memory_format=torch.contiguous_format) for d in data]
        others = [d.roll(1, 0) if d.dim() > 0 and len(d) > 1 else d.clone() for d in copies]
        self.watch = Watch(model, guide, getattr(objective, "loss", None), (args, kwargs))
        try:
            captured = capture(function, [*self._static, *copies], others=[*self._static, *others])
            changed = self.watch.changed()
            if changed is not None:
                raise CannotCompileError(f"{changed} changes at each call of the pair")
        except CannotCompileError:
            self.watch.restore()
            raise
        self._owners = None if inside else owners
        self._kernel = lower(captured, self._static, copies)

    def fits(self) -> bool:
        """Whether pair and optimizer are what they were; a state loaded since is taken over."""
        if self.watch.changed() is not None:
            return False
        if [_kind(p) for p in self._parameters] != self._kinds:
            return False
        if [frozen_options(o) for o in self._optimizers] != self.options:
            return False
        known = zip(self._optimizers, self._states, strict=True)
        return all(o.state is s and len(s) == n for o, (s, n) in known) or self._rebound()

    def bring_up(self, weight: kl_weight | None) -> None:
        """Hand the numbers that may change to the graph: KL weight, learning rates, betas."""
        for optimizer, numbers, known in zip(
            self._optimizers, self._numbers, self._known, strict=True
        ):
            for i, group in enumerate(optimizer.param_groups):
                now = changing_of(group)
                if now != known[i] or isinstance(group["lr"], Tensor):
                    tree_map_(lambda tensor, number: tensor.fill_(number), numbers[i], now)
                    known[i] = now
            optimizer._opt_called = True  # type: ignore[attr-defined] # schedulers ask for it
        if weight is not None:
            self._beta.fill_(weight.beta)

    def run(self, data: Sequence[Tensor]) -> Terms:
        """Take the step on tensors of the shapes that the graph was made for."""
        results = self._kernel(data)
        if self._owners is not None:
            for parameter, gradient in zip(self._owners, results[3:], strict=True):
                parameter.grad = gradient
            if isinstance(self._optimizer, PyroOptim):
                self._optimizer(self._owners)
            else:
                self._optimizer.step()
            for parameter in self._owners:
                parameter.grad = None
        return Terms(*results[:3])

    def _number(self, _: Any = None) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self._device)

    def _rebound(self) -> bool:
        """Point the graph to the state that an optimizer has loaded; a recording keeps its own."""
        start, stop = self._state_at
        state = [tensor for o in self._optimizers for tensor in state_tensors(o)]
        before = self._static[start:stop]
        if self._device.type == "cuda" or list(map(_kind, state)) != list(map(_kind, before)):
            return False
        self._static[start:stop] = state
        self._states = [(o.state, len(o.state)) for o in self._optimizers]
        return True

    def _terms(
        self,
        objective: Objective,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weight: kl_weight | None,
    ) -> Terms:
        """The terms, with the KL weight as a tensor in place of the number that it is now."""
        if weight is None:
            return objective.terms(model, guide, args, kwargs)
        number, weight.beta = weight.beta, self._beta
        try:
            return objective.terms(model, guide, args, kwargs)
        finally:
            weight.beta = number


def _clipped(gradients: dict[Tensor, Tensor], most: float) -> dict[Tensor, Tensor]:
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    return {parameter: gradient * factor for parameter, gradient in gradients.items()}


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.dtype, tensor.device, tensor.shape, tensor.requires_grad)
