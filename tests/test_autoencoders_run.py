"""From the autoencoder to the VAE, the script: calls that are repeated, cut, or mistaken."""

import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyro_vae as pv

PATH = Path(__file__).parents[1] / "experiments" / "autoencoders.py"
FEW = ["--only", "sparse", "mean field, L2 with its scale"]
FIT = pv.fit
Call = Callable[..., dict[str, Any]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    def of(*options: str, out: str = "run") -> dict[str, Any]:
        words = [PATH.name, "--smoke", "--out", str(tmp_path / out), *options]
        monkeypatch.setattr("sys.argv", words)
        runpy.run_path(str(PATH), run_name="__main__")
        return json.loads((tmp_path / out / "results.json").read_text())

    return of


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)  # takes seconds


def test_a_call_that_is_repeated_trains_nothing_again(call, monkeypatch, tmp_path, capsys):
    figures = call()
    reference, *rows = figures["rows"]
    assert reference["name"] == "training data"
    assert reference["coverage"] > max(row["coverage"] for row in rows)
    for row in rows:
        assert (row["epochs"], row["of_epochs"], row["seed"]) == (2, 2, 0)
        assert math.isfinite(row["reconstruction"])
        if "VAE" in row["name"] or "mean field" in row["name"]:
            assert row["log_evidence"] > row["elbo"]
        else:
            assert row["log_evidence"] in ("no prior", "no bound")
    assert {"data", "networks", "training", "evaluation"} == set(figures["protocol"])
    assert (tmp_path / "run" / "autoencoders.png").stat().st_size > 1000
    assert f"{rows[0]['reconstruction']:.4g}" in capsys.readouterr().out
    monkeypatch.setattr(pv, "fit", None)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    assert call() == figures


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_its_budget_cut_ends_where_an_uncut_one_does_and_takes_more_seeds(call):
    cut = call(*FEW, "--budget", "1e-9")
    assert [row["epochs"] for row in cut["rows"][1:]] == [1, 1]
    resumed, uncut = call(*FEW), call(*FEW, out="uncut")
    for rows in (resumed["rows"], uncut["rows"]):
        for row in rows:
            row.pop("seconds", None)
    assert resumed["rows"] == uncut["rows"]
    more = call("--only", "sparse", "--seeds", "0", "1")
    assert [row.get("seed") for row in more["rows"]] == [None, 0, 0, 1]


@pytest.mark.usefixtures("undrawn")
def test_one_that_is_stopped_while_it_is_judged_is_judged_by_the_next_call(call, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pv, "reconstruct", lambda *_: sys.exit("stopped"))
        with pytest.raises(SystemExit, match="stopped"):
            call("--only", "sparse")
    _, row = call("--only", "sparse")["rows"]
    assert row["epochs"] == row["of_epochs"] == 2


@pytest.mark.usefixtures("undrawn")
def test_one_that_diverges_stops_no_other_and_is_not_tried_again(call, monkeypatch):
    def fit(*pair: Any, **options: Any) -> pv.History:
        if "sparse" in str(options.get("out")):
            raise pv.DivergedError("the loss turned NaN")
        return FIT(*pair, **options)

    monkeypatch.setattr(pv, "fit", fit)
    _, bad, good = call(*FEW)["rows"]
    assert (bad["epochs"], bad["of_epochs"], bad["diverged"], bad["finished"]) == (0, 2, True, True)
    assert good["epochs"] == 2
    monkeypatch.setattr(pv, "fit", None)
    call(*FEW)


@pytest.mark.parametrize(
    ("option", "value", "low"),
    [("latent-dim", 1, 1), ("num-test", 5, 5), ("num-particles", 0, 1), ("budget", 0, 0)],
)
def test_mistakes_end_in_a_line(monkeypatch, tmp_path, option, value, low):
    words = [PATH.name, "--out", str(tmp_path), f"--{option}", str(value)]
    monkeypatch.setattr("sys.argv", words)
    said = rf"^autoencoders\.py: --{option}: expected more than {low}, got {value}(\.0)?\.$"
    with pytest.raises(SystemExit, match=said):
        runpy.run_path(str(PATH), run_name="__main__")


@pytest.mark.usefixtures("undrawn")
def test_figures_of_another_protocol_are_never_added_to(call, tmp_path):
    (tmp_path / "run").mkdir()
    pv.Results(tmp_path / "run" / "results.json", title="Another", protocol={})
    with pytest.raises(SystemExit, match=r"^autoencoders\.py: .* figures of another protocol"):
        call()
