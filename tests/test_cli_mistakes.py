"""Mistakes on the command line: one message each, and nothing is lost."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import SMALL, array, as_in_a_process_of_its_own, saved, trained
from helpers import TutorialPair, bits

import pyro_vae as pv
from pyro_vae.cli import main


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own(monkeypatch, tmp_path_factory):
    as_in_a_process_of_its_own(monkeypatch, tmp_path_factory.mktemp("cache"))


def content(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir()}


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
    "no averages": (["--ema-decay", "1"], None, "ema_decay: expected at least 0 and less than 1"),
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
        ["train", "--batch-size", "0"],
        ["evaluate", "RUN", "--num-particles", "0"],
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
