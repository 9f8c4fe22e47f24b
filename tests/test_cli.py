"""The command line: the common case from the data to the report, and its help."""

import argparse
import json
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import KINDS, SMALL, as_in_a_process_of_its_own, saved, trained

import pyro_vae as pv
from pyro_vae.cli import COMMANDS, main
from pyro_vae.options import parser
from pyro_vae.runs.directory import Run


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own(monkeypatch, tmp_path_factory):
    as_in_a_process_of_its_own(monkeypatch, tmp_path_factory.mktemp("cache"))


# --- the way of the data -------------------------------------------------------------------------


def test_digits_are_trained_judged_sampled_and_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()  # with pictures
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    run = tmp_path / "digits"
    options = ["--latent-dim", "2", "--hidden-dims", "16", "--epochs", "2"]
    assert main(["train", "--data", "digits", "--out", str(run), *options]) == 0
    told = capsys.readouterr()
    assert "digits: 1,297 training, 250 validation and 250 test data of 64 dim" in told.out
    assert "likelihood: binomial, picked for integer levels; choose with --likelihood" in told.out
    records, _ = Run(run).read_metrics()
    best = max(records, key=lambda record: record["valid_elbo"])
    assert (
        f"best validation ELBO {best['valid_elbo']:.3f} nats per datum, epoch {best['epoch']} of 2"
    ) in told.out
    assert f"next: pyro-vae evaluate {run}; pictures: {run / 'report.html'}" in told.out
    assert [line.split()[:2] for line in told.err.splitlines()] == [
        ["epoch", "1/2"],
        ["epoch", "2/2"],
    ]
    assert (run / "manifold.png").is_file()

    assert main(["evaluate", str(run), "--num-particles", "4", "--limit", "20"]) == 0
    told = capsys.readouterr().out
    said = Run(run).read_json("evidence.json")
    assert "log p(x) of 20 data (test)" in told
    row = next(line.split() for line in told.splitlines() if line.startswith("log p(x)  "))
    assert row[2] == f"{said['log_evidence']:.3f}"
    assert row[3] == f"{said['mean_standard_error']:.3f}"
    assert f"{said['bits_per_dim']:.4f} bits per dimension" in told
    model, guide = pv.load(run)
    rows = torch.linspace(0, 249, 20).round().long()
    x = pv.load_data("digits").test[rows]
    assert said["log_evidence"] == pv.log_evidence(model, guide, x, num_particles=4).mean

    assert main(["sample", str(run), "--num", "5", "--draw", "--seed", "3"]) == 0
    assert str(run / "generated.npy") in capsys.readouterr().out
    draws = np.load(run / "generated.npy")
    assert (draws == pv.generate(model, 5, draw=True, seed=3).numpy()).all()
    assert (run / "generated.png").is_file()

    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert (run / "report.html").is_file()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_values_of_an_array_pick_a_likelihood_that_is_a_density(kind, suffix, tmp_path, capsys):
    run = tmp_path / "run"
    args = ["train", "--data", saved(tmp_path, kind, suffix), "--out", str(run), *SMALL]
    assert main(args) == 0
    _, likelihood, values = KINDS[kind]
    picked = f"likelihood: {likelihood}, picked for {values}; choose with --likelihood"
    assert picked in capsys.readouterr().out
    functions = re.findall(r'"function": "families\.(\w+)"', (run / "config.json").read_text())
    assert likelihood in functions
    assert main(["evaluate", str(run), "--num-particles", "3"]) == 0
    assert "log p(x) of 8 data (test)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "kind", "quantity"),
    [
        (["--binarize", "threshold"], "levels", "log p(x)"),
        (["--binarize", "static"], "unit", "log p(x)"),
        (["--binarize", "dynamic"], "bytes", "log p(x)"),
        (["--dequantize"], "levels", "bound on log P(x)"),
        (["--intensities"], "levels", "score"),
    ],
)
def test_data_are_prepared_when_told_and_the_figures_named_for_it(
    options, kind, quantity, tmp_path, capsys
):
    run = trained(tmp_path, *options, kind=kind)
    told = capsys.readouterr()
    name = "score" if quantity == "score" else "ELBO"
    assert f"best validation {name} " in told.out
    assert f"  valid {name} " in told.err
    assert main(["evaluate", str(run), "--num-particles", "3"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{quantity} of 8 data (test)")
    (step,) = Run(run).config["data"]["steps"]
    assert all(line.strip() in told for line in Run(run).config["data"]["preparation"])
    word = options[-1].removeprefix("--")
    assert step[0] == {"threshold": "binarize"}.get(
        word, f"binarize_{word}" if options[0] == "--binarize" else word
    )


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (["--likelihood", "categorical"], "levels"),
        (["--likelihood", "fixed_normal", "--scale", "2"], "real"),
        (["--likelihood", "laplace", "--min-scale", "0.1"], "real"),
        (["--likelihood", "fixed_laplace"], "unit"),
        (["--network", "gated_mlp"], "binary"),
        (["--network", "conv", "--activation", "tanh"], "images"),
        (["--no-analytic-kl", "--num-particles", "2"], "binary"),
        (["--kl-weight", "0.5", "--warmup", "3", "--max-grad-norm", "1"], "binary"),
        (["--cosine", "--learning-rate", "0.01", "--patience", "1", "--seed", "7"], "binary"),
        (["--ema-decay", "0.9"], "binary"),
    ],
)
def test_every_option_can_be_used(options, kind, tmp_path):
    if kind == "images":
        path, run = tmp_path / "images.npy", tmp_path / "run"
        np.save(path, np.random.default_rng(0).integers(0, 2, (80, 8, 8)))
        assert main(["train", "--data", str(path), "--out", str(run), *SMALL, *options]) == 0
    else:
        run = trained(tmp_path, *options, kind=kind)
    command = Run(run).config["notes"]["command"]
    for option, value in zip(options, [*options[1:], ""], strict=True):
        key = option.removeprefix("--").removeprefix("no-").replace("-", "_")
        if option.startswith("--") and not value.startswith("--") and value:
            assert str(command[key]) in (value, f"{value}.0")
    records, _ = Run(run).read_metrics()
    if "--warmup" in options:
        assert [record["kl_weight"] for record in records] == pytest.approx([0.5 / 3, 1 / 3])
    if "--cosine" in options:
        assert records[0]["learning_rate"] == 0.01
        assert records[1]["learning_rate"] == pytest.approx(0.005)


def test_a_run_is_gone_on_with_as_if_it_had_not_stopped(tmp_path, capsys, monkeypatch):
    options = ["--cosine", "--binarize", "dynamic", "--warmup", "3", "--patience", "50"]
    options += ["--epochs", "4"]
    whole = trained(tmp_path, *options, kind="unit")
    step, steps = torch.optim.Adam.step, []

    def interrupted(self: Any, closure: Any = None) -> Any:
        steps.append(1)
        if len(steps) == 6:
            signal.raise_signal(signal.SIGINT)
        return step(self, closure)

    cut = tmp_path / "cut"
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", interrupted)
        data = str(tmp_path / "unit.npy")
        assert main(["train", "--data", data, "--out", str(cut), *SMALL, *options]) == 130
    told = capsys.readouterr().err
    assert f"Go on with resume=True (pyro-vae train --resume {cut})" in told
    assert "Traceback" not in told
    torch.manual_seed(5)
    assert main(["train", "--resume", str(cut)]) == 0
    one, other = (Run(path).load_checkpoint() for path in (whole, cut))
    for role in ("model", "guide"):
        modules = one["parameters"]["modules"][role], other["parameters"]["modules"][role]
        assert all(a.equal(b) for a, b in zip(*(m.values() for m in modules), strict=True))
    columns = [[r["valid_elbo"] for r in state["records"]] for state in (one, other)]
    assert columns[0] == columns[1]


def test_a_finished_run_can_be_made_longer(tmp_path):
    run = trained(tmp_path)
    assert main(["train", "--resume", str(run), "--epochs", "3"]) == 0
    assert [record["epoch"] for record in Run(run).read_metrics()[0]] == [1, 2, 3]
    assert Run(run).config["options"]["epochs"] == 3


def test_what_one_particle_cannot_tell_is_printed_as_nan(tmp_path, capsys):
    run = trained(tmp_path)
    assert main(["evaluate", str(run), "--num-particles", "1", "--limit", "1"]) == 0
    rows = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in rows if line.startswith("log p(x)  "))
    assert row[3:5] == ["nan", "nan"]


def test_samples_go_where_they_are_sent(tmp_path, capsys):
    run = trained(tmp_path)
    out = tmp_path / "mine.npy"
    assert main(["sample", str(run), "--num", "3", "--out", str(out)]) == 0
    assert np.load(out).shape == (3, 9)
    assert out.with_suffix(".png").is_file()
    assert not (run / "generated.npy").exists()
    assert "3 means of p(x|z)" in capsys.readouterr().out


# --- help ----------------------------------------------------------------------------------------


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (a for a in parser(COMMANDS)._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


@pytest.mark.parametrize("command", commands())
def test_every_option_is_in_the_help_with_its_default(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for action in commands()[command]._actions:
        assert action.help, action.dest
        for option in action.option_strings:
            assert option in said
        if action.option_strings and action.default not in (None, argparse.SUPPRESS):
            after = said[said.rindex(f"{action.option_strings[0]} ") :]
            assert f"(default: {action.default})" in after, action.dest


def test_the_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(command in said for command in ("train", "evaluate", "sample", "report"))


# --- the installed command -----------------------------------------------------------------------


def test_the_installed_command_writes_plain_lines_into_a_log_file(tmp_path):
    command = Path(sys.executable).with_name("pyro-vae")
    log, run = tmp_path / "log.txt", tmp_path / "run"
    args = ["train", "--data", saved(tmp_path), "--out", str(run), *SMALL]
    with log.open("wb") as file:
        done = subprocess.run(
            [str(command), *args], stdout=file, stderr=subprocess.STDOUT, check=False
        )
    written = log.read_bytes()
    assert done.returncode == 0, written.decode()
    assert b"\r" not in written
    assert b"\x1b" not in written
    lines = [line for line in written.decode().splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2
    assert (run / "report.html").is_file()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["epoch"] == 2
