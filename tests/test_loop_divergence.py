"""A loop that diverges says where, and goes back to its last good state."""

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import bernoulli_latents, double_bits, library_pair, store_pair
from loop_runs import (
    BATCH,
    NUM_TRAIN,
    adam,
    data,
    library,
    loop_of,
    run_epochs,
    sgd,
    tutorial,
    values,
    without_seconds,
)
from torch import Tensor

import pyro_vae as pv
from pyro_vae.inference.loop import Loop


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


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", ["dreams", "discrete"])
def test_what_draws_bits_refuses_nan_and_that_is_a_divergence_too(case, compiled):
    """Its own error would be a RuntimeError of the sampler, without a word of the parameters."""
    pyro.clear_param_store()
    model, guide, args = library_pair() if case == "dreams" else bernoulli_latents()
    loss = pv.WakeSleep() if case == "dreams" else pv.ReweightedWakeSleep(2)
    svi = pv.SVI(model, guide, adam, loss, compile=compiled)
    svi.setup(*args)
    loop = Loop(svi, args, None, batch_size=2, seed=5)
    loop.run_epoch()
    before = values(loop)
    optimizer: Any = svi.optimizer
    optimizer.param_groups[0]["lr"] = torch.inf
    with pytest.raises(pv.DivergedError, match=r"epoch 2, step 2: .*parameter '.*' was not finite"):
        loop.run_epoch()
    assert_restored(loop, before)
    optimizer.param_groups[0]["lr"] = 1e-2
    assert loop.run_epoch()

    name, broken = next(iter(svi.parameters.named.items()))
    broken.data.fill_(torch.nan)
    for call in (svi.step, svi.evaluate):
        if case == "discrete" or call == svi.step:
            with pytest.raises(pv.DivergedError, match=f"parameter '{name}' is not finite") as told:
                call(*args)
            assert "p_in" in str(told.value)


def test_an_error_of_the_program_itself_stays_what_it_is():
    model, guide, args = library_pair()

    def failing(x: Tensor) -> None:
        if len(x) == 3:
            raise RuntimeError("three data are too few")
        model(x)

    svi = pv.SVI(failing, guide, adam)
    svi.step(*args)
    for call in (svi.step, svi.evaluate):
        with pytest.raises(RuntimeError, match=r"^three data are too few"):
            call(args[0][:3])


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
