"""Runs held against each other: the figures, the picture, and what can't be compared."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import bernoulli_pair, bits

import pyro_vae as pv
from pyro_vae import cli
from pyro_vae.evidence.compare import fingerprint
from pyro_vae.runs import plots
from pyro_vae.runs.swaps import _judged

X = bits(40)
EVALUATE = partial(pv.evaluate_run, num_particles=10, progress=False)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda *run: None)


def run(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    pv.fit(*bernoulli_pair(), X, epochs=1, batch_size=20, out=folder, progress=False)
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    found = [run(tmp_path / name, seed) for seed, name in enumerate(("one", "two", "three"))]
    for folder in found:
        EVALUATE(folder, data=X)
    return found


def test_differences_are_those_of_the_estimates(runs, tmp_path):
    out = tmp_path / "out"
    found = pv.compare_runs(runs, out=out)
    assert list(found.estimates) == ["one", "two", "three"]
    estimates = [EVALUATE(folder, data=X) for folder in runs]
    for name, estimate in zip(("two", "three"), estimates[1:], strict=True):
        expected = pv.compare(estimate, estimates[0])
        difference = found.differences[name]
        torch.testing.assert_close(difference.difference, expected.difference)
        assert difference.mean_standard_error == pytest.approx(expected.mean_standard_error)
        assert f"{expected.mean:+.2f}" in str(found)
    kept = json.loads((out / "comparison.json").read_text())
    assert kept["baseline"] == "one"
    assert [row["name"] for row in kept["rows"]] == ["one", "two", "three"]
    assert kept["rows"][0]["difference"] is None
    assert kept["rows"][1]["log_evidence"] == pytest.approx(estimates[1].mean)
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_line_prints_the_table(runs, capsys):
    assert cli.main(["compare", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("one", "two", "three", "difference"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r[:1], "at least two runs, got 1"),
        (lambda r: [r[0], r[0].parent / "none"], "is no run directory"),
        (lambda r: [r[0], run(r[0].parent / "fresh")], "the run was not judged"),
        (lambda r: [r[0], r[0]], "two runs have folders of one name"),
    ],
)
def test_what_can_not_be_compared_is_refused(runs, spoil, message, capsys):
    assert cli.main(["compare", *map(str, spoil(runs))]) == 2
    assert message in capsys.readouterr().err


def test_other_data_are_refused(runs):
    EVALUATE(runs[1], data=1 - X)
    with pytest.raises(ValueError, match=r"two and one: .*other data"):
        pv.compare_runs(runs)


def test_scores_and_probabilities_are_refused(runs):
    path = runs[2] / "evidence.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantity": "score"}))
    with pytest.raises(ValueError, match=r"three was judged by its score, one by its log p\(x\)"):
        pv.compare_runs(runs)


def swaps() -> dict[str, Any]:
    return {"N(0, I)": bernoulli_pair, "wider": partial(bernoulli_pair, latent_dim=3)}


def test_swaps_are_trained_judged_and_gone_on_with(tmp_path, monkeypatch):
    data = pv.load_data({"train": X.numpy(), "valid": X[:10].numpy(), "test": X[:20].numpy()})
    options: Any = {"epochs": 2, "batch_size": 20, "num_particles": 5, "progress": False}
    found = pv.compare_swaps(swaps(), data, out=tmp_path, **options)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"n-0-i", "wider"}
    assert len(found.estimates["wider"].value) == 20
    monkeypatch.setattr("pyro_vae.runs.swaps.evaluate_run", None)  # nothing is judged anew
    again = pv.compare_swaps(swaps(), data, out=tmp_path, **options)
    assert again.rows == found.rows
    (tmp_path / "wider" / "evidence.json").unlink()
    monkeypatch.undo()
    third = pv.compare_swaps(swaps(), data, out=tmp_path, **options)
    assert torch.equal(third.estimates["wider"].value, found.estimates["wider"].value)
    longer = pv.compare_swaps(swaps(), data, out=tmp_path, **{**options, "epochs": 3})
    assert [row["epochs"] for row in longer.rows] == [3, 3]
    assert not torch.equal(longer.estimates["wider"].value, found.estimates["wider"].value)
    other = pv.load_data({"train": 1 - X.numpy(), "valid": X[:10].numpy(), "test": X[:20].numpy()})
    with pytest.raises(ValueError, match="data"):
        pv.compare_swaps(swaps(), other, out=tmp_path, **{**options, "epochs": 3})


def test_swaps_that_the_clock_stops_are_judged_as_they_are_and_gone_on_with(tmp_path, monkeypatch):
    data = pv.load_data({"train": X.numpy(), "valid": X[:10].numpy(), "test": X[:20].numpy()})
    options: Any = {"epochs": 2, "batch_size": 20, "num_particles": 5, "progress": False}
    whole = pv.compare_swaps(swaps(), data, out=tmp_path / "whole", **options)
    options |= {"out": tmp_path / "cut", "max_seconds": 1e-9}
    first = pv.compare_swaps(swaps(), data, **options)
    assert [row["epochs"] for row in first.rows] == [1, 1]
    assert [row["of_epochs"] for row in first.rows] == [2, 2]
    # One is killed when it has trained on, and not yet judged again what it has now.
    with monkeypatch.context() as patch:
        patch.setattr("pyro_vae.runs.swaps.evaluate_run", None)
        with pytest.raises(TypeError):
            pv.compare_swaps(swaps(), data, **options)
    second = pv.compare_swaps(swaps(), data, **options)
    assert [row["epochs"] for row in second.rows] == [2, 2]
    for name, estimate in whole.estimates.items():
        assert torch.equal(second.estimates[name].value, estimate.value)
        assert not torch.equal(first.estimates[name].value, estimate.value)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what the tests add."""
    now = [0.0]
    monkeypatch.setattr("pyro_vae.runs.swaps.time.monotonic", lambda: now[0])
    return now


def test_time_is_shared_among_what_is_left_and_a_divergence_stops_no_other(
    tmp_path, monkeypatch, clock
):
    """Of 240 seconds every training takes 30 and every judging 60; the second diverges."""
    data = pv.load_data({"train": X.numpy(), "valid": X[:10].numpy(), "test": X[:20].numpy()})
    fit, judge, shares = pv.fit, pv.evaluate_run, []

    def trained(*pair: Any, max_seconds: float = math.inf, **options: Any) -> pv.History:
        shares.append(max_seconds)
        clock[0] += 30.0
        history = fit(*pair, **options)
        if str(options["out"]).endswith("broken"):
            raise pv.DivergedError("the loss turned NaN")
        return history

    def judged(*args: Any, **options: Any) -> pv.Evaluation:
        clock[0] += 60.0
        return judge(*args, **options)

    monkeypatch.setattr("pyro_vae.runs.swaps.fit", trained)
    monkeypatch.setattr("pyro_vae.runs.swaps.evaluate_run", judged)
    first, second = swaps().items()
    options: Any = {"epochs": 1, "batch_size": 20, "num_particles": 5, "progress": False}
    three = dict([first, ("broken", second[1]), second])
    with pytest.warns(UserWarning, match="^broken is left out: the loss turned NaN"):
        found = pv.compare_swaps(three, data, out=tmp_path, total_seconds=240.0, **options)
    assert shares == pytest.approx([240 / 3, 150 / 2, 120])
    assert list(found.estimates) == [first[0], second[0]]
    assert found.diverged == {"broken": "the loss turned NaN"}
    # What has no epochs left needs no time: all of it is for a swap that is new.
    more = {first[0]: first[1], "new": second[1]}
    pv.compare_swaps(more, data, out=tmp_path, total_seconds=100.0, **options)
    assert shares[-1] == pytest.approx(100 - 30)
    with pytest.raises(pv.DivergedError):
        pv.compare_swaps({"broken": second[1], **more}, data, out=tmp_path / "other", **options)
    with pytest.raises(ValueError, match="total_seconds: expected more than 0"):
        pv.compare_swaps(more, data, out=tmp_path, total_seconds=0.0, **options)


def test_names_that_are_one_folder_are_refused(tmp_path):
    data = pv.load_data({"train": X.numpy(), "valid": X.numpy(), "test": X.numpy()})
    pair = {"a b": bernoulli_pair, "A-B": bernoulli_pair}
    with pytest.raises(ValueError, match="names that differ in their letters and digits"):
        pv.compare_swaps(pair, data, out=tmp_path)


def test_the_picture_wants_two_models():
    with pytest.raises(ValueError, match="at least two models"):
        plots.differences([])


def test_only_what_was_judged_alike_is_not_judged_again(tmp_path):
    data = pv.load_data({"train": X.numpy(), "valid": X[:10].numpy(), "test": X[:20].numpy()})
    whole = fingerprint((data.test,))
    said = {"num_particles": 5, "budget": 1.0, "seed": 0, "part": "test", "epochs": 3}

    def judged(asked: float = 1.0, **written: Any) -> int | None:
        text = json.dumps({**said, "fingerprint": whole, **written})
        (tmp_path / "evidence.json").write_text(text)
        return _judged(tmp_path, data, 5, asked, 0)

    assert judged() == 3
    assert judged(fingerprint=fingerprint((data.test[::2],))) is None  # by limit=10
    assert judged(num_particles=4) is judged(seed=1) is judged(part="valid") is None
    assert judged(0.5) is judged(math.inf) is None
    assert judged(math.inf, budget=None) == 3  # null is what infinities become
