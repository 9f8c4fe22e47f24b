"""Named sets; of real files where PYRO_VAE_DATA names the folder that has them."""

import gzip
import os
import struct
from functools import cache as once
from itertools import pairwise

import numpy as np
import pytest
import scipy.io
import torch

from pyro_vae.data import Kind, bits, load_data, sets

ROOT = os.environ.get("PYRO_VAE_DATA")
needs_files = pytest.mark.skipif(ROOT is None, reason="PYRO_VAE_DATA names no folder")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """An empty cache directory, so that no test reads what another one wrote."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "pyro_vae"


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


@once
def real(name):
    return load_data(name, root=ROOT)


@needs_files
def test_the_real_binarized_mnist():
    data = real("binarized_mnist")
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
    bits_of, grey = real("binarized_mnist"), real("mnist")
    assert grey.labels is not None
    probs = (grey.test / 255).clamp(1e-4, 1 - 1e-4)
    score = bits_of.test[::50] @ probs.logit().T + torch.log1p(-probs).sum(1)
    classes = grey.labels.test[score.argmax(1)].tolist()
    assert all(earlier <= later for earlier, later in pairwise(classes))
    assert set(classes) == set(range(10))


@needs_files
def test_the_real_mnist_and_frey_faces():
    mnist, faces = real("mnist"), real("frey_faces")
    assert mnist.labels is not None
    assert mnist.labels.train[:5].tolist() == [5, 0, 4, 1, 9]
    assert (mnist.train.double().mean() / 255).item() == pytest.approx(0.1307, abs=5e-4)
    assert faces.dim == 560
    # a face is smooth along its rows: the shape is (28, 20) and not (20, 28)
    tall, wide = faces.train.reshape(-1, 28, 20), faces.train.reshape(-1, 20, 28)
    assert tall.diff(dim=1).abs().mean() < 0.8 * wide.diff(dim=1).abs().mean()
