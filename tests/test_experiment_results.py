"""Figures of an experiment: kept whole, never mixed, taken up where they stopped."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.runs import results as module

PROTOCOL = {"data": "digits", "epochs": 3, "layers": (5, 4)}


def opened(path: Path, **changes: Any) -> pv.Results:
    options = {"title": "Priors", "protocol": PROTOCOL, **changes}
    return pv.Results(path / "runs" / "results.json", **options)


def read(path: Path) -> dict[str, Any]:
    return json.loads((path / "runs" / "results.json").read_text())


def test_rows_come_back_as_they_were_put(tmp_path):
    results = opened(tmp_path)
    results.put("one", log_evidence=-0.1 - 0.2, epochs=3, curve=[1.5, 2], best={"at": 2}, note="a")
    results.put("two", log_evidence=-3)
    results.note(as_reported={"the paper": -86.76})
    for again in (results, opened(tmp_path)):
        assert [row["name"] for row in again.rows] == ["one", "two"]
        assert "one" in again
        assert "three" not in again
        assert again["one"] == {
            "name": "one",
            "log_evidence": -0.1 - 0.2,
            "epochs": 3,
            "curve": [1.5, 2],
            "best": {"at": 2},
            "note": "a",
        }
    kept = read(tmp_path)
    assert list(kept) == ["title", "protocol", "machine", "versions", "rows", "as_reported"]
    assert kept["protocol"] == {"data": "digits", "epochs": 3, "layers": [5, 4]}
    assert {"processor", "cores", "device"} == set(kept["machine"])
    assert kept["versions"]["torch"] == torch.__version__


def test_a_row_of_the_same_name_is_replaced_where_it_stands(tmp_path):
    results = opened(tmp_path)
    for name in ("one", "two", "three"):
        results.put(name, value=1, old=True)
    results.put("two", value=2)
    assert results.rows == read(tmp_path)["rows"]
    assert [row["value"] for row in results.rows] == [1, 2, 1]
    assert results["two"] == {"name": "two", "value": 2}


def test_what_is_unknown_is_null(tmp_path):
    results = opened(tmp_path)
    results.put("one", a=math.nan, b=[math.inf, 1.0], c=np.float64("nan"), d={"e": -math.inf})
    results.note(f=math.nan)
    expected = {"name": "one", "a": None, "b": [None, 1.0], "c": None, "d": {"e": None}}
    assert results["one"] == expected == opened(tmp_path)["one"]
    assert read(tmp_path)["f"] is None


def test_two_processes_keep_the_rows_of_both(tmp_path):
    one, other = opened(tmp_path), opened(tmp_path)
    one.put("one", value=1)
    other.put("two", value=2)
    one.note(found=3)
    other.put("one", value=4)
    assert other.rows == read(tmp_path)["rows"]
    assert [(row["name"], row["value"]) for row in other.rows] == [("one", 4), ("two", 2)]
    assert read(tmp_path)["found"] == 3


def test_a_file_that_another_has_spoiled_meanwhile_is_left_and_the_row_is_told(tmp_path):
    results, path = opened(tmp_path), tmp_path / "runs" / "results.json"
    spoiled = json.dumps({**read(tmp_path), "protocol": {**PROTOCOL, "epochs": 4}})
    for text in ("{", spoiled):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"is damaged|holds figures of another") as caught:
            results.put("one", value=1.5)
        assert caught.value.__notes__ == ['What was to be added: {"name": "one", "value": 1.5}']
        assert path.read_text() == text


def test_a_copy_may_be_changed_and_the_file_stays(tmp_path):
    results = opened(tmp_path)
    results.put("one", curve=[1])
    results.rows[0]["curve"].append(2)
    results["one"]["curve"].append(3)
    results.put("two")
    assert read(tmp_path)["rows"] == [{"name": "one", "curve": [1]}, {"name": "two"}]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"protocol": {**PROTOCOL, "epochs": 4}}, r"epochs is 3 there, 4 here\. "),
        ({"protocol": {"data": "mnist", "epochs": 3}}, "data is 'digits' .* layers is .* missing"),
        ({"protocol": {**PROTOCOL, "seed": None}}, "seed is missing there, None here"),
        ({"title": "Guides"}, "title is 'Priors' there, 'Guides' here"),
    ],
)
def test_figures_of_another_protocol_are_not_added_to(changes, told, tmp_path):
    opened(tmp_path).put("one", value=1)
    path = tmp_path / "runs" / "results.json"
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"results.json holds figures of another protocol.*{told}"):
        opened(tmp_path, **changes)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "\xff", "[]", '{"rows": []}', "null"])
def test_a_damaged_file_is_named_and_left_as_it_is(text, tmp_path):
    opened(tmp_path).put("one", value=1)
    path = tmp_path / "runs" / "results.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"results\.json is (damaged|no file of).* to begin anew"):
        opened(tmp_path)
    assert path.read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize("key", ["rows", "protocol"])
def test_parts_of_another_shape_are_named(key, tmp_path):
    opened(tmp_path).put("one", value=1)
    path = tmp_path / "runs" / "results.json"
    path.write_text(json.dumps({**read(tmp_path), key: ["x"]}))
    with pytest.raises(ValueError, match=r"is no file of pv\.Results"):
        opened(tmp_path)


def test_one_that_is_killed_while_it_writes_leaves_the_last_whole_file(tmp_path):
    opened(tmp_path).put("one", value=1)
    before = read(tmp_path)
    for stop in ("fsync", "replace"):
        child = os.fork()
        if child == 0:
            setattr(os, stop, lambda *args: os._exit(9))
            opened(tmp_path).put("two", value=2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert read(tmp_path) == before
    again = opened(tmp_path)
    again.put("two", value=2)
    assert [row["name"] for row in read(tmp_path)["rows"]] == ["one", "two"]


def test_a_disk_that_refuses_leaves_memory_and_file_alike(tmp_path, monkeypatch):
    results = opened(tmp_path)
    results.put("one", value=1)

    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match=r"can't write .*results\.json .*No space left"):
        results.put("two", value=2)
    monkeypatch.undo()
    assert results.rows == read(tmp_path)["rows"] == [{"name": "one", "value": 1}]


def test_a_row_of_another_machine_says_so(tmp_path, monkeypatch):
    opened(tmp_path).put("one", value=1)
    there = {"processor": "another", "cores": 99, "device": "cuda"}
    monkeypatch.setattr(module, "machine", lambda device: there)
    results = opened(tmp_path)
    results.put("two", value=2)
    assert "machine" not in results["one"]
    assert results["two"] == {"name": "two", "value": 2, "machine": there}
    assert read(tmp_path)["machine"] != there


def test_mistakes_are_named(tmp_path):
    results = opened(tmp_path)
    with pytest.raises(TypeError, match=r"^value: expected numbers.*Tensor.*\.item\(\)"):
        results.put("one", value=torch.ones(1))
    with pytest.raises(ValueError, match=r"^put: 'name' is the name of the row"):
        results.put("one", name="two")
    with pytest.raises(ValueError, match=r"^note: 'rows' is a part of every results file"):
        results.note(rows=[])
    results.put("two")
    with pytest.raises(KeyError, match=r"no row 'one' in .*results\.json; rows there: 'two'"):
        results["one"]
    with pytest.raises(TypeError, match=r"^protocol: expected numbers"):
        opened(tmp_path / "other", protocol={"data": torch.ones(1)})
    assert not (tmp_path / "other").exists()
    assert read(tmp_path)["rows"] == [{"name": "two"}]
