"""A run that is taken up again, as if the signals that stopped it had never come."""

import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pyro
import pytest
import torch
from fit_pairs import (
    adam,
    context_pair,
    dropout_pair,
    dynamic,
    fast,
    fit,
    param_pair,
    parameters,
    same,
    state,
    tutorial_pair,
)
from helpers import bernoulli_pair, bits
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

import pyro_vae as pv
from pyro_vae.runs.directory import Run


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Those are for test_pictures."""
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda *run: None)


X = torch.ones(60, 9)


def pieces_case() -> tuple[Any, Any, Any, dict[str, Any]]:
    """Everything at once: fresh bits, dropout, warm-up, a schedule, clipping, validation."""
    options = {
        "optimizer": adam,
        "lr_schedule": lambda optimizer: LambdaLR(optimizer, lambda epoch: 0.9**epoch),
        "kl_weight": pv.warmup(3),
        "max_grad_norm": 5.0,
        "loss": TraceMeanField_ELBO(num_particles=2, vectorize_particles=True),
    }
    return *dropout_pair(), dynamic(), options


def params_case() -> tuple[Any, Any, Any, dict[str, Any]]:
    data = bits(60)
    return *param_pair(), data, {"optimizer": adam, "valid": data[:20], "ema_decay": 0.9}


def tutorial_case() -> tuple[Any, Any, Any, dict[str, Any]]:
    return *tutorial_pair(), bits(60), {}


def arguments_case() -> tuple[Any, Any, Any, dict[str, Any]]:
    def sgd(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=1e-3, momentum=0.9)

    data = bits(60), torch.rand(60, 3)
    plateau = partial(ReduceLROnPlateau, patience=0)
    return *context_pair(), data, {"optimizer": sgd, "lr_schedule": plateau}


def overfit_case() -> tuple[Any, Any, Any, dict[str, Any]]:
    data = bits(40)
    options = {"valid": data[:20], "patience": 3, "optimizer": fast}
    return *bernoulli_pair(hidden_dims=(32,)), data[20:], options


CASES = [pieces_case, params_case, tutorial_case, arguments_case]


def as_in_a_new_process(case: Callable[[], Any], seed: int = 0) -> Any:
    """The case made again: the data and initial parameters as ever, the random state another."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    made = case()
    torch.manual_seed(100 + seed)
    return made


def start(case: Callable[[], Any], out: Path, seed: int = 0, **changes: Any) -> Any:
    """Train a case; the history and the parameters."""
    model, guide, data, options = as_in_a_new_process(case, seed)
    history = fit(model, guide, data, out=out, **{**options, **changes})
    return history, parameters(model, guide)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_bit_for_bit_the_one_that_never_stopped(case, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    history, reached = start(case, whole, epochs=4)
    start(case, cut, epochs=2)
    resumed, reached_again = start(case, cut, seed=1, epochs=4, resume=True)
    assert same(state(whole), state(cut))
    assert same(reached, reached_again)
    assert same(history.records, resumed.records)
    assert history.best_epoch == resumed.best_epoch
    assert same(Run(whole).read_metrics(), Run(cut).read_metrics())


class Stopping(torch.optim.Adam):
    """Adam, but the user presses Ctrl-C in the middle of a step."""

    presses: ClassVar[dict[int, int]] = {5: 1}

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.01)
        self.steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for _ in range(self.presses.get(self.steps, 0)):
            signal.raise_signal(signal.SIGINT)
        return super().step(closure)


@pytest.mark.parametrize("case", CASES[:3])
@pytest.mark.parametrize(
    ("at", "where"),
    [
        (1, "in epoch 1, after step 1 of 3"),
        (3, "after epoch 1"),
        (5, "in epoch 2, after step 2 of 3"),
    ],
)
def test_after_ctrl_c_a_run_goes_on_as_if_nothing_had_been(case, at, where, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    history, reached = start(case, whole, epochs=3, optimizer=adam)
    monkeypatch.setattr(Stopping, "presses", {at: 1})
    told = f"^stopped {where}; saved in {re.escape(str(cut))}. Go on with resume=True .*--resume"
    with pytest.raises(KeyboardInterrupt, match=told):
        start(case, cut, epochs=3, optimizer=Stopping)
    resumed, reached_again = start(case, cut, seed=1, epochs=3, resume=True, optimizer=adam)
    assert same(state(whole), state(cut))
    assert same(reached, reached_again)
    assert same(history.records, resumed.records)


def test_a_run_may_be_stopped_again_and_again(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start(pieces_case, whole, epochs=3)
    monkeypatch.setattr(Stopping, "presses", {2: 1})
    stops = 0
    for number in range(9):
        try:
            start(pieces_case, cut, number, epochs=3, resume=stops > 0, optimizer=Stopping)
        except KeyboardInterrupt:
            stops += 1
        else:
            break
    assert stops == 4  # after steps 2, 4, 6, 8 of 9
    assert same(state(whole), state(cut))


def test_ctrl_c_without_a_run_says_that_nothing_is_saved():
    model, guide = bernoulli_pair()
    with pytest.raises(KeyboardInterrupt, match="nothing is saved without out="):
        fit(model, guide, bits(60), epochs=3, optimizer=Stopping)


def test_a_second_ctrl_c_stops_at_once_and_leaves_the_saved_run_whole(tmp_path, monkeypatch):
    out, whole = tmp_path / "run", tmp_path / "whole"
    monkeypatch.setattr(Stopping, "presses", {5: 2})
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        start(pieces_case, out, epochs=3, optimizer=Stopping)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(state(out)["records"]) == 1
    start(pieces_case, whole, epochs=3)
    start(pieces_case, out, seed=1, epochs=3, resume=True)
    assert same(state(whole), state(out))


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_the_clock_stops_goes_on_as_if_it_never_had(case, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    history, reached = start(case, whole, epochs=3, max_seconds=1e6)
    assert history.stopped == "epochs"
    for number in range(2):  # every call trains for an epoch, however little time it has
        part, _ = start(case, cut, number, epochs=3, resume=number > 0, max_seconds=1e-9)
        assert part.stopped == "time"
        assert len(part.records) == len(state(cut)["records"]) == number + 1
    resumed, reached_again = start(case, cut, 2, epochs=3, resume=True, max_seconds=1e-9)
    assert resumed.stopped == "epochs"
    assert same(state(whole), state(cut))
    assert same(reached, reached_again)
    assert same(history.records, resumed.records)


def test_the_clock_is_that_of_the_call(tmp_path):
    options = {"callbacks": [lambda record: time.sleep(0.1)], "max_seconds": 0.25}
    first, _ = start(params_case, tmp_path / "run", epochs=99, **options)
    again, _ = start(params_case, tmp_path / "run", epochs=99, resume=True, **options)
    assert first.stopped == again.stopped == "time"
    assert 1 <= len(first.records) <= 3
    assert 1 <= len(again.records) - len(first.records) <= 3


def test_a_run_that_was_killed_before_its_first_epoch_was_saved_begins_anew(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    history, reached = start(pieces_case, whole, epochs=2)

    def killed(*args: Any, **arrays: Any) -> None:
        raise SystemExit(9)

    for method, lines in (("write_arrays", 0), ("write_metrics", 0), ("save_checkpoint", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(Run, method, killed)
            with pytest.raises(SystemExit):
                start(pieces_case, cut, epochs=2, resume=method != "write_arrays")
        assert len(Run(cut).read_metrics()[0]) == lines
        assert not (cut / "checkpoint.pt").exists()
    resumed, reached_again = start(pieces_case, cut, seed=1, epochs=2, resume=True)
    assert same(state(whole), state(cut))
    assert same([reached, history.records], [reached_again, resumed.records])
    assert (cut / "examples.npz").read_bytes() == (whole / "examples.npz").read_bytes()


def test_a_run_that_has_lost_its_checkpoint_does_not_begin_anew(tmp_path):
    out = tmp_path / "run"
    start(params_case, out, epochs=2)
    (out / "checkpoint.pt").unlink()
    metrics = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt does not exist"):
        start(params_case, out, epochs=3, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == metrics


def test_early_stopping_counts_on_in_a_resumed_run(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    history, reached = start(overfit_case, whole, epochs=300)
    assert history.stopped == "patience"
    assert history.best_epoch is not None
    start(overfit_case, cut, epochs=history.best_epoch + 1)
    resumed, reached_again = start(overfit_case, cut, seed=1, epochs=300, resume=True)
    assert (resumed.stopped, resumed.best_epoch) == ("patience", history.best_epoch)
    assert same(history.records, resumed.records)
    assert same(reached, reached_again)
    assert same(state(whole), state(cut))


@pytest.mark.parametrize("case", [*CASES, overfit_case])
def test_a_finished_run_is_not_changed_by_resuming_it(case, tmp_path):
    out = tmp_path / "run"
    epochs = 300 if case is overfit_case else 3
    history, reached = start(case, out, epochs=epochs)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    again, reached_again = start(case, out, seed=1, epochs=epochs, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    assert same(vars(history), vars(again))
    assert same(reached, reached_again)


def test_the_run_says_how_it_was_made(tmp_path):
    out = tmp_path / "run"
    history, _ = start(pieces_case, out, epochs=2, notes={"why": ["a test"]})
    config = Run(out).config
    assert history.run == out
    assert config["notes"] == {"why": ["a test"]}
    assert config["data"]["steps"] == [["binarize_dynamic", {"seed": 0}]]
    assert config["options"]["epochs"] == 2
    assert config["options"]["loss"] == "TraceMeanField_ELBO(num_particles=2)"
    assert config["options"]["lr_schedule"] == "LambdaLR"
    assert config["options"]["kl_weight"] == {"first": 1 / 3, "last": 2 / 3}
    pair = dropout_pair()
    assert config["parameters"] == sum(p.numel() for half in pair for p in half.parameters())
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


def test_resuming_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"^resume: say with out="):
        fit(*bernoulli_pair(), X, resume=True)
    with pytest.raises(FileNotFoundError, match=r"is no run directory: it has no config\.json"):
        fit(*bernoulli_pair(), X, resume=True, out=tmp_path)
