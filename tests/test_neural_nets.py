"""The VAE of the neural-network libraries: by hand and as programs, the same numbers."""

import importlib.util
import json
import runpy
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import pyro_vae as pv

PATH = Path(__file__).parents[1] / "experiments" / "neural_nets.py"
SCRIPT = runpy.run_path(str(PATH))
X = torch.rand(20, 9).round().double()


def by_hand() -> Any:
    torch.manual_seed(1)
    return SCRIPT["ByHand"](9, 8, 3).double()


def test_the_loss_by_hand_is_minus_the_bound():
    module = by_hand()
    h = module.encoder(X).relu()
    q = dist.Normal(module.mean(h), (module.log_variance(h) / 2).exp()).to_event(1)
    torch.manual_seed(0)
    logits = module.pixels(module.decoder(q.rsample()).relu())
    rate = kl_divergence(q, dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
    bound = dist.Bernoulli(logits=logits).to_event(1).log_prob(X) - rate
    torch.manual_seed(0)
    torch.testing.assert_close(module(X), -bound.sum(), rtol=1e-12, atol=0)


def test_a_log_variance_is_said_by_a_family_of_ones_own_or_by_an_option():
    params = torch.randn(5, 2, 3).double()
    own = SCRIPT["of_log_variance"](params)
    option = partial(pv.families.normal, to_scale=pv.families.exp_half, min_scale=0.0)(params)
    value = torch.randn(5, 3).double()
    torch.testing.assert_close(own.log_prob(value), option.log_prob(value), rtol=1e-12, atol=0)
    torch.testing.assert_close(own.variance, params[:, 1].exp(), rtol=1e-12, atol=0)


def test_programs_and_modules_say_the_same_of_the_same_weights():
    found = SCRIPT["agreement"](by_hand(), X)
    assert "Pyro programs" in found
    for row in found.values():
        assert row["loss difference, 64 bits"] < 1e-14
        assert row["gradient difference, 64 bits"] < 1e-14


def test_weights_that_differ_are_seen(monkeypatch):
    module = by_hand()
    other = SCRIPT["pair"](module.state_dict())
    other[2][3].data += 1e-3  # the bias of both heads
    monkeypatch.setitem(SCRIPT["agreement"].__globals__, "pair", lambda weights: other)
    found = SCRIPT["agreement"](module, X)["Pyro programs"]
    assert found["loss difference, 64 bits"] > 1e-6


def test_adam_written_out_in_jax_is_that_of_torch(monkeypatch):
    jax = pytest.importorskip("jax")
    module = by_hand()
    in_jax = SCRIPT["InJax"]({name: w.detach() for name, w in module.state_dict().items()})
    eps = torch.randn(20, 3).double()
    monkeypatch.setattr(jax.random, "normal", lambda *args: in_jax.array(eps))
    monkeypatch.setattr(torch, "randn_like", lambda mean: eps)
    optimizer = SCRIPT["ADAM"](module.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        loss = module(X)
        loss.backward()
        optimizer.step()
        assert float(in_jax.step(in_jax.array(X))) == pytest.approx(loss.item(), rel=1e-12)
    for name, weight in module.state_dict().items():
        found = torch.tensor(in_jax.weights[name].tolist()).double()
        torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-7)


def test_a_module_through_jax_has_the_loss_and_the_gradient_of_torch():
    pytest.importorskip("jax")
    module, (x, y) = by_hand(), (X[:7], X[7:])  # of two sizes
    there = SCRIPT["InJax"]({})
    for data in (x, y):
        found = []
        for loss in (module, partial(SCRIPT["through_jax"], there, module, None)):
            torch.manual_seed(2)
            minus = loss(data)
            found.append([minus.detach(), *torch.autograd.grad(minus, list(module.parameters()))])
        torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", [PATH.name, "--smoke", "--out", str(out), *options])
    runpy.run_path(str(PATH), run_name="__main__")
    return json.loads((out / "results.json").read_text())


@pytest.fixture
def without_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX takes seconds to compile, and adds nothing to a test of the script's ways."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *of: None if name == "jax" else find(name, *of)
    )
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)


def trainings(figures: dict[str, Any]) -> dict[str, Any]:
    rows = {row["name"]: row for row in figures["rows"] if "epochs" in row}
    for row in rows.values():
        row.pop("train_seconds", None)
    return rows


def test_all_are_trained_alike_and_go_on_where_the_budget_ended(monkeypatch, tmp_path):
    cut = call(monkeypatch, tmp_path / "cut", "--budget", "1e-9")
    assert {row["epochs"] for row in trainings(cut).values()} == {1}
    figures, uncut = (call(monkeypatch, tmp_path / of) for of in ("cut", "uncut"))
    rows = trainings(figures)
    assert rows == trainings(uncut)
    names = [f"{name}, seed 0" for name in SCRIPT["THERE"]]
    assert list(rows) == names
    hand = rows["PyTorch by hand, seed 0"]
    for row in (rows[name] for name in names[1:]):
        assert (row["epochs"], row["of_epochs"]) == (2, 2)
        assert row["losses"] == pytest.approx(hand["losses"], rel=1e-12)
        assert row["losses"][1] < row["losses"][0] - 1
        assert abs(row["log p(x) more than by hand"]) < 1e-10
    timed = {row["name"]: row["milliseconds"] for row in figures["rows"] if "milliseconds" in row}
    assert timed.keys() == set(SCRIPT["THERE"])
    assert "JAX" not in figures["title"]
    assert (tmp_path / "cut" / "neural_nets.png").stat().st_size > 1000
    monkeypatch.setattr("pyro_vae.fit", None)  # nothing is left to train
    assert trainings(call(monkeypatch, tmp_path / "cut")) == rows


@pytest.mark.usefixtures("without_jax")
def test_one_that_lags_behind_goes_on_and_is_compared_when_it_is_there(monkeypatch, tmp_path):
    fit = pv.fit

    def lagging(model: Any, guide: Any, *args: Any, **options: Any) -> pv.History:
        if type(model).__name__ == "ByHand":
            options["max_seconds"] = 1e-9
        return fit(model, guide, *args, **options)

    with monkeypatch.context() as context:
        context.setattr("pyro_vae.fit", lagging)
        rows = trainings(call(monkeypatch, tmp_path))
    assert rows["PyTorch by hand, seed 0"]["epochs"] == 1
    assert rows["Pyro programs, seed 0"]["epochs"] == 2
    assert "log p(x) more than by hand" not in rows["Pyro programs, seed 0"]
    rows = trainings(call(monkeypatch, tmp_path))
    assert rows["PyTorch by hand, seed 0"]["epochs"] == 2
    assert abs(rows["Pyro programs, seed 0"]["log p(x) more than by hand"]) < 1e-10


@pytest.mark.usefixtures("without_jax")
def test_one_that_diverges_stops_no_other(monkeypatch, tmp_path):
    fit = pv.fit

    def diverging(model: Any, *args: Any, **options: Any) -> pv.History:
        if type(model).__name__ == "ByHand":
            raise pv.DivergedError("the loss turned NaN")
        return fit(model, *args, **options)

    monkeypatch.setattr("pyro_vae.fit", diverging)
    rows = trainings(call(monkeypatch, tmp_path))
    bad, good = rows["PyTorch by hand, seed 0"], rows["Pyro programs, seed 0"]
    assert (bad["epochs"], bad["diverged"], bad["finished"]) == (0, True, True)
    assert good["epochs"] == 2


def test_steps_are_timed_on_the_device_that_was_named(monkeypatch):
    seen = []

    def steppers(module: Any, x: torch.Tensor, *, compiled: bool) -> dict[str, Any]:
        seen.append((x.device.type, next(module.parameters()).device.type, compiled))
        return {}

    monkeypatch.setitem(SCRIPT["untrained"].__globals__, "steppers", steppers)
    args = Namespace(hidden=4, latent_dim=2, device="meta", smoke=True)
    SCRIPT["untrained"](pv.load_data("digits").binarize(), args)
    assert seen == [("meta", "meta", False)]


def test_mistakes_end_in_a_line(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"^neural_nets\.py: --budget: expected minutes > 0"):
        call(monkeypatch, tmp_path, "--budget", "0")
