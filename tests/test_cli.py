"""The command line: the common case from the data to the report, and one message for a mistake."""

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
from helpers import TutorialPair, bits

import pyro_vae as pv
from pyro_vae.cli import _parser, main
from pyro_vae.runs.directory import Run

SMALL = ["--latent-dim", "2", "--hidden-dims", "8", "--epochs", "2", "--batch-size", "20"]


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own(monkeypatch, tmp_path_factory):
    """No pictures, which test_pictures looks at; warnings as a user sees them; an empty cache."""
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda *run: None)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    torch.manual_seed(0)


KINDS: dict[str, tuple[Any, str, str]] = {
    "binary": (lambda g: g.integers(0, 2, (80, 9)), "bernoulli", "binary values"),
    "bools": (lambda g: g.random((80, 3, 3)) < 0.5, "bernoulli", "binary values"),
    "levels": (lambda g: g.integers(0, 7, (80, 9)), "binomial", "integer levels"),
    "bytes": (lambda g: g.integers(0, 256, (80, 9), np.uint8), "binomial", "integer levels"),
    "unit": (lambda g: g.random((80, 9)), "normal", "values in [0, 1]"),
    "real": (lambda g: g.normal(3.0, 50.0, (80, 9)), "normal", "real values"),
}


def array(kind: str) -> np.ndarray:
    return KINDS[kind][0](np.random.default_rng(0))


def saved(folder: Path, kind: str = "binary", suffix: str = ".npy") -> str:
    path = folder / f"{kind}{suffix}"
    if suffix == ".npy":
        np.save(path, array(kind))
    else:
        np.savez(path, x=array(kind), labels=np.arange(80) % 4)
    return str(path)


def trained(folder: Path, *options: str, kind: str = "binary") -> Path:
    out = folder / "run"
    assert main(["train", "--data", saved(folder, kind), "--out", str(out), *SMALL, *options]) == 0
    return out


def content(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir()}


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
    assert "log p(x) of 20 data (test), 4 particles each" in told
    assert (
        f"{said['log_evidence']:.3f} nats per datum, +- {said['mean_standard_error']:.3f}" in told
    )
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
    assert "+- nan (estimator) +- nan (test set)" in capsys.readouterr().out


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
    (found,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
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


# --- mistakes ------------------------------------------------------------------------------------


def spoil(name: str, value: bytes) -> Any:
    return lambda folder, run: (run / name).write_bytes(value)


def new_data(array: Any) -> Any:
    return lambda folder, run: np.save(folder / "binary.npy", array)


def nothing(folder: Path, run: Path) -> None:
    """The mistake is in the command itself."""


HALVES = np.eye(80) / 2
NAN = np.where(np.arange(27).reshape(3, 9) == 13, np.nan, 0.5)
OF_TRAINING: dict[str, tuple[list[str], Any, str]] = {
    "no data": (["--data"], None, "train: give --data and --out, or --resume RUN"),
    "an unknown set": (["--data", "digit"], None, "Did you mean 'digits'?"),
    "no file": (["--data", "nowhere.npy"], None, "found none at"),
    "NaN": ([], NAN, "row 1, column 4"),
    "an empty array": ([], np.zeros((0, 9)), "expected at least one datum"),
    "objects": ([], np.array(["a", "b", "c", "d"]), "expected an array of numbers"),
    "negative integers": ([], -np.ones((9, 2), int), "expected integers in 0..65535"),
    "a batch too large": (["--batch-size", "99"], None, "batch_size: 99 is larger than"),
    "no epochs": (["--epochs", "0"], None, "epochs: expected at least 1, got 0"),
    "a likelihood that is none": (
        ["--likelihood", "normal"],
        None,
        "Normal is no density for binary values",
    ),
    "no levels": (["--likelihood", "binomial"], None, "no integer levels; use bernoulli"),
    "two preparations": (["--dequantize", "--intensities"], None, "choose one of --dequantize"),
    "binary data": (["--binarize", "static"], None, "binarize_static: expected integer levels"),
    "no images": (["--network", "conv"], None, "--network conv: the data are no images"),
    "no GPU": (["--device", "cuda:7"], None, "device: 'cuda:7' is not available here"),
    "a negative weight": (["--kl-weight", "-1"], None, "kl_weight: expected weights >= 0"),
    "a negative warm-up": (["--warmup", "-3"], None, "warmup: expected at least one epoch"),
    "no patience": (["--patience", "0"], None, "patience: expected at least 1, got 0"),
    "a rate below zero": (["--learning-rate", "-1"], None, "learning rate"),
    "a scale of zero": (["--likelihood", "fixed_normal", "--scale", "0"], HALVES, "scale"),
}


@pytest.mark.parametrize(("options", "data", "told"), OF_TRAINING.values(), ids=OF_TRAINING)
def test_a_mistake_in_training_is_one_message_and_costs_nothing(
    options: list[str], data, told, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path)
    if data is not None:
        np.save(path, data)
    source = [] if options[:1] == ["--data"] else ["--data", path]
    given = [] if options == ["--data"] else options
    args = ["train", *source, "--out", "run", *SMALL, *given]
    assert main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("pyro-vae: error: ")
    assert told in err
    assert "Traceback" not in err
    with pytest.raises((ValueError, TypeError, OSError)):
        main(["--traceback", *args])
    assert main(["train", "--data", saved(tmp_path), "--out", "run", *SMALL]) == 0


OF_RUNS: dict[str, tuple[list[str], Any, str]] = {
    "not empty": (
        ["train", "--data", "DATA", "--out", "RUN", "--batch-size", "20"],
        nothing,
        "exists and is not empty; give another directory, or go on",
    ),
    "resume with options": (
        ["train", "--resume", "RUN", "--batch-size", "7", "--cosine"],
        nothing,
        "only --epochs may be given with it, leave out --batch-size, --cosine",
    ),
    "resume nothing": (["train", "--resume", "FOLDER"], nothing, "is no run directory"),
    "evaluate nothing": (["evaluate", "FOLDER"], nothing, "is no run directory"),
    "sample nothing": (["sample", "FOLDER"], nothing, "is no run directory"),
    "report nothing": (["report", "FOLDER"], nothing, "is no run directory"),
    "config": (["report", "RUN"], spoil("config.json", b"{"), "config.json is damaged"),
    "config of another": (["evaluate", "RUN"], spoil("config.json", b"{}"), "config.json"),
    "config for resuming": (
        ["train", "--resume", "RUN"],
        spoil("config.json", b"{"),
        "config.json is damaged",
    ),
    "checkpoint": (["evaluate", "RUN"], spoil("checkpoint.pt", b"PK"), "checkpoint.pt can't be"),
    "checkpoint for resuming": (
        ["train", "--resume", "RUN", "--epochs", "3"],
        spoil("checkpoint.pt", b""),
        "checkpoint.pt can't be loaded",
    ),
    "examples": (["report", "RUN"], spoil("examples.npz", b"PK"), "examples.npz is damaged"),
    "changed data": (
        ["evaluate", "RUN"],
        new_data(1 - array("binary")),
        "binary has changed since",
    ),
    "changed data for resuming": (
        ["train", "--resume", "RUN", "--epochs", "3"],
        new_data(1 - array("binary")),
        "the run was started with other data",
    ),
    "lost data": (
        ["evaluate", "RUN"],
        lambda folder, run: (folder / "binary.npy").unlink(),
        "found none at",
    ),
    "narrow data": (
        ["evaluate", "RUN", "--data", "DATA"],
        new_data(array("binary")[:, :8]),
        "expected input of shape (*batch, 9), got",
    ),
    "particles": (["evaluate", "RUN", "--num-particles", "0"], nothing, "num_particles: expected"),
    "limit": (["evaluate", "RUN", "--limit", "0"], nothing, "limit: expected at least 1 datum"),
    "device": (["evaluate", "RUN", "--device", "tpu"], nothing, "device: 'tpu' is not available"),
    "out": (["sample", "RUN", "--out", "mine.txt"], nothing, "--out: expected a path that ends in"),
    "out's folder": (["sample", "RUN", "--out", "no/mine.npy"], nothing, "no/mine.npy"),
}


@pytest.mark.parametrize(("command", "spoiling", "told"), OF_RUNS.values(), ids=OF_RUNS)
def test_a_mistake_with_a_run_is_one_message_and_changes_nothing(
    command: list[str], spoiling, told, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run = trained(tmp_path)
    spoiling(tmp_path, run)
    words = {"RUN": str(run), "FOLDER": str(tmp_path), "DATA": str(tmp_path / "binary.npy")}
    args: list[str] = [words.get(word, word) for word in command]
    before = content(run)
    capsys.readouterr()
    assert main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("pyro-vae: error: ")
    assert told in err
    assert before.items() <= content(run).items()
    with pytest.raises((ValueError, TypeError, OSError)):
        main(["--traceback", *args])


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["judge"],
        ["train", "--likelihood", "poisson"],
        ["train", "--epochs", "many"],
        ["train", "--latent-dim", "0"],
        ["train", "--hidden-dims", "8", "-1"],
        ["train", "--num-particles", "0"],
        ["sample", "RUN", "--num", "0"],
        ["evaluate", "RUN", "--part", "tset"],
    ],
)
def test_words_that_are_unknown_are_refused_with_the_usage(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: pyro-vae")


def test_a_run_that_python_started_is_gone_on_with_in_python(tmp_path, capsys):
    foreign, run = TutorialPair(), tmp_path / "run"
    pv.fit(foreign.model, foreign.guide, bits(40), epochs=1, batch_size=20, progress=False, out=run)
    assert main(["train", "--resume", str(run)]) == 2
    assert "was not started by pyro-vae train" in capsys.readouterr().err
    assert main(["evaluate", str(run)]) == 2
    assert main(["sample", str(run)]) == 2
    assert "build it as before and pass model= and guide=" in capsys.readouterr().err


def test_a_training_that_diverges_has_a_status_of_its_own(tmp_path, capsys):
    run = tmp_path / "run"
    args = ["train", "--data", saved(tmp_path, "real"), "--out", str(run), *SMALL]
    assert main([*args, "--learning-rate", "1e30"]) == 1
    err = capsys.readouterr().err
    assert "pyro-vae: error: the loss turned NaN or infinite in epoch 1, step" in err
    assert "site '" in err
    assert "Traceback" not in err
    with pytest.raises(pv.DivergedError):
        main(["--traceback", *args[:4], str(tmp_path / "other"), *SMALL, "--learning-rate", "1e30"])


def test_a_bare_ctrl_c_says_something(tmp_path, capsys, monkeypatch):
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pv, "load_data", stop)
    assert main(["train", "--data", "digits", "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "\npyro-vae: stopped\n"


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
