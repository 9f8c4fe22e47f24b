"""What a judged run says of the trust that it deserves: in its files, its report, and printed."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import bernoulli_pair, bits

import pyro_vae as pv
from pyro_vae import cli
from pyro_vae.runs.report import write_report

X = bits(40)
EVALUATE = partial(pv.evaluate_run, data=X, progress=False)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda *run: None)
    folder = tmp_path / "run"
    pv.fit(*bernoulli_pair(), X, epochs=1, batch_size=20, out=folder, progress=False)
    return folder


def test_the_files_hold_k_per_datum_and_what_to_do(run):
    estimate = EVALUATE(run, num_particles=100)
    assert estimate.pareto_k is not None
    with np.load(run / "evidence.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["pareto_k"], estimate.pareto_k.numpy())
    said = json.loads((run / "evidence.json").read_text())
    assert said["untrusted"] == estimate.untrusted
    assert said["advice"] == estimate.advice
    assert said["kind"] == estimate.kind == "weighting, and annealing where it fails"
    assert EVALUATE(num_particles=100, run=run, budget=0.0).kind == "importance weighting"


def test_the_page_warns_of_data_that_are_not_to_be_trusted(run):
    assert EVALUATE(run, num_particles=1).untrusted == 1
    page = (run / "report.html").read_text()
    assert '<p class="note">40 of 40 data can&#x27;t be trusted to weighting' in page
    said = json.loads((run / "evidence.json").read_text())
    trusted = {**said, "untrusted": 0.0, "advice": "The error bars of all 40 data can be trusted."}
    (run / "evidence.json").write_text(json.dumps(trusted))
    page = write_report(run).read_text()
    assert 'class="note"' not in page
    assert trusted["advice"] in page  # among all that the evaluation left


def test_the_command_line_prints_it(run, capsys, tmp_path):
    saved = tmp_path / "data.npy"
    np.save(saved, X.numpy())
    data = pv.load_data(saved)
    pv.fit(*bernoulli_pair(), data, epochs=1, batch_size=20, out=tmp_path / "own", progress=False)
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "own"), "--num-particles", "100"]) == 0
    said = json.loads((tmp_path / "own" / "evidence.json").read_text())
    assert said["advice"] in capsys.readouterr().out


def test_figures_from_before_there_was_a_k_are_still_compared(run, tmp_path):
    EVALUATE(run, num_particles=100)
    with np.load(run / "evidence.npz", allow_pickle=False) as file:
        old = {name: file[name] for name in file.files if name != "pareto_k"}
    np.savez(run / "evidence.npz", **old)
    path = run / "evidence.json"
    said = json.loads(path.read_text())
    new = ("kind", "untrusted", "advice")
    path.write_text(json.dumps({key: said[key] for key in said if key not in new}))
    found = pv.compare_runs({"a": run, "b": run})
    assert found.differences["b"].mean == 0
    assert found.estimates["a"].pareto_k is None
    path.write_text(json.dumps({**said, "kind": "annealing"}))
    assert torch.equal(
        pv.compare_runs({"a": run, "b": run}).estimates["b"].value, found.estimates["b"].value
    )
    assert pv.compare_runs({"a": run, "b": run}).estimates["a"].kind == "annealing"
