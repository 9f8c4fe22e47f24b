"""A step of stochastic variational inference as one graph: loss, gradients, and optimizer.

The first step of an ``SVI`` is taken by the uncompiled program, which checks the pair and makes the
optimizer's state; graphs work on the same parameters and the same state, and draw the same noise,
so that compiled and uncompiled steps may follow one another in any order.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map, tree_map_

from pyro_vae.graph.arguments import flatten, frozen_settings, rebuild
from pyro_vae.graph.capture import capture
from pyro_vae.graph.lower import Kernel, lower
from pyro_vae.graph.refusal import CannotCompileError, ThisTimeError, warn_uncompiled
from pyro_vae.graph.watch import Watch
from pyro_vae.inference.handlers import Program, active_weight, kl_weight, latent_sites
from pyro_vae.inference.objectives import ELBO, Objective, Terms
from pyro_vae.inference.parameters import Parameters
from pyro_vae.inference.structure import kind_of
from pyro_vae.inference.update_rules import (
    apply_rule,
    changing_of,
    frozen_options,
    rule_of,
    state_tensors,
    to_device,
    torch_optimizers,
)

__all__ = ["Compile", "CompiledSteps"]

Compile = bool | Literal["auto"]

# Minibatches of another size (an epoch's last one) are compiled once there were so many of them.
_OTHER_SHAPES = 5000
_MOST_VARIANTS = 4
_MOST_KINDS = 1000


@dataclass
class _Variant:
    """One compiled step, good for arguments of one shape and one state of the pair."""

    kernel: Kernel
    watch: Watch
    parameters: list[Tensor]
    kinds: list[tuple[Any, ...]]
    optimizers: list[Optimizer]
    states: list[tuple[Any, int]]
    static: list[Tensor]
    state_at: tuple[int, int]  # where the optimizers' state stands in ``static``
    options: list[Any]
    numbers: list[list[dict[str, Any]]]
    known: list[list[Any]]
    beta: Tensor
    owners: list[Tensor] | None  # of the gradients, where the optimizer takes its step outside


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
        self.model = model
        self.guide = guide
        self.objective = objective
        self.parameters = parameters
        self.optimizer = optimizer
        self.patience = patience
        self.gave_up: str | None = None
        self._told: set[str] = set()
        self._variants: dict[Any, list[_Variant]] = {}
        self._asked: Counter[Any] = Counter()
        device = next(iter(parameters.named.values())).device
        self._device = device

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
            variant = self._find(key)
            if variant is None:
                self._asked[key] += 1
                if len(self._asked) > _MOST_KINDS:
                    raise CannotCompileError(
                        "the arguments differ at nearly every step in shape, or in values that are "
                        "no tensors; hand numbers over as tensors"
                    )
                patience = _OTHER_SHAPES if self._variants else self.patience
                if self._asked[key] <= patience or len(self._variants) >= _MOST_VARIANTS:
                    return None
                variant = self._compile(args, kwargs, data, weight, max_grad_norm)
                self._variants.setdefault(key, []).append(variant)
        except ThisTimeError as error:
            if str(error) and str(error) not in self._told:
                self._told.add(str(error))
                warn_uncompiled("SVI goes on without compiling the step", error)
            return None
        except CannotCompileError as error:
            self.gave_up = str(error)
            self._variants.clear()
            warn_uncompiled("SVI goes on without compiling the step", error)
            return None
        return self._run(variant, data, weight)

    def _find(self, key: Any) -> _Variant | None:
        """The variant for these arguments and the pair's state of this moment."""
        variants = self._variants.get(key, [])
        for variant in variants:
            if variant.watch.changed() is None and self._fits(variant):
                return variant
        if len(variants) >= _MOST_VARIANTS:
            changed = variants[-1].watch.changed()
            advice = "keep numbers that change in tensors, such as buffers"
            if changed is None:
                changed = f"what the optimizer trains, or an option of it ({_differing(variants)})"
                advice = "a schedule of the learning rate alone needs no new graph"
            raise CannotCompileError(
                f"{changed} has changed {_MOST_VARIANTS} times since compiling; {advice}"
            )
        if variants:
            self._asked[key] = max(self.patience, _OTHER_SHAPES)  # compile anew at once
        return None

    def _fits(self, variant: _Variant) -> bool:
        if [_kind(p) for p in variant.parameters] != variant.kinds:
            return False
        if [frozen_options(o) for o in variant.optimizers] != variant.options:
            return False
        known = zip(variant.optimizers, variant.states, strict=True)
        return all(o.state is s and len(s) == n for o, (s, n) in known) or self._rebound(variant)

    def _rebound(self, variant: _Variant) -> bool:
        """Point a graph to the state that an optimizer has loaded; a recording keeps its own."""
        start, stop = variant.state_at
        state = [tensor for o in variant.optimizers for tensor in state_tensors(o)]
        before = variant.static[start:stop]
        if self._device.type == "cuda" or list(map(_kind, state)) != list(map(_kind, before)):
            return False
        variant.static[start:stop] = state
        variant.states = [(o.state, len(o.state)) for o in variant.optimizers]
        return True

    def _run(self, variant: _Variant, data: list[Tensor], weight: kl_weight | None) -> Terms:
        for optimizer, numbers, known in zip(
            variant.optimizers, variant.numbers, variant.known, strict=True
        ):
            for i, group in enumerate(optimizer.param_groups):
                now = changing_of(group)
                if now != known[i] or isinstance(group["lr"], Tensor):
                    tree_map_(lambda tensor, number: tensor.fill_(number), numbers[i], now)
                    known[i] = now
            optimizer._opt_called = True  # type: ignore[attr-defined] # schedulers ask for it
        if weight is not None:
            variant.beta.fill_(weight.beta)
        results = variant.kernel([d.detach().contiguous() for d in data])
        if variant.owners is not None:
            for parameter, gradient in zip(variant.owners, results[3:], strict=True):
                parameter.grad = gradient
            self._outside_step(variant.owners)
        return Terms(*results[:3])

    def _outside_step(self, parameters: list[Tensor]) -> None:
        if isinstance(self.optimizer, PyroOptim):
            self.optimizer(parameters)
        else:
            self.optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    def _compile(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        data: list[Tensor],
        weight: kl_weight | None,
        max_grad_norm: float | None,
    ) -> _Variant:
        self._check_objective()
        parameters = [p for p in self.parameters.named.values() if p.requires_grad]
        optimizers = torch_optimizers(self.optimizer)
        rules = [rule_of(optimizer) for optimizer in optimizers]
        inside = bool(optimizers) and all(rule is not None for rule in rules)
        if not inside:
            optimizers, rules = [], []
        to_device(optimizers, self._device)

        def number(_: Any = None) -> Tensor:
            return torch.zeros((), dtype=torch.float64, device=self._device)

        numbers = [
            [tree_map(number, changing_of(group)) for group in optimizer.param_groups]
            for optimizer in optimizers
        ]
        beta = number()
        owners: list[Tensor] = []

        def function(*tensors: Tensor) -> Sequence[Tensor]:
            given = iter(tensors[len(tensors) - len(data) :])
            terms = self._terms(rebuild(args, given), rebuild(kwargs, given), weight, beta)
            if not terms.loss.requires_grad:
                raise CannotCompileError("the loss depends on no parameter")
            found = torch.autograd.grad(terms.loss, parameters, allow_unused=True)
            gradients = {p: g for p, g in zip(parameters, found, strict=True) if g is not None}
            if max_grad_norm is not None:
                gradients = _clipped(gradients, max_grad_norm)
            for rule, optimizer, changing in zip(rules, optimizers, numbers, strict=True):
                assert rule is not None
                apply_rule(rule, optimizer, gradients, changing)
            owners[:] = gradients
            results = [terms.loss.detach(), terms.distortion, terms.rate]
            return results if inside else [*results, *gradients.values()]

        state = [tensor for optimizer in optimizers for tensor in state_tensors(optimizer)]
        static = [*parameters, *state, *tree_leaves(numbers), beta]
        copies = [d.detach().clone(memory_format=torch.contiguous_format) for d in data]
        others = [d.roll(1, 0) if d.dim() > 0 and len(d) > 1 else d.clone() for d in copies]
        watch = Watch(self.model, self.guide, getattr(self.objective, "loss", None), (args, kwargs))
        try:
            captured = capture(function, [*static, *copies], others=[*static, *others])
            changed = watch.changed()
            if changed is not None:
                raise CannotCompileError(f"{changed} changes at each call of the pair")
        except CannotCompileError:
            watch.restore()
            raise
        return _Variant(
            kernel=lower(captured, static, copies),
            watch=watch,
            parameters=list(self.parameters.named.values()),
            kinds=[_kind(p) for p in self.parameters.named.values()],
            optimizers=optimizers,
            states=[(optimizer.state, len(optimizer.state)) for optimizer in optimizers],
            static=static,
            state_at=(len(parameters), len(parameters) + len(state)),
            options=[frozen_options(optimizer) for optimizer in optimizers],
            numbers=numbers,
            known=[[None for _ in groups] for groups in numbers],
            beta=beta,
            owners=None if inside else owners,
        )

    def _terms(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weight: kl_weight | None,
        beta: Tensor,
    ) -> Terms:
        """The terms, with the KL weight as a tensor in place of the number that it is now."""
        if weight is None:
            return self.objective.terms(self.model, self.guide, args, kwargs)
        number, weight.beta = weight.beta, beta
        try:
            return self.objective.terms(self.model, self.guide, args, kwargs)
        finally:
            weight.beta = number

    def _check_objective(self) -> None:
        objective = self.objective
        if not isinstance(objective, ELBO):
            if not hasattr(objective.loss, "differentiable_loss") and hasattr(
                objective.loss, "loss_and_grads"
            ):
                raise CannotCompileError(
                    f"the loss {type(objective.loss).__name__} does its own backward pass"
                )
            return
        structure = objective.structure
        if structure is not None and not structure.reparameterized:
            name, site = next(
                (name, site)
                for name, site in latent_sites(structure.guide_trace)
                if not site["fn"].has_rsample
            )
            raise CannotCompileError(
                f"site {name!r}: the guide draws it without a pathwise gradient "
                f"({kind_of(site['fn'])}), so Pyro's own loss is used"
            )


def _differing(variants: Sequence[_Variant]) -> str:
    """The names of the options in which the variants' optimizers differ."""
    groups = [group for variant in variants for options in variant.options for group in options]
    names = {name for group in groups for name in group}
    found = sorted(n for n in names if any(g.get(n) != groups[0].get(n) for g in groups))
    return ", ".join(map(repr, found)) or "its state"


def _clipped(gradients: dict[Tensor, Tensor], most: float) -> dict[Tensor, Tensor]:
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    return {parameter: gradient * factor for parameter, gradient in gradients.items()}


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.dtype, tensor.device, tensor.shape, tensor.requires_grad)
