"""Named sets and a user's own arrays, each as a Split of raw values.

Nothing is prepared here: grey levels stay levels. What is binarized has been distributed so.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.arrays import Array, read_arrays, split_arrays
from pyro_vae.data.bits import cache_directory, packed_bits
from pyro_vae.data.kinds import PARTS, Kind
from pyro_vae.data.preparation import PREPARATIONS
from pyro_vae.data.split import Labels, Split

__all__ = ["load_data", "restore"]

_FRACTION = 0.1
_MNIST_SIZES = {"train": 60_000, "t10k": 10_000}
_MNIST_VALID = 10_000
_IDX = ("images-idx3", "labels-idx1")
_BINARIZED_SIZES = {"train": 50_000, "valid": 10_000, "test": 10_000}
_IMAGE = (28, 28)
_PIXELS = 784


def load_data(
    data: str | Path | Array | Mapping[str, Array] | Sequence[Array],
    *,
    root: str | Path | None = None,
    labels: Any = None,
    seed: int = 0,
    valid_fraction: float = _FRACTION,
    test_fraction: float = _FRACTION,
) -> Split:
    """Raw data in three parts that know what their values are.

    | name | sizes | values |
    |---|---|---|
    | `digits` | 1,297 / 250 / 250 of 8 x 8, shuffled | levels 0..16 |
    | `mnist`, `fashion_mnist` | 50,000 / 10,000 / 10,000 of 28 x 28 | levels 0..255 |
    | `binarized_mnist` | 50,000 / 10,000 / 10,000 of 28 x 28 | binary |
    | `frey_faces` | 1,565 / 200 / 200 of 28 x 20, shuffled | levels 0..255 |

    Values of one's own are binary where they are all 0 or 1, levels where they are integers from
    0 on (256 of them for bytes, else as many as the largest needs), in the unit interval or real.

    Args:
        data: A name of the table; the path of a .npy or .npz file; a tensor or array (N, ...);
            or parts, as a sequence (train, valid, test) or by name. Names of a mapping or of an
            .npz file are `x`, with `labels` or `y`, or `train`, `valid`, `test`, with
            `train_labels` and so on. Arrays (N, H, W), (N, 1, H, W) and (N, H, W, 1) are images.
        root: The folder where a named set's files are. mnist and fashion_mnist are downloaded
            into it, or into the user's cache directory, where they are not there.
        labels: Classes (N,) for an array, or three of them for a sequence of parts.
        seed: Fixes the shuffle of digits, frey_faces and one's own array.
        valid_fraction: Validation share of one's own array.
        test_fraction: Test share of one's own array.

    Returns:
        A Split with float32 parts (N, D) on the CPU.

    Raises:
        FileNotFoundError: A file is not there and cannot be downloaded.
        ValueError: An unknown name, a damaged file, or values that are not finite.
        TypeError: Something that holds no numbers.

    >>> load_data("digits")
    digits: 1,297 training, 250 validation and 250 test data of 64 dimensions (8 x 8), ...
    >>> load_data(torch.linspace(-1, 1, 20).reshape(10, 2))
    array: 8 training, 1 validation and 1 test data of 2 dimensions, real values; cut into ...
    """
    fractions = {"valid_fraction": valid_fraction, "test_fraction": test_fraction}
    if not isinstance(data, (str, Path)):
        return split_arrays(data, labels=labels, seed=seed, **fractions, name="array")
    if labels is not None:
        raise ValueError(
            "labels: expected None beside a name or a path, since a set has its own and a file "
            "keeps them under 'labels' in an .npz"
        )
    folder = None if root is None else Path(root).expanduser().resolve()
    if str(data) not in _SETS:
        path = _path(data)
        split = split_arrays(read_arrays(path), seed=seed, **fractions, name=path.stem)
        return replace(split, source={"data": str(path), "seed": seed, **fractions})
    if set(fractions.values()) != {_FRACTION}:
        raise ValueError(f"valid_fraction, test_fraction: {data} has parts of fixed sizes")
    split = _SETS[str(data)](str(data), folder, seed)
    source = {"data": str(data), "root": None if folder is None else str(folder), "seed": seed}
    return replace(split, source=source)


def restore(description: Mapping[str, Any]) -> Split:
    """The data that `Split.describe` described: loaded again, prepared again, compared.

    Args:
        description: What `describe` returned, possibly by way of JSON.

    Raises:
        ValueError: The values came from memory, or are not what they were.

    >>> data = load_data("digits").binarize_static(seed=1)
    >>> restore(data.describe()).test.equal(data.test)
    True
    """
    source, name = description["source"], description["name"]
    if source is None:
        raise ValueError(f"data: {name} came from memory and no copy was kept; pass the data again")
    split = load_data(**source)
    for step, arguments in description["steps"]:
        if step not in PREPARATIONS:
            raise ValueError(f"steps: expected one of {', '.join(PREPARATIONS)}, got {step!r}")
        split = getattr(split, step)(**arguments)
    if split.describe()["fingerprint"] != description["fingerprint"]:
        raise ValueError(
            f"data: {name} has changed since: {source['data']} now gives other values; bring the "
            "old files back, or pass the data to use"
        )
    return split


def _path(data: str | Path) -> Path:
    path = Path(data).expanduser().resolve()
    if path.suffix not in (".npy", ".npz"):
        close = difflib.get_close_matches(str(data), _SETS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"data: expected one of {', '.join(_SETS)}, or the path of a file that ends in .npy "
            f"or .npz, got {str(data)!r}.{hint}"
        )
    return path


def _shuffled(rows: Tensor, seed: int, sizes: list[int]) -> tuple[Tensor, ...]:
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(rows)))
    return rows[order].split(sizes)


def _digits(name: str, root: Path | None, seed: int) -> Split:
    from sklearn.datasets import load_digits  # imported here since it takes a second

    pixels, classes = load_digits(return_X_y=True)
    sizes = [1_297, 250, 250]
    train, valid, test = _shuffled(torch.from_numpy(pixels).float(), seed, sizes)
    return Split(
        train=train,
        valid=valid,
        test=test,
        labels=Labels(*_shuffled(torch.from_numpy(classes).long(), seed, sizes)),
        kind=Kind.LEVELS,
        num_levels=17,
        name=name,
        image_shape=(8, 8),
        preparation=(f"scikit-learn's 1,797 digits, shuffled under seed {seed}",),
    )


def _mnist(name: str, root: Path | None, seed: int) -> Split:
    from torchvision import datasets  # imported here since it takes a second

    dataset = datasets.MNIST if name == "mnist" else datasets.FashionMNIST
    home = root or cache_directory()
    raw = home / dataset.__name__ / "raw"
    files = [raw / f"{part}-{what}-ubyte" for part in _MNIST_SIZES for what in _IDX]
    by_hand = f"put {', '.join(file.name for file in files)}, unpacked, into {raw}"
    if not all(file.is_file() for file in files):
        try:
            dataset(home, download=True)
        except Exception as error:  # of the network, the server, the checksum or the disk
            raise FileNotFoundError(
                f"root: {name} is not in {raw} and cannot be downloaded ({error}); {by_hand}, or "
                "name a folder that has it by root="
            ) from error
    images, classes = [], []
    for part, expected in _MNIST_SIZES.items():
        try:
            read = dataset(home, train=part == "train")
            if read.data.shape != (expected, *_IMAGE) or read.targets.shape != (expected,):
                got = f"{tuple(read.data.shape)} images, {tuple(read.targets.shape)} labels"
                raise ValueError(f"got {got}")
        except Exception as error:  # a damaged file raises whatever its first damaged byte leads to
            raise ValueError(
                f"root: expected {expected:,} images of 28 x 28 and their labels in {raw}/{part}-* "
                f"({error}); the files are truncated or damaged: delete them and load again, or "
                f"{by_hand}"
            ) from error
        images.append(read.data.reshape(expected, _PIXELS).float())
        classes.append(read.targets.long())
    sizes = [_MNIST_SIZES["train"] - _MNIST_VALID, _MNIST_VALID]
    train, valid = images[0].split(sizes)
    train_classes, valid_classes = classes[0].split(sizes)
    return Split(
        train=train,
        valid=valid,
        test=images[1],
        labels=Labels(train_classes, valid_classes, classes[1]),
        kind=Kind.LEVELS,
        num_levels=256,
        name=name,
        image_shape=_IMAGE,
        preparation=(f"the last {_MNIST_VALID:,} training images are the validation part",),
    )


def _binarized_mnist(name: str, root: Path | None, seed: int) -> Split:
    stems = {part: f"binarized_mnist_{part}.amat" for part in PARTS}
    wanted = f"{', '.join(stems.values())}, plain or gzipped (.gz)"
    if root is None:
        raise ValueError(
            f"root: {name} is not downloaded; name the folder that has {wanted}, in itself or in "
            f"{name}/"
        )
    found = {part: _find(root, name, [stem, f"{stem}.gz"]) for part, stem in stems.items()}
    missing = [stems[part] for part, path in found.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"root: expected {wanted}, in {root} or {root / name}; {', '.join(missing)} not found"
        )
    files = {part: path for part, path in found.items() if path is not None}
    bits = packed_bits(files, sizes=_BINARIZED_SIZES, num_values=_PIXELS)
    values = torch.from_numpy(np.unpackbits(bits, axis=1, count=_PIXELS)).float()
    train, valid, test = values.split([_BINARIZED_SIZES[part] for part in PARTS])
    return Split(
        train=train,
        valid=valid,
        test=test,
        kind=Kind.BINARY,
        name=name,
        image_shape=_IMAGE,
        preparation=(
            "static binarization as distributed (Larochelle and Murray 2011)",
            "the test images are sorted by class, so that a part of them is no sample",
        ),
    )


def _find(root: Path, name: str, files: list[str]) -> Path | None:
    candidates = [folder / file for folder in (root, root / name) for file in files]
    return next((path for path in candidates if path.is_file()), None)


def _frey_faces(name: str, root: Path | None, seed: int) -> Split:
    from scipy.io import loadmat

    file = "frey_rawface.mat"
    if root is None:
        raise ValueError(f"root: {name} is not downloaded; name the folder that has {file}")
    path = _find(root, name, [file])
    if path is None:
        raise FileNotFoundError(f"root: expected {file} in {root} or {root / name}, found none")
    try:
        columns = np.asarray(loadmat(path)["ff"])
    except Exception as error:  # a damaged file raises whatever its first damaged byte leads to
        raise ValueError(
            f"root: cannot read 'ff' from {path} ({error!r}); fetch it again"
        ) from error
    if columns.shape != (560, 1_965) or columns.dtype != np.uint8:
        raise ValueError(
            f"root: expected 'ff' in {path} to be uint8 of shape (560, 1965), one column a frame, "
            f"got {columns.dtype} of shape {columns.shape}"
        )
    frames = torch.from_numpy(np.ascontiguousarray(columns.T)).float()
    train, valid, test = _shuffled(frames, seed, [1_565, 200, 200])
    return Split(
        train=train,
        valid=valid,
        test=test,
        kind=Kind.LEVELS,
        num_levels=256,
        name=name,
        image_shape=(28, 20),
        preparation=(f"1,965 frames of a video, shuffled under seed {seed}",),
    )


_SETS = {
    "digits": _digits,
    "mnist": _mnist,
    "fashion_mnist": _mnist,
    "binarized_mnist": _binarized_mnist,
    "frey_faces": _frey_faces,
}
