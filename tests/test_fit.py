"""Fitting: any pair and any data, and a history that says what happened."""

import copy
import random
import re
import signal
import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from fit_pairs import (
    PAIRS,
    adam,
    context_pair,
    dropout_pair,
    dynamic,
    fast,
    fit,
    parameters,
    same,
)
from helpers import LinearGaussian, bernoulli_pair, bits
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

import pyro_vae as pv
from pyro_vae.context import at_rest, seeded


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Those are for test_pictures."""
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda *run: None)


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


@pytest.mark.parametrize("pictures", [True, False])
def test_pictures_are_drawn_unless_they_are_not_wanted(pictures, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda run, *pair: drawn.append(run.path))
    fit(*bernoulli_pair(), bits(60), epochs=1, out=tmp_path, pictures=pictures)
    assert drawn == [tmp_path] * pictures
    kept = {"config.json", "metrics.jsonl", "checkpoint.pt", "examples.npz"}
    assert {path.name for path in tmp_path.iterdir()} == kept


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
    history = overfit(*pair, train, valid, patience=5, kl_weight=pv.warmup(40))
    assert history.stopped == "patience"
    # The best epoch was in the warm-up, and training went on.
    assert history.best_epoch is not None
    assert history.best_epoch < 39
    assert len(history.records) == 39 + 5


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
