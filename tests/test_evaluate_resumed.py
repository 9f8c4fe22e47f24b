"""The evaluation of a run: annealed where it has to be, resumed where it was killed, and drawn."""

import json
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from helpers import bernoulli_latents
from test_evaluation import TINY, hard_pair
from torch import Tensor

import pyro_vae as pv
from pyro_vae import cli
from pyro_vae.runs.arrays import ArrayFolder
from pyro_vae.runs.report import write_report
from pyro_vae.runs.trust import trust

EVALUATE = partial(pv.evaluate_run, num_particles=50, budget=1e6, progress=False, **TINY)


def trained(model: Any, guide: Any, x: Tensor, out: Path, loss: Any = None) -> dict[str, Any]:
    """A run whose parameters stay what they were; what it needs to be judged."""
    options: dict[str, Any] = {"epochs": 1, "batch_size": len(x), "loss": loss}
    still = partial(torch.optim.SGD, lr=0.0)
    pv.fit(model, guide, x, optimizer=still, out=out, pictures=False, progress=False, **options)
    return {"run": out, "data": x, "model": model, "guide": guide}


@pytest.fixture
def hard(tmp_path) -> dict[str, Any]:
    pair, guide, x = hard_pair(120)

    def learned(x: Tensor) -> None:
        shift = pyro.param("shift", torch.zeros(()))
        pair.model(x + shift)

    return trained(learned, guide, x, tmp_path / "run")


def test_a_run_is_evaluated_as_its_pair_is(hard):
    found = EVALUATE(**hard)
    assert found.annealed is not None
    direct = pv.evaluate(
        hard["model"], hard["guide"], hard["data"], num_particles=50, budget=1e6, **TINY
    )
    assert found.value.equal(direct.value)
    said = json.loads((hard["run"] / "evidence.json").read_text())
    assert said["log_evidence"] == found.mean
    assert said["num_annealed"] == len(found.rows)
    assert said["mean_standard_error"] == found.mean_standard_error
    with np.load(hard["run"] / "evidence.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["value"], found.value.numpy())
        np.testing.assert_array_equal(file["annealed_rows"], found.rows.numpy())
    assert (hard["run"] / "trust.png").stat().st_size > 1000
    page = write_report(hard["run"]).read_text()
    assert "What of it can be trusted" in page
    assert "were annealed" in page


def test_its_epochs_are_those_of_the_parameters_that_are_judged(hard):
    """A training that was killed between its two files has told of an epoch that it lost."""
    metrics = hard["run"] / "metrics.jsonl"
    (line,) = metrics.read_text().splitlines()
    lost = line.replace('"epoch": 1', '"epoch": 2')
    assert lost != line
    metrics.write_text(f"{line}\n{lost}\n")
    EVALUATE(**hard, limit=3)
    assert json.loads((hard["run"] / "evidence.json").read_text())["epochs"] == 1


def test_two_runs_are_compared_by_the_errors_that_were_found(hard, tmp_path):
    options: dict[str, Any] = {"num_particles": 50, "budget": 3.0, "progress": False, **TINY}
    found = pv.evaluate_run(**hard, **options)
    assert found.shared_error > 0
    compared = pv.compare_runs({"a": hard["run"], "b": hard["run"]})
    assert compared.estimates["a"].mean_standard_error == found.mean_standard_error
    assert compared.estimates["a"].shared_error == found.shared_error
    assert compared.differences["b"].estimator_error == pytest.approx(
        2**0.5 * found.mean_standard_error
    )


def test_a_killed_evaluation_of_a_run_goes_on(hard, monkeypatch):
    never_stopped = EVALUATE(**hard)
    for file in (hard["run"] / "evaluation").iterdir():
        file.unlink()
    write = ArrayFolder.__setitem__

    def once(self: ArrayFolder, key: str, value: Tensor) -> None:
        write(self, key, value)
        if key.startswith("weights") and key.endswith("-0"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ArrayFolder, "__setitem__", once)
        with pytest.raises(KeyboardInterrupt, match=r"kept in .*evaluation, and the same call"):
            EVALUATE(**hard)
    files = sorted((hard["run"] / "evaluation").glob("weights-*-0.npy"))
    written = files[0].stat().st_mtime_ns
    resumed = EVALUATE(**hard)
    assert files[0].stat().st_mtime_ns == written
    assert resumed.value.equal(never_stopped.value)
    seconds = json.loads((hard["run"] / "evidence.json").read_text())["seconds"]
    EVALUATE(**hard)  # nothing is left to do, and what it took is still said
    assert json.loads((hard["run"] / "evidence.json").read_text())["seconds"] > seconds
    # A damaged block is computed again; blocks of other options are beside it.
    files[0].write_bytes(b"no array")
    assert EVALUATE(**hard).value.equal(never_stopped.value)
    before = set((hard["run"] / "evaluation").glob("*-*"))
    EVALUATE(**hard, seed=5)
    assert before < set((hard["run"] / "evaluation").glob("*-*"))


def test_a_full_disk_does_not_stop_an_evaluation(tmp_path):
    folder = ArrayFolder(tmp_path / "file")
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match=r"The evaluation goes on"):
        folder["a"] = torch.zeros(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, not for each block
        folder["b"] = torch.zeros(3)
    assert "a" not in folder
    assert dict(folder) == {}


def test_a_block_with_a_single_damaged_byte_is_none(tmp_path):
    ArrayFolder(tmp_path)["a"] = torch.arange(6.0).reshape(2, 3)
    file = tmp_path / "a.npy"
    whole = file.read_bytes()
    for spoiled in (
        *(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))),
        *(whole[:length] for length in range(0, len(whole), 7)),
    ):
        file.write_bytes(spoiled)
        assert ArrayFolder(tmp_path).get("a") is None
    file.write_bytes(whole)
    assert torch.equal(ArrayFolder(tmp_path)["a"], torch.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(np.load(file), [[0, 1, 2], [3, 4, 5]])


def test_a_block_that_another_process_has_deleted_is_no_error(tmp_path):
    class Raced(ArrayFolder):
        def __iter__(self) -> Iterator[str]:
            names = list(super().__iter__())
            for name in names:
                (tmp_path / f"{name}.npy").unlink()
            return iter(names)

    pair, guide, x = hard_pair(5)
    pv.log_evidence(pair.model, guide, x, num_particles=10, kept=ArrayFolder(tmp_path))
    changed = partial(pair.guide, inflation=2.0)
    found = pv.log_evidence(pair.model, changed, x, num_particles=10, kept=Raced(tmp_path))
    assert found.value.equal(pv.log_evidence(pair.model, changed, x, num_particles=10).value)


def test_a_directory_that_can_not_be_written_to_is_refused_before_the_work(hard, monkeypatch):
    def refused(**options: Any) -> None:
        raise OSError(30, "Read-only file system", str(options["dir"]))

    monkeypatch.setattr("pyro_vae.runs.evaluate.tempfile.TemporaryFile", refused)
    monkeypatch.setattr("pyro_vae.runs.evaluate.evaluate", None)
    with pytest.raises(OSError, match=r"run: can't write to .*run \(Read-only file system\)"):
        EVALUATE(**hard)


def test_what_was_found_is_said_where_it_can_not_be_written(hard, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyro_vae.runs.directory.Run.write_arrays", full)
    with pytest.raises(OSError, match="No space left") as caught:
        pv.evaluate_run(**hard, num_particles=10, budget=0.0, progress=False)
    (note,) = caught.value.__notes__
    assert "10 particles each" in note


def test_figures_and_values_of_two_evaluations_are_not_compared(hard):
    options: dict[str, Any] = {"num_particles": 10, "budget": 0.0, "progress": False}
    pv.evaluate_run(**hard, **options)
    before = (hard["run"] / "evidence.json").read_bytes()
    pv.evaluate_run(**hard, **options, seed=1)
    (hard["run"] / "evidence.json").write_bytes(before)  # as if killed between the two files
    with pytest.raises(ValueError, match=r"are of two evaluations, .* pyro-vae evaluate"):
        pv.compare_runs({"a": hard["run"], "b": hard["run"]})


def test_the_command_line_says_what_could_not_be_annealed(tmp_path, capsys):
    model, guide, (x,) = bernoulli_latents()
    run = trained(model, guide, x, tmp_path / "run", pv.ReweightedWakeSleep(2))
    found = pv.evaluate_run(**run, num_particles=8, budget=1e9, progress=False)
    assert "annealing can't be had" in found.advice
    said = json.loads((tmp_path / "run" / "evidence.json").read_text())
    assert said["advice"] == found.advice
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(tmp_path / "run"), "--budget", "-1"])
    assert "expected a number of at least 0, got '-1'" in capsys.readouterr().err


def test_progress_says_what_is_done_and_how_long_it_takes(hard, monkeypatch, capsys):
    monkeypatch.setattr("pyro_vae.runs.progress.INTERVAL", 0.0)
    pv.evaluate_run(**hard, num_particles=50, budget=1e6, **TINY)
    told = capsys.readouterr().err
    assert "weighing 120 data: 6000/6000 weights, about" in told
    assert "annealing: " in told
    assert "left" in told


@pytest.mark.parametrize("particles", [1000, 3])
def test_the_picture_of_trust_has_the_axis_of_all_that_can_be(particles):
    """An exact guide gives all data one effective sample size, and no axis of its own."""
    pair, _, x = hard_pair(5)
    found = pv.evaluate(pair.model, pair.guide, x, num_particles=particles, budget=0.0)
    (axes,) = trust(found).axes
    low, high = axes.get_xlim()
    assert low < 1 < particles < high
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == (["1", "10", "100", "1,000"] if particles == 1000 else ["1", "2", "3"])
    assert not axes.get_xticklabels(minor=True)


def test_both_panels_of_trust_have_one_axis(hard):
    judged = pv.evaluate(
        hard["model"], hard["guide"], hard["data"], num_particles=50, budget=5.0, **TINY
    )
    left, right = trust(judged).axes
    assert left.get_xlim() == right.get_xlim()
    legend = left.get_legend()
    assert legend is not None
    assert "the highest to trust, 0.41" in [text.get_text() for text in legend.get_texts()]
