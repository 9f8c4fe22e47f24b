"""Trainings of figures 4 and 5: cuts by the budget, divergence, mistakes."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from scripts import figures, runner

import pyro_vae as pv

SCRIPT = Path(__file__).parents[1] / "experiments" / "aevb_manifold.py"
NAMES = runpy.run_path(str(SCRIPT))


run = runner(SCRIPT, "--smoke")


def test_a_cut_by_the_budget_goes_on_where_it_was(monkeypatch, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "cut"
    run(monkeypatch, "--out", str(whole))
    run(monkeypatch, "--budget", "0.00001", "--out", str(out))
    cut = figures(out)
    assert [(row["latent_dim"], row["epochs"]) for row in cut["rows"]] == [(2, 1)]
    assert cut["finished"] is False
    run(monkeypatch, "--out", str(out))
    for found in (expected := figures(whole)), (again := figures(out)):
        assert found["finished"] is True
        for row in found["rows"]:
            del row["seconds_per_epoch"]
    assert again["rows"] == expected["rows"]


def test_what_diverges_gets_a_row_and_stops_no_other(monkeypatch, tmp_path, capsys):
    fit, calls = pv.fit, []

    def diverging(*args: Any, **options: Any) -> Any:
        calls.append(options["out"].name)
        if len(calls) > 1:
            return fit(*args, **options)
        fit(*args, **{**options, "epochs": 1})
        raise pv.DivergedError("the loss is NaN")

    monkeypatch.setattr(pv, "fit", diverging)
    run(monkeypatch, "--out", str(tmp_path / "out"))
    assert "digits, 2 latents, seed 0: the loss is NaN" in capsys.readouterr().out
    found = figures(tmp_path / "out")
    epochs = [(row.get("diverged"), row["epochs"]) for row in found["rows"]]
    assert epochs == [(True, 1), (None, 2), (None, 2)]
    assert found["finished"] is True
    run(monkeypatch, "--out", str(tmp_path / "out"))
    assert len(calls) == 3


@pytest.mark.parametrize("flag", ["--samples", "--budget", "--num-particles", "--size"])
def test_a_number_too_small_is_one_line(monkeypatch, tmp_path, flag):
    monkeypatch.setattr("sys.argv", [SCRIPT.name, "--out", str(tmp_path), flag, "0"])
    with pytest.raises(SystemExit, match=rf"^aevb_manifold\.py: {flag}: expected more than 0"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
