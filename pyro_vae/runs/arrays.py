"""A folder of arrays as a mapping: what a long computation has finished, each in a file."""

import hashlib
import io
import warnings
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_vae.runs.directory import atomically

__all__ = ["ArrayFolder"]

# Of the checksum behind the array; numpy's format has none, and reads no further than the array.
_DIGEST = 32


class ArrayFolder(MutableMapping[str, Tensor]):
    """Tensors by name, each in an ``.npy`` file that is whole or not there.

    A file that is damaged or can't be read counts as none: what was in it is computed again. One
    that can't be written is warned of, once: computing goes on.

    Args:
        path: The folder; it is made with the first file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False

    def __getitem__(self, key: str) -> Tensor:
        try:
            whole = self._file(key).read_bytes()
        except OSError as error:
            raise KeyError(key) from error
        array, digest = whole[:-_DIGEST], whole[-_DIGEST:]
        if hashlib.sha256(array).digest() != digest:
            raise KeyError(key)
        return torch.from_numpy(np.load(io.BytesIO(array), allow_pickle=False))

    def __setitem__(self, key: str, value: Tensor) -> None:
        array = io.BytesIO()
        np.save(array, value.cpu().numpy())
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with atomically(self._file(key)) as file:
                file.write(array.getvalue() + hashlib.sha256(array.getvalue()).digest())
        except OSError as error:
            if not self._warned:
                warnings.warn(f"{error} The evaluation goes on.", UserWarning, stacklevel=3)
            self._warned = True

    def __delitem__(self, key: str) -> None:
        try:
            self._file(key).unlink()
        except FileNotFoundError as error:
            raise KeyError(key) from error

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(file.stem for file in self.path.glob("*.npy")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _file(self, key: str) -> Path:
        return self.path / f"{key}.npy"
