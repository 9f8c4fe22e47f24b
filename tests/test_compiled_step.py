"""A compiled step is an eager step: losses, parameters, buffers, and noise."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from compiled_runs import adam, assert_alike, drawn_pair, normalized_pair, sgd, trained
from helpers import (
    PAIRS,
    Made,
    TopDownGuide,
    TopDownModel,
    bernoulli_pair,
    bits,
    double_bits,
    library_pair,
    masked_pair,
    store_pair,
    subsampled_pair,
    tutorial_pair,
)
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.optim import SGD

import pyro_vae as pv
from pyro_vae.graph.watch import Watch

optim: Any = pyro.optim


# --- pairs and losses


class Encoder(nn.Module):
    """That of Pyro's VAE tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.softplus = nn.Linear(9, 8), nn.Softplus()
        self.fc21, self.fc22 = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.softplus(self.fc1(x.reshape(-1, 9)))
        return self.fc21(hidden), torch.exp(self.fc22(hidden))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc21 = nn.Linear(2, 8), nn.Linear(8, 9)
        self.softplus, self.sigmoid = nn.Softplus(), nn.Sigmoid()

    def forward(self, z: Tensor) -> Tensor:
        return self.sigmoid(self.fc21(self.softplus(self.fc1(z))))


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.z_dim = Encoder(), Decoder(), 2

    def model(self, x: Tensor) -> Tensor:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = torch.zeros(x.shape[0], self.z_dim, dtype=x.dtype, device=x.device)
            z = pyro.sample("latent", dist.Normal(z_loc, torch.ones_like(z_loc)).to_event(1))
            loc = self.decoder.forward(z)
            likelihood = dist.Bernoulli(loc, validate_args=False).to_event(1)
            pyro.sample("obs", likelihood, obs=x.reshape(-1, 9))
            return loc

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder.forward(x)
            pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))


def pyros_tutorial_pair(dtype: torch.dtype = torch.float64) -> Made:
    vae = VAE().to(dtype)
    return vae.model, vae.guide, (bits().to(dtype),)


VECTORIZED = {"num_particles": 3, "vectorize_particles": True}
CASES: list[tuple[Any, Callable[[], Any]]] = [
    *((make, Trace_ELBO) for make in (*PAIRS, pyros_tutorial_pair, drawn_pair, normalized_pair)),
    *((make, TraceMeanField_ELBO) for make in (subsampled_pair, masked_pair)),
    (store_pair, partial(Trace_ELBO, num_particles=3)),
    (masked_pair, partial(Trace_ELBO, **VECTORIZED)),
    (store_pair, partial(TraceMeanField_ELBO, **VECTORIZED)),
]


@pytest.mark.parametrize(("make", "loss"), CASES)
def test_compiled_steps_lead_where_eager_steps_lead(make, loss, interpreted):
    assert_alike(interpreted, make, loss=loss)


def test_noise_is_fresh_at_each_step(interpreted):
    losses, _ = trained(store_pair, True, steps=5, optimizer=lambda *_: partial(SGD, lr=0.0))
    assert len(set(losses[:, 0].tolist())) == 5
    assert len(interpreted) == 1


def test_a_users_loss_is_compiled(interpreted):
    def loss(model: Any, guide: Any, *args: Any) -> Tensor:
        guided = pyro.poutine.trace(guide).get_trace(*args)
        replayed = pyro.poutine.replay(model, trace=guided)
        return 2 * (
            guided.log_prob_sum() - pyro.poutine.trace(replayed).get_trace(*args).log_prob_sum()
        )

    assert_alike(interpreted, store_pair, loss=lambda: loss)


# --- optimizers


class Own(torch.optim.Adam):
    """A subclass has no rule."""


OPTIMIZERS: dict[str, tuple[Any, bool]] = {  # and whether the graph takes its step
    "sgd": (lambda *_: sgd, True),
    "adam": (lambda *_: adam, True),
    "adamw": (lambda *_: lambda p: torch.optim.AdamW(p, lr=1e-2), True),
    "tensor": (lambda *_: lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2).double()), True),
    "no rule": (lambda *_: lambda p: Own(p, lr=1e-2), False),
    "clipped": (lambda *_: optim.ClippedAdam({"lr": 1e-2, "clip_norm": 0.5, "lrd": 0.9}), False),
    "clip": (lambda *_: optim.SGD({"lr": 1e-1}, {"clip_norm": 0.3}), False),
    "pyro": (lambda *_: optim.Adam({"lr": 1e-2}), True),
    "pyro, by name": (lambda *_: optim.Adam(lambda n: {"lr": 0.01 * (1 + ("s" in n))}), True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_takes_its_steps(name, interpreted):
    assert_alike(interpreted, store_pair, optimizer=OPTIMIZERS[name][0])
    (graph,) = interpreted
    results: Any = list(graph.module.graph.nodes)[-1].args[0]
    assert (len(results) == 3) is OPTIMIZERS[name][1]


@pytest.mark.parametrize(("name", "norm"), [("sgd", 0.5), ("no rule", 0.5), ("clipped", 1e6)])
def test_gradients_are_clipped(name, norm, interpreted):
    assert_alike(interpreted, tutorial_pair, optimizer=OPTIMIZERS[name][0], max_grad_norm=norm)


def test_an_instance_trains_what_it_was_given_and_nothing_else(interpreted):
    assert_alike(interpreted, library_pair, optimizer=lambda _, guide: adam(guide.parameters()))


def scheduled(svi: Any) -> Iterator[None]:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(svi.optimizer, 0.5)
    while True:
        yield
        scheduler.step()


def scheduled_late(svi: Any) -> Iterator[None]:
    yield
    yield from scheduled(svi)


def scheduled_by_pyro(svi: Any) -> Iterator[None]:
    while True:
        yield
        svi.optimizer.step()


def pyros_scheduler(*_: Any) -> Any:
    arguments = {"optimizer": SGD, "optim_args": {"lr": 1e-2}, "gamma": 0.5}
    return optim.ExponentialLR(arguments)


@pytest.mark.parametrize(
    ("optimizer", "script"),
    [
        (lambda *_: adam, scheduled),
        # Torch warns of a scheduler's step before which it saw none of the optimizer.
        (lambda *_: adam, scheduled_late),
        (pyros_scheduler, scheduled_by_pyro),
    ],
)
def test_a_schedule_reaches_the_graph(optimizer, script, interpreted):
    assert_alike(interpreted, store_pair, optimizer=optimizer, script=script)


# --- what changes between steps

WEIGHTS: dict[str, tuple[Any, ...]] = {
    "floats": (0.0, 0.3, 0.6, 0.9),  # float32, the default dtype here, does not hold them
    "double tensors": tuple(torch.tensor([0.0, 0.3, 0.6], dtype=torch.float64)),
    "it comes and goes": (None, 0.25, None, 0.5, 0.75, None),
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_the_weight_of_the_kl_changes_without_a_new_graph(weights, interpreted):
    def weighted(svi: Any) -> Iterator[None]:
        for weight in weights:
            with contextlib.nullcontext() if weight is None else pv.kl_weight(weight):
                yield

    assert_alike(interpreted, store_pair, script=weighted, steps=len(weights))


def test_a_smaller_minibatch_is_taken_as_it_is(interpreted):
    def minibatches(svi: Any) -> Iterator[None]:
        for size in (7, 3, 3, 7):
            yield
            losses.append(svi.step(double_bits(size)).item())

    losses: list[float] = []
    assert_alike(interpreted, store_pair, script=minibatches)
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-9)


def test_steady_steps_are_the_steps_that_look_around(interpreted):
    def steadily(svi: Any) -> Iterator[None]:
        yield
        yield
        with svi.steady():
            for size in (10, 3, 10):
                yield
                losses.append(svi.step(double_bits(size)).item())

    losses: list[float] = []
    assert_alike(interpreted, store_pair, script=steadily, steps=5, optimizer=lambda *_: adam)
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-9)


def test_a_steady_stretch_looks_around_once_and_the_next_one_again(interpreted, monkeypatch):
    looks: list[None] = []
    changed = Watch.changed
    monkeypatch.setattr(Watch, "changed", lambda watch: looks.append(None) or changed(watch))
    model, guide, args = store_pair()
    svi = pv.SVI(model, guide, sgd, compile=True)
    for _ in range(3):
        svi.step(*args)
    looks.clear()
    for _ in range(2):
        with svi.steady():
            for _ in range(5):
                svi.step(*args)
    assert len(looks) == 2
    svi.step(*args)
    svi.step(*args)
    assert len(looks) == 4


def test_auto_starts_uncompiled_and_then_compiles(interpreted, monkeypatch):
    def count(svi: Any) -> Iterator[None]:
        while True:
            graphs.append(len(interpreted))
            yield

    graphs: list[int] = []
    expected, _ = trained(store_pair, False)
    for worth in (1e-9, 1e9):
        monkeypatch.setattr("pyro_vae.inference.svi.WORTH_COMPILING", worth)
        losses, _ = trained(store_pair, "auto", script=count)
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0.0)
    assert graphs == [0, 0, 0, 1, 1] + [1] * 5


# --- the compiler itself


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda: (*bernoulli_pair(784, 4, (64,)), (bits(64, 784),)), Trace_ELBO),
        (lambda: (TopDownModel(), TopDownGuide(), (bits(),)), TraceMeanField_ELBO),
        (lambda: pyros_tutorial_pair(torch.float32), Trace_ELBO),
    ],
    ids=["flat", "hierarchical", "tutorial"],
)
def test_compiled_by_the_compiler(make, loss):
    (losses, tensors), (expected, others) = (
        trained(make, c, loss=loss, optimizer=lambda *_: adam) for c in (True, False)
    )
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(tensors, others, rtol=1e-4, atol=1e-4)
