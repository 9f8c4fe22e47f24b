"""A graph does what its function does, on live tensors; what it can't follow is refused."""

import contextlib
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_vae.graph.capture import Captured, capture
from pyro_vae.graph.refusal import CannotCompileError

Function = Callable[..., Sequence[Tensor]]
RNG = np.random.default_rng(0)
ARRAY = np.array([1.0, 2.0, 3.0])
NUMBER = torch.tensor(2.0, dtype=torch.float64)


def data() -> Tensor:
    return torch.randn(4, 3, dtype=torch.float64)


def captured(function: Function, *inputs: Tensor) -> Captured:
    """The first inputs are the same tensors in both runs; the last one is data."""
    others = [*inputs[:-1], inputs[-1].roll(1, 0)]
    return capture(function, inputs, others=others)


def run(graph: Captured, *inputs: Tensor, seed: int = 3) -> list[Tensor]:
    torch.manual_seed(seed)
    with torch.no_grad():
        return list(graph.module(*inputs, *graph.reached))


def seeded(function: Function, *inputs: Tensor, seed: int = 3) -> list[Tensor]:
    torch.manual_seed(seed)
    return [r.detach() for r in function(*inputs)]


# --- what is captured


def in_place(x: Tensor) -> Sequence[Tensor]:
    y = x.clone()
    y[y > 0] = 0.0
    y[:, 0] += 1.0
    return (y,)


def gradient(x: Tensor) -> Sequence[Tensor]:
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad((x @ w).exp().sum(), [w])


def gradient_of_numbers(x: Tensor) -> Sequence[Tensor]:
    w, b = (torch.tensor(0.5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return torch.autograd.grad((x * w.exp() + b).sum(), [w, b])


def sampled(x: Tensor) -> Sequence[Tensor]:
    seen: Any = x[:, 0] > 0
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=seen):
        trace = pyro.poutine.trace(lambda: pyro.sample("z", dist.Normal(x.T[0], 1.0))).get_trace()
    trace.compute_log_prob()
    site: Any = trace.nodes["z"]
    return site["value"], site["log_prob"]


FUNCTIONS: dict[str, Function] = {
    "elementwise": lambda x: (x.exp() * 2, x.sum(0)),
    "the input itself": lambda x: (x,),
    "literals": lambda x: (x * torch.tensor([1.0, 2.0, 3.0]), torch.tensor(2.0) + x),
    "rows": lambda x: (sum(row for row in x),),  # type: ignore[misc]
    "in place": in_place,
    "gradient": gradient,
    # What takes a 0-d tensor without an operation on it does not read its value.
    "gradient of numbers": gradient_of_numbers,
    "type of a number": lambda x: (x.float().type_as(NUMBER), NUMBER.new_tensor([1.0]) + x),
    "sites": sampled,
    "array": lambda x: (x * torch.tensor(ARRAY), x + torch.from_numpy(ARRAY)),
    "normal": lambda x: (x + torch.randn(4, 3), torch.empty_like(x).normal_()),
    "uniform": lambda x: (torch.rand_like(x) * x,),
    "bernoulli": lambda x: (torch.bernoulli(x.sigmoid()),),
    "dropout": lambda x: (F.dropout(x, 0.5),),
    "gamma": lambda x: (dist.Gamma(x.exp(), 1.0).rsample(),),  # type: ignore[arg-type]
    "permutation": lambda x: (x[torch.randperm(4)],),
    "categorical": lambda x: (torch.multinomial(x.exp(), 1),),
    "float32": lambda x: (x.float() @ torch.ones(3, 2),),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_graph_does_what_the_function_does(function):
    graph = captured(function, data())
    for seed in range(3):
        x = data()
        ours, theirs = run(graph, x, seed=seed), seeded(function, x, seed=seed)
        assert len(ours) == len(theirs)
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("name", ["normal", "uniform", "bernoulli", "dropout", "gamma", "sites"])
def test_noise_is_fresh_at_each_call(name):
    graph, x = captured(FUNCTIONS[name], data()), data()
    torch.manual_seed(0)
    a, b = (graph.module(x, *graph.reached)[0] for _ in range(2))
    assert not torch.equal(a, b)


def test_the_callers_random_state_is_left_alone():
    before = torch.get_rng_state()
    for name in ("normal", "dropout", "sites", "in place"):
        captured(FUNCTIONS[name], x := torch.ones(4, 3, dtype=torch.float64))
        assert torch.equal(x, torch.ones(4, 3, dtype=torch.float64))
        assert torch.equal(torch.get_rng_state(), before)


# --- tensors that a run changes, and tensors that it reaches


def test_inputs_are_put_back_and_a_graph_changes_them():
    def function(count: Tensor, x: Tensor) -> Sequence[Tensor]:
        count.add_(1)
        return (x * count,)

    x, count = data(), torch.ones(1, dtype=torch.float64)
    graph = captured(function, count, x)
    assert count.item() == 1
    for expected in (2, 3):
        assert torch.equal(run(graph, count, x)[0], x * expected)
        assert count.item() == expected


def test_buffers_are_put_back_and_a_graph_changes_them():
    norm = nn.BatchNorm1d(3).double()
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    x = data()
    graph = captured(lambda x: (norm(x),), x)
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    twin = nn.BatchNorm1d(3).double()
    for _ in range(2):
        y = data()
        assert torch.equal(run(graph, y)[0], twin(y).detach())
    assert norm.num_batches_tracked == 2  # type: ignore[comparison-overlap]
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in norm.state_dict().items())


def test_reached_tensors_are_live():
    scale, frozen = torch.ones(3).double(), nn.Parameter(torch.ones(3).double())
    linear = nn.Linear(3, 2).double()
    graph = captured(lambda x: (linear(x * scale * frozen),), data())
    x = data()
    for tensor in (scale, frozen, linear.weight, linear.bias):
        before = run(graph, x)[0]
        with torch.no_grad():
            tensor.mul_(2)
        assert not torch.equal(before, run(graph, x)[0])
        assert torch.equal(run(graph, x)[0], linear(x * scale * frozen).detach())
    assert {id(t) for t in graph.reached} >= {id(scale)}


def test_an_input_reached_by_closure_is_the_input():
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def function(w: Tensor, x: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad((x * weight).exp().sum(), [weight])

    graph, x = captured(function, weight, data()), data()
    other = torch.full((3,), 2.0, dtype=torch.float64)
    assert torch.equal(run(graph, other, x)[0], (x * (x * other).exp()).sum(0))
    assert not graph.reached


NUMBERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "factor": lambda x, half, one: x * half,
    "power": lambda x, half, one: x.exp() ** half,
    "clamp": lambda x, half, one: x.clamp(min=half),
    "fill": lambda x, half, one: torch.zeros_like(x).fill_(half),
    "stack": lambda x, half, one: x * torch.stack([half, half, half]),
    "normal": lambda x, half, one: dist.Normal(half, half).expand([3]).log_prob(x),
}
# Torch reads these numbers itself, without a call that Python could see.
READ_BY_TORCH: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "full": lambda x, half, one: x + torch.full((3,), half),  # type: ignore[arg-type]
    "full_like": lambda x, half, one: torch.full_like(x, half),  # type: ignore[arg-type]
    "tensor": lambda x, half, one: x * torch.tensor([half, half, 1.0]),
    "alpha": lambda x, half, one: torch.add(x, x, alpha=half),  # type: ignore[arg-type]
    "softplus": lambda x, half, one: F.softplus(x, beta=half),  # type: ignore[arg-type]
    "leaky": lambda x, half, one: F.leaky_relu(x, half),  # type: ignore[arg-type]
    "column": lambda x, half, one: x[:, one] * 1.0,
    "row": lambda x, half, one: x[one] * 1.0,
    "slice": lambda x, half, one: x[:, one:].sum(1),  # type: ignore[misc]
    "narrow": lambda x, half, one: x.narrow(1, one, 1) * 1.0,
}


@pytest.mark.parametrize("name", [*NUMBERS, *READ_BY_TORCH])
def test_a_number_in_a_buffer_is_live_or_refused(name):
    use = (NUMBERS | READ_BY_TORCH)[name]
    half, one = torch.tensor(0.5, dtype=torch.float64), torch.tensor(1)
    try:
        graph = captured(lambda x: (use(x, half, one),), data())
    except CannotCompileError as error:
        assert "reads a tensor's value on the host" in str(error)  # noqa: PT017
        return
    half.fill_(0.25)
    one.fill_(2)
    x = data()
    assert torch.equal(run(graph, x)[0], use(x, half, one))


def test_a_number_made_of_an_input_is_live_or_refused():
    def function(w: Tensor, x: Tensor) -> Sequence[Tensor]:
        return (x * torch.tensor([w, w, 1.0]),)

    w, x = torch.tensor(2.0), data()
    try:
        graph = captured(function, w, x)
    except CannotCompileError:
        return
    w.fill_(3.0)
    assert torch.equal(run(graph, w, x)[0], function(w, x)[0])


# --- what is refused


def seeding(x: Tensor) -> Sequence[Tensor]:
    torch.manual_seed(0)
    return (x + torch.randn(3),)


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        self.calls += 1
        return (x.exp(),) if self.calls % 2 else (x.exp().sin(),)


def after_a_site(x: Tensor) -> Sequence[Tensor]:
    z = pyro.sample("latent", dist.Normal(x, 1.0))
    return (z * z.mean().item(),)


HOST, SHAPE = r"line \d+\): reads a tensor's value on the host", "shape of a result depends on val"
DIFFERS = r"two runs of the pair differed.*draw with pyro\.sample or torch"
REFUSED: dict[str, tuple[Function, str]] = {
    "item": (lambda x: (x * x.sum().item(),), HOST + r" \(Tensor\.item\)"),
    "tolist": (lambda x: (torch.tensor(x.tolist()),), HOST + r" \(Tensor\.tolist\)"),
    "numpy": (lambda x: (torch.tensor(x.numpy()),), HOST + r" \(Tensor\.numpy\)"),
    "asarray": (lambda x: (torch.tensor(np.asarray(x)),), HOST + r" \(Tensor\.__array__\)"),
    "float": (lambda x: (x * float(x.sum()),), HOST + r" \(Tensor\.__float__\)"),
    "int": (lambda x: (x * int(x.sum()),), HOST + r" \(Tensor\.__int__\)"),
    "range": (lambda x: (x * len(range(x.long().max())),), HOST + r" \(Tensor\.__index__\)"),
    "if": (lambda x: (x if x.sum() > 0 else -x,), HOST + r" \(Tensor\.__bool__\)"),
    "in": (lambda x: (x * (0.0 in x),), HOST),
    "equal": (lambda x: (x if torch.equal(x, x.abs()) else -x,), HOST),
    "allclose": (lambda x: (x if torch.allclose(x, x.abs()) else -x,), HOST),
    "chosen column": (lambda x: (x[:, x.sum(0).argmax()],), HOST),
    "printed": (lambda x: (x * len(f"{x.mean()}"),), HOST),
    "after a site": (after_a_site, r"at or after site 'latent' \(test_graph_capture\.py, " + HOST),
    "before a site": (lambda x: (x * x.sum().item(),), "before the first site"),
    "mask": (lambda x: (x[x > 0],), SHAPE + r".*aten\.index.*poutine\.mask"),
    "masked_select": (lambda x: (x.masked_select(x > 0),), SHAPE),
    "nonzero": (lambda x: (x.nonzero(),), SHAPE),
    "where": (lambda x: (torch.where(x > 0)[0],), SHAPE),
    "unique": (lambda x: (torch.unique(x),), SHAPE),
    "NumPy's noise": (lambda x: (x * np.random.rand(),), DIFFERS),  # noqa: NPY002
    "random": (lambda x: (x * random.random(),), DIFFERS),
    "generator of NumPy": (lambda x: (x * RNG.normal(),), DIFFERS),
    "array of noise": (lambda x: (x * torch.tensor(RNG.normal(size=3)),), DIFFERS),
    "memory of noise": (lambda x: (x * torch.from_numpy(RNG.normal(size=3)),), DIFFERS),
    "seed": (seeding, "seeds torch's generator itself"),
    "Pyro's seed": (lambda x: (pyro.set_rng_seed(1), torch.randn(3))[1:], "seeds torch's"),
    "counter": (Counting(), DIFFERS.replace("draw", "counts its calls.*draw", 1)),
    "KeyError": (lambda x: ({}["step"],), r"KeyError: 'step'"),
    "generator of torch": (lambda x: (torch.randn(3, generator=torch.Generator()),), "enerator"),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_a_graph_cannot_follow_is_refused_and_leaves_no_trace(function, reason):
    x, kept = data(), torch.zeros(3, dtype=torch.float64)
    before, state = x.clone(), torch.get_rng_state()

    def changing(x: Tensor) -> Sequence[Tensor]:
        kept.add_(1)
        x.add_(kept)
        torch.randn(2)
        return function(x)

    with pytest.raises(CannotCompileError) as refused:
        captured(changing, x)
    assert re.search(reason, str(refused.value)), str(refused.value)
    assert torch.equal(x, before)
    assert not kept.any()
    assert torch.equal(torch.get_rng_state(), state)


def test_validation_is_as_it_was():
    for function in (FUNCTIONS["sites"], after_a_site):
        with pyro.validation_enabled(is_validate=True):
            with contextlib.suppress(CannotCompileError):
                captured(function, data())
            assert torch.distributions.Distribution._validate_args is True


@pytest.mark.parametrize("state", ["NumPy", "Python"])
def test_other_random_states_are_put_back(state):
    draw: Any = np.random.rand if state == "NumPy" else random.random
    seed: Any = np.random.seed if state == "NumPy" else random.seed
    seed(0)
    expected = draw()
    seed(0)
    with pytest.raises(CannotCompileError):
        captured(lambda x: (x * draw(),), data())
    assert draw() == expected
