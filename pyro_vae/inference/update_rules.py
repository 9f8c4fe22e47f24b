"""Torch's optimizers as tensor operations, for a step that is one graph.

Torch's own ``step`` reads counters on the host and loops over parameters in Python. Here the same
updates are written on the optimizer's own state tensors, which they change in place: checkpoints,
schedulers and uncompiled steps go on working on them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from pyro_vae.graph.operators import hold
from pyro_vae.graph.refusal import ThisTimeError

__all__ = [
    "Rule",
    "apply_rule",
    "changing_of",
    "frozen_options",
    "load_state",
    "rule_of",
    "state_tensors",
    "to_device",
    "torch_optimizers",
]

# Options that schedules change: they enter a graph as 0-d tensors, the others are frozen in it.
_CHANGING = ("lr", "betas", "momentum")

Group = dict[str, Any]
State = dict[str, Any]


class Rule(NamedTuple):
    """An optimizer's update in two parts.

    Attributes:
        numbers: From the options of a group and the count of steps, one for each parameter, to the
            coefficients of the update: numbers, 0-d tensors, or tensors of one entry a parameter.
        update: Changes a parameter and its state in place, given the gradient and the coefficients.
        counts: Whether the state of every parameter counts its steps.
    """

    numbers: Callable[[Group, Tensor], list[Any]]
    update: Callable[[Tensor, Tensor, State, Group, Sequence[Tensor]], None]
    counts: bool = True


def torch_optimizers(optimizer: Optimizer | PyroOptim) -> list[Optimizer]:
    """The torch optimizers that take the step; none where it is not theirs alone."""
    if isinstance(optimizer, Optimizer):
        return [optimizer]
    if any(clip is not None for clip in optimizer.grad_clip.values()):
        return []
    inner = list(optimizer.optim_objs.values())
    found = [o.optimizer if isinstance(o, LRScheduler) else o for o in inner]
    return [o for o in found if isinstance(o, Optimizer)] if found else []


def to_device(optimizers: list[Optimizer], device: torch.device) -> None:
    """A graph on a GPU counts its steps there, as torch's capturable optimizers do."""
    if device.type != "cuda":
        return
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
        for state in optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(device)


def load_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state, but for how it computes: that is this machine's affair."""
    ways = ("capturable", "foreach", "fused")
    own = [{way: g[way] for way in ways if way in g} for g in optimizer.param_groups]
    own += [{}] * len(state["param_groups"])  # torch says what is wrong with another number
    groups = [{**group, **mine} for group, mine in zip(state["param_groups"], own, strict=False)]
    optimizer.load_state_dict({**state, "param_groups": groups})


def frozen_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What a graph freezes of an optimizer: everything but parameters and ``changing_of``."""
    frozen = []
    for group in optimizer.param_groups:
        changing = changing_of(group)
        frozen.append({k: v for k, v in group.items() if k != "params" and k not in changing})
    return frozen


def rule_of(optimizer: Optimizer) -> Rule | None:
    """The update rule of an optimizer after its first step; None where there is none.

    Args:
        optimizer: Any torch optimizer.
    """
    rule = _RULES.get(type(optimizer))
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    if rule is None or any(hooks):
        return None
    for group in optimizer.param_groups:
        if group.get("differentiable") or any(p.is_complex() for p in group["params"]):
            return None
    return rule


def state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """The tensors of an optimizer's state, in the order of its parameters."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            for value in optimizer.state.get(param, {}).values():
                if isinstance(value, Tensor):
                    yield value


def apply_rule(
    rule: Rule,
    optimizer: Optimizer,
    gradients: dict[Tensor, Tensor],
    numbers: list[dict[str, Any]],
) -> None:
    """Update every parameter that has a gradient.

    Args:
        rule: The optimizer's rule.
        optimizer: The optimizer, whose state exists.
        gradients: From parameter to gradient.
        numbers: Of each parameter group, what ``changing_of`` finds, as 0-d float64 tensors.
    """
    with torch.no_grad():
        for group, changing in zip(optimizer.param_groups, numbers, strict=True):
            options = {**group, **changing}
            params = [param for param in group["params"] if param in gradients]
            if not params:
                continue
            # Asking by [] would make an empty state.
            states = [optimizer.state.get(param, {}) for param in params]
            coefficients = _coefficients(rule, options, params, states)
            for i, (param, state) in enumerate(zip(params, states, strict=True)):
                gradient = gradients[param]
                if group.get("maximize"):
                    gradient = -gradient
                rule.update(param, gradient, state, group, coefficients[:, i].unbind())


def _coefficients(rule: Rule, options: Group, params: list[Tensor], states: list[State]) -> Tensor:
    """The coefficients of every parameter (m, number of parameters), in the parameters' dtype.

    They are computed in float64, since 1 - beta ** step loses four digits in float32, and held: a
    compiler would otherwise compute powers anew for every sixteen elements of a parameter.
    """
    if rule.counts and not all("step" in state for state in states):
        raise ThisTimeError  # a first gradient: an uncompiled step makes the state for it
    counters = [state["step"].add_(1) for state in states if "step" in state]
    lr = options["lr"]
    steps = torch.stack(counters).double() if counters else lr.new_zeros(())
    rows = [torch.as_tensor(number, dtype=lr.dtype) for number in rule.numbers(options, steps)]
    table = torch.stack([row.to(lr.device).expand(len(params)) for row in rows])
    dtypes = {param.dtype for param in params}
    return hold(table.to(dtypes.pop()) if len(dtypes) == 1 else table)


def changing_of(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a parameter group that may change: numbers, or pairs of them.

    A momentum of zero is left out: there is none then, and no state for it.
    """
    found = {name: group[name] for name in _CHANGING if name in group}
    return {name: value for name, value in found.items() if name == "lr" or _nonzero(value)}


def _nonzero(value: Any) -> bool:
    return isinstance(value, Tensor) or value != 0


def _decayed(param: Tensor, gradient: Tensor, group: Group) -> Tensor:
    return gradient + group["weight_decay"] * param if group["weight_decay"] else gradient


def _adam_numbers(group: Group, step: Tensor) -> list[Any]:
    (beta1, beta2), lr = group["betas"], group["lr"]
    return [
        lr / (1 - beta1**step),
        (1 - beta2**step).rsqrt(),
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        1 - lr * group["weight_decay"],
    ]


def _adam(
    param: Tensor, gradient: Tensor, state: State, group: Group, numbers: Sequence[Tensor]
) -> None:
    rate, unbias, beta1, rest1, beta2, rest2, shrink = numbers
    if not group.get("decoupled_weight_decay"):
        gradient = _decayed(param, gradient, group)
    elif group["weight_decay"]:
        param.mul_(shrink)
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.mul_(beta1).add_(rest1 * gradient)
    square.mul_(beta2).add_(rest2 * gradient * gradient)
    if group["amsgrad"]:
        square = torch.maximum(state["max_exp_avg_sq"], square)
        state["max_exp_avg_sq"].copy_(square)
    param.sub_(rate * mean / (square.sqrt() * unbias + group["eps"]))


def _adamax_numbers(group: Group, step: Tensor) -> list[Any]:
    beta1, beta2 = group["betas"]
    return [group["lr"] / (1 - beta1**step), beta1, 1 - beta1, beta2]


def _adamax(
    param: Tensor, gradient: Tensor, state: State, group: Group, numbers: Sequence[Tensor]
) -> None:
    rate, beta1, rest1, beta2 = numbers
    gradient = _decayed(param, gradient, group)
    mean, largest = state["exp_avg"], state["exp_inf"]
    mean.mul_(beta1).add_(rest1 * gradient)
    largest.copy_(torch.maximum(largest * beta2, gradient.abs() + group["eps"]))
    param.sub_(rate * mean / largest)


def _adagrad_numbers(group: Group, step: Tensor) -> list[Any]:
    return [group["lr"] / (1 + (step - 1) * group["lr_decay"])]


def _adagrad(
    param: Tensor, gradient: Tensor, state: State, group: Group, numbers: Sequence[Tensor]
) -> None:
    gradient = _decayed(param, gradient, group)
    total = state["sum"].addcmul_(gradient, gradient)
    param.sub_(numbers[0] * gradient / (total.sqrt() + group["eps"]))


def _momentum_numbers(group: Group, step: Tensor) -> list[Any]:
    return [group["lr"], group["momentum"]]


def _rmsprop(
    param: Tensor, gradient: Tensor, state: State, group: Group, numbers: Sequence[Tensor]
) -> None:
    rate, momentum = numbers
    gradient = _decayed(param, gradient, group)
    square = state["square_avg"].mul_(group["alpha"])
    square.addcmul_(gradient, gradient, value=1 - group["alpha"])
    variance = square
    if group["centered"]:
        mean = state["grad_avg"].lerp_(gradient, 1 - group["alpha"])
        variance = square - mean * mean
    direction = gradient / (variance.sqrt() + group["eps"])
    if _nonzero(group["momentum"]):
        direction = state["momentum_buffer"].mul_(momentum).add_(direction)
    param.sub_(rate * direction)


def _sgd(
    param: Tensor, gradient: Tensor, state: State, group: Group, numbers: Sequence[Tensor]
) -> None:
    rate, momentum = numbers
    gradient = _decayed(param, gradient, group)
    if _nonzero(group["momentum"]):
        buffer = state["momentum_buffer"]
        buffer.mul_(momentum).add_((1 - group["dampening"]) * gradient)
        gradient = gradient + momentum * buffer if group["nesterov"] else buffer
    param.sub_(rate * gradient)


# Exact types: a subclass may do anything.
_RULES: dict[type, Rule] = {
    Adam: Rule(_adam_numbers, _adam),
    AdamW: Rule(_adam_numbers, _adam),
    Adamax: Rule(_adamax_numbers, _adamax),
    Adagrad: Rule(_adagrad_numbers, _adagrad),
    RMSprop: Rule(_momentum_numbers, _rmsprop),
    SGD: Rule(_momentum_numbers, _sgd, counts=False),
}
