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


def overflowing() -> Any:
    """Discrete latents, whose logits are NaN once the square of a parameter overflows."""
    model, _, args = bernoulli_latents()

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.linspace(-1, 1, 27).double().view(9, 3))
        square = slope.square().sum()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=x @ slope + (square - square)).to_event(1))

    return model, guide, args


DRAWING = {"dreams": library_pair, "discrete": bernoulli_latents, "overflow": overflowing}


def drawing(case: str, **options: Any) -> tuple[pv.SVI, tuple[Tensor, ...]]:
    """Pairs that a sampler refuses to run once it is handed NaN."""
    pyro.clear_param_store()
    model, guide, args = DRAWING[case]()
    loss = pv.WakeSleep() if case == "dreams" else pv.ReweightedWakeSleep(2)
    svi = pv.SVI(model, guide, adam, loss, **options)
    svi.setup(*args)
    return svi, args


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("case", "rate"), [("dreams", torch.inf), ("discrete", torch.inf), ("overflow", 1e200)]
)
def test_what_draws_bits_refuses_nan_and_that_is_a_divergence_too(
    case, compiled, rate, interpreted
):
    """Also of parameters that are finite, but make NaN."""
    svi, args = drawing(case, compile=compiled)
    loop = Loop(svi, args, None, batch_size=2, seed=5)
    loop.run_epoch()
    before = values(loop)
    optimizer: Any = svi.optimizer
    optimizer.param_groups[0]["lr"] = rate
    with pytest.raises(pv.DivergedError, match=r"epoch 2, step 2: ") as told:
        loop.run_epoch()
    assert ("was not finite any more" in str(told.value)) == (rate == torch.inf)
    assert "p_in" in str(told.value) or case == "dreams"
    assert bool(interpreted) == compiled
    assert isinstance(told.value.__cause__, pv.DivergedError if rate == torch.inf else RuntimeError)
    assert_restored(loop, before)
    optimizer.param_groups[0]["lr"] = 1e-2
    assert loop.run_epoch()


@pytest.mark.parametrize("case", ["dreams", "discrete"])
def test_a_step_and_a_loss_name_the_parameter_that_is_not_finite(case, interpreted):
    """Compiling is not given up for it, which would be a warning."""
    svi, args = drawing(case, compile=True)
    svi.step(*args)
    name, broken = next(iter(svi.parameters.named.items()))
    good = broken.detach().clone()
    broken.data.fill_(torch.nan)
    for call in (svi.step, svi.evaluate):
        if case == "discrete" or call == svi.step:
            with pytest.raises(pv.DivergedError, match=f"parameter '{name}' is not finite") as told:
                call(*args)
            assert "p_in" in str(told.value)
    broken.data.copy_(good)
    assert svi.step(*args).isfinite()
    assert interpreted


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


def test_an_error_that_does_not_come_again_is_in_the_message_and_the_cause():
    """The step works with the parameters of the start, and in the replay: nothing else tells."""
    svi, args = drawing("dreams")
    guide, left = svi.guide, [RuntimeError("out of memory, for once")]

    def failing(x: Tensor) -> None:
        if left and len(x) == 3:
            raise left.pop()
        guide(x)

    svi.guide = failing
    loop = Loop(svi, (args[0].repeat(2, 1)[:7],), None, batch_size=4, seed=5)
    before = {name: value.detach().clone() for name, value in svi.parameters.named.items()}
    with pytest.raises(pv.DivergedError, match=r"out of memory, for once") as told:
        loop.run_epoch()
    assert str(told.value.__cause__).startswith("out of memory, for once")
    assert all(torch.equal(before[name], value) for name, value in svi.parameters.named.items())


def test_an_error_in_the_middle_of_an_epoch_is_told_and_costs_nothing():
    """Mended, the epoch ends where it would have ended."""
    ends = []
    for few in (0, 3):
        torch.manual_seed(0)
        svi, args = drawing("dreams")
        guide, refused = svi.guide, [few]

        def failing(x: Tensor, guide: Any = guide, refused: list[int] = refused) -> None:
            if len(x) in refused:
                raise RuntimeError("three data are too few")
            guide(x)

        svi.guide = failing
        loop = Loop(svi, (args[0].repeat(2, 1)[:7],), None, batch_size=4, seed=5)
        if few:
            with pytest.raises(RuntimeError, match=r"^three data are too few"):
                loop.run_epoch()
            assert (loop.step, loop.records) == (1, [])
            refused.clear()
        assert loop.run_epoch()
        ends.append({"noise": torch.get_rng_state(), **dict(svi.parameters.named)})
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


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
