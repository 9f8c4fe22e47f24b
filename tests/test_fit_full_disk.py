"""Fitting onto a full disk, which a real limit on the size of files stands for."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from fit_pairs import fit, state
from helpers import bernoulli_pair, bits


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Those are for test_pictures."""
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda *run: None)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Files can't grow larger than so many bytes: what a full disk does, for this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_training_goes_on_while_the_disk_is_full(tmp_path, monkeypatch):
    # A clock that stands still makes every checkpoint due.
    monkeypatch.setattr("pyro_vae.runs.training.time", SimpleNamespace(monotonic=lambda: 0.0))
    out = tmp_path / "run"
    full = no_file_above(4000)
    held = []

    def callback(record: dict[str, Any]) -> None:
        if record["epoch"] == 2:
            full.__enter__()
        if record["epoch"] == 4:
            full.__exit__(None, None, None)
            held.append(len(state(out)["records"]))

    told = r"can't write .*checkpoint.pt .* Training goes on"
    with pytest.warns(UserWarning, match=told) as warned:
        fit(*bernoulli_pair(), bits(60), epochs=5, out=out, callbacks=[callback])
    assert len(warned) == 2  # after epochs 2 and 3
    assert held == [1]  # the checkpoint of epoch 1 was whole all the time
    assert len(state(out)["records"]) == 5
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_full_disk_at_the_end_is_an_error_that_names_the_file(tmp_path):
    model, guide = bernoulli_pair()
    out, full = tmp_path / "run", no_file_above(4000)

    def callback(record: dict[str, Any]) -> None:
        if record["epoch"] == 3:
            full.__enter__()

    told = r"can't write .*checkpoint.pt .*earlier version .*untouched"
    try:
        with pytest.raises(OSError, match=told):
            fit(model, guide, bits(60), epochs=3, out=out, callbacks=[callback])
    finally:
        full.__exit__(None, None, None)
    assert len(state(out)["records"]) < 3
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
