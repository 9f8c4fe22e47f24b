"""Epochs: every datum, the right sums, resumption bit for bit, and a way back from NaN."""

import copy
import io
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from helpers import TutorialPair, bernoulli_pair, double_bits, leaves, store_pair
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

import pyro_vae as pv
from pyro_vae.inference.loop import Loop

optim: Any = pyro.optim

NUM_TRAIN, BATCH = 23, 10  # 10 + 10 + 3


def library() -> tuple[Any, Any]:
    return bernoulli_pair()


def tutorial() -> tuple[Any, Any]:
    pair = TutorialPair()
    return pair.model, pair.guide


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def sgd(rate: float, **options: Any) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, **options)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    train, valid = (torch.rand(n, 9, generator=generator).round() for n in (NUM_TRAIN, 7))
    return train, valid


def loop_of(
    make: Any = library,
    optimizer: Any = adam,
    loss: Any = None,
    schedule: Any = None,
    **options: Any,
) -> Loop:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide = make()
    train, valid = data()
    svi = pv.SVI(model, guide, optimizer, loss=loss)
    svi.setup(train[:BATCH])
    scheduler = None if schedule is None else schedule(svi.optimizer)
    pyro.set_rng_seed(1)
    options = {"batch_size": BATCH, "seed": 5} | options
    return Loop(svi, (train,), (valid,), scheduler=scheduler, **options)


def values(loop: Loop) -> dict[str, Tensor]:
    found = leaves(loop.svi.model, loop.svi.guide)
    return {name: leaf.detach().clone() for name, leaf in found.items()}


def without_seconds(loop: Loop) -> list[str]:
    """The records to the last digit; as text, in which NaN equals NaN."""
    return [repr({k: v for k, v in r.items() if k != "seconds"}) for r in loop.records]


def run_epochs(loop: Loop, epochs: int) -> None:
    for _ in range(epochs):
        loop.run_epoch()


def written(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a run directory keeps it: nothing is executed when it is read."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- the KL weight's schedule


@pytest.mark.parametrize("epochs", [1, 3, 50])
def test_warmup_is_linear_from_one_over_epochs_to_one(epochs):
    weight = pv.warmup(epochs)
    expected = [e / epochs for e in range(1, epochs + 1)]
    assert [weight(e) for e in range(1, epochs + 1)] == pytest.approx(expected)
    assert weight(10 * epochs) == 1.0


@pytest.mark.parametrize("epochs", [0, -3])
def test_a_warmup_of_no_epochs_is_refused(epochs):
    with pytest.raises(ValueError, match="at least one epoch"):
        pv.warmup(epochs)


def test_the_weight_of_the_epoch_is_applied_and_the_bound_is_logged_without_it():
    loop = loop_of(weight=pv.warmup(4), optimizer=sgd(0.0))
    for beta in (0.25, 0.5, 0.75, 1.0, 1.0):
        loop.run_epoch()
        record = loop.records[-1]
        assert record["kl_weight"] == beta
        assert record["loss"] == pytest.approx(record["distortion"] + beta * record["rate"])
        assert record["elbo"] == pytest.approx(-record["distortion"] - record["rate"])


# --- what an epoch is


def test_every_epoch_sees_every_datum_once_and_each_in_another_order():
    train = torch.arange(NUM_TRAIN, dtype=torch.float32).unsqueeze(-1)
    seen: list[list[int]] = [[]]

    def model(x: Tensor) -> None:
        weight = pyro.param("weight", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(weight, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        seen[-1].extend(x[:, 0].int().tolist())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    svi = pv.SVI(model, guide, adam)
    svi.setup(train[:2])
    loop = Loop(svi, (train,), None, batch_size=BATCH, seed=5)
    for _ in range(3):
        seen.append([])
        loop.run_epoch()
    orders = seen[1:]
    assert all(sorted(order) == list(range(NUM_TRAIN)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert loop.steps_per_epoch == 3
    assert loop.epoch == 3


def test_the_record_is_the_mean_over_all_data_and_the_smaller_last_minibatch_counts():
    """With a learning rate of zero, and a rate that is no estimate, the sums are known."""
    loop = loop_of(optimizer=sgd(0.0), loss=TraceMeanField_ELBO())
    handed: list[float] = []
    loop.run_epoch(lambda loss: bool(handed.append(loss.item())))
    guide: Any = loop.svi.guide
    q = guide.encoder(data()[0])
    rate = 0.5 * (q.mean**2 + q.variance - 1 - q.variance.log()).sum() / NUM_TRAIN
    record = loop.records[0]
    assert record["rate"] == pytest.approx(rate.item(), rel=1e-5)
    expected = (10 * handed[0] + 10 * handed[1] + 3 * handed[2]) / 23
    assert record["loss"] == pytest.approx(expected)


def test_a_loss_per_datum_is_handed_over_after_each_step():
    handed: list[Tensor] = []
    loop_of().run_epoch(lambda loss: bool(handed.append(loss)))
    assert len(handed) == 3
    assert all(loss.shape == () and 0 < loss < 20 and not loss.requires_grad for loss in handed)


def test_sums_are_float64():
    """Four large losses: a float32 sum of them would lose its last digits."""
    big = 2.0**24

    def model(x: Tensor) -> None:
        pyro.factor("big", -(big / 10) * torch.ones(()) * len(x) - pyro.param("p", torch.zeros(())))

    svi = pv.SVI(model, lambda x: None, sgd(0.0))
    train = torch.zeros(40, 1)
    svi.setup(train[:10])
    loop = Loop(svi, (train,), None, batch_size=10, seed=0)
    each = float(torch.tensor(big / 10) * 10)
    loop.run_epoch()
    assert loop._sums.dtype == torch.float64
    assert loop.records[0]["loss"] == 4 * each / 40


def test_the_validation_bound_has_the_same_noise_every_epoch_and_leaves_the_stream_alone():
    loop = loop_of(optimizer=sgd(0.0))
    run_epochs(loop, 2)
    first, second = loop.records
    assert first["valid_elbo"] == second["valid_elbo"]
    assert first["loss"] != second["loss"]
    without = loop_of(optimizer=sgd(0.0))
    without.valid = None
    run_epochs(without, 2)
    assert [r["loss"] for r in without.records] == [first["loss"], second["loss"]]
    assert math.isnan(without.records[0]["valid_elbo"])


def test_the_validation_bound_is_pyros_and_ignores_the_weight():
    loop = loop_of(weight=lambda epoch: 0.1)
    loop.run_epoch()
    pyro.set_rng_seed(0)
    model, guide, valid = loop.svi.model, loop.svi.guide, data()[1]
    draws = torch.tensor([-Trace_ELBO().loss(model, guide, valid) / 7 for _ in range(300)])
    assert abs(loop.records[0]["valid_elbo"] - draws.mean()) < 5 * draws.std()
    assert draws.std() < 1


def test_data_are_refreshed_in_every_minibatch():
    calls: list[Tensor] = []

    def refresh(x: Tensor) -> Tensor:
        calls.append(torch.rand_like(x).round())
        return calls[-1]

    loop_of(refresh=refresh).run_epoch()
    assert [len(c) for c in calls] == [10, 10, 3]


# --- resumption

OPTIMIZERS: dict[str, Any] = {
    "adam": lambda: adam,
    "pyro": lambda: optim.ClippedAdam({"lr": 1e-2}),
    "momentum": lambda: sgd(1e-3, momentum=0.9),
}
SCHEDULES: dict[str, Any] = {
    "constant": None,
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=5),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
}
COMBINATIONS = [
    ("adam", "constant"),
    ("adam", "cosine"),
    ("adam", "plateau"),
    ("pyro", "constant"),
    ("momentum", "cosine"),
]


@pytest.mark.parametrize("stop", [(0, 1), (1, 0), (1, 2), (3, 0)], ids=str)
@pytest.mark.parametrize(("optimizer", "schedule"), COMBINATIONS)
@pytest.mark.parametrize("make", [library, tutorial])
def test_a_resumed_run_is_the_run_that_never_stopped(make, optimizer, schedule, stop):
    def refresh(x: Tensor) -> Tensor:  # dynamic binarization: noise in the data
        return torch.rand_like(x).lt(0.2 + 0.6 * x).to(x.dtype)

    def fresh() -> Loop:
        return loop_of(
            make,
            OPTIMIZERS[optimizer](),
            schedule=SCHEDULES[schedule],
            refresh=refresh,
            weight=pv.warmup(3),
        )

    straight = fresh()
    run_epochs(straight, 4)
    expected, records = values(straight), without_seconds(straight)

    first = fresh()
    epochs, steps = stop
    run_epochs(first, epochs)
    if steps:
        assert not first.run_epoch(lambda loss: first.step == steps)
    state = written(first.state_dict())

    second = fresh()
    torch.manual_seed(99)
    second.load_state_dict(state)
    assert (second.epoch, second.step) == stop
    while second.epoch < 4:
        assert second.run_epoch()
    assert without_seconds(second) == records
    for name, value in values(second).items():
        assert torch.equal(value, expected[name]), name
    assert second.best is not None
    assert straight.best is not None
    assert second.best["epoch"] == straight.best["epoch"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_going_back_in_the_same_process_goes_the_same_way_again(optimizer):
    loop = loop_of(optimizer=OPTIMIZERS[optimizer]())
    loop.run_epoch()
    state = copy.deepcopy(loop.state_dict())
    loop.run_epoch()
    expected, records = values(loop), without_seconds(loop)
    loop.load_state_dict(state)
    loop.run_epoch()
    assert without_seconds(loop) == records
    assert all(torch.equal(value, expected[name]) for name, value in values(loop).items())


def test_a_stop_asked_for_at_the_last_step_lets_the_epoch_end():
    loop = loop_of()
    assert loop.run_epoch(lambda loss: loop.step == 3)
    assert (loop.epoch, loop.step) == (1, 0)


# --- schedules and the best parameters


def test_the_cosine_schedule_is_torchs():
    loop = loop_of(schedule=SCHEDULES["cosine"])
    run_epochs(loop, 5)
    rates = [record["learning_rate"] for record in loop.records]
    assert rates == pytest.approx([0.5e-2 * (1 + math.cos(math.pi * e / 5)) for e in range(5)])


def test_the_plateau_schedule_watches_the_validation_bound():
    loop = loop_of(optimizer=sgd(1e-12), schedule=SCHEDULES["plateau"])
    run_epochs(loop, 4)
    rates = [record["learning_rate"] for record in loop.records]
    # Nothing gets better: from the second epoch on the rate is halved after each.
    assert rates == pytest.approx([1e-12, 1e-12, 0.5e-12, 0.25e-12])


def test_the_best_parameters_are_put_back():
    loop = loop_of(optimizer=sgd(1e-2))
    loop.run_epoch()
    best, bound = values(loop), loop.records[0]["valid_elbo"]
    with torch.no_grad():
        for leaf in leaves(loop.svi.model, loop.svi.guide).values():
            leaf.mul_(30.0)
    loop.run_epoch()
    assert loop.records[1]["valid_elbo"] < bound
    assert loop.best is not None
    assert (loop.best["epoch"], loop.best["valid_elbo"]) == (1, bound)
    loop.restore_best()
    assert all(torch.equal(value, best[name]) for name, value in values(loop).items())


def test_without_validation_there_is_no_best():
    loop = loop_of()
    loop.valid = None
    loop.run_epoch()
    before = values(loop)
    assert loop.best is None
    loop.restore_best()
    assert all(torch.equal(value, before[name]) for name, value in values(loop).items())


def test_a_loss_that_hides_its_parts_is_logged_as_a_loss():
    loop = loop_of(loss=RenyiELBO(num_particles=2))
    loop.run_epoch()
    record = loop.records[0]
    assert math.isnan(record["elbo"])
    assert 0 < record["loss"] < 20
    assert -20 < record["valid_elbo"] < 0


# --- divergence


def assert_restored(loop: Loop, before: dict[str, Tensor]) -> None:
    assert loop.step == 0
    for name, value in values(loop).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("make", [library, tutorial])
def test_a_learning_rate_of_a_million_is_told_from_a_result(make):
    loop = loop_of(make, sgd(1e6))
    before = values(loop)
    message = r"in epoch 1, step [23]: .*site '(z|latent|x|obs)'"
    with pytest.raises(pv.DivergedError, match=message):
        run_epochs(loop, 3)
    assert_restored(loop, before)
    assert loop.records == []


def breaking() -> tuple[Any, Any]:
    """A foreign pair whose model takes the logarithm of a negative number at a huge datum."""
    model, guide, _ = store_pair()

    def fragile(x: Tensor) -> None:
        model(x)
        level = torch.tensor(1.0 if x.sum() < 1e6 else -1.0)
        with pyro.plate("more data", len(x)):
            pyro.sample("y", dist.Normal(level.log(), 1.0), obs=torch.zeros(len(x)))

    return fragile, guide


@pytest.mark.parametrize("bad", [0, 13, 22])
def test_a_bad_datum_in_a_later_epoch_is_found_and_the_epoch_undone(bad):
    model, guide = breaking()
    train = double_bits(NUM_TRAIN)
    svi = pv.SVI(model, guide, adam)
    svi.setup(train[:BATCH])
    loop = Loop(svi, (train,), (train.clone(),), batch_size=BATCH, seed=5)
    loop.run_epoch()
    before, records, noise = values(loop), without_seconds(loop), torch.get_rng_state()
    optimizer: Any = svi.optimizer
    state = copy.deepcopy(optimizer.state_dict()["state"])
    train[bad] = 1e7
    with pytest.raises(pv.DivergedError, match=r"in epoch 2, step \d: site '(x|y|z)'") as caught:
        loop.run_epoch()
    assert "back at the end of epoch 1" in str(caught.value)
    assert_restored(loop, before)
    assert without_seconds(loop) == records
    assert torch.equal(torch.get_rng_state(), noise)
    after = optimizer.state_dict()["state"]
    for key, slots in state.items():
        assert all(torch.equal(slots[k], after[key][k]) for k in slots)
    train[bad] = 1.0  # mended, training goes on
    assert loop.run_epoch()


def test_an_infinite_last_step_of_an_epoch_is_undone_before_anyone_saves_it():
    """One step an epoch: no later loss of that epoch shows what the step has done."""
    loop = loop_of(batch_size=NUM_TRAIN, optimizer=sgd(1e38))
    before = values(loop)
    with pytest.raises(pv.DivergedError):
        run_epochs(loop, 3)
    assert loop.best is None or math.isfinite(loop.best["valid_elbo"])
    assert_restored(loop, before)


def test_huge_parameters_whose_loss_is_not_finite_are_not_the_last_good_ones():
    """After the only step of epoch 1 they are finite, but no loss is."""
    loop = loop_of(tutorial, batch_size=NUM_TRAIN, optimizer=sgd(1e6))
    with pytest.raises(pv.DivergedError):
        run_epochs(loop, 3)
    assert loop.svi.evaluate_loss(data()[0]).isfinite()


def test_a_state_of_another_pair_is_refused():
    state = written(loop_of().state_dict())
    with pytest.raises(ValueError, match="the checkpoint is of another pair"):
        loop_of(tutorial).load_state_dict(state)
