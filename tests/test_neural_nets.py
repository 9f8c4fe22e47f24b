"""The VAE of the neural-network libraries: by hand and as programs, the same numbers."""

import json
import runpy
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


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", [PATH.name, "--smoke", "--out", str(out), *options])
    runpy.run_path(str(PATH), run_name="__main__")
    return json.loads((out / "results.json").read_text())


def test_the_script_trains_both_alike_and_goes_on_where_its_budget_ended(monkeypatch, tmp_path):
    cut = call(monkeypatch, tmp_path, "--budget", "1e-9")
    assert [row["epochs"] for row in cut["rows"] if "epochs" in row] == [1, 1]
    figures = call(monkeypatch, tmp_path)
    rows = {row["name"]: row for row in figures["rows"]}
    hand, ours = rows["PyTorch by hand, seed 0"], rows["Pyro programs, seed 0"]
    assert (ours["epochs"], ours["of_epochs"]) == (2, 2)
    assert ours["losses"] == pytest.approx(hand["losses"], rel=1e-5)
    assert ours["losses"][1] < ours["losses"][0] - 1
    assert abs(ours["log p(x) more than by hand"]) < 1e-4
    assert rows["Pyro programs"]["milliseconds"] > 0
    assert (tmp_path / "neural_nets.png").stat().st_size > 1000
    monkeypatch.setattr("pyro_vae.fit", None)  # nothing is left to train
    assert call(monkeypatch, tmp_path) == figures
