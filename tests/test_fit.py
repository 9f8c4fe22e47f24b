"""Fitting: any pair, any data, and a run that is taken up again as if it had never stopped.

What is stopped here is stopped by real signals, and disks are filled by a real limit on the size
of files. Pictures are left to test_pictures.
"""

import copy
import json
import random
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import LinearGaussian, TutorialPair, bernoulli_pair, bits
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

import pyro_vae as pv
from pyro_vae.context import at_rest, seeded
from pyro_vae.data import Split
from pyro_vae.runs.directory import Run

COLUMNS = {
    "epoch",
    "seconds",
    "loss",
    "elbo",
    "distortion",
    "rate",
    "kl_weight",
    "learning_rate",
    "valid_elbo",
}

fit = partial(pv.fit, batch_size=20, progress=False)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda *run: None)


def adam(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


def fast(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.03)


def param_pair(dim: int = 9) -> tuple[Callable[..., None], Callable[..., None]]:
    """A foreign pair whose every parameter is a ``pyro.param``, one of them constrained."""
    start = torch.randn(dim, 2) / 3

    def model(x: Tensor) -> None:
        weight = pyro.param("weight", lambda: start.clone())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ weight.T).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        weight = pyro.param("back", lambda: start.T.clone())
        scale = pyro.param("scale", lambda: torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weight.T, scale).to_event(1))

    return model, guide


class PlainModel(nn.Module):
    """A program that is an ``nn.Module`` and no ``PyroModule``."""

    def __init__(self, dim: int = 9) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, dim))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.network(z)).to_event(1), obs=x)


class PlainGuide(nn.Module):
    def __init__(self, dim: int = 9) -> None:
        super().__init__()
        self.network = nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> None:
        loc, scale = self.network(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1))


def tutorial_pair() -> tuple[Any, Any]:
    foreign = TutorialPair()
    return foreign.model, foreign.guide


def context_pair(dim: int = 9, context: int = 3) -> tuple[pv.Model, pv.Guide]:
    """p(x | z, y) and q(z | x, y)."""
    make = partial(pv.networks.mlp, hidden_dims=(8,))
    encoder = pv.Conditional(make(dim + context, (2, 2)), pv.families.normal)
    likelihood = pv.Conditional(make(2 + context, (1, dim)), pv.families.bernoulli)
    return pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)


def dropout_pair(dim: int = 9) -> tuple[pv.Model, pv.Guide]:
    def activation() -> nn.Module:
        return nn.Sequential(nn.Softplus(), nn.Dropout(0.3))

    make = partial(pv.networks.mlp, hidden_dims=(8,), activation=activation)
    encoder = pv.Conditional(make(dim, (2, 2)), pv.families.normal)
    likelihood = pv.Conditional(make(2, (1, dim)), pv.families.bernoulli)
    return pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)


PAIRS = {
    "pieces": bernoulli_pair,
    "tutorial": tutorial_pair,
    "params": param_pair,
    "plain modules": lambda: (PlainModel(), PlainGuide()),
    "dropout": dropout_pair,
}


def dynamic(size: int = 60, dim: int = 9) -> Split:
    """Grey values that become other bits in every minibatch."""
    grey = torch.rand(3, size, dim)
    return pv.load_data((grey[0], grey[1, :30], grey[2, :30])).binarize_dynamic()


def parameters(model: Any, guide: Any) -> dict[str, Tensor]:
    """All parameters, wherever they live; copies."""
    found: dict[str, Tensor] = {}
    for role, program in (("model", model), ("guide", guide)):
        if isinstance(program, nn.Module):
            found |= {f"{role}.{name}": p for name, p in program.named_parameters()}
    own = {name.partition(".")[2] for name in found}  # Pyro's modules stand in the store too
    stored = pyro.get_param_store().named_parameters()
    found |= {name: p for name, p in stored if name.replace("$$$", ".") not in own}
    return {name: p.detach().clone() for name, p in found.items()}


def same(a: Any, b: Any) -> bool:
    """Equality to the last bit, also of NaN, of nested values; times of day aside."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(-1), b.view(-1))
    if isinstance(a, dict):
        a, b = ({k: v for k, v in d.items() if k != "seconds"} for d in (a, b))
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (a == b or (a != a and b != b))


# --- training ------------------------------------------------------------------------------------


def test_a_guide_that_can_be_exact_is_trained_to_the_exact_log_evidence():
    truth = LinearGaussian.random(latent_dim=1)
    train, valid = truth.sample(100), truth.sample(50)
    encoder = pv.Conditional(pv.networks.mlp(5, (2, 1), hidden_dims=()), pv.families.normal)
    guide = pv.Guide(encoder).double()
    history = fit(
        truth.model,
        guide,
        train,
        valid=valid,
        epochs=120,
        batch_size=50,
        optimizer=lambda params: torch.optim.Adam(params, lr=0.1),
        lr_schedule=lambda optimizer: LambdaLR(optimizer, lambda epoch: 0.97**epoch),
    )
    exact = truth.log_evidence(valid).mean().item()
    # One draw a datum: the bound of a nearly exact guide has a standard error of about 0.01.
    assert history["valid_elbo"][-1] == pytest.approx(exact, abs=0.04)
    assert history["valid_elbo"][0] < exact - 0.4
    posterior = pv.encode(guide, valid)
    torch.testing.assert_close(posterior.mean, truth.posterior(valid).mean, atol=0.15, rtol=0)


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_every_parameter_of_any_pair_moves(make, loss):
    model, guide = make()
    given: list[Tensor] = []
    before: list[Tensor] = []

    def optimizer(params):
        given.extend(params)
        before.extend(p.detach().clone() for p in params)
        return adam(params)

    history = fit(model, guide, bits(60), epochs=1, optimizer=optimizer, loss=loss())
    held = parameters(model, guide).values()
    assert sum(p.numel() for p in given) == sum(p.numel() for p in held) > 0
    assert not any(torch.equal(a, b) for a, b in zip(before, given, strict=True))
    assert np.isfinite(history["elbo"]).all()


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_a_loss_of_the_users_is_minimised_and_its_parts_are_unknown(make):
    model, guide = make()

    def loss(model, guide, x):
        return Trace_ELBO().differentiable_loss(model, guide, x)

    x = torch.ones(60, 9)
    history = fit(model, guide, x, valid=x, epochs=5, loss=loss, optimizer=adam)
    assert history["loss"][-1] < history["loss"][0] - 0.2
    assert np.isnan(history["elbo"]).all()
    assert np.isfinite(history["loss"]).all()
    assert np.isfinite(history["valid_elbo"]).all()


def test_the_history_has_a_column_for_everything_that_is_known():
    history = fit(*bernoulli_pair(), bits(60), valid=bits(20), epochs=3, kl_weight=0.5)
    assert all(set(record) == COLUMNS for record in history.records)
    assert history["epoch"] == [1, 2, 3]
    assert history["seconds"] == sorted(history["seconds"])
    assert history["kl_weight"] == [0.5] * 3
    assert history["learning_rate"] == [1e-3] * 3
    assert history.stopped == "epochs"
    assert history.run is None
    parts = {key: np.array(history[key]) for key in COLUMNS}
    np.testing.assert_allclose(parts["elbo"], -(parts["distortion"] + parts["rate"]), rtol=1e-12)
    np.testing.assert_allclose(parts["loss"], parts["distortion"] + 0.5 * parts["rate"], rtol=1e-6)


def test_without_validation_data_the_last_parameters_stay():
    seen = []
    model, guide = bernoulli_pair()
    watch = [lambda record: seen.append(parameters(model, guide))]
    history = fit(model, guide, bits(60), epochs=2, callbacks=watch)
    assert history.best_epoch is None
    assert np.isnan(history["valid_elbo"]).all()
    assert same(parameters(model, guide), seen[-1])


def test_the_kl_weight_may_be_a_schedule():
    history = fit(*bernoulli_pair(), bits(60), epochs=4, kl_weight=pv.warmup(3))
    assert history["kl_weight"] == [1 / 3, 2 / 3, 1.0, 1.0]


def test_the_learning_rate_follows_its_schedule_once_an_epoch():
    history = fit(
        *bernoulli_pair(),
        bits(60),
        epochs=3,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.01),
        lr_schedule=lambda optimizer: LambdaLR(optimizer, lambda epoch: 0.5**epoch),
    )
    assert history["learning_rate"] == pytest.approx([0.01, 0.005, 0.0025])


@pytest.mark.parametrize("valid", [None, torch.ones(10, 9)])
def test_a_plateau_is_one_of_the_validation_bound_else_of_the_loss(valid):
    def constant(model, guide, x):  # never better, so that every epoch is a plateau
        return 0 * Trace_ELBO().differentiable_loss(model, guide, x)

    plateau = partial(ReduceLROnPlateau, patience=0, factor=0.1)
    options: dict[str, Any] = {"epochs": 4, "lr_schedule": plateau, "valid": valid}
    flat = fit(*bernoulli_pair(), torch.ones(60, 9), loss=constant, **options)
    assert flat["learning_rate"][-1] < 1e-4
    better = fit(*bernoulli_pair(), torch.ones(60, 9), optimizer=adam, **options)
    assert better["learning_rate"] == [0.01] * 4


def test_the_norm_of_a_large_gradient_is_clipped():
    model, guide = bernoulli_pair()
    before = parameters(model, guide)
    fit(
        model,
        guide,
        bits(60),
        epochs=1,
        batch_size=60,
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        max_grad_norm=0.25,
    )
    after = parameters(model, guide)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).norm()
    assert moved.item() == pytest.approx(0.25, rel=1e-4)


def test_a_callback_sees_every_record_and_stops_by_returning_true():
    seen = []

    def callback(record):
        seen.append(record["epoch"])
        return record["epoch"] == 3

    history = fit(*bernoulli_pair(), bits(60), epochs=9, callbacks=[lambda record: 1, callback])
    assert seen == history["epoch"] == [1, 2, 3]
    assert history.stopped == "callback"


def test_an_epoch_visits_every_row_once_in_a_new_order_with_its_partners():
    numbers = torch.arange(50.0)
    seen: list[list[tuple[float, float]]] = [[]]
    likelihood = pv.Conditional(pv.networks.mlp(3, (1, 9)), pv.families.fixed_normal)
    model = pv.Model(pv.priors.StandardNormal(2), likelihood)
    guide = context_pair(dim=9, context=1)[1]

    def watched(x, y):
        if torch.is_grad_enabled():
            seen[-1] += list(zip(x[:, 0].tolist(), y[:, 0].tolist(), strict=True))
        return model(x, y)

    x = numbers[:, None].repeat(1, 9)
    watch = [lambda record: seen.append([])]
    fit(watched, guide, (x, numbers[:, None] + 100), epochs=3, callbacks=watch)
    epochs = seen[:3]
    expected = [(i, i + 100) for i in numbers.tolist()]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_pair_of_two_arguments_is_validated_on_both():
    train, valid = (bits(60), torch.rand(60, 3)), (bits(20), torch.rand(20, 3))
    history = fit(*context_pair(), train, valid=valid, epochs=2)
    assert np.isfinite(history["valid_elbo"]).all()
    assert history.best_epoch in (1, 2)


def test_dynamic_binarization_draws_other_bits_in_every_epoch():
    one = torch.full((1, 400), 0.5)
    data = pv.load_data((one, one, one)).binarize_dynamic()
    seen = []
    model, guide = bernoulli_pair(400)

    def watched(x):
        if torch.is_grad_enabled():
            seen.append(x)
        return model(x)

    fit(watched, guide, data, epochs=3, batch_size=1)
    assert len(seen) == 3
    assert all(set(x.unique().tolist()) == {0.0, 1.0} for x in seen)
    assert not seen[0].equal(seen[1])
    assert not seen[1].equal(seen[2])
    assert torch.cat(seen).mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 1200**0.5)


def overfit(model, guide, train, valid, **options: Any) -> pv.History:
    settings = {"epochs": 300, "patience": 3, "batch_size": 20, "optimizer": fast, **options}
    return fit(model, guide, train, valid=valid, **settings)


def test_early_stopping_puts_the_best_parameters_back():
    model, guide = bernoulli_pair(hidden_dims=(32,))
    train, valid = bits(20), bits(20)
    seen = []
    watch = [lambda record: seen.append(parameters(model, guide))]
    history = overfit(model, guide, train, valid, callbacks=watch)
    bounds = history["valid_elbo"]
    assert history.stopped == "patience"
    best = int(np.argmax(bounds))
    assert history.best_epoch == best + 1 == len(bounds) - 3
    assert same(parameters(model, guide), seen[best])
    svi = pv.SVI(model, guide, fast)
    svi.setup(valid)
    with at_rest(model, guide), seeded(0, "valid"):
        terms = svi.evaluate(valid)
    assert -(terms.distortion + terms.rate).item() / 20 == max(bounds)


def test_patience_begins_when_the_kl_weight_has_reached_its_end():
    pair, train, valid = bernoulli_pair(hidden_dims=(32,)), bits(20), bits(20)
    history = overfit(*pair, train, valid, patience=1, kl_weight=pv.warmup(40))
    assert history.stopped == "patience"
    assert len(history.records) >= 40
    # There was no gain at some epoch of the warm-up, and training went on.
    assert (np.diff(history["valid_elbo"][:39]) < 0).any()


def random_states() -> tuple[Any, ...]:
    numpys: Any = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state(), numpys[1].tolist(), random.getstate()


@pytest.mark.parametrize("with_run", [False, True])
def test_the_callers_random_states_are_left_alone(with_run, tmp_path):
    pair, data = dropout_pair(), dynamic()
    before = random_states()
    fit(*pair, data, epochs=2, out=tmp_path / "run" if with_run else None)
    assert same(before, random_states())


def test_one_seed_gives_one_training_and_another_seed_another():
    data, results = dynamic(), []
    start = dropout_pair()
    for number, seed in enumerate((5, 5, 6)):
        torch.manual_seed(number)
        pair = copy.deepcopy(start)
        history = fit(*pair, data, epochs=2, seed=seed)
        results.append((parameters(*pair), history.records))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_progress_is_one_plain_line_an_epoch_where_there_is_no_terminal(capsys):
    fit(*bernoulli_pair(), bits(60), valid=bits(20), epochs=2, progress=True)
    lines = capsys.readouterr().err.splitlines()
    pattern = r"epoch +{}/2  ELBO -\d+\.\d{{3}}  valid ELBO -\d+\.\d{{3}}  rate \d+\.\d\d  \d.* s"
    assert len(lines) == 2
    assert all(re.fullmatch(pattern.format(i + 1), line) for i, line in enumerate(lines))
    fit(*bernoulli_pair(), bits(60), epochs=1)
    assert capsys.readouterr() == ("", "")


def test_fit_works_in_a_thread_and_gives_the_signal_handler_back():
    handler = signal.getsignal(signal.SIGINT)
    lengths: list[int] = []
    pair = bernoulli_pair()

    def train() -> None:
        lengths.append(len(fit(*pair, bits(60), epochs=2).records))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    train()
    assert lengths == [2, 2]
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_the_pair_is_moved_and_a_run_goes_on(tmp_path):
    data = dynamic()
    for epochs, resume in ((1, False), (2, True)):
        model, guide = bernoulli_pair()
        history = fit(model, guide, data, epochs=epochs, out=tmp_path / "run", resume=resume)
        assert next(model.parameters()).is_cuda
        assert len(history.records) == epochs


# --- taking up a run again -----------------------------------------------------------------------


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
    return *param_pair(), data, {"optimizer": adam, "valid": data[:20]}


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


def state(out: Path) -> dict[str, Any]:
    return Run(out).load_checkpoint()


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
    assert config["options"]["loss"] == "TraceMeanField_ELBO"
    assert config["options"]["lr_schedule"] == "LambdaLR"
    assert config["options"]["kl_weight"] == [1 / 3, 2 / 3]
    pair = dropout_pair()
    assert config["parameters"] == sum(p.numel() for half in pair for p in half.parameters())
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


# --- what goes wrong -----------------------------------------------------------------------------


def spoiled(values: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    values = values.clone()
    values[at] = value
    return values


def no_latent(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("other", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def wide_guide() -> pv.Guide:
    return pv.Guide(pv.Conditional(pv.networks.mlp(9, (2, 3)), pv.families.normal))


def narrow_model() -> pv.Model:
    likelihood = pv.Conditional(pv.networks.mlp(2, (1, 8)), pv.families.bernoulli)
    return pv.Model(pv.priors.StandardNormal(2), likelihood)


def levels() -> Split:
    return pv.load_data(torch.randint(0, 5, (90, 9)))


X = torch.ones(60, 9)
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "NaN": (
        {"data": spoiled(X, (7, 3), torch.nan)},
        ValueError,
        "^data: 1 of 540 values are NaN or infinite, the first in row 7",
    ),
    "infinity": (
        {"valid": spoiled(X, (2, 0), torch.inf)},
        ValueError,
        "^valid: 1 of 540 values are NaN or infinite, the first in row 2",
    ),
    "NaN among labels": (
        {"data": (X, spoiled(torch.ones(60), (5,), torch.nan))},
        ValueError,
        r"^data\[1\]: 1 of 60 values .* row 5",
    ),
    "support": (
        {"data": 2 * X},
        ValueError,
        "site 'x': 20 of 20 observed .* outside the support",
    ),
    "kind": (
        {"data": levels()},
        ValueError,
        "site 'x': Bernoulli is no density for integer levels 0..4.*binomial",
    ),
    "features": (
        {"data": X[:, :8]},
        ValueError,
        r"expected input of shape \(\*batch, 9\), got \(20, 8\)",
    ),
    "features of a part": (
        {"valid": X[:, :8]},
        ValueError,
        r"^valid: expected tensors with data of shapes \[\(9,\)\] .* got \[\(8,\)\]",
    ),
    "arguments of a part": ({"valid": (X, X)}, ValueError, "^valid: expected tensors with"),
    "decoder": (
        {"model": narrow_model()},
        ValueError,
        r"site 'x': the observed value has shape \(20, 9\), but .* \(20, 8\)",
    ),
    "empty": ({"data": X[:0]}, ValueError, r"^data: expected at least one datum, got \(0, 9\)"),
    "empty validation": ({"valid": X[:0]}, ValueError, "^valid: expected at least one datum"),
    "nothing": ({"data": ()}, ValueError, "^data: expected a tensor or a tuple of tensors"),
    "no tensor": ({"data": [X.numpy()]}, TypeError, "^data: expected a tensor, got ndarray"),
    "batch": (
        {"batch_size": 61},
        ValueError,
        "^batch_size: 61 is larger than the training set of 60 data; give at most 60",
    ),
    "lengths": (
        {"data": (X, X[:59])},
        ValueError,
        r"^data\[1\]: expected 60 rows as in data\[0\], got 59",
    ),
    "two validations": ({"data": dynamic(), "valid": X}, ValueError, "^valid: a Split has its own"),
    "latent": (
        {"guide": no_latent},
        ValueError,
        r"the guide has no latent site 'z', .* the guide draws \['other'\]",
    ),
    "latent's shape": (
        {"guide": wide_guide()},
        ValueError,
        r"site 'z': the guide draws values of shape \(20, 3\), but the model expects \(20, 2\)",
    ),
    "patience": ({"patience": 3}, ValueError, "^patience: .*give valid="),
    "epochs": ({"epochs": 0}, ValueError, "^epochs: expected at least 1, got 0"),
    "weight": ({"kl_weight": -1.0}, ValueError, "^kl_weight: expected weights >= 0, got -1"),
    "clipping": ({"max_grad_norm": 0.0}, ValueError, "expected max_grad_norm > 0"),
    "optimizer": (
        {"optimizer": torch.optim.Adam([nn.Parameter(X)])},
        TypeError,
        "^optimizer: fit expects a factory such as lambda params: .* got Adam",
    ),
    "loss": ({"loss": "elbo"}, TypeError, "^loss: expected a Pyro ELBO"),
    "device": ({"device": "gpu"}, ValueError, "^device: 'gpu' is not available here"),
}


@pytest.mark.parametrize(("change", "error", "match"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_and_costs_nothing(change, error, match, tmp_path):
    model, guide = bernoulli_pair()
    before, out = parameters(model, guide), tmp_path / "run"
    arguments = {"model": model, "guide": guide, "data": X, "epochs": 2, "out": out}
    with pytest.raises(error, match=match):
        fit(**{**arguments, **change})
    assert same(parameters(model, guide), before)
    history = fit(**arguments)  # the same directory is free for the corrected call
    assert len(history.records) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"^device: 'cuda' is not available here .*use 'cpu'"):
        fit(*bernoulli_pair(), X, device="cuda")


def test_a_pair_without_parameters_is_named():
    truth = LinearGaussian.random()
    with pytest.raises(ValueError, match=r"no parameters to train.*pyro.module"):
        fit(truth.model, truth.guide, truth.sample(60), epochs=1)


def test_resuming_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"^resume: say with out="):
        fit(*bernoulli_pair(), X, resume=True)
    with pytest.raises(FileNotFoundError, match=r"is no run directory: it has no config\.json"):
        fit(*bernoulli_pair(), X, resume=True, out=tmp_path)


def test_a_run_of_another_pair_is_not_gone_on_with(tmp_path):
    out = tmp_path / "run"
    fit(*bernoulli_pair(), X, epochs=1, out=out)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    name = re.escape("model.likelihood.network.layers.0.weight")
    told = rf"of another pair: {name} .*\(8, 2\) on disk and \(8, 3\)"
    with pytest.raises(ValueError, match=told):
        fit(*bernoulli_pair(latent_dim=3), X, epochs=2, out=out, resume=True)
    with pytest.raises(ValueError, match=r"of another pair: modules has .*'guide', 'model'"):
        fit(*tutorial_pair(), X, epochs=2, out=out, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data": torch.zeros(61, 9)}, r"^resume: the run was started with other data"),
        ({"batch_size": 10}, r"^resume: .* batch_size=20, now it is 10"),
        ({"seed": 1}, r"^resume: .* seed=0, now it is 1"),
        ({"loss": TraceMeanField_ELBO()}, r"^resume: .* loss=\w+, now it is TraceMeanField_ELBO"),
    ],
)
def test_a_run_is_not_gone_on_with_under_other_conditions(change, match, tmp_path):
    out = tmp_path / "run"
    fit(*bernoulli_pair(), X, epochs=1, out=out)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=match):
        fit(*bernoulli_pair(), **{"data": X, **change}, epochs=2, out=out, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


def test_other_values_of_a_split_are_other_data(tmp_path):
    out = tmp_path / "run"
    fit(*bernoulli_pair(), dynamic(), epochs=1, out=out)
    with pytest.raises(ValueError, match=r"^resume: the run was started with other data"):
        fit(*bernoulli_pair(), dynamic(), epochs=2, out=out, resume=True)


def test_a_directory_with_anything_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"^out: .* is not empty; .*resume=True"):
        fit(*bernoulli_pair(), X, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_directory_that_cannot_be_made_is_named_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^out: can't write to .*file/run \(Not a directory\)"):
        fit(*bernoulli_pair(), X, out=tmp_path / "file" / "run")


def explode(at: int) -> Callable[[torch.optim.Optimizer], LambdaLR]:
    """A learning rate that is past all reason from an epoch (1, 2, ...) on."""
    return lambda optimizer: LambdaLR(optimizer, lambda done: 1e30 if done + 1 >= at else 1.0)


@pytest.mark.parametrize("case", ["modules", "params"])
def test_a_loss_that_turns_nan_names_the_site_and_keeps_the_last_good_state(case, tmp_path):
    model, guide = bernoulli_pair() if case == "modules" else param_pair()
    seen, out = [], tmp_path / "run"
    with pytest.raises(pv.DivergedError) as caught:
        fit(
            model,
            guide,
            bits(60),
            epochs=5,
            optimizer=adam,
            lr_schedule=explode(3),
            callbacks=[lambda record: seen.append(parameters(model, guide))],
            out=out,
        )
    message = str(caught.value)
    assert re.match(r"the loss turned NaN or infinite in epoch 3, step [23]: site '[xz]'", message)
    assert "The pair is back at the end of epoch 2." in message
    assert len(seen) == 2
    assert same(parameters(model, guide), seen[1])
    assert [record["epoch"] for record in state(out)["records"]] == [1, 2]
    assert len(Run(out).read_metrics()[0]) == 2
    if case == "modules":
        assert same(parameters(*pv.load(out)), seen[1])


def test_parameters_that_are_past_all_reason_but_finite_are_no_good_state(tmp_path):
    model, guide = bernoulli_pair()
    seen, out = [], tmp_path / "run"
    with pytest.raises(
        pv.DivergedError, match=r"in epoch 4, step 1: .* back at the end of epoch 2"
    ):
        fit(
            model,
            guide,
            bits(60),
            epochs=5,
            batch_size=60,
            optimizer=adam,
            lr_schedule=explode(3),  # the only loss of epoch 3 comes before its only step
            callbacks=[lambda record: seen.append(parameters(model, guide))],
            out=out,
        )
    assert same(parameters(model, guide), seen[1])
    assert [record["epoch"] for record in state(out)["records"]] == [1, 2]


def test_parameters_that_the_last_step_of_an_epoch_broke_are_never_saved(tmp_path):
    model, guide = param_pair()

    def steep(x: Tensor) -> None:  # finite at 0, with a gradient that isn't
        pyro.factor("steep", 0 * pyro.param("slope", torch.zeros(())).square().sqrt())
        model(x)

    out = tmp_path / "run"
    with pytest.raises(pv.DivergedError, match=r"epoch 1, step 1: .*parameter '.*' was not finite"):
        fit(steep, guide, bits(60), batch_size=60, epochs=5, out=out)
    assert all(p.isfinite().all() for p in parameters(steep, guide).values())
    saved = state(out)
    assert saved["records"] == []
    assert all(p.isfinite().all() for p in saved["parameters"]["params"].values())


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Files can't grow larger than so many bytes: what a full disk does, for this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_training_goes_on_while_the_disk_is_full(tmp_path, monkeypatch):
    # A clock that stands still makes every checkpoint due.
    monkeypatch.setattr("pyro_vae.runs.training.time", SimpleNamespace(monotonic=lambda: 0.0))
    out = tmp_path / "run"
    full = no_file_above(4000)
    held = []

    def callback(record: dict[str, Any]) -> None:
        if record["epoch"] == 2:
            full.__enter__()
        if record["epoch"] == 4:
            full.__exit__(None, None, None)
            held.append(len(state(out)["records"]))

    told = r"can't write .*checkpoint.pt .* Training goes on"
    with pytest.warns(UserWarning, match=told) as warned:
        fit(*bernoulli_pair(), bits(60), epochs=5, out=out, callbacks=[callback])
    assert len(warned) == 2  # after epochs 2 and 3
    assert held == [1]  # the checkpoint of epoch 1 was whole all the time
    assert len(state(out)["records"]) == 5
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_full_disk_at_the_end_is_an_error_that_names_the_file(tmp_path):
    model, guide = bernoulli_pair()
    out, full = tmp_path / "run", no_file_above(4000)

    def callback(record: dict[str, Any]) -> None:
        if record["epoch"] == 3:
            full.__enter__()

    told = r"can't write .*checkpoint.pt .*earlier version .*untouched"
    try:
        with pytest.raises(OSError, match=told):
            fit(model, guide, bits(60), epochs=3, out=out, callbacks=[callback])
    finally:
        full.__exit__(None, None, None)
    assert len(state(out)["records"]) < 3
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
