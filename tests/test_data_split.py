"""A split: what it checks, what it says of itself, and how it is restored from that."""

import json
import math

import numpy as np
import pytest
import torch
from splits import levels, split_of

from pyro_vae.data import Kind, Labels, Split, load_data, restore, sets

# --- what a split checks


def test_a_split_says_where_values_are_not_finite():
    values = torch.zeros(5, 3)
    values[3, 1], values[4, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match=r"data.test: .* got 2 of 15 .* row 3, column 1 \(nan"):
        split_of(torch.zeros(2, 3), Kind.REAL, test=values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": torch.zeros(3)}, r"data.train: expected shape \(N, D\)"),
        ({"valid": torch.zeros(0, 2)}, "data.valid: .* at least one datum"),
        ({"test": torch.zeros(4, 3)}, "data.test: expected 2 dimensions as in data.train, got 3"),
        ({"test": torch.zeros(4, 2).double()}, "data.test: expected float32 on the CPU"),
        ({"image_shape": (3, 1)}, "image_shape: .* product 2"),
        ({"labels": Labels(*[torch.zeros(4).long()] * 3)}, r"labels.train: .* shape \(5,\)"),
        ({"labels": Labels(*[torch.zeros(5)] * 3)}, "labels.train: expected int64"),
        ({"num_levels": 3}, "num_levels: expected .* None"),
        ({"kind": Kind.LEVELS}, "num_levels: expected the number of levels"),
    ],
)
def test_a_split_refuses_misshapen_parts(fields, message):
    part = torch.zeros(5, 2)
    raw = {"train": part, "valid": part, "test": part, "kind": Kind.BINARY, "name": "toy"}
    with pytest.raises(ValueError, match=message):
        Split(**(raw | fields))


@pytest.mark.parametrize(
    ("value", "kind", "num_levels"),
    [
        (0.5, Kind.BINARY, None),
        (1.5, Kind.LEVELS, 3),
        (3.0, Kind.LEVELS, 3),
        (-1.0, Kind.LEVELS, 3),
        (1.5, Kind.UNIT_INTERVAL, None),
    ],
)
def test_a_split_refuses_values_of_another_kind(value, kind, num_levels):
    with pytest.raises(ValueError, match=rf"data.train: expected .* got {value:g} in row 1, col"):
        split_of([[0.0], [value]], kind, num_levels)


def test_the_summary_is_one_paragraph_with_the_preparation():
    text = repr(levels(5).binarize())
    assert text == (
        "toy: 5 training, 5 validation and 5 test data of 3 dimensions, binary values; "
        "binarized at 0.5 of the largest level."
    )


# --- description and restoration


@pytest.mark.parametrize("method", sets.PREPARATIONS)
def test_a_description_gives_the_prepared_data_again(method, tmp_path):
    data = load_data("digits", seed=2)
    if method == "standardize":
        path = tmp_path / "real.npy"
        np.save(path, np.random.default_rng(0).normal(size=(1797, 3)))
        data = load_data(path)
    data = getattr(data, method)()
    described = json.loads(json.dumps(data.describe()))
    again = restore(described)
    assert again.describe() == data.describe()
    for part in ("train", "valid", "test"):
        assert getattr(again, part).equal(getattr(data, part))
    assert sum(described["sizes"].values()) == 1797
    assert described["steps"][0][0] == method


def test_changed_data_are_not_restored(tmp_path):
    path = tmp_path / "mine.npy"
    np.save(path, np.arange(20.0)[:, None])
    described = load_data(path).binarize(threshold=0.2).describe()
    np.save(path, np.arange(20.0)[::-1, None])
    with pytest.raises(ValueError, match="mine has changed since"):
        restore(described)


def test_what_came_from_memory_is_asked_for():
    with pytest.raises(ValueError, match=r"array came from memory .* pass the data"):
        restore(load_data(np.zeros((3, 2))).describe())


def test_a_step_that_is_no_preparation_is_not_called():
    described = load_data("digits").describe() | {"steps": [["describe", {}]]}
    with pytest.raises(ValueError, match=r"steps: expected one of binarize, .* got 'describe'"):
        restore(described)
