"""Rows of figure 2: their errors, cuts by the budget, divergence, and mistakes."""

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scripts import figures, runner

import pyro_vae as pv

SCRIPT = Path(__file__).parents[1] / "experiments" / "aevb_bound.py"
NAMES = runpy.run_path(str(SCRIPT))


run = runner(SCRIPT, "--smoke")
MANIFOLD = runpy.run_path(str(SCRIPT.with_stem("aevb_manifold")))
EACH = pytest.mark.parametrize(("names", "kinds"), [(NAMES, "PANELS"), (MANIFOLD, "KINDS")])


@EACH
def test_the_decoder_of_greys_is_a_normal_by_its_log_variance(names, kinds):
    params = torch.tensor([[[0.3, -1.0], [0.8, -2.0]]])  # means before the sigmoid, log-variances
    x = torch.tensor([[0.1, 0.9]])
    loc, log_variance = 1 / (1 + torch.exp(-params[:, 0])), params[:, 1]
    by_hand = -0.5 * (math.log(2 * math.pi) + log_variance + (x - loc) ** 2 / log_variance.exp())
    found = names["sigmoid_normal"](params)
    torch.testing.assert_close(found.log_prob(x), by_hand.sum(-1))


@EACH
def test_initial_weights_have_a_variance_of_a_hundredth(names, kinds):
    model, guide = names["build"](names[kinds]["digits"], 64, 5, 100, seed=0)
    weights = torch.cat([p.flatten() for p in (*model.parameters(), *guide.parameters())])
    assert weights.var().item() == pytest.approx(0.01, rel=5 * (2 / len(weights)) ** 0.5)
    assert weights.mean().abs() < 5 * 0.1 / len(weights) ** 0.5


def test_the_advantage_is_taken_where_the_shorter_curve_ends():
    rows: list[dict[str, Any]] = [
        {"name": f"d, 2 latents, {method}, seed 0", "method": method}
        | {f"{part}_bound": {"value": 0.0, "sampling_error": e} for part in ("train", "test")}
        for method, e in (("AEVB", 0.3), ("wake-sleep", 0.4))
    ]
    curves = {
        rows[0]["name"]: {"samples": [1, 2, 4], "train": [1.0, 5.0, 9.0], "test": [0.0, 4.0, 8.0]},
        rows[1]["name"]: {"samples": [1, 3], "train": [0.0, 2.0], "test": [0.0, 1.0]},
    }
    found = NAMES["advantages"](rows, curves)[rows[0]["name"]]
    assert found["train"] == {"value": 5.0, "standard_error": pytest.approx(0.5)}
    assert found["test"]["value"] == 5.0
    assert NAMES["advantages"]([rows[0], {**rows[1], "diverged": True}], curves) == {}


def test_grey_levels_can_be_given_to_a_bernoulli_as_in_the_paper(monkeypatch, tmp_path):
    run(monkeypatch, "--intensities", "--methods", "AEVB", "--out", str(tmp_path / "out"))
    (row,) = figures(tmp_path / "out")["rows"]
    assert row["data"] == "digits"
    assert row["variance_gain"]["standard_error"] > 0


def test_a_cut_by_the_budget_changes_nothing(monkeypatch, tmp_path):
    """Also: what was finished is not trained again, and the machine is that of the last call."""
    out = tmp_path / "cut"
    one = ["--methods", "AEVB"]
    run(monkeypatch, *one, "--out", str(tmp_path / "whole"))
    run(monkeypatch, *one, "--budget", "0.00001", "--out", str(out))
    cut = figures(out)
    assert ([row["epochs"] for row in cut["rows"]], cut["finished"]) == ([1], False)
    cut["rows"][0]["machine"] = {"processor": "another", "cores": 1, "device": "cpu"}
    (out / "results.json").write_text(json.dumps(cut))
    run(monkeypatch, *one, "--out", str(out))
    whole, again = figures(tmp_path / "whole"), figures(out)
    for found in (whole, again):
        del found["rows"][0]["seconds_per_epoch"]
    assert again["finished"] is True
    assert [again[key] for key in ("rows", "curves", "gradient_variance")] == [
        whole[key] for key in ("rows", "curves", "gradient_variance")
    ]
    monkeypatch.setattr(pv, "fit", None)
    run(monkeypatch, *one, "--out", str(tmp_path / "whole"))


def test_what_diverges_gets_a_row_and_stops_no_other(monkeypatch, tmp_path, capsys):
    fit = pv.fit

    def diverging(*args: Any, **options: Any) -> Any:
        if isinstance(options["loss"], pv.WakeSleep):
            return fit(*args, **options)
        fit(*args, **{**options, "epochs": 1})
        raise pv.DivergedError("the loss is NaN")

    monkeypatch.setattr(pv, "fit", diverging)
    run(monkeypatch, "--out", str(tmp_path / "out"))
    assert "AEVB, seed 0: the loss is NaN" in capsys.readouterr().out
    found = figures(tmp_path / "out")
    assert [(row.get("diverged"), row["epochs"]) for row in found["rows"]] == [
        (True, 1),
        (True, 1),
        (None, 2),
    ]
    assert found["finished"] is True
    assert found["above_wake_sleep"] == {}
    assert (tmp_path / "out" / "aevb_bound.png").is_file()
    monkeypatch.setattr(pv, "fit", None)
    run(monkeypatch, "--out", str(tmp_path / "out"))


def test_a_step_at_which_the_pilot_breaks_is_not_chosen(monkeypatch, tmp_path):
    """Wake-sleep's dreams refuse NaN; the step that breaks stands between two that don't."""
    steps = ["--steps", "0.01", "inf", "0.02", "--methods", "wake-sleep"]
    run(monkeypatch, "--intensities", *steps, "--out", str(tmp_path))
    (row,) = figures(tmp_path)["rows"]
    assert row["step"] in (0.01, 0.02)
    assert row["epochs"] == 2


def test_dreams_that_break_are_a_row_that_diverged(monkeypatch, tmp_path, capsys):
    wanted = ["--intensities", "--steps", "inf", "--methods", "wake-sleep", "AEVB"]
    run(monkeypatch, *wanted, "--out", str(tmp_path))
    assert capsys.readouterr().out.count("was not finite any more") == 2
    assert [row["diverged"] for row in figures(tmp_path)["rows"]] == [True] * 2


@pytest.mark.parametrize("flag", ["--epochs", "--pilot", "--budget", "--draws", "--hidden"])
def test_a_number_too_small_is_one_line(monkeypatch, tmp_path, flag):
    monkeypatch.setattr("sys.argv", [SCRIPT.name, "--out", str(tmp_path), flag, "0"])
    with pytest.raises(SystemExit, match=rf"^aevb_bound\.py: {flag}: expected at least .*, got 0"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_error_of_a_bound_is_that_of_its_draws_and_data():
    """Log-weights N(z, 1) with z ~ N(0, 2^2) over data: errors 1 and sqrt(5), over sqrt(size)."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(4000, 1, generator=generator)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.factor("x", z + x[:, 0])

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    found = NAMES["with_errors"](3.0, model, guide, x, 100)
    assert found == {
        "value": 3.0,
        "standard_error": pytest.approx(0.1, rel=0.1),
        "sampling_error": pytest.approx(0.05**0.5, rel=0.1),
    }
