"""Data: kinds, preparation, the likelihoods that are densities, and files that are damaged.

Real files are read where the environment variable PYRO_VAE_DATA names the folder that has them.
"""

import gzip
import json
import math
import os
import struct
from itertools import pairwise
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.io
import torch

from pyro_vae.data import Kind, Labels, Split, bits, load_data, restore, sets

ROOT = os.environ.get("PYRO_VAE_DATA")
needs_files = pytest.mark.skipif(ROOT is None, reason="PYRO_VAE_DATA names no folder")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """An empty cache directory, so that no test reads what another one wrote."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "pyro_vae"


def split_of(values: Any, kind: Kind, num_levels: int | None = None, **fields: Any) -> Split:
    values = torch.as_tensor(values, dtype=torch.float32)
    fields = {"train": values, "valid": values, "test": values, "name": "toy"} | fields
    return Split(kind=kind, num_levels=num_levels, **fields)


def levels(num_data: int = 4_000, dim: int = 3, num_levels: int = 17) -> Split:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(num_levels, (num_data, dim), generator=generator)
    return split_of(values, Kind.LEVELS, num_levels)


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


# --- preparation


def test_binarize_compares_with_a_fraction_of_the_largest_level():
    data = split_of([[0, 8, 9, 16]], Kind.LEVELS, 17)
    assert data.binarize().train.tolist() == [[0, 0, 1, 1]]
    assert data.binarize(threshold=0.0).train.tolist() == [[0, 1, 1, 1]]
    assert split_of([[0.2, 0.8]], Kind.UNIT_INTERVAL).binarize().train.tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="threshold: expected"):
        data.binarize(threshold=1.0)


def test_static_binarization_has_the_intensity_as_its_mean():
    raw = split_of(torch.tensor([[0.0, 4.0, 12.0, 16.0]]).repeat(20_000, 1), Kind.LEVELS, 17)
    data = raw.binarize_static(seed=3)
    for part in (data.train, data.valid, data.test):
        # five standard errors of a mean of 20,000 bits, of 0.0031 each
        torch.testing.assert_close(
            part.mean(0), torch.tensor([0, 0.25, 0.75, 1]), atol=0.016, rtol=0
        )
    assert data.kind is Kind.BINARY
    assert data.refresh is None
    assert data.train.equal(raw.binarize_static(seed=3).train)
    assert not data.train.equal(raw.binarize_static(seed=4).train)
    assert not data.train.equal(data.test)  # the parts are equal before, their noise is not


def test_dynamic_binarization_draws_training_data_anew_and_the_others_once():
    raw = levels()
    data = raw.binarize_dynamic(seed=1)
    assert data.refresh is not None
    torch.testing.assert_close(data.train, raw.train / 16)
    torch.manual_seed(0)
    draws = torch.stack([data.refresh(data.train) for _ in range(200)])
    assert not draws[0].equal(draws[1])
    torch.testing.assert_close(draws.mean((0, 1)), data.train.mean(0), atol=0.005, rtol=0)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert set(data.test.unique().tolist()) == {0.0, 1.0}
    assert data.test.equal(raw.binarize_dynamic(seed=1).test)
    assert "4,000 training data drawn anew" in data.summary()


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_dequantized_values_stay_in_the_cell_of_their_level(num_levels):
    raw = levels(num_levels=num_levels)
    data = raw.dequantize(seed=1)
    assert data.refresh is not None
    assert data.kind is Kind.UNIT_INTERVAL
    assert data.log_jacobian == pytest.approx(-3 * math.log(num_levels))
    torch.manual_seed(0)
    fresh = data.refresh(data.train)
    for values, before in ((fresh, raw.train), (data.test, raw.test)):
        noise = values.double() * num_levels - before.double()
        assert noise.min() > -1e-4
        assert noise.max() < 1 + 1e-4
        assert noise.mean() == pytest.approx(0.5, abs=5 * (1 / 12 / noise.numel()) ** 0.5)
    assert not fresh.equal(data.refresh(data.train))
    assert data.test.equal(raw.dequantize(seed=1).test)


def test_the_largest_noise_stays_below_the_next_level(monkeypatch):
    largest = 1 - 2.0**-24
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, largest))
    raw = split_of(torch.arange(256)[:, None], Kind.LEVELS, 256)
    data = raw.dequantize()
    assert data.refresh is not None
    assert (data.refresh(data.train) * 256).floor().equal(raw.train)


def test_the_dequantized_density_bounds_the_probability_of_the_levels():
    # The oracle: one dimension, p(y) a normal, P(x) by its distribution function.
    num_levels, density = 4, torch.distributions.Normal(0.4, 0.3)
    edges = torch.arange(num_levels + 1) / num_levels
    log_prob = (density.cdf(edges[1:]) - density.cdf(edges[:-1])).log()
    raw = split_of(torch.arange(num_levels).repeat(50_000)[:, None], Kind.LEVELS, num_levels)
    data = raw.dequantize()
    assert data.refresh is not None
    torch.manual_seed(0)
    y = data.refresh(data.train)
    log_density = (density.log_prob(y).sum(-1) + data.log_jacobian).reshape(-1, num_levels)
    bound = log_density.mean(0)
    assert (bound < log_prob).all()
    assert (bound > log_prob - 0.1).all()
    # without the logarithm inside the expectation the bound is the probability itself
    torch.testing.assert_close(log_density.exp().mean(0).log(), log_prob, atol=0.01, rtol=0)


def test_intensities_are_scores_and_no_density():
    data = levels().intensities()
    assert not data.is_density
    assert data.kind is Kind.UNIT_INTERVAL
    assert data.train.max() == 1
    assert "no log p(x)" in data.summary()
    data.check_likelihood(dist.Bernoulli(logits=torch.zeros(2, 3)).to_event(1), "x")


def test_preparation_refuses_the_wrong_kind_and_says_what_works():
    binary, real = split_of([[0.0, 1.0]], Kind.BINARY), split_of([[-0.5]], Kind.REAL)
    grey = split_of([[0.5]], Kind.UNIT_INTERVAL)
    with pytest.raises(ValueError, match=r"binarize: .* binary values. Use families.bernoulli"):
        binary.binarize()
    with pytest.raises(ValueError, match=r"binarize_static: .* real values. Use families.normal"):
        real.binarize_static()
    with pytest.raises(ValueError, match="dequantize: expected integer levels, got toy with value"):
        grey.dequantize()
    with pytest.raises(ValueError, match="intensities: expected integer levels or values in"):
        real.intensities()
    with pytest.raises(ValueError, match="binarize: toy is already prepared by dequantize"):
        levels().dequantize().binarize()


def test_preparation_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    raw = levels(50)
    for data in (raw.binarize_static(), raw.binarize_dynamic(), raw.dequantize()):
        data.check_likelihood(
            (dist.Normal if data.kind is Kind.UNIT_INTERVAL else _bernoulli)(
                torch.zeros(2, 3), torch.ones(2, 3)
            ).to_event(1),
            "x",
        )
    load_data(torch.randn(10, 2, generator=torch.Generator().manual_seed(0)))
    assert torch.get_rng_state().equal(state)


def _bernoulli(logits, _):
    return dist.Bernoulli(logits=logits)


# --- which likelihoods are densities

BATCHES = [(), (1,), (7,), (5, 7), (3, 1, 7)]
FAMILIES = {
    "bernoulli": lambda shape: dist.Bernoulli(logits=torch.zeros(shape)),
    "binomial": lambda shape: dist.Binomial(total_count=16, logits=torch.zeros(shape)),
    "binomial_tensor": lambda shape: dist.Binomial(torch.full(shape, 16.0), torch.full(shape, 0.5)),
    "categorical": lambda shape: dist.Categorical(logits=torch.zeros(*shape, 17)),
    "normal": lambda shape: dist.Normal(torch.zeros(shape), 1.0),
    "laplace": lambda shape: dist.Laplace(torch.zeros(shape), 1.0),
    "uniform": lambda shape: dist.Uniform(torch.zeros(shape), torch.ones(shape)),
}
DENSITIES = {
    Kind.BINARY: {"bernoulli", "binomial", "binomial_tensor", "categorical"},
    Kind.LEVELS: {"binomial", "binomial_tensor", "categorical"},
    Kind.UNIT_INTERVAL: {"normal", "laplace", "uniform"},
    Kind.REAL: {"normal", "laplace"},
}
EXAMPLES = {
    Kind.BINARY: split_of([[0, 1], [1, 1], [0, 0]] * 9, Kind.BINARY),
    Kind.LEVELS: split_of([[0, 16], [3, 1], [9, 9]] * 9, Kind.LEVELS, 17),
    Kind.UNIT_INTERVAL: split_of([[0.5, 0.25], [0.75, 0.9]] * 9, Kind.UNIT_INTERVAL),
    Kind.REAL: split_of([[-3.0, 0.25], [4.5, 0.9]] * 9, Kind.REAL),
}


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", Kind)
def test_a_likelihood_passes_where_it_is_a_density(kind, family, batch):
    likelihood = FAMILIES[family]((*batch, 2)).to_event(1)
    if family in DENSITIES[kind]:
        EXAMPLES[kind].check_likelihood(likelihood, "x")
    else:
        with pytest.raises(ValueError, match=r"site 'x': \w+ is no density for .* Use families."):
            EXAMPLES[kind].check_likelihood(likelihood, "x")


@pytest.mark.parametrize("family", ["binomial_tensor", "normal"])
def test_a_plate_over_the_dimensions_is_as_good_as_an_event(family):
    kind = Kind.LEVELS if family == "binomial_tensor" else Kind.REAL
    EXAMPLES[kind].check_likelihood(FAMILIES[family]((7, 2)), "x")


def test_the_refusal_names_row_and_choices():
    data = split_of(torch.tensor([[0.0], [1.0], [2.0], [4.0]]), Kind.LEVELS, 5)
    with pytest.raises(ValueError, match=r"levels 0..4: 2 of 4 data in data.train .* row 2"):
        data.check_likelihood(dist.Bernoulli(logits=torch.zeros(3, 1)).to_event(1), "pixels")
    with pytest.raises(ValueError, match=r"'pixels'.* it is continuous") as error:
        data.check_likelihood(dist.Normal(torch.zeros(3, 1), 1.0).to_event(1), "pixels")
    for choice in (
        "families.binomial with total_count=4",
        "families.categorical with 5 params",
        "data.dequantize()",
        "data.binarize()",
        "data.binarize_dynamic()",
        "data.intensities() is the deliberate override",
    ):
        assert choice in str(error.value)


def test_a_value_in_the_test_part_alone_is_found():
    data = split_of([[0.5]], Kind.REAL, test=torch.tensor([[0.5], [1.5]]))
    with pytest.raises(ValueError, match=r"1 of 2 data in data.test .* row 1"):
        data.check_likelihood(FAMILIES["uniform"]((3, 1)).to_event(1), "x")


def test_refreshed_training_data_are_what_is_checked():
    # Intensities are outside of a Bernoulli's support; the bits drawn from them are inside.
    levels().binarize_dynamic().check_likelihood(FAMILIES["bernoulli"]((7, 3)).to_event(1), "x")


def test_the_wrong_feature_size_is_refused():
    with pytest.raises(ValueError, match=r"site 'x': expected a likelihood of 3 values .* \(5,\)"):
        levels().check_likelihood(FAMILIES["binomial"]((7, 5)).to_event(1), "x")


def test_a_distribution_without_support_is_refused():
    class Silent(dist.TorchDistribution):
        @property
        def arg_constraints(self):
            return {}

    with pytest.raises(ValueError, match="give the distribution a `support`"):
        levels().check_likelihood(Silent(torch.Size([7]), torch.Size([3])), "x")


# --- a user's own arrays


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


# --- named sets

SIZES = {"train": 12, "t10k": 4}
LINES = {"train": 5, "valid": 3, "test": 2}


def test_the_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = load_data("digits")
    assert data.labels is not None
    pixels, classes = load_digits(return_X_y=True)
    rows = {(tuple(row), label) for row, label in zip(pixels.tolist(), classes, strict=True)}
    for part, labels in zip((data.train, data.valid, data.test), data.labels, strict=True):
        assert {(tuple(r), y) for r, y in zip(part.tolist(), labels.tolist(), strict=True)} <= rows
    assert len(data.train) + len(data.valid) + len(data.test) == 1_797
    assert (data.kind, data.num_levels, data.image_shape) == (Kind.LEVELS, 17, (8, 8))
    assert not load_data("digits", seed=1).train.equal(data.train)


def write_idx(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """The four files of MNIST with 12 and 4 images, and the sizes that go with them."""
    monkeypatch.setattr(sets, "_MNIST_SIZES", SIZES)
    monkeypatch.setattr(sets, "_MNIST_VALID", 3)
    generator = np.random.default_rng(0)
    images = {part: generator.integers(256, size=(n, 28, 28)) for part, n in SIZES.items()}
    for folder in ("MNIST", "FashionMNIST"):
        for part, values in images.items():
            write_idx(tmp_path / folder / "raw" / f"{part}-images-idx3-ubyte", values)
            write_idx(
                tmp_path / folder / "raw" / f"{part}-labels-idx1-ubyte", np.arange(len(values))
            )
    return tmp_path, images


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist_keeps_the_last_training_images_for_validation(small_mnist, name):
    root, images = small_mnist
    data = load_data(name, root=root)
    assert data.labels is not None
    stacked = np.concatenate([images["train"], images["t10k"]]).reshape(16, 784)
    assert np.array_equal(torch.cat([data.train, data.valid, data.test]).numpy(), stacked)
    assert [len(data.train), len(data.valid), len(data.test)] == [9, 3, 4]
    assert data.labels.valid.tolist() == [9, 10, 11]
    assert (data.kind, data.num_levels, data.image_shape) == (Kind.LEVELS, 256, (28, 28))


@pytest.mark.parametrize("kept", [0, 3, 16, 5_000])
def test_a_truncated_idx_file_is_named(small_mnist, kept):
    root, _ = small_mnist
    path = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"root: expected 12 images .*/train-\* .*truncated"):
        load_data("mnist", root=root)


def test_another_number_of_images_is_refused(small_mnist):
    root, images = small_mnist
    write_idx(root / "MNIST" / "raw" / "t10k-images-idx3-ubyte", images["t10k"][:3])
    with pytest.raises(ValueError, match=r"expected 4 images .*t10k-.*got \(3, 28, 28\) images"):
        load_data("mnist", root=root)


@pytest.mark.parametrize("give_root", [True, False])
def test_a_failed_download_says_which_files_to_put_where(tmp_path, cache, monkeypatch, give_root):
    def refuse(self):
        raise RuntimeError("HTTP Error 403: Forbidden")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", refuse)
    with pytest.raises(FileNotFoundError, match="403") as error:
        load_data("mnist", root=tmp_path if give_root else None)
    assert "t10k-labels-idx1-ubyte, unpacked, into " in str(error.value)
    assert str((tmp_path if give_root else cache) / "MNIST" / "raw") in str(error.value)


def test_what_is_not_there_is_downloaded_into_the_root(small_mnist, tmp_path, monkeypatch):
    root, _ = small_mnist
    fresh = tmp_path / "fresh"

    def download(self):
        (root / "MNIST").rename(fresh / "MNIST")

    fresh.mkdir()
    monkeypatch.setattr("torchvision.datasets.MNIST.download", download)
    assert len(load_data("mnist", root=fresh).train) == 9


@pytest.fixture
def small_binarized(tmp_path, monkeypatch):
    """The three text files with 5, 3 and 2 images, one of them gzipped."""
    monkeypatch.setattr(sets, "_BINARIZED_SIZES", LINES)
    generator = np.random.default_rng(0)
    values = {part: generator.integers(2, size=(n, 784)) for part, n in LINES.items()}
    folder = tmp_path / "binarized_mnist"
    folder.mkdir()
    for part, rows in values.items():
        end = {"train": " \r\n", "valid": "\n", "test": " \n"}[part]
        text = end.join(" ".join(map(str, row)) for row in rows).encode()
        packed = gzip.compress(text) if part == "train" else text
        suffix = ".gz" if part == "train" else ""
        (folder / f"binarized_mnist_{part}.amat{suffix}").write_bytes(packed)
    return tmp_path, values


def test_text_files_give_their_bits_with_and_without_the_cache(small_binarized, cache, monkeypatch):
    root, values = small_binarized
    first = load_data("binarized_mnist", root=root)
    assert len(list(cache.iterdir())) == 1  # and no temporary file
    monkeypatch.setattr(bits, "_parse", None)  # a second reading would call it
    second = load_data("binarized_mnist", root=root / "binarized_mnist")
    for data in (first, second):
        for part, rows in values.items():
            assert np.array_equal(getattr(data, part).numpy(), rows)
    assert first.kind is Kind.BINARY
    assert first.image_shape == (28, 28)
    assert first.labels is None
    assert "test images are sorted by class" in first.summary()


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped"])
def test_a_damaged_cache_is_made_again(small_binarized, cache, damage):
    root, values = small_binarized
    load_data("binarized_mnist", root=root)
    (cached,) = cache.iterdir()
    whole = bytearray(cached.read_bytes())
    whole[len(whole) // 2] ^= 255
    damaged = {"truncated": whole[:99], "garbage": b"nothing", "flipped": whole}[damage]
    cached.write_bytes(bytes(damaged))
    data = load_data("binarized_mnist", root=root)
    assert np.array_equal(data.train.numpy(), values["train"])
    assert len(cached.read_bytes()) == len(whole)


def test_changed_text_is_not_taken_from_the_cache(small_binarized):
    root, values = small_binarized
    load_data("binarized_mnist", root=root)
    path = root / "binarized_mnist" / "binarized_mnist_test.amat"
    path.write_bytes(path.read_bytes().translate(bytes.maketrans(b"01", b"10")))
    data = load_data("binarized_mnist", root=root)
    assert np.array_equal(data.test.numpy(), 1 - values["test"])


def test_a_cache_that_cannot_be_written_is_done_without(small_binarized, tmp_path, monkeypatch):
    root, values = small_binarized
    blocked = tmp_path / "a file"
    blocked.write_text("where the cache directory would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    data = load_data("binarized_mnist", root=root)
    assert np.array_equal(data.valid.numpy(), values["valid"])


def test_a_full_disk_leaves_no_half_written_cache(small_binarized, cache, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    load_data("binarized_mnist", root=small_binarized[0])
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(b"1", b"2", 1), "line 1 has others"),
        (lambda text: text[:-40], "line 3 has others"),
        (lambda text: text.replace(b"0 1", b"01 ", 1), "line 1 has others"),
        (lambda text: text.replace(b"\n", b"\nx", 1), "line 2 has others"),
        (lambda text: text[: text.rindex(b"\n")], "it has 2 lines"),
        (lambda text: text + b"\n" + text, "it has 6 lines"),
        (lambda text: b"", "it has 0 lines"),
    ],
)
def test_damaged_text_is_named_by_file_and_line(small_binarized, change, message):
    root, _ = small_binarized
    path = root / "binarized_mnist" / "binarized_mnist_valid.amat"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"3 lines of 784 .*_valid.amat, but {message}"):
        load_data("binarized_mnist", root=root)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "plain"])
def test_a_damaged_gzip_file_is_named(small_binarized, damage):
    root, _ = small_binarized
    path = root / "binarized_mnist" / "binarized_mnist_train.amat.gz"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 255
    damaged = {"truncated": whole[:200], "flipped": whole, "plain": b"0 1 0"}[damage]
    path.write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match=r"_train.amat.gz is truncated or damaged .*fetch it"):
        load_data("binarized_mnist", root=root)


def test_missing_text_files_are_listed(small_binarized):
    root, _ = small_binarized
    (root / "binarized_mnist" / "binarized_mnist_test.amat").unlink()
    with pytest.raises(FileNotFoundError, match=r"binarized_mnist_test.amat not found"):
        load_data("binarized_mnist", root=root)
    with pytest.raises(ValueError, match="root: binarized_mnist is not downloaded"):
        load_data("binarized_mnist")


def test_frey_faces_are_the_columns_of_the_file(tmp_path):
    faces = np.random.default_rng(0).integers(256, size=(560, 1_965), dtype=np.uint8)
    scipy.io.savemat(tmp_path / "frey_rawface.mat", {"ff": faces})
    data = load_data("frey_faces", root=tmp_path)
    rows = torch.cat([data.train, data.valid, data.test]).numpy()
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, faces.T.tolist()))
    assert [len(data.train), len(data.valid), len(data.test)] == [1_565, 200, 200]
    assert (data.num_levels, data.image_shape) == (256, (28, 20))


@pytest.mark.parametrize("damage", ["empty", "truncated", "shape", "name"])
def test_a_damaged_mat_file_is_named(tmp_path, damage):
    path = tmp_path / "frey_rawface.mat"
    faces = np.zeros((560, 3 if damage == "shape" else 1_965), np.uint8)
    scipy.io.savemat(path, {"gg" if damage == "name" else "ff": faces})
    if damage in ("empty", "truncated"):
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else 900])
    with pytest.raises(ValueError, match=r"root: .*'ff' .*frey_rawface.mat"):
        load_data("frey_faces", root=tmp_path)


def test_absent_frey_faces_say_where_they_are_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected frey_rawface.mat in .*frey_faces"):
        load_data("frey_faces", root=tmp_path)
    with pytest.raises(ValueError, match="root: frey_faces is not downloaded"):
        load_data("frey_faces")


# --- the real files


@needs_files
def test_the_real_binarized_mnist():
    data = load_data("binarized_mnist", root=ROOT)
    assert [len(data.train), len(data.valid), len(data.test)] == [50_000, 10_000, 10_000]
    # counts of ones, from the text by another tool: tr -cd 1 < FILE | wc -c
    assert [int(part.double().sum()) for part in (data.train, data.valid, data.test)] == [
        5_118_041,
        1_028_036,
        1_038_896,
    ]


@needs_files
def test_the_real_binarized_test_images_are_sorted_by_class():
    # The class of a binarized image is that of the MNIST image under which it is likeliest.
    bits_of, grey = load_data("binarized_mnist", root=ROOT), load_data("mnist", root=ROOT)
    assert grey.labels is not None
    probs = (grey.test / 255).clamp(1e-4, 1 - 1e-4)
    score = bits_of.test[::50] @ probs.logit().T + torch.log1p(-probs).sum(1)
    classes = grey.labels.test[score.argmax(1)].tolist()
    assert all(earlier <= later for earlier, later in pairwise(classes))
    assert set(classes) == set(range(10))


@needs_files
def test_the_real_mnist_and_frey_faces():
    mnist, faces = load_data("mnist", root=ROOT), load_data("frey_faces", root=ROOT)
    assert mnist.labels is not None
    assert mnist.labels.train[:5].tolist() == [5, 0, 4, 1, 9]
    assert (mnist.train.double().mean() / 255).item() == pytest.approx(0.1307, abs=5e-4)
    assert faces.dim == 560
    # a face is smooth along its rows: the shape is (28, 20) and not (20, 28)
    tall, wide = faces.train.reshape(-1, 28, 20), faces.train.reshape(-1, 20, 28)
    assert tall.diff(dim=1).abs().mean() < 0.8 * wide.diff(dim=1).abs().mean()


def test_standardize_keeps_densities_exact():
    generator = torch.Generator().manual_seed(0)
    rows = 5.0 + 3.0 * torch.randn(400, 3, generator=generator)
    rows[:, 2] = 7.0
    data = load_data(rows)
    prepared = data.standardize()
    assert prepared.train.mean(0).abs().max() < 1e-5
    assert prepared.train[:, :2].std(0, correction=0).sub(1).abs().max() < 1e-5
    loc, scale = data.train.double().mean(0), data.train.double().std(0, correction=0)
    scale[2] = 1.0
    of_x = torch.distributions.Normal(loc, scale).log_prob(data.test.double()).sum(1)
    of_y = torch.distributions.Normal(0.0, 1.0).log_prob(prepared.test.double()).sum(1)
    torch.testing.assert_close(of_y + prepared.log_jacobian, of_x, rtol=0, atol=1e-5)


def test_standardize_is_for_real_values_alone():
    with pytest.raises(ValueError, match="standardize: expected values in \\[0, 1\\] or real"):
        load_data("digits").standardize()
