"""A loop that is stopped and taken up again goes the same way, bit for bit."""

import copy
from typing import Any

import pyro
import pyro.optim
import pytest
import torch
from loop_runs import (
    SCHEDULES,
    adam,
    library,
    loop_of,
    run_epochs,
    sgd,
    tutorial,
    values,
    without_seconds,
    written,
)
from torch import Tensor

import pyro_vae as pv
from pyro_vae.inference.loop import Loop

optim: Any = pyro.optim


OPTIMIZERS: dict[str, Any] = {
    "adam": lambda: adam,
    "pyro": lambda: optim.ClippedAdam({"lr": 1e-2}),
    "momentum": lambda: sgd(1e-3, momentum=0.9),
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
        assert not first.run_epoch(lambda loss, size: first.step == steps)
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
    assert loop.run_epoch(lambda loss, size: loop.step == 3)
    assert (loop.epoch, loop.step) == (1, 0)


def test_a_state_of_another_pair_is_refused():
    state = written(loop_of().state_dict())
    with pytest.raises(ValueError, match="the checkpoint is of another pair"):
        loop_of(tutorial).load_state_dict(state)
