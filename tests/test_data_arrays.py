"""A user's own arrays, in memory and in files, and what is wrong with them."""

import json
import math

import numpy as np
import pytest
import torch

from pyro_vae.data import Kind, load_data, restore


@pytest.mark.parametrize(
    ("values", "kind", "num_levels"),
    [
        (np.array([[True], [False], [True]]), Kind.BINARY, None),
        (np.array([[0.0], [1.0], [1.0]]), Kind.BINARY, None),
        (np.array([[0], [1], [7]], np.uint8), Kind.LEVELS, 256),
        (np.array([[0], [1], [7]], np.int64), Kind.LEVELS, 8),
        (np.array([[0], [1], [7]], ">u2"), Kind.LEVELS, 8),
        (np.array([[0.0], [2.0], [7.0]]), Kind.LEVELS, 8),
        (np.array([[0.0], [0.5], [1.0]], np.float16), Kind.UNIT_INTERVAL, None),
        (np.array([[0.0], [0.5], [2.0]]), Kind.REAL, None),
        (np.array([[-1.0], [0.0], [1.0]]), Kind.REAL, None),
        (torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.bfloat16), Kind.UNIT_INTERVAL, None),
    ],
)
def test_the_values_tell_their_kind(values, kind, num_levels):
    data = load_data(values)
    assert (data.kind, data.num_levels) == (kind, num_levels)
    assert sorted(torch.cat([data.train, data.valid, data.test])[:, 0]) == sorted(
        torch.as_tensor(np.asarray(values.tolist(), np.float32))[:, 0]
    )


def test_an_array_is_cut_under_the_seed_with_its_labels():
    values = torch.arange(200.0)[:, None] * 0.37 - 4
    data = load_data(values, labels=torch.arange(200), seed=5)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [160, 20, 20]
    assert data.labels is not None
    every = torch.cat(data.labels)
    assert every.sort().values.equal(torch.arange(200))
    assert torch.cat([data.train, data.valid, data.test]).equal(values[every])
    assert load_data(values, seed=5).test.equal(data.test)
    assert not load_data(values, seed=6).test.equal(data.test)
    assert "cut into 160 / 20 / 20 under seed 5" in data.summary()
    assert len(load_data(values, valid_fraction=0.25, test_fraction=0.5).train) == 50


def test_an_array_that_changes_later_leaves_the_split_alone():
    values = np.zeros((4, 2), np.float32)
    data = load_data(values)
    values[:] = 1
    assert data.train.sum() == 0


@pytest.mark.parametrize(
    ("shape", "dim", "image_shape"),
    [
        ((5, 6), 6, None),
        ((5,), 1, None),
        ((5, 4, 3), 12, (4, 3)),
        ((5, 1, 4, 3), 12, (4, 3)),
        ((5, 4, 3, 1), 12, (4, 3)),
        ((5, 3, 4, 2), 24, None),
    ],
)
def test_images_are_flattened_and_remembered(shape, dim, image_shape):
    values = np.linspace(-1, 1, math.prod(shape)).reshape(shape)
    data = load_data((values, values, values))
    assert (data.dim, data.image_shape) == (dim, image_shape)
    torch.testing.assert_close(data.train, torch.tensor(values).float().reshape(5, -1))


def test_parts_stay_as_they_are():
    parts = {"train": np.arange(6)[:, None], "valid": np.arange(2)[:, None], "test": [[9]]}
    named = {f"{part}_labels": np.arange(len(values)) for part, values in parts.items()}
    by_name, in_order = load_data(parts | named), load_data(tuple(parts.values()))
    for data in (by_name, in_order):
        assert data.train[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
        assert (data.kind, data.num_levels) == (Kind.LEVELS, 10)
    assert by_name.labels is not None
    assert by_name.labels.train.tolist() == [0, 1, 2, 3, 4, 5]
    assert in_order.labels is None


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([[0.0, np.nan]] * 3, {}, ValueError, r"data.train: .* 1 of 2 that is not"),
        (np.array([[0.0], [np.inf], [1]]), {}, ValueError, r"data: .* row 1, column 0 \(inf"),
        (np.array([[0.0], [1e300], [1]]), {}, ValueError, "inf in float32"),
        (np.zeros((0, 3)), {}, ValueError, "data: expected at least one datum"),
        (np.zeros((4, 0)), {}, ValueError, "data: expected at least one datum"),
        (np.zeros((2, 3)), {}, ValueError, "data: expected at least 3 data"),
        (np.array([[-1], [0], [1]]), {}, ValueError, r"integers in 0..65535, got -1 to 1"),
        (np.array([["a"], ["b"]]), {}, TypeError, "data: expected an array of numbers, got dtype"),
        (np.array([[None]] * 3), {}, TypeError, "dtype object"),
        (np.zeros((3, 2), complex), {}, TypeError, "dtype complex128"),
        (3, {}, TypeError, "data: expected the name of a set, .* got int"),
        ([np.zeros((3, 2))] * 2, {}, TypeError, "got list of length 2"),
        ([np.zeros((3, 2)), np.zeros((3, 4)), np.zeros((3, 2))], {}, ValueError, "of one shape"),
        ({"a": np.zeros((3, 2))}, {}, ValueError, r"arrays named 'x' .* got \['a'\]"),
        ({"x": np.zeros((3, 2))}, {"labels": [0] * 3}, ValueError, "labels: data with names"),
        (np.zeros((3, 2)), {"labels": [0, 1]}, ValueError, "one integer for each of 3 data"),
        (np.zeros((3, 2)), {"labels": [0, 1, 0.5]}, ValueError, "one integer for each"),
        ([np.zeros((3, 2))] * 3, {"labels": [0, 1, 2, 3]}, ValueError, "three arrays"),
        (np.zeros((9, 2)), {"test_fraction": 0.9}, ValueError, "test_fraction: .* below 1"),
        (np.zeros((9, 2)), {"valid_fraction": 0.0}, ValueError, "valid_fraction, .* positive"),
        ("digits", {"labels": [0]}, ValueError, "labels: expected None"),
        ("digits", {"valid_fraction": 0.2}, ValueError, "digits has parts of fixed sizes"),
        ("mnits", {}, ValueError, r"one of digits, mnist, .*'mnits'. Did you mean 'mnist'"),
        ("values.csv", {}, ValueError, r"ends in .npy or .npz, got 'values.csv'"),
        ("absent.npy", {}, FileNotFoundError, "found none at .*absent.npy"),
    ],
)
def test_bad_arguments_are_named(data, options, error, message):
    with pytest.raises(error, match=message):
        load_data(data, **options)


def test_partial_labels_by_name_are_refused():
    parts = {part: np.zeros((3, 2)) for part in ("train", "valid", "test")}
    with pytest.raises(ValueError, match=r"labels: expected train_labels, .* \['train_labels'\]"):
        load_data(parts | {"train_labels": np.zeros(3)})


@pytest.mark.parametrize("form", ["npy", "npz", "npz_parts"])
def test_files_give_what_the_arrays_give(tmp_path, form):
    values, labels = np.arange(60).reshape(10, 3, 2), np.arange(10)
    path = tmp_path / f"mine.{form[:3]}"
    if form == "npy":
        np.save(path, values)
        expected = load_data(values)
    elif form == "npz":
        np.savez(path, x=values, y=labels)
        expected = load_data(values, labels=labels)
    else:
        parts = {"train": values, "valid": values, "test": values, "train_labels": labels}
        parts |= {"valid_labels": labels, "test_labels": labels}
        np.savez_compressed(path, **parts)
        expected = load_data(parts)
    data = load_data(path)
    assert data.name == "mine"
    assert data.image_shape == (3, 2)
    assert data.train.equal(expected.train)
    assert (data.labels is None) == (expected.labels is None)
    assert restore(json.loads(json.dumps(data.describe()))).train.equal(data.train)


@pytest.mark.parametrize("form", ["npy", "npz"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "pickled"])
def test_damaged_files_are_named(tmp_path, form, damage):
    path = tmp_path / f"mine.{form}"
    values = np.array([[1], [2], None], dtype=object) if damage == "pickled" else np.zeros((50, 3))
    if form == "npy":
        np.save(path, values, allow_pickle=True)
    else:
        np.savez(path, allow_pickle=True, x=values)
    whole = path.read_bytes()
    kept = {"empty": b"", "truncated": whole[: len(whole) // 2], "garbage": b"no array" * 20}
    path.write_bytes(kept.get(damage, whole))
    with pytest.raises(ValueError, match=rf"data: cannot read .*mine.{form}: .*write the file"):
        load_data(path)
