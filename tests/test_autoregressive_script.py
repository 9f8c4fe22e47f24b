"""Models without latents and with them: exact sums, maximum likelihood, and the script's runs."""

import json
import math
import runpy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import runner

import pyro_vae as pv

PATH = Path(__file__).parents[1] / "experiments" / "autoregressive.py"
SCRIPT = runpy.run_path(str(PATH))
D = 5


def pair(name: str, hidden: int = 6) -> tuple[Any, Any, Any]:
    return SCRIPT["pairs"](D, 2, hidden, 3.0)[name]()


def everything() -> torch.Tensor:
    return torch.tensor(list(product((0.0, 1.0), repeat=D)))


def adam(rate: float) -> Any:
    return lambda params: torch.optim.Adam(params, lr=rate)


@pytest.mark.parametrize("name", ["independent", "autoregressive"])
def test_without_latents_the_evidence_is_exact_and_sums_to_one(name):
    model, guide, loss = pair(name)
    estimate = pv.log_evidence(model, guide, everything(), num_particles=2)
    assert estimate.value.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(estimate.value, estimate.elbo)
    assert not estimate.standard_error.any()
    assert estimate.trusted.all()
    svi = pv.SVI(model, guide, adam(1e-3), loss)
    expected = -estimate.value.sum().item()
    assert svi.evaluate_loss(everything()).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["latents", "both"])
def test_with_latents_the_estimates_of_all_values_sum_to_one(name):
    """To their error: log p(x) is estimated for each of the 2^D values."""
    model, _, _ = pair(name)
    estimate = pv.log_evidence(model, pv.from_prior(model), everything(), num_particles=3000)
    p = estimate.value.exp()
    error = (p * estimate.standard_error).square().sum().sqrt().item()
    assert 0 < error < 0.02
    assert p.sum().item() == pytest.approx(1.0, abs=4 * error)


def test_fit_maximizes_the_likelihood_and_draws_are_of_what_was_learned():
    """Bits that copy the one before: the chain rule holds it, independent bits can't."""
    flips = (torch.rand(4000, D) < 0.1).float()
    flips[:, 0] = (torch.rand(4000) < 0.3).float()
    x = flips.cumsum(1) % 2
    found = {}
    for name in ("independent", "autoregressive"):
        model, guide, loss = pair(name, hidden=50)
        options: dict[str, Any] = {"epochs": 15, "batch_size": 400, "progress": False}
        pv.fit(model, guide, x, loss=loss, optimizer=adam(0.03), **options)
        found[name] = pv.log_evidence(model, guide, x, num_particles=2).mean

    def entropy(p: torch.Tensor) -> float:
        return -(p * p.log() + (1 - p) * (1 - p).log()).sum().item()

    assert found["independent"] == pytest.approx(-entropy(x.mean(0)), abs=0.01)
    assert found["autoregressive"] == pytest.approx(-entropy(flips.mean(0)), abs=0.02)
    drawn = pv.generate(model, x, draw=True)
    assert drawn.shape == x.shape
    flipped = (drawn[:, 1:] != drawn[:, :-1]).float().mean().item()
    assert flipped == pytest.approx(0.1, abs=0.03)


def test_free_bits_keep_latents_that_the_chain_rule_would_leave_unused():
    torch.manual_seed(0)
    x = ((torch.rand(400, D) < 0.1).float().cumsum(1)) % 2
    rates = {}
    for name in ("both", "both, free bits"):
        model, guide, loss = SCRIPT["pairs"](D, 2, 20, 1.0)[name]()
        options: dict[str, Any] = {"epochs": 20, "batch_size": 100, "progress": False}
        pv.fit(model, guide, x, loss=loss, optimizer=adam(0.02), **options)
        rates[name] = SCRIPT["use_of_latents"](model, guide, x, 0)["rate"]
    assert rates["both"] < 0.4
    assert rates["both, free bits"] > 0.7  # one nat is free


def test_a_run_without_latents_is_kept_with_its_draws(tmp_path):
    model, guide, loss = pair("autoregressive")
    x = torch.rand(40, D).round()
    pv.fit(
        model, guide, x, loss=loss, epochs=1, batch_size=20, out=tmp_path / "run", progress=False
    )
    assert (tmp_path / "run" / "samples.png").stat().st_size > 1000
    before = pv.log_evidence(model, guide, x, num_particles=2)
    again = pv.load(tmp_path / "run", model=pair("autoregressive")[0], guide=guide)
    assert torch.equal(pv.log_evidence(*again, x, num_particles=2).value, before.value)


def test_latents_that_copy_a_bit_are_used_and_those_of_the_prior_are_not():
    model, guide, _ = pair("both")
    x = torch.rand(300, D).round()
    encoder = guide.encoder
    encoder.network = pv.networks.mlp(D, (2, 2), hidden_dims=())
    scale = pv.families.inverse_softplus(1.0)
    layer = next(m for m in encoder.network.modules() if isinstance(m, torch.nn.Linear))
    torch.nn.init.zeros_(layer.weight)
    layer.bias.data.copy_(torch.tensor([0.0, 0.0, scale, scale]))
    unused = SCRIPT["use_of_latents"](model, guide, x, 0)
    assert unused == pytest.approx(
        {"rate": 0.0, "mutual_information": 0.0, "active_units": 0, "latents": 2}, abs=1e-5
    )
    layer.weight.data[0, 0] = 20.0  # z1 = 20 x1 + noise
    used = SCRIPT["use_of_latents"](model, guide, x, 0)
    on = x[:, 0].mean().item()
    assert used["rate"] == pytest.approx(on * 20**2 / 2, rel=0.05)
    bit = -on * math.log(on) - (1 - on) * math.log(1 - on)
    assert used["mutual_information"] == pytest.approx(bit, abs=1e-3)
    assert (used["active_units"], used["latents"]) == (1, 2)


run = runner(PATH, "--smoke")


def rows(monkeypatch: Any, out: Path, *args: str) -> list[dict[str, Any]]:
    """The rows after a call, but for the time that they took."""
    run(monkeypatch, "--out", str(out), "--models", "autoregressive", "both, free bits", *args)
    found = json.loads((out / "results.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k != "train_seconds"} for row in found]


def test_a_run_that_its_budget_cut_ends_where_an_uncut_one_does(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    cut = rows(monkeypatch, tmp_path / "cut", "--budget", "1e-9")
    assert [(row["name"], row["epochs"], row["of_epochs"]) for row in cut] == [
        ("autoregressive", 1, 2)
    ]
    assert "both, free bits: no time left; call again" in capsys.readouterr().out
    resumed = rows(monkeypatch, tmp_path / "cut")
    assert [row["epochs"] for row in resumed] == [2, 2]
    assert resumed == rows(monkeypatch, tmp_path / "uncut")


def test_one_that_diverges_stops_no_other_and_is_not_tried_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    fit = pv.fit

    def diverging(model: Any, *args: Any, **options: Any) -> pv.History:
        if type(model).__name__ == "Direct":
            raise pv.DivergedError("the loss turned NaN")
        return fit(model, *args, **options)

    monkeypatch.setattr("pyro_vae.fit", diverging)
    bad, good = found = rows(monkeypatch, tmp_path)
    assert (bad["epochs"], bad["of_epochs"], bad["diverged"], bad["finished"]) == (0, 2, True, True)
    assert good["epochs"] == 2
    assert "autoregressive: the loss turned NaN" in capsys.readouterr().out
    monkeypatch.setattr("pyro_vae.fit", lambda *args, **options: pytest.fail("trained again"))
    assert rows(monkeypatch, tmp_path) == found


def test_a_budget_of_nothing_is_a_mistake(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"^autoregressive\.py: --budget: expected minutes > 0"):
        run(monkeypatch, "--out", str(tmp_path), "--budget", "0")


def test_the_table_is_made_once_and_gone_on_with(monkeypatch, tmp_path, capsys):
    out = ["--out", str(tmp_path), "--models", "autoregressive", "both, free bits"]
    run(monkeypatch, *out)
    figures = json.loads((tmp_path / "results.json").read_text())
    exact, free = figures["rows"]
    assert (exact["name"], free["name"]) == ("autoregressive", "both, free bits")
    assert exact["log_evidence"] == pytest.approx(exact["elbo"], abs=1e-9)
    assert (exact["mean_standard_error"], exact["rate"], exact["num_particles"]) == (0, 0, 2)
    assert "at most log N = 5.30 nats" in figures["protocol"]["use of latents"]  # of 200 data
    assert (tmp_path / "autoregressive.png").stat().st_size > 1000
    assert f"{free['log_evidence']:.3f}" in capsys.readouterr().out
    monkeypatch.setattr("pyro_vae.fit", lambda *args, **options: pytest.fail("trained again"))
    run(monkeypatch, *out)
    with pytest.raises(SystemExit, match="root"):
        run(monkeypatch, "--data", "binarized_mnist", "--root", str(tmp_path))
