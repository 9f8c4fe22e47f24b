"""What can't be compiled is said once and runs as it is; what changes later on is followed."""

import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyro
import pytest
import torch
from compiled_runs import adam, normalized_pair, trained
from fit_pairs import PlainGuide, PlainModel
from helpers import Made, bernoulli_latents, bernoulli_pair, double_bits, library_pair, store_pair
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.graph.refusal import CannotCompileError

Make = Callable[[], Any]


def alike(ours: Any, theirs: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol, equal_nan=True)


def falls_back(make: Make, reason: str, **options: Any) -> None:
    """One warning with the reason, and the steps are eager ones."""
    with pytest.warns(UserWarning, match="SVI goes on without compiling the step: ") as caught:
        ours = trained(make, True, **options)
    (warning,) = caught
    assert re.search(reason, str(warning.message)), str(warning.message)
    alike(ours, trained(make, False, **options))


def followed(make: Make, *, rtol: float = 1e-9, **options: Any) -> None:
    """The steps are eager ones, without a word."""
    alike(trained(make, True, **options), trained(make, False, **options), rtol)


# --- said once


def troubled(trouble: Callable[[Tensor], Any]) -> Make:
    """The model does something more after its sites; one parameter has to come of it."""

    def make() -> Made:
        model, guide, args = store_pair()
        act = copy.deepcopy(trouble)  # each pair counts its own calls

        def with_trouble(x: Tensor) -> None:
            model(x)
            factor = act(x)
            if factor is not None:
                pyro.factor("trouble", factor * pyro.param("weight").sum())

        return with_trouble, guide, args

    return make


class Acts:
    """Keeps something at each call."""

    def __init__(self, act: Callable[[Any, Tensor], Any], kept: Any = 0) -> None:
        self.act, self.kept = act, kept

    def __call__(self, x: Tensor) -> Any:
        return self.act(self, x)


def last(self: Any, x: Tensor) -> None:
    self.kept = x.mean()


def other_site(self: Any, x: Tensor) -> Any:
    self.kept += 1
    return 0.1 if self.kept % 2 else None


def count(self: Any, x: Tensor) -> float:
    self.kept += 1
    return 0.1 * self.kept


def generator(self: Any, x: Tensor) -> Tensor:
    self.kept = self.kept or torch.Generator()
    return torch.rand((), generator=self.kept)


HOST = r"at or after site 'x' \(test_compiled_bad_input\.py, line \d+\): reads a tensor's value on"
AT = "at or after site 'x': "
DIFFER = AT + "two runs of the pair differed"
TROUBLES: dict[str, tuple[Any, str]] = {
    "item": (lambda x: x.mean().item(), HOST + r" the host \(Tensor\.item\)"),
    "branch": (lambda x: 1.0 if x.sum() > 0 else -1.0, HOST + r" the host \(Tensor\.__bool__\)"),
    "selection": (
        lambda x: x[x > 0].sum(),
        AT + r"the shape of a result.*poutine\.mask",
    ),
    "NumPy's noise": (lambda x: np.random.rand(), DIFFER),  # noqa: NPY002
    # It ends where it began, as if it had drawn nothing.
    "seed": (lambda x: (torch.manual_seed(0), torch.rand(()))[1], "seeds torch's generator"),
    "kept value": (Acts(last), "attribute 'kept' of Acts.* changes at each call"),
    "every second call": (Acts(other_site), DIFFER),
    # The runs of a capture must not count as calls, nor draw from it.
    "counted calls": (Acts(count), DIFFER),
    "own generator": (Acts(generator), AT + "the pair draws from a generator of its own"),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_a_pair_that_cannot_be_compiled_is_spoken_of_once(name, interpreted):
    trouble, reason = TROUBLES[name]
    falls_back(troubled(trouble), reason)
    assert not interpreted or "each call" in reason


def test_a_guide_without_a_pathwise_gradient(interpreted):
    """Two warnings: of the gradient, and of the step that is not compiled."""
    with pytest.warns(UserWarning, match="site 'z': the guide draws it without") as caught:
        found = trained(bernoulli_latents, True)
    gradient, step = (str(warning.message) for warning in caught)
    assert "REINFORCE" in gradient
    assert re.search(r"without compiling the step: site 'z'.*\(Bernoulli\)", step)
    with pytest.warns(UserWarning, match="REINFORCE"):
        alike(found, trained(bernoulli_latents, False))
    assert not interpreted


def test_losses_that_cannot_be_compiled(interpreted):
    own = partial(RenyiELBO, num_particles=2)
    falls_back(library_pair, "the loss RenyiELBO does its own backward pass", loss=own)
    pyros = partial(getattr, Trace_ELBO(), "differentiable_loss")
    falls_back(library_pair, "reads a tensor's value on the host", loss=pyros)


def test_a_step_inside_handlers(interpreted):
    def blocked(svi: Any) -> Iterator[None]:
        yield
        while True:
            with pyro.poutine.block(), pyro.poutine.scale(scale=2.0):
                yield

    falls_back(store_pair, r"inside handlers.*BlockMessenger, ScaleMessenger", script=blocked)


def test_without_a_compiler(monkeypatch):
    lower = Mock(side_effect=CannotCompileError("no compiler"))
    monkeypatch.setattr("pyro_vae.inference.step_graph.lower", lower)
    falls_back(store_pair, "no compiler")


def taking(*more: Any) -> Make:
    """A pair with another argument."""

    def make() -> Made:
        model, guide, (x,) = store_pair()
        return lambda x, *_: model(x), lambda x, *_: guide(x), (x, *more)

    return make


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        (torch.ones(2, requires_grad=True), "an argument of the step requires a gradient"),
        (double_bits().to_sparse(), "sparse"),
        (np.ones(2), "argument.*ndarray"),
    ],
    ids=["gradient", "sparse", "array"],
)
def test_arguments_that_cannot_be_compiled(argument, reason, interpreted):
    falls_back(taking(argument), reason)


@pytest.mark.parametrize("method", ["step", "update"])
def test_the_warning_points_to_the_step_and_is_one_line(method, interpreted):
    # Pyro adds the shapes of the sites to what is raised under a trace.
    model, guide, args = troubled(lambda x: x.mean().item())()
    svi = pv.SVI(model, guide, adam, compile=True)
    svi.step(*args)
    with pytest.warns(UserWarning, match="goes on without") as caught:
        getattr(svi, method)(*args)
    assert caught[0].filename == __file__
    assert "\n" not in str(caught[0].message)


@pytest.mark.parametrize("compile", ["yes", None, 2, "AUTO"])
def test_other_words_are_refused(compile):
    with pytest.raises(ValueError, match='compile to be True, False or "auto", got'):
        pv.SVI(*bernoulli_pair(), adam, compile=compile)


# --- followed


class Scaled(PlainModel):
    """With a number in Python, and with a layer that is another one in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.network.append(nn.Dropout(0.5))
        self.scale: Any = 1.0

    def forward(self, x: Tensor) -> None:
        pyro.poutine.scale(super().forward, scale=self.scale)(x)


def scaled_pair() -> Made:
    return Scaled().double(), PlainGuide().double(), (double_bits(),)


def doing(*things: Callable[[Any], Any]) -> Callable[[Any], Iterator[None]]:
    """Does something before each of the steps that follow the third one."""

    def script(svi: Any) -> Iterator[None]:
        yield from (None, None, None)
        for thing in things:
            thing(svi)
            yield

    return script


def rescale(scale: Any) -> Callable[[Any], Any]:
    return lambda svi: setattr(svi.model, "scale", scale)


def test_a_changed_attribute_is_followed(interpreted):
    followed(scaled_pair, script=doing(*map(rescale, (0.5, 0.5, 1.0))), steps=7)
    assert len(interpreted) == 2  # the first graph is still good for the first value


def test_an_attribute_that_goes_on_changing_is_spoken_of(interpreted, monkeypatch):
    monkeypatch.setattr("pyro_vae.inference.compiled._MOST_GRAPHS", 2)
    script = doing(*(rescale(1.0 / n) for n in range(2, 6)))
    falls_back(scaled_pair, "attribute 'scale' of Scaled in the model", script=script, steps=7)
    assert len(interpreted) == 2


def test_more_shapes_than_there_are_graphs_are_spoken_of_once(interpreted, monkeypatch):
    monkeypatch.setattr("pyro_vae.inference.compiled._MOST_GRAPHS", 2)
    monkeypatch.setattr("pyro_vae.inference.compiled._OTHER_SHAPES", 1)
    sizes = [lambda svi, n=n: svi.step(double_bits(n)) for n in (3, 4, 5, 6) * 2]
    falls_back(store_pair, "more than 2 shapes", script=doing(*sizes), steps=9)
    assert len(interpreted) == 2


def test_training_and_evaluation_modes_are_followed(interpreted):
    flips = [lambda svi: svi.model.eval(), lambda svi: svi.model.train()] * 3
    followed(scaled_pair, script=doing(*flips), steps=9)
    assert len(interpreted) == 2


def test_loaded_parameters_and_states_are_followed(interpreted):
    def rewound(svi: Any) -> Iterator[None]:
        yield
        parameters, state = copy.deepcopy((svi.parameters.state_dict(), svi.optimizer.state_dict()))
        yield from (None, None)
        svi.parameters.load_state_dict(parameters)
        yield
        svi.optimizer.load_state_dict(state)

    followed(normalized_pair, script=rewound, steps=6, optimizer=lambda *_: adam)


def test_a_rate_schedule_that_turns_momentum_too_is_followed(interpreted):
    def cycled(svi: Any) -> Iterator[None]:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(svi.optimizer, 0.1, total_steps=20)
        while True:
            yield
            scheduler.step()

    followed(store_pair, script=cycled, steps=8, optimizer=lambda *_: adam)
    assert len(interpreted) == 1


OTHERWISE: dict[str, tuple[Make, Callable[[Any], Any]]] = {
    "decay": (store_pair, lambda svi: svi.optimizer.param_groups[0].update(weight_decay=0.5)),
    "frozen": (scaled_pair, lambda svi: svi.model.requires_grad_(False)),
    "norm": (store_pair, lambda svi: setattr(svi, "max_grad_norm", 0.1)),
}


@pytest.mark.parametrize(("make", "change"), OTHERWISE.values(), ids=OTHERWISE)
def test_what_is_trained_otherwise_is_followed(make, change, interpreted):
    followed(make, script=doing(change), steps=6, max_grad_norm=1.0)


def test_another_precision_is_followed(interpreted):
    def cast(module: nn.Module, args: Any) -> Any:
        return (args[0].to(next(module.parameters()).dtype),)

    def make() -> Made:
        model, guide = PlainModel(), PlainGuide()
        for module in (model, guide):
            module.register_forward_pre_hook(cast)
        return model, guide, (double_bits(),)

    script = doing(lambda svi: (svi.model.double(), svi.guide.double()))
    sgd = partial(torch.optim.SGD, lr=1e-2)  # without a state, which would keep its precision
    followed(make, script=script, steps=6, optimizer=lambda *_: sgd, rtol=1e-5)
    assert len(interpreted) == 2


def test_what_a_users_loss_reads_is_followed(interpreted):
    def make() -> Made:
        weights[:] = [1.0]
        return store_pair()

    def loss(model: Any, guide: Any, *args: Any) -> Tensor:
        guided = pyro.poutine.trace(guide).get_trace(*args)
        traced = pyro.poutine.trace(pyro.poutine.replay(model, trace=guided)).get_trace(*args)
        return guided.log_prob_sum() - weights[0] * traced.log_prob_sum()

    weights = [1.0]
    followed(make, script=doing(lambda _: weights.insert(0, 0.5)), steps=6, loss=lambda: loss)


def test_what_an_argument_holds_is_followed(interpreted):
    def make() -> Made:
        options.kept = 1.0
        model, guide, (x,) = store_pair()

        def scaled(x: Tensor, options: Acts) -> None:
            pyro.poutine.scale(model, scale=options.kept)(x)

        return scaled, lambda x, options: guide(x), (x, options)

    options = Acts(last)
    script = doing(lambda svi: setattr(options, "kept", 0.5))
    followed(make, script=script, steps=6)


def test_statistics_of_networks_that_are_hard_to_find_are_put_back(interpreted):
    # No name in the guide leads to the normalization, which counts its runs.
    def make() -> Made:
        held = [nn.BatchNorm1d(9, affine=False).double()]
        norms.extend(held)
        model, guide, args = store_pair()
        return model, lambda x: guide(held[0](x)), args

    norms: list[nn.Module] = []
    followed(make)
    torch.testing.assert_close(*(dict(norm.named_buffers()) for norm in norms))
