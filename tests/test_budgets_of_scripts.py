"""Budgets of experiments: of the clock, training and judging together, shared by what is left."""

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import pytest

import pyro_vae as pv

FOLDER = Path(__file__).parents[1] / "experiments"


@pytest.mark.parametrize(
    ("script", "judge", "options"),
    [
        ("autoencoders", "encode", ["--only", "sparse", "VAE, BCE"]),
        ("neural_nets", "log_evidence", []),
        ("autoregressive", "evaluate_run", ["--models", "autoregressive", "latents"]),
    ],
)
def test_judging_is_charged_to_the_budget(monkeypatch, tmp_path, script, judge, options):
    """Ten minutes for two: five for the first; judging it takes four, and six are left."""
    clock, given = [1000.0], []
    fit, judged = pv.fit, getattr(pv, judge)
    find = importlib.util.find_spec

    def fitted(*pair: Any, **said: Any) -> pv.History:
        given.append(said["max_seconds"])
        return fit(*pair, **said)

    def slowly(*args: Any, **said: Any) -> Any:
        clock[0] = 1240.0
        return judged(*args, **said)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *of: None if name == "jax" else find(name, *of)
    )
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(pv, "fit", fitted)
    monkeypatch.setattr(pv, judge, slowly)
    words = [f"{script}.py", "--smoke", "--out", str(tmp_path), "--budget", "10", *options]
    monkeypatch.setattr("sys.argv", words)
    runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
    assert given == [300.0, 360.0]
