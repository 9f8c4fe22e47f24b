"""Every experiment runs from beginning to end, and is a script that a reader can copy."""

import ast
import json
import math
import os
import runpy
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from sklearn.metrics import roc_auc_score

import pyro_vae as pv

FOLDER = Path(__file__).parents[1] / "experiments"
SCRIPTS = sorted(FOLDER.glob("*.py"))
DATA = os.environ.get("PYRO_VAE_DATA")
# Those that read a folder of data; the others have theirs from scikit-learn.
NEEDS_DATA = {"binarized_mnist"}
# Those that train one pair and judge it.
SINGLE = {"binarized_mnist", "conditional", "digits", "hierarchies", "semi_supervised"}
# Those that train several swaps and end in a comparison. All others have tests of their own.
COMPARING = {"guides", "likelihoods", "priors"}
COMPARISONS = [path for path in SCRIPTS if path.stem in COMPARING]
EXPERIMENTS = [path for path in SCRIPTS if path.stem in SINGLE]

READING = [path for path in SCRIPTS if '"--root"' in path.read_text() and path.stem != "everything"]


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


@pytest.mark.parametrize("script", READING, ids=names(READING))
def test_a_data_set_that_is_missing_is_said_without_a_traceback(script, monkeypatch, tmp_path):
    args = ["--root", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    if script.stem not in NEEDS_DATA:
        bits = '"binarized_mnist"' in script.read_text()
        args += ["--data", "binarized_mnist" if bits else "mnist"]
    with pytest.raises(SystemExit, match=rf"^{script.name}: .*{tmp_path / 'nowhere'}"):
        run(script, monkeypatch, *args)


@pytest.mark.parametrize("script", EXPERIMENTS, ids=names(EXPERIMENTS))
def test_a_folder_that_is_none_is_said_in_a_line(script, monkeypatch, tmp_path):
    if script.stem in NEEDS_DATA:
        pytest.skip("its data come first")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=rf"^{script.name}: .*{tmp_path / 'file'}"):
        run(script, monkeypatch, "--smoke", "--out", str(tmp_path / "file"))


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
    assert (out / f"{script.stem}.png").is_file()
    assert all(row["epochs"] == row["of_epochs"] == 2 for row in figures["rows"])
    assert str(out / "results.json") in said


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


def test_annealing_judges_in_every_way(monkeypatch, tmp_path, capsys):
    out = tmp_path / "runs"
    run(FOLDER / "annealing.py", monkeypatch, "--smoke", "--out", str(out))
    figures = json.loads((out / "results.json").read_text())
    rows = {row["name"]: row for row in figures["rows"]}
    speed = rows.pop("gradients")
    nats = {name: row["nats per datum"]["value"] for name, row in rows.items()}
    assert all(map(math.isfinite, nats.values()))
    assert all(row["nats per datum"]["standard_error"] > 0 for row in rows.values())
    gained = nats["more than importance weighting"]
    assert gained == pytest.approx(nats["annealing from the guide"] - nats["importance weighting"])
    gap = nats["annealing from the guide"] - rows["importance weighting"]["elbo"]
    assert nats["approximation gap"] + nats["amortization gap"] == pytest.approx(gap, abs=0.3)
    assert speed["share_of_the_products_alone"] > 0
    # Called again, it has nothing to do.
    monkeypatch.setattr("pyro_vae.bidirectional", None)
    run(FOLDER / "annealing.py", monkeypatch, "--smoke", "--out", str(out))
    assert json.loads((out / "results.json").read_text()) == figures
    assert {"title", "protocol", "machine"} <= set(figures)
    assert str(out / "results.json") in capsys.readouterr().out


def test_likelihoods_are_annealed_where_that_is_asked_for(monkeypatch, tmp_path):
    out = tmp_path / "runs"
    few = ["--anneal", "3", "--annealed", "4", "--num-chains", "2", "--leapfrog-steps", "1"]
    only = ["--only", "discretized logistic", "binomial"]
    run(FOLDER / "likelihoods.py", monkeypatch, "--smoke", "--out", str(out), *few, *only)
    figures = json.loads((out / "results.json").read_text())
    annealed = figures["annealed"]
    best = max(figures["rows"], key=lambda row: row["log_evidence"])
    assert annealed["name"] == best["name"]
    assert annealed["num_data"] == 4
    assert annealed["bits_per_dim"] == pytest.approx(-annealed["log_evidence"] / (64 * math.log(2)))


def test_foreign_images_are_told_apart_by_every_score(monkeypatch, tmp_path, capsys):
    out = tmp_path / "run"
    run(FOLDER / "out_of_distribution.py", monkeypatch, "--smoke", "--out", str(out))
    figures = json.loads((out / "results.json").read_text())
    own, *foreign = figures["sets"]
    made = ["mirrored", "inverted", "shuffled pixels", "noise", "empty"]
    names = ["unseen class (1)", "black and white", *made]
    assert own["name"] == "held-out data"
    assert [row["name"] for row in foreign] == names
    for row in foreign:
        assert set(row["auroc"]) == {"likelihood", "typicality", "complexity", "ratio"}
        for area in row["auroc"].values():
            assert 0 <= area["value"] <= 1
            assert 0 <= area["standard_error"] < 0.2
    codes = {row["name"]: row["code_bits"] for row in figures["sets"]}
    assert codes["empty"] < codes["black and white"] < codes["held-out data"] < codes["noise"]
    assert "without the images of class 1" in figures["protocol"]["data"]
    assert {"protocol", "seed", "num_particles", "log_evidence_train"} <= set(figures)
    said = capsys.readouterr().out
    assert f"| empty | {foreign[-1]['log_evidence']:.1f} |" in said
    assert (out / "out_of_distribution.png").stat().st_size > 1000


def test_the_area_under_the_curve_is_that_of_scikit_learn():
    script = runpy.run_path(str(FOLDER / "out_of_distribution.py"))
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(200, generator=generator).mul(3).round()  # with ties
    foreign = torch.randn(150, generator=generator).mul(3).round() + 2
    labels = torch.cat([torch.zeros(200), torch.ones(150)])
    expected = roc_auc_score(labels.numpy(), torch.cat([own, foreign]).numpy())
    area = script["auroc"](own, foreign)
    assert area["value"] == pytest.approx(expected, rel=1e-12)
    # Its error against that of repetitions.
    repeated = [
        script["auroc"](torch.randn(60), torch.randn(40) + 1)["value"] for _ in range(1_000)
    ]
    said = script["auroc"](torch.randn(60), torch.randn(40) + 1)["standard_error"]
    assert said == pytest.approx(torch.tensor(repeated).std().item(), rel=0.3)


def test_the_code_of_an_image_can_be_read_back():
    """The bits that a code needs, against zlib's own reading of it."""
    script = runpy.run_path(str(FOLDER / "out_of_distribution.py"))
    x = torch.randint(0, 2, (5, 64)).float()
    for row in x:
        packed = script["_packed"](row.to(torch.int64))
        assert len(packed) == 8
        raw = zlib.decompress(script["_deflated"](packed), wbits=-15)
        bits = [(byte >> i) & 1 for byte in raw for i in range(8)]
        assert bits == row.int().tolist()
    lengths = script["code_length"](x, (8, 8), 1)
    assert (lengths >= 64).all()  # nobody codes noise in less
    smooth = torch.arange(64).float().div(4).floor().unsqueeze(0)
    assert script["code_length"](smooth, (8, 8), 16) < 8 * 64
