"""Epochs: every datum, the right sums, schedules, and the best parameters."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import leaves
from loop_runs import BATCH, NUM_TRAIN, SCHEDULES, adam, data, loop_of, run_epochs, sgd, values
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.context import at_rest, seeded
from pyro_vae.inference.loop import Loop

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
    loop.run_epoch(lambda loss, size: bool(handed.append(loss.item() / size)))
    guide: Any = loop.svi.guide
    q = guide.encoder(data()[0])
    rate = 0.5 * (q.mean**2 + q.variance - 1 - q.variance.log()).sum() / NUM_TRAIN
    record = loop.records[0]
    assert record["rate"] == pytest.approx(rate.item(), rel=1e-5)
    expected = (10 * handed[0] + 10 * handed[1] + 3 * handed[2]) / 23
    assert record["loss"] == pytest.approx(expected)


def test_the_loss_and_the_number_of_data_are_handed_over_after_each_step():
    handed: list[tuple[Tensor, int]] = []
    loop_of().run_epoch(lambda *given: bool(handed.append(given)))
    assert [size for _, size in handed] == [10, 10, 3]
    for loss, size in handed:
        assert loss.shape == ()
        assert 0 < loss / size < 20
        assert not loss.requires_grad


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


def test_the_best_parameters_of_an_objective_of_weights_are_those_of_its_own_bound():
    """A wide guide lowers the ELBO and raises the importance-weighted bound, so the two differ."""
    loss = pv.ImportanceWeighted(20)
    loop = loop_of(loss=loss, optimizer=sgd(1e-12))
    assert loop.valid is not None
    assert isinstance(loop.svi.guide, nn.Module)
    found = []
    for _ in range(8):
        with torch.no_grad():
            last = list(loop.svi.guide.parameters())[-1]
            last[len(last) // 2 :] += 0.3  # the biases of the scales
        loop.run_epoch()
        with at_rest(loop.svi.model, loop.svi.guide), seeded(loop.seed, "valid"):
            terms = loop.svi.evaluate(*loop.valid)
        found.append((-terms.loss.item(), loop.records[-1]["valid_elbo"]))
    bounds, elbos = zip(*found, strict=True)
    assert loop.best is not None
    assert loop.best["epoch"] == 1 + bounds.index(max(bounds)) != 1 + elbos.index(max(elbos))
    assert loop.best["valid_elbo"] == elbos[bounds.index(max(bounds))]


def test_the_best_parameters_under_free_bits_are_those_of_the_elbo():
    """Its loss counts a floor that is no rate: minus the loss is not the tighter bound."""
    loop = loop_of(loss=pv.FreeBits(1000.0), optimizer=sgd(1e-12))
    loop.run_epoch()
    assert loop.best is not None
    assert loop.best["bound"] == loop.records[0]["valid_elbo"]


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
