"""Every experiment runs from beginning to end, and is a script that a reader can copy."""

import ast
import json
import math
import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

import pyro_vae as pv

FOLDER = Path(__file__).parents[1] / "experiments"
SCRIPTS = sorted(FOLDER.glob("*.py"))
DATA = os.environ.get("PYRO_VAE_DATA")
# Those that read a folder of data; the others have theirs from scikit-learn.
NEEDS_DATA = {"binarized_mnist"}
# Those that make pages of other experiments' figures.
NO_TRAINING = {"tables"}
# Those that train several swaps and end in a comparison.
COMPARING = {"guides", "likelihoods", "priors"}
COMPARISONS = [path for path in SCRIPTS if path.stem in COMPARING]
# Those with tests of their own below.
OF_THEIR_OWN = {"full_bayes"}
EXPERIMENTS = [path for path in SCRIPTS if path.stem not in NO_TRAINING | COMPARING | OF_THEIR_OWN]


def names(scripts: list[Path]) -> list[str]:
    return [path.stem for path in scripts]


def run(script: Path, monkeypatch: pytest.MonkeyPatch, *args: str) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", [script.name, *args])
    return runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_a_script_uses_the_public_names_only(script):
    imported = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a script that is copied has no package around it"
            imported.add(node.module or "")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "pv" or node.attr in pv.__all__, node.attr
    ours = {name for name in imported if name.split(".")[0] in ("pyro_vae", "experiments", "tests")}
    assert ours <= {"pyro_vae"}


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_a_script_says_what_it_is_and_how_it_is_called(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(script, monkeypatch, "--help")
    assert stop.value.code == 0
    assert f"python experiments/{script.name}" in capsys.readouterr().out


@pytest.mark.parametrize("script", EXPERIMENTS, ids=names(EXPERIMENTS))
def test_an_experiment_runs_and_leaves_its_figures(script, monkeypatch, tmp_path, capsys):
    out = tmp_path / "run"
    args = ["--smoke", "--out", str(out)]
    if script.stem in NEEDS_DATA:
        if DATA is None:
            pytest.skip("PYRO_VAE_DATA names no folder")
        args += ["--root", DATA]
    run(script, monkeypatch, *args)
    said = capsys.readouterr().out
    figures = json.loads((out / "results.json").read_text())
    assert math.isfinite(figures["log_evidence"])
    assert figures["log_evidence"] >= figures["elbo"]
    for key in ("mean_standard_error", "sampling_error", "train_seconds"):
        assert figures[key] > 0
    assert {"num_particles", "num_test", "epochs", "seed", "protocol"} <= set(figures)
    assert f"{figures['log_evidence']:.3f}" in said
    assert str(out / "report.html") in said
    assert (out / "report.html").is_file()


@pytest.mark.parametrize("script", COMPARISONS, ids=names(COMPARISONS))
def test_a_comparison_runs_and_leaves_its_figures(script, monkeypatch, tmp_path, capsys):
    out = tmp_path / "runs"
    run(script, monkeypatch, "--smoke", "--out", str(out))
    said = capsys.readouterr().out
    figures = json.loads((out / "results.json").read_text())
    assert len(figures["rows"]) >= 5
    for row in figures["rows"]:
        assert row["log_evidence"] >= row["elbo"]
        assert row["name"] in said
        assert f"{row['log_evidence']:.2f}" in said
    assert all(row["difference_error"] > 0 for row in figures["rows"][1:])
    assert {"title", "protocol", "machine", "baseline"} <= set(figures)
    assert (out / "comparison.png").is_file()
    assert str(out / "results.json") in said


def test_full_bayes_compares_all_ways_on_every_number_of_data(monkeypatch, tmp_path, capsys):
    out = tmp_path / "run"
    run(FOLDER / "full_bayes.py", monkeypatch, "--smoke", "--out", str(out))
    figures = json.loads((out / "results.json").read_text())
    assert [row["num_train"] for row in figures["rows"]] == [25, 50]
    for row in figures["rows"]:
        assert row["bound"] <= row["tighter_bound"]
        for way in ("full", "point", "stopped"):
            assert math.isfinite(row[way]["log_density"])
            assert row[way]["mean_standard_error"] > 0
        gain = row["full"]["log_density"] - row["point"]["log_density"]
        assert row["point"]["full_minus_this"] == pytest.approx(gain)
    assert {"protocol", "seed", "num_test", "num_global", "num_particles"} <= set(figures)
    said = capsys.readouterr().out
    assert f"| 50 | {figures['rows'][1]['bound']:.2f} +- " in said
    assert (out / "full_bayes.png").stat().st_size > 1000


def test_the_pair_for_binarized_mnist_is_trained_and_judged_on_any_bits():
    script = runpy.run_path(str(FOLDER / "binarized_mnist.py"))
    model, guide = script["build"](3, (5, 4))
    # On data that are one image again and again, what is learned is seen within a few steps.
    x = torch.rand(1, 784).round().repeat(40, 1)
    history = pv.fit(
        model,
        guide,
        x,
        loss=TraceMeanField_ELBO(),
        optimizer=lambda params: torch.optim.Adam(params, lr=0.01),
        epochs=5,
        batch_size=10,
        progress=False,
    )
    assert history["elbo"][0] == pytest.approx(-784 * math.log(2), rel=0.1)
    assert history["elbo"][-1] > history["elbo"][0] + 50
    weights = pv.log_weights(model, guide, x[:7], num_particles=13)
    assert weights.shape == (13, 7)
    assert pv.encode(guide, x[:7]).event_shape == (3,)


def test_the_pair_for_the_digits_is_over_levels():
    script = runpy.run_path(str(FOLDER / "digits.py"))
    model, guide = script["build"](2)
    data = pv.load_data("digits")
    x = data.test[:7]
    assert pv.reconstruct(model, guide, x, draw=True).max() <= 16
    data.check_likelihood(pv.decode(model, torch.zeros(1, 2)), "x")
    assert pv.log_weights(model, guide, x, num_particles=2).shape == (2, 7)
