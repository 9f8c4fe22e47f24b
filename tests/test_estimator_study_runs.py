"""The study of estimators: what it makes of gradients, and how it comes to its end."""

import argparse
import dataclasses
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_vae as pv

PATH = Path(__file__).parents[1] / "experiments" / "estimator_study.py"
SCRIPT = runpy.run_path(str(PATH))
ESTIMATORS, noise_of = SCRIPT["ESTIMATORS"], SCRIPT["noise_of"]
TINY = ("--hidden-dims", "4", "--latent-dim", "2", "--draws", "2", "--particles", "1")

pytestmark = pytest.mark.filterwarnings("ignore:.*REINFORCE")


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", [PATH.name, "--out", str(out), *options])
    runpy.run_path(str(PATH), run_name="__main__")
    return json.loads((out / "results.json").read_text())


def without_times(figures: dict[str, Any]) -> Any:
    rows, noise = (
        [{k: v for k, v in row.items() if k not in ("seconds", "ms_per_step", "ms")} for row in of]
        for of in (figures["rows"], [m for of in figures["noise"].values() for m in of])
    )
    return rows, noise


def test_noise_is_told_from_signal():
    truth = torch.tensor([0.3, -0.4], dtype=torch.float64)
    rows = 1.5 * truth + 2.0 * torch.randn(40_000, 2, dtype=torch.float64)
    found = noise_of(rows, truth.expand(2, 2))
    assert found["variance"] == pytest.approx(8.0, rel=0.03)
    assert found["snr"] == pytest.approx(0.75 / 8**0.5, rel=0.1)
    assert found["bias"]["value"] == pytest.approx(0.5, abs=0.1)
    assert found["bias"]["standard_error"] == pytest.approx((8 / 40_000) ** 0.5 / 0.5, rel=0.03)
    # What few estimates of nothing leave in the length of their mean is noise, and is taken off.
    nothing = [noise_of(torch.randn(10, 500))["snr"] for _ in range(20)]
    assert max(nothing) < 0.2 < (1 / 10) ** 0.5


@pytest.mark.parametrize("scale", [1.0, 0.1**0.5])
def test_the_noise_of_the_truth_is_not_taken_for_bias(scale):
    """Two estimators of one mean, of which one has at most as much variance as the truth."""
    mean, biases = torch.full((500,), 0.1, dtype=torch.float64), []
    truth = rows = mean
    for _ in range(20):
        truth, rows = (mean + s * torch.randn(50, 500).double() for s in (1.0, scale))
        found = noise_of(rows, truth)["bias"]
        assert found["value"] < found["standard_error"] / 2
        noise = ((1 + scale**2) * 500 / 50) ** 0.5
        assert found["standard_error"] == pytest.approx(noise / mean.norm().item(), rel=0.2)
        biases.append(found["value"])
    assert min(biases) == 0.0
    assert "bias" not in noise_of(rows)
    off = noise_of(mean + 0.2 + torch.randn(50, 500).double(), truth)["bias"]
    assert off["value"] == pytest.approx(2.0, rel=0.15)


def test_the_clock_counts_the_steps_alone_and_waits_for_the_last(monkeypatch):
    events, step = [], pv.SVI.step

    def seen(svi: Any, x: torch.Tensor) -> Any:
        events.append("step")
        loss = step(svi, x)
        read = type("Loss", (), {"item": lambda _: events.append("read") or loss.item()})
        return read()

    def clock() -> float:
        events.append("clock")
        return float(events.count("clock"))

    args = argparse.Namespace(hidden_dims=[4], latent_dim=2, device="cpu")
    pair, _ = SCRIPT["trained"](SCRIPT["Training"](), pv.load_data("digits"), 0, math.inf, args)
    monkeypatch.setattr(pv.SVI, "step", seen)
    monkeypatch.setattr("time.perf_counter", clock)
    loss = ESTIMATORS["exact KL"][0](1)
    rows, ms = SCRIPT["gradients"](pair, loss, [torch.ones(5, 64)] * 4)
    assert events == ["step", "read", "clock", *["step"] * 4, "read", "clock"]
    assert ms == 250.0
    assert len(rows["encoder"]) == 4


def test_a_pair_before_training_lies_on_the_device_that_is_meant(tmp_path):
    args = argparse.Namespace(hidden_dims=[4], latent_dim=2, out=tmp_path, device="meta")
    data = pv.load_data("digits")
    pair, records = SCRIPT["trained"](SCRIPT["Training"](), data, 0, math.inf, args)
    assert records == []
    assert {p.device.type for part in pair for p in part.parameters()} == {"meta"}


def test_a_training_that_diverges_is_told_and_does_not_end_the_study(monkeypatch, tmp_path, capsys):
    args = argparse.Namespace(hidden_dims=[4], latent_dim=2, out=tmp_path, device="cpu")
    job = SCRIPT["Training"](optimizer="SGD", rate=1e6)
    data = pv.load_data("digits").binarize()
    assert SCRIPT["trained"](job, data, 1, math.inf, args) == (None, [])

    def fit(*_: Any, batch_size: int, **options: Any) -> pv.History:
        if batch_size == 1000:
            raise pv.DivergedError("the loss is nan")
        return pv.History(records=[{"seconds": 1.0}] * options["epochs"])

    monkeypatch.setattr(pv, "fit", fit)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)  # takes seconds
    *others, lost = call(monkeypatch, tmp_path / "run", "--smoke")["rows"]
    assert lost["name"].startswith("exact KL, K = 1, minibatch 1000")
    assert (lost["epochs"], lost["of_epochs"]) == (0, 2)
    assert lost["diverged"] is lost["finished"] is True
    assert len(others) == 2
    assert f"{lost['name']}: diverged" in capsys.readouterr().out


def test_a_call_measures_every_estimator_and_is_not_repeated(monkeypatch, tmp_path, capsys):
    figures = call(monkeypatch, tmp_path / "run", "--smoke")
    assert len(figures["rows"]) == 3
    for row in figures["rows"]:
        assert row["epochs"] == row["of_epochs"] == 2
        assert row["finished"] is True
        assert math.isfinite(row["log_evidence"])
    assert list(figures["noise"]) == ["0", "1", "2"]
    start = next(m for m in figures["noise"]["0"] if m["estimator"] == "exact KL")
    assert figures["rows"][0]["encoder_snr_0"] == start["encoder_snr"]
    for stage in figures["noise"].values():
        assert {m["estimator"] for m in stage} == set(ESTIMATORS)
        assert all(m["decoder_variance"] > 0 and m["ms"] > 0 for m in stage)
        assert all(("encoder_bias" in m) is not m["anew"] for m in stage)
    assert (tmp_path / "run" / "estimator_study.png").stat().st_size > 1000
    assert f"{figures['rows'][0]['log_evidence']:.3f}" in capsys.readouterr().out

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)  # takes seconds
    with monkeypatch.context() as finished:
        finished.setattr(pv, "fit", None)
        finished.setattr(pv, "SVI", None)
        assert call(monkeypatch, tmp_path / "run", "--smoke") == figures


@pytest.mark.slow
def test_a_budget_changes_no_figure_and_a_seed_more_begins_nothing_anew(monkeypatch, tmp_path):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)  # takes seconds
    figures = call(monkeypatch, tmp_path / "run", "--smoke")
    cut = call(monkeypatch, tmp_path / "cut", "--smoke", "--budget", "1e-9")
    assert [(row["epochs"], row["finished"]) for row in cut["rows"]] == [(1, False)] * 3
    assert list(cut["noise"]) == ["0", "1"]
    resumed = call(monkeypatch, tmp_path / "cut", "--smoke")
    assert without_times(resumed) == without_times(figures)

    records = [{"seconds": 1.0}] * 2
    monkeypatch.setattr(pv, "fit", lambda *_, **__: pv.History(records=records))
    more = call(monkeypatch, tmp_path / "run", "--smoke", "--seeds", "1", "0")
    assert more["rows"][:3] == figures["rows"]
    assert [row["name"][-6:] for row in more["rows"][3:]] == ["seed 1"] * 3
    assert more["noise"] == figures["noise"]


def test_a_stage_is_measured_before_training_goes_on(monkeypatch, tmp_path):
    """The first training is cut before its stage; the others come to their end before it does."""
    done: dict[str, int] = {}

    def fit(*_: Any, epochs: int, max_seconds: float, out: Path, **__: Any) -> pv.History:
        first = out.name == SCRIPT["Training"]().name
        done[out.name] = done.get(out.name, 0) + 1 if first and max_seconds < 1 else epochs
        return pv.History(records=[{"seconds": 1.0}] * done[out.name])

    monkeypatch.setattr(pv, "fit", fit)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    options = (*TINY, "--epochs", "60", "--num-particles", "2")
    cut = call(monkeypatch, tmp_path, *options, "--budget", "1e-9")
    assert list(cut["noise"]) == ["0"]
    assert [row["epochs"] for row in cut["rows"]] == [1] + [60] * (len(cut["rows"]) - 1)
    whole = call(monkeypatch, tmp_path, *options)
    assert list(whole["noise"]) == ["0", "3", "60"]
    by_name = {row["name"]: row for row in whole["rows"]}
    assert all(row["finished"] for row in whole["rows"])
    for estimator in ESTIMATORS:
        row = by_name[SCRIPT["Training"](estimator).name]
        assert {f"encoder_{kind}_{e}" for kind in ("snr", "bias") for e in (0, 3, 60)} <= set(row)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--epochs", "0"), "--epochs: expected at least 1, got 0"),
        (("--hidden-dims", "4", "0"), r"--hidden-dims: expected at least 1, got \[4, 0\]"),
        (("--budget", "-1"), "--budget: expected more than 0 minutes, got -1.0"),
        (("--data", "few.npy"), "--data: few has 80 training data, a minibatch 1000"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(monkeypatch, tmp_path, options, said):
    monkeypatch.chdir(tmp_path)
    few = pv.load_data("digits").binarize()
    few = dataclasses.replace(few, train=few.train[:80], name="few", labels=None)
    if "few.npy" in options:
        monkeypatch.setattr(pv, "load_data", lambda *_, **__: few)
    with pytest.raises(SystemExit, match=rf"^estimator_study\.py: {said}\.$"):
        call(monkeypatch, tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()
