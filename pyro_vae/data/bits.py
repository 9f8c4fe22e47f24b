"""Binary images in text files, read once into a packed cache of bits.

The cache is keyed by the bytes of the files, so that it cannot be stale, and is a zip file, whose
checksum tells a damaged one. It is a convenience: what cannot be read is made again, and what
cannot be written is done without.
"""

import contextlib
import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

__all__ = ["cache_directory", "packed_bits"]


def cache_directory() -> Path:
    """Where this library keeps what can be made again: $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "pyro_vae"


def packed_bits(
    files: Mapping[str, Path], *, sizes: Mapping[str, int], num_values: int
) -> np.ndarray:
    """The bits of all parts, one below the other, from the cache where they are there.

    Args:
        files: The text file of each part, plain or gzipped.
        sizes: The number of lines that each has to have.
        num_values: The number of values in a line, D.

    Returns:
        uint8 of shape (N, ceil(D / 8)), as `np.packbits` packs them.

    Raises:
        ValueError: A file is truncated or damaged; the message names it.
    """
    raw = {part: path.read_bytes() for part, path in files.items()}
    key = hashlib.sha256(b"".join(hashlib.sha256(raw[part]).digest() for part in files))
    cached = cache_directory() / f"bits-{key.hexdigest()[:32]}.npz"
    shape = (sum(sizes.values()), -(-num_values // 8))
    try:
        with cached.open("rb") as file:  # np.load leaves a damaged file open
            bits = np.load(file, allow_pickle=False)["bits"]
        if bits.shape == shape and bits.dtype == np.uint8:
            return bits
    except Exception:  # not there, or damaged in any way: what it was made from is at hand
        pass
    parts = [_parse(files[part], raw[part], sizes[part], num_values) for part in files]
    bits = np.packbits(np.concatenate(parts), axis=1)
    _store(cached, bits)
    return bits


def _parse(path: Path, raw: bytes, num_lines: int, num_values: int) -> np.ndarray:
    """The values of a text file, one image a line, uint8 (num_lines, D)."""
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"root: {path} is truncated or damaged ({error}); fetch it again"
            ) from error
    lines = [line.rstrip() for line in raw.splitlines()]
    width = 2 * num_values - 1
    bad = next((index for index, line in enumerate(lines) if len(line) != width), None)
    if bad is None and lines:
        grid = np.frombuffer(b"".join(lines), np.uint8).reshape(-1, width)
        values = grid[:, ::2] - ord("0")
        fits = (values <= 1).all(axis=1) & (grid[:, 1::2] == ord(" ")).all(axis=1)
        if fits.all() and len(lines) == num_lines:
            return values
        bad = None if fits.all() else int(fits.argmin())
    where = f"line {bad + 1:,} has others" if bad is not None else f"it has {len(lines):,} lines"
    raise ValueError(
        f"root: expected {num_lines:,} lines of {num_values} values 0 or 1 with single spaces "
        f"between them in {path}, but {where}; fetch the file again"
    )


def _store(path: Path, bits: np.ndarray) -> None:
    """Write the cache whole or not at all; without one, the next call takes seconds longer."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                np.savez(file, bits=bits)
                file.close()
                os.replace(file.name, path)
            finally:
                Path(file.name).unlink(missing_ok=True)
