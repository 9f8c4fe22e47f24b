"""A user's own values: read, told apart by kind, split under a seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.kinds import PARTS, Kind, check_finite
from pyro_vae.data.split import Labels, Split

__all__ = ["Array", "read_arrays", "split_arrays"]

Array: TypeAlias = Tensor | np.ndarray

_LARGEST_LEVEL = 65_535
_GRAMMAR = (
    "'x' (and 'labels' or 'y' with it), or 'train', 'valid' and 'test' (and 'train_labels', "
    "'valid_labels', 'test_labels' with them)"
)


def read_arrays(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """The array of a .npy file, or the arrays of an .npz file by name; nothing is unpickled.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds Python objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data: expected a .npy or .npz file, found none at {path}")
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            return {key: loaded[key] for key in loaded.files}
    except Exception as error:  # a damaged file raises whatever its first damaged byte leads to
        raise ValueError(
            f"data: cannot read {path}: {error}. Expected what np.save or np.savez wrote, arrays "
            "of numbers, whole; write the file again"
        ) from error


def split_arrays(
    data: Array | Mapping[str, Any] | Sequence[Any],
    *,
    labels: Any = None,
    seed: int,
    valid_fraction: float,
    test_fraction: float,
    name: str,
) -> Split:
    """A Split of one array, cut under the seed, or of three parts as they are.

    Args:
        data: One array (N, ...), a sequence of three, or a mapping with named arrays.
        labels: Classes (N,), or three of them; a mapping has its own.
        seed: Fixes which data go into which part.
        valid_fraction: Share of the validation part, in (0, 1).
        test_fraction: Share of the test part, in (0, 1).
        name: What the set is called in reports.
    """
    if isinstance(data, Mapping):
        if labels is not None:
            raise ValueError("labels: data with names carry their own, in 'labels' or 'y'")
        data, labels = _named(data)
    if isinstance(data, (Tensor, np.ndarray)):
        array = _numbers("data", data)
        values, image_shape = _rows("data", array)
        kind, num_levels = _kind([array], [values])
        order = _cut(len(values), seed, valid_fraction, test_fraction)
        parts = {part: values[index] for part, index in order.items()}
        if labels is not None:
            classes = _classes("labels", labels, len(values))
            labels = Labels(**{part: classes[index] for part, index in order.items()})
        sizes = " / ".join(f"{len(index):,}" for index in order.values())
        sentence = f"cut into {sizes} under seed {seed}"
    elif isinstance(data, (tuple, list)) and len(data) == len(PARTS):
        arrays = [_numbers(f"data.{part}", array) for part, array in zip(PARTS, data, strict=True)]
        rows = [_rows(f"data.{part}", array) for part, array in zip(PARTS, arrays, strict=True)]
        values, shapes = zip(*rows, strict=True)
        if len({(part.shape[1], shape) for part, shape in rows}) > 1:
            raise ValueError(
                "data: expected three parts with data of one shape, got arrays of shapes "
                + ", ".join(str(array.shape) for array in arrays)
            )
        kind, num_levels = _kind(arrays, list(values))
        image_shape = shapes[0]
        parts = dict(zip(PARTS, values, strict=True))
        if labels is not None:
            labels = _classes_of_parts(labels, parts)
        sentence = "in the parts that were given"
    else:
        count = f" of length {len(data)}" if isinstance(data, (tuple, list)) else ""
        raise TypeError(
            "data: expected the name of a set, the path of a file, a tensor, an array, three of "
            f"them (train, valid, test) or a mapping with {_GRAMMAR}, got "
            f"{type(data).__name__}{count}"
        )
    return Split(
        **parts,
        labels=labels,
        kind=kind,
        num_levels=num_levels,
        name=name,
        image_shape=image_shape,
        preparation=(sentence,),
    )


def _named(arrays: Mapping[str, Any]) -> tuple[Any, Any]:
    """The data and the labels of a mapping: one array, or the three parts."""
    if all(part in arrays for part in PARTS):
        keys = [f"{part}_labels" for part in PARTS]
        labelled = [key for key in keys if key in arrays]
        if labelled and labelled != keys:
            raise ValueError(f"labels: expected {', '.join(keys)} or none of them, got {labelled}")
        labels = tuple(arrays[key] for key in keys) if labelled else None
        return tuple(arrays[part] for part in PARTS), labels
    if "x" in arrays:
        return arrays["x"], arrays.get("labels", arrays.get("y"))
    raise ValueError(f"data: expected arrays named {_GRAMMAR}, got {sorted(arrays)}")


def _numbers(argument: str, data: Any) -> np.ndarray:
    if isinstance(data, Tensor):
        data = data.detach().cpu()
        data = (data.float() if data.dtype == torch.bfloat16 else data).numpy()
    array = np.asarray(data)
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"{argument}: expected an array of numbers, got dtype {array.dtype}; "
            "convert it by .astype(np.float32)"
        )
    if array.ndim == 0 or array.size == 0:
        raise ValueError(
            f"{argument}: expected at least one datum, one along the first axis each, got an "
            f"array of shape {array.shape}"
        )
    return array


def _rows(argument: str, array: np.ndarray) -> tuple[Tensor, tuple[int, int] | None]:
    """Finite float32 values (N, D), and height and width where the array holds images."""
    image_shape = array.shape[1:]
    if len(image_shape) == 3 and 1 in (image_shape[0], image_shape[2]):
        image_shape = image_shape[1:] if image_shape[0] == 1 else image_shape[:2]
    with np.errstate(over="ignore"):  # the check says where a value is too large for float32
        rows = torch.from_numpy(array.astype(np.float32).reshape(len(array), -1))
    check_finite(argument, rows)
    return rows, (image_shape[0], image_shape[1]) if len(image_shape) == 2 else None


def _kind(arrays: list[np.ndarray], values: list[Tensor]) -> tuple[Kind, int | None]:
    """What the values are, and how many levels they have."""
    lowest = min(float(part.min()) for part in values)
    highest = max(float(part.max()) for part in values)
    declared = all(array.dtype.kind in "biu" for array in arrays)
    integral = declared or all(bool((part == part.round()).all()) for part in values)
    if integral and lowest >= 0 and highest <= 1:
        return Kind.BINARY, None
    if integral and lowest >= 0 and highest <= _LARGEST_LEVEL:
        is_bytes = all(array.dtype == np.uint8 for array in arrays)
        return Kind.LEVELS, 256 if is_bytes else int(highest) + 1
    if declared:
        raise ValueError(
            f"data: expected integers in 0..{_LARGEST_LEVEL}, got {lowest:g} to {highest:g}; shift "
            "them, or convert them to floats that are meant as real values"
        )
    return (Kind.UNIT_INTERVAL if lowest >= 0 and highest <= 1 else Kind.REAL), None


def _cut(num_data: int, seed: int, valid: float, test: float) -> dict[str, Tensor]:
    """Which data go into which part, at least one into each."""
    if not (0 < valid < 1 and 0 < test < 1 and valid + test < 1):
        raise ValueError(
            "valid_fraction, test_fraction: expected two positive numbers with a sum below 1, "
            f"got {valid} and {test}"
        )
    if num_data < len(PARTS):
        raise ValueError(
            f"data: expected at least {len(PARTS)} data, one for each of {', '.join(PARTS)}, "
            f"got {num_data}"
        )
    num_valid = min(max(1, round(num_data * valid)), num_data - 2)
    num_test = min(max(1, round(num_data * test)), num_data - num_valid - 1)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(num_data))
    sizes = [num_data - num_valid - num_test, num_valid, num_test]
    return dict(zip(PARTS, order.split(sizes), strict=True))


def _classes(argument: str, labels: Any, num_data: int) -> Tensor:
    array = _numbers(argument, labels)
    if array.shape != (num_data,) or (array != np.round(array)).any():
        raise ValueError(
            f"{argument}: expected one integer for each of {num_data:,} data, got an array of "
            f"shape {array.shape} and dtype {array.dtype}"
        )
    return torch.from_numpy(array.astype(np.int64))


def _classes_of_parts(labels: Any, parts: Mapping[Any, Tensor]) -> Labels:
    if not isinstance(labels, (tuple, list)) or len(labels) != len(PARTS):
        raise ValueError("labels: expected three arrays (train, valid, test), as the data are")
    named = zip(PARTS, labels, strict=True)
    return Labels(*(_classes(f"labels.{part}", one, len(parts[part])) for part, one in named))
