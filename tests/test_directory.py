"""The files of a run: whole or not there, readable without trust, named when they are damaged."""

import json
import math
import os
import pickle
import resource
import signal
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_vae.runs.directory import Run, atomically


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "deep" / "run")


def names(run: Run) -> list[str]:
    return sorted(path.name for path in run.path.iterdir())


def test_an_empty_directory_may_be_used(tmp_path):
    assert Run.create(tmp_path).path == tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_directory_of_a_run_that_was_killed_in_its_first_write_may_be_used(tmp_path):
    process = os.fork()
    if process == 0:
        try:
            with atomically(tmp_path / "config.json") as file:
                file.write(b"{")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(process, 0)
    assert len(list(tmp_path.iterdir())) == 1
    assert Run.create(tmp_path).path == tmp_path


def test_a_directory_in_use_is_refused(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(FileExistsError, match=r"^out: .* exists and is not empty; give another"):
        Run.create(tmp_path)
    with pytest.raises(FileExistsError, match=r"^out: .*x is a file; give a directory"):
        Run.create(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_place_that_is_not_writable_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^out: can't write to .*run \(Not a directory\); give a"):
        Run.create(tmp_path / "file" / "run")


def test_only_a_run_can_be_opened(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"is no run directory: it has no config\.json"):
            Run.open(path)


def test_numbers_that_json_lacks_become_null(run):
    run.write_json("a.json", {"x": math.nan, "y": [1.5, -math.inf, (math.inf, 2)], "z": "NaN"})
    text = (run.path / "a.json").read_text()
    parsed = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert parsed == {"x": None, "y": [1.5, None, [None, 2]], "z": "NaN"}
    assert text.endswith("}\n")


def test_metrics_come_back_as_they_were_with_null_for_nan(run):
    records = [{"epoch": 1, "elbo": -3.25}, {"epoch": 2, "elbo": math.nan}]
    run.write_metrics(records)
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 2
    assert run.read_metrics() == ([records[0], {"epoch": 2, "elbo": None}], 0)


def test_damaged_lines_of_the_metrics_are_counted_and_the_others_read(run):
    (run.path / "metrics.jsonl").write_bytes(b'{"epoch": 1}\n{"epo\n[2]\n\xff\xfe\n{"epoch": 5}\n')
    assert run.read_metrics() == ([{"epoch": 1}, {"epoch": 5}], 3)


def test_arrays_come_back_as_they_were(run):
    assert run.read_arrays("a.npz") == {}
    arrays = {"x": np.arange(6.0).reshape(2, 3), "labels": np.array([1, 2])}
    run.write_arrays("a.npz", **arrays)
    back = run.read_arrays("a.npz")
    assert list(back) == list(arrays)
    assert all((back[key] == arrays[key]).all() for key in arrays)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"{", b"\x93NUMPY", b"text"])
def test_damaged_arrays_are_named(run, content):
    (run.path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz is damaged"):
        run.read_arrays("a.npz")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'{"a": 1}}'])
def test_a_damaged_config_is_named(run, content):
    (run.path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged .*restore it from a copy"):
        _ = Run.open(run.path).config


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b"{}", b'{"data": 3}'])
def test_a_config_of_another_shape_is_named(run, content):
    (run.path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json.*expected .* restore it from a copy"):
        _ = Run.open(run.path).config


# --- atomic writing ------------------------------------------------------------------------------


def test_a_file_is_written_whole_with_the_usual_permissions_and_nothing_beside_it(run):
    before = os.umask(0o027)
    try:
        with atomically(run.path / "a.txt") as file:
            file.write(b"one")
            assert not (run.path / "a.txt").exists()
    finally:
        os.umask(before)
    assert (run.path / "a.txt").read_bytes() == b"one"
    assert stat.S_IMODE((run.path / "a.txt").stat().st_mode) == 0o640
    assert names(run) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_whatever_happens_in_between_the_old_file_stays(run, error):
    (run.path / "a.txt").write_bytes(b"old")

    def write() -> None:
        with atomically(run.path / "a.txt") as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert caught.value is error
    assert (run.path / "a.txt").read_bytes() == b"old"
    assert names(run) == ["a.txt"]


def test_a_reader_sees_the_old_file_or_the_new_one(run):
    path = run.path / "a.txt"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        with atomically(path) as file:
            file.write(b"new and longer")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new and longer"


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_process_that_is_killed_leaves_the_old_file(run):
    (run.path / "a.txt").write_bytes(b"old")
    process = os.fork()  # a new interpreter would import torch first
    if process == 0:
        try:
            with atomically(run.path / "a.txt") as file:
                file.write(b"new")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert (run.path / "a.txt").read_bytes() == b"old"


@pytest.mark.parametrize("size", [0, 1, 1000, 4000, 19_000])
def test_a_disk_that_is_full_is_named_and_costs_no_file(run, size):
    state = {"parameters": {"weight": torch.randn(5000)}}
    run.save_checkpoint(state)
    run.write_arrays("a.npz", x=np.random.default_rng(0).random(5000))
    run.write_json("a.json", list(range(5000)))
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    told = r"can't write .*{} \(File too large\); an earlier version of the file is untouched"
    try:
        with pytest.raises(OSError, match=told.format("checkpoint.pt")):
            run.save_checkpoint(state)
        with pytest.raises(OSError, match=told.format("a.npz")):
            run.write_arrays("a.npz", x=np.random.default_rng(1).random(5000))
        with pytest.raises(OSError, match=told.format("a.json")):
            run.write_json("a.json", list(range(6000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_a_directory_that_has_gone_is_named(tmp_path):
    path = tmp_path / "gone" / "a.txt"
    with pytest.raises(OSError, match=r"can't write .*a\.txt \(No such file"), atomically(path):
        pass


# --- checkpoints ---------------------------------------------------------------------------------


def checkpoint(run: Run) -> bytes:
    run.save_checkpoint(
        {
            "parameters": {"modules": {}, "params": {"w": torch.arange(300.0)}},
            "best": None,
            "records": [{"epoch": 1, "elbo": math.nan}],
        }
    )
    return (run.path / "checkpoint.pt").read_bytes()


def test_a_checkpoint_comes_back_as_it_was(run):
    checkpoint(run)
    state = run.load_checkpoint()
    assert state["parameters"]["params"]["w"].equal(torch.arange(300.0))
    assert state["best"] is None
    assert math.isnan(state["records"][0]["elbo"])


def test_a_missing_checkpoint_is_named(run):
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt does not exist: the run stopped"):
        run.load_checkpoint()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_checkpoint_is_named(run, share):
    whole = checkpoint(run)
    (run.path / "checkpoint.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        ValueError, match=r"checkpoint\.pt can't be loaded .*Restore it from a copy"
    ):
        run.load_checkpoint()


def test_a_damaged_byte_is_noticed_or_does_no_harm(run):
    """Every fifth byte in turn: either a ValueError that names the file, or the same state."""
    whole = checkpoint(run)
    path = run.path / "checkpoint.pt"
    noticed = 0
    for place in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[place] ^= 0x41
        path.write_bytes(damaged)
        try:
            state = run.load_checkpoint()
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            noticed += 1
        else:
            assert state["parameters"]["params"]["w"].equal(torch.arange(300.0)), place
    assert noticed > 100


@pytest.mark.parametrize("content", [b"\x80\x04N.", b"text", pickle.dumps({"format": 1})])
def test_something_that_is_no_checkpoint_is_named(run, content):
    (run.path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt (can't be loaded|has checkpoint format)"):
        run.load_checkpoint()


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_executed(run, tmp_path):
    bomb = Bomb(tmp_path / "executed")
    pickle.loads(pickle.dumps(bomb))
    assert bomb.path.exists()  # it would go off
    bomb.path.unlink()
    torch.save({"format": 1, "parameters": bomb}, run.path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt can't be loaded .*other than tensors"):
        run.load_checkpoint()
    (run.path / "checkpoint.pt").write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError, match=r"checkpoint\.pt can't be loaded"):
        run.load_checkpoint()
    assert not bomb.path.exists()


def test_a_checkpoint_of_another_format_is_named(run):
    torch.save({"format": 99}, run.path / "checkpoint.pt")
    with pytest.raises(
        ValueError, match=r"has checkpoint format 99; this version .* reads format 1"
    ):
        run.load_checkpoint()
    torch.save([1, 2], run.path / "checkpoint.pt")
    with pytest.raises(ValueError, match="has checkpoint format list"):
        run.load_checkpoint()
