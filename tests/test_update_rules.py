"""Every update rule against the step of torch's own optimizer, on the same gradients."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, Optimizer, RMSprop
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map

from pyro_vae.inference.update_rules import apply_rule, changing_of, rule_of, state_tensors

ADAM = (
    {},
    {"betas": (0.7, 0.9), "eps": 1e-2},
    {"weight_decay": 0.1},
    {"amsgrad": True},
    {"maximize": True},
    {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
    {"fused": True, "weight_decay": 0.1},
    {"foreach": True, "amsgrad": True},
    {"lr": torch.tensor(0.05, dtype=torch.float64)},
)
MAKINGS: dict[type[Optimizer], tuple[dict[str, Any], ...]] = {
    Adam: (*ADAM, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    AdamW: (*ADAM, {"weight_decay": 0.0}),
    Adamax: (
        {},
        {"betas": (0.7, 0.9), "eps": 1e-2},
        {"weight_decay": 0.1, "maximize": True},
        {"foreach": True},
    ),
    Adagrad: (
        {},
        {"lr_decay": 0.3, "eps": 1e-3},
        {"initial_accumulator_value": 0.5, "weight_decay": 0.1},
        {"maximize": True, "lr_decay": 0.1},
        {"fused": True},
    ),
    RMSprop: (
        {},
        {"alpha": 0.6, "eps": 1e-2},
        {"momentum": 0.8},
        {"centered": True},
        {"centered": True, "momentum": 0.8, "weight_decay": 0.1, "maximize": True},
        {"foreach": True, "momentum": 0.5},
    ),
    SGD: (
        {},
        {"weight_decay": 0.1},
        {"maximize": True, "weight_decay": 0.1},
        {"momentum": 0.8},
        {"momentum": 0.8, "dampening": 0.3},
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.8, "maximize": True, "foreach": True},
        {"fused": True, "momentum": 0.8},
    ),
}
ALL = [(kind, options) for kind, several in MAKINGS.items() for options in several]
Gradients = list[Tensor | None]
NAMES = [f"{kind.__name__} {', '.join(options) or 'plain'}" for kind, options in ALL]


def tensors() -> list[Tensor]:
    """Of several shapes, one of them a single number."""
    shapes = ((3, 4), (), (5,))
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def twins(kind: Any, options: dict[str, Any], *, grouped: bool = False) -> tuple[Any, Any]:
    """Two optimizers over equal parameters of their own."""
    first = tensors()
    second = [p.detach().clone().requires_grad_() for p in first]
    options = {"lr": 0.05} | options

    def make(params: list[Tensor]) -> Optimizer:
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.2, "weight_decay": 0.3}]
        return kind(groups if grouped else params, **copy.deepcopy(options))

    return make(first), make(second)


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def by_torch(optimizer: Optimizer, gradients: Gradients) -> None:
    for param, gradient in zip(params_of(optimizer), gradients, strict=True):
        param.grad = None if gradient is None else gradient.clone()
    optimizer.step()
    for param in params_of(optimizer):
        param.grad = None


def by_rule(optimizer: Optimizer, gradients: Gradients) -> None:
    rule = rule_of(optimizer)
    assert rule is not None
    rates: Any = [
        tree_map(lambda n: torch.as_tensor(n, dtype=torch.float64), changing_of(group))
        for group in optimizer.param_groups
    ]
    given = {
        p: g.clone() for p, g in zip(params_of(optimizer), gradients, strict=True) if g is not None
    }
    apply_rule(rule, optimizer, given, rates)


def some_gradients(optimizer: Optimizer, steps: int) -> Iterator[Gradients]:
    for _ in range(steps):
        yield [torch.randn_like(p) for p in params_of(optimizer)]


def assert_alike(ours: Optimizer, theirs: Optimizer, tolerance: float = 1e-12) -> None:
    close: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(params_of(ours), params_of(theirs), **close)
    a, b = ours.state_dict(), theirs.state_dict()
    held, expected = ({k: v for k, v in d["state"].items() if v} for d in (a, b))
    torch.testing.assert_close(held, expected, **close)
    assert a["param_groups"] == b["param_groups"]


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize(("kind", "options"), ALL, ids=NAMES)
def test_a_rule_takes_torchs_steps(kind, options, grouped):
    ours, theirs = twins(kind, options, grouped=grouped)
    gradients = some_gradients(ours, 6)
    first = next(gradients)
    by_torch(ours, first)
    by_torch(theirs, first)
    for later in gradients:
        before = [p.detach().clone() for p in params_of(ours)]
        by_rule(ours, later)
        by_torch(theirs, later)
        assert_alike(ours, theirs)
        assert not any(map(torch.equal, before, params_of(ours)))


@pytest.mark.parametrize(("kind", "options"), ALL, ids=NAMES)
def test_steps_of_both_kinds_may_follow_one_another(kind, options):
    """The state stays what torch's step works on, and in the very same tensors."""
    ours, theirs = twins(kind, options)
    gradients = some_gradients(ours, 7)
    by_torch(ours, first := next(gradients))
    by_torch(theirs, first)
    held = list(state_tensors(ours))
    for step, later in enumerate(gradients):
        for group in (*ours.param_groups, *theirs.param_groups):  # as a scheduler does it
            group["lr"] = 0.1 / (step + 1)
        (by_rule if step % 2 else by_torch)(ours, later)
        by_torch(theirs, later)
    assert_alike(ours, theirs)
    assert all(a is b for a, b in zip(held, state_tensors(ours), strict=True))


@pytest.mark.parametrize(("kind", "options"), ALL, ids=NAMES)
def test_a_saved_state_is_torchs(kind, options):
    ours, theirs = twins(kind, options)
    for step, gradients in enumerate(some_gradients(ours, 3)):
        (by_rule if step else by_torch)(ours, gradients)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    with torch.no_grad():
        for p, q in zip(params_of(theirs), params_of(ours), strict=True):
            p.copy_(q)
    last = next(some_gradients(ours, 1))
    by_torch(ours, last)
    by_torch(theirs, last)
    assert_alike(ours, theirs, 0.0)


def test_a_rule_without_a_state_makes_none():
    ours, theirs = twins(SGD, {})
    gradients = next(some_gradients(ours, 1))
    by_rule(ours, gradients)
    by_torch(theirs, gradients)
    assert ours.state_dict() == theirs.state_dict()


@pytest.mark.parametrize(("kind", "options"), ALL, ids=NAMES)
def test_a_parameter_without_a_gradient_is_left_alone(kind, options):
    ours, theirs = twins(kind, options | {"weight_decay": 0.1})
    for step, gradients in enumerate(some_gradients(ours, 4)):
        if step:
            gradients[1] = None
        before = params_of(ours)[1].detach().clone()
        by_torch(theirs, gradients)
        (by_rule if step else by_torch)(ours, gradients)
        assert torch.equal(before, params_of(ours)[1]) is bool(step)
    assert_alike(ours, theirs)


@pytest.mark.parametrize(("kind", "options"), ALL, ids=NAMES)
def test_in_float32_a_rule_agrees_to_float32(kind, options):
    """The counter is a float32 tensor whatever the parameters are."""
    torch.manual_seed(1)
    params = [torch.randn(3, 4), torch.randn(())]
    ours, theirs = (
        kind([p.clone().requires_grad_() for p in params], **{"lr": 0.05} | options)
        for _ in range(2)
    )
    for step, gradients in enumerate(some_gradients(ours, 30)):
        by_torch(theirs, gradients)
        (by_rule if step else by_torch)(ours, gradients)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)
    a, b = list(state_tensors(ours)), list(state_tensors(theirs))
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


# --- what has no rule


class Renamed(Adam):
    """A subclass may do anything, even this."""


@pytest.mark.parametrize(
    "make",
    [
        Renamed,
        torch.optim.NAdam,
        torch.optim.LBFGS,
        lambda p: Adam(p, differentiable=True),
        lambda p: SGD(p, lr=0.1, differentiable=True),
        lambda p: Adam([{"params": p[:1]}, {"params": p[1:], "differentiable": True}]),
    ],
    ids=["subclass", "NAdam", "LBFGS", "Adam", "SGD", "second group"],
)
def test_other_optimizers_have_no_rule(make):
    assert rule_of(make(tensors())) is None


def test_complex_parameters_have_no_rule():
    assert rule_of(Adam([torch.ones(2, dtype=torch.complex128).requires_grad_()])) is None


@pytest.mark.parametrize("where", ["register_step_pre_hook", "register_step_post_hook"])
def test_an_optimizer_with_hooks_has_no_rule(where):
    optimizer = Adam(tensors())
    assert rule_of(optimizer) is not None
    handle = getattr(optimizer, where)(lambda *_: None)
    assert rule_of(optimizer) is None
    handle.remove()
    assert rule_of(optimizer) is not None


def test_hooks_of_all_optimizers_are_hooks_of_each():
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    try:
        assert rule_of(Adam(tensors())) is None
    finally:
        handle.remove()
