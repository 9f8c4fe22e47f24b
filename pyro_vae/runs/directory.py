"""A run directory: what one training leaves on disk, every file written atomically.

===================  ==========================================================================
``config.json``      data, pair, options, versions: how the run was made
``metrics.jsonl``    one line an epoch
``checkpoint.pt``    the whole state of training; loaded without executing anything in it
``examples.npz``     some test data, so that pictures can be drawn from this folder alone
``evidence.json``    the last evaluation; ``evidence.npz`` holds it per datum
``evaluation/``      its finished blocks of data, so that one that was killed goes on
``*.png``            pictures
``report.html``      all of it on one page
===================  ==========================================================================
"""

import json
import math
import os
import platform
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyro
import torch

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind
    fcntl = None

__all__ = ["CHECKPOINT_FORMAT", "Run", "atomically", "finite", "machine", "versions"]

CHECKPOINT_FORMAT = 1
UNFINISHED = ".config.json."  # begins the temporary name of a run's first file


class Run:
    """The files of one run.

    Args:
        path: The directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path) -> "Run":
        """Make a directory for a new run.

        Raises:
            FileExistsError: There is something in it already.
            OSError: It can't be made or written to.
        """
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise FileExistsError(f"out: {run.path} is a file; give a directory.")
        # What a kill has left of the first file is in nobody's way.
        if run.path.exists() and not all(p.name.startswith(UNFINISHED) for p in run.path.iterdir()):
            raise FileExistsError(
                f"out: {run.path} exists and is not empty; give another directory, or go on with "
                "the run in it by resume=True (--resume on the command line)."
            )
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=run.path):
                pass
        except OSError as error:
            raise OSError(
                f"out: can't write to {run.path} ({error.strerror}); give a directory on a disk "
                "that is writable."
            ) from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Take an existing run.

        Raises:
            FileNotFoundError: The directory holds no run.
        """
        run = cls(path)
        if not (run.path / "config.json").is_file():
            raise FileNotFoundError(
                f"{run.path} is no run directory: it has no config.json. Expected a folder that "
                "fit(..., out=...) or pyro-vae train --out ... has written."
            )
        return run

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep others from training in this run; the system lets it go when this process ends.

        Raises:
            OSError: Another training is under way in it.
        """
        if fcntl is None:
            yield
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(
                    f"out: another training is under way in {self.path}; wait until it has ended, "
                    "or give another directory."
                ) from None
            except OSError:  # some network disks know no locks
                pass
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # for processes too that were forked meanwhile
            os.close(handle)

    @property
    def config(self) -> dict[str, Any]:
        """How the run was made."""
        config = self.read_json("config.json")
        if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
            raise ValueError(
                f"{self.path / 'config.json'}: expected a JSON object that describes a run, with "
                "an entry 'data'; restore it from a copy of the run."
            )
        return config

    @property
    def has_begun(self) -> bool:
        """Whether training has come so far that there has to be a checkpoint."""
        # Metrics are written first, and the first epoch's with a checkpoint.
        return (self.path / "checkpoint.pt").exists() or len(self.read_metrics()[0]) > 1

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file; NaN and infinities become null."""
        text = json.dumps(finite(value), indent=1, allow_nan=False)
        with atomically(self.path / name) as file:
            file.write(text.encode() + b"\n")

    def read_json(self, name: str) -> Any:
        """Read a JSON file.

        Raises:
            ValueError: It is damaged.
        """
        try:
            return json.loads((self.path / name).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.path / name} is damaged ({error}); restore it from a copy of the run."
            ) from error

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """Write ``metrics.jsonl``, one line an epoch."""
        lines = (json.dumps(finite(record), allow_nan=False) + "\n" for record in records)
        with atomically(self.path / "metrics.jsonl") as file:
            file.write("".join(lines).encode())

    def read_metrics(self) -> tuple[list[dict[str, Any]], int]:
        """The readable lines of ``metrics.jsonl``, and how many could not be read."""
        path = self.path / "metrics.jsonl"
        records, lost = [], 0
        for line in path.read_bytes().splitlines() if path.is_file() else []:
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                lost += 1
        return records, lost

    def write_arrays(self, name: str, **arrays: np.ndarray) -> None:
        """Write an ``.npz`` file."""
        with atomically(self.path / name) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    def read_arrays(self, name: str) -> dict[str, np.ndarray]:
        """Read an ``.npz`` file; an empty dict where there is none.

        Raises:
            ValueError: It is damaged.
        """
        path = self.path / name
        if not path.is_file():
            return {}
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except Exception as error:  # a damaged file raises whatever its first damaged byte leads to
            raise ValueError(f"{path} is damaged ({error}); delete it to go on without.") from error

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write ``checkpoint.pt``."""
        with atomically(self.path / "checkpoint.pt") as file:
            torch.save({"format": CHECKPOINT_FORMAT, **state}, file)

    def load_checkpoint(self, map_location: Any = "cpu") -> dict[str, Any]:
        """Read ``checkpoint.pt`` without executing anything in it.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, holds more than tensors and plain values, or is of a
                version that this one does not know.
        """
        path = self.path / "checkpoint.pt"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: the run stopped before its first epoch was saved. Train "
                "again into another directory."
            )
        try:
            with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of damaged bytes that look like a new protocol
                state = torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # a damaged file raises whatever its first damaged byte leads to
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{path} can't be loaded ({reason}): it is damaged, cut off, or holds something "
                "other than tensors and plain values. Restore it from a copy of the run."
            ) from error
        if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
            found = state.get("format") if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"{path} has checkpoint format {found}; this version of pyro_vae reads format "
                f"{CHECKPOINT_FORMAT}."
            )
        return state


@contextmanager
def atomically(path: Path) -> Iterator[BinaryIO]:
    """Write a file under a temporary name, and give it its own when it is whole.

    Raises:
        OSError: The disk is full or read-only; the old file is untouched.
    """
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        refused = _refused_by_the_disk(error)
        if refused is None:
            raise
        raise OSError(
            f"can't write {path} ({refused.strerror or refused}); an earlier version of the file "
            "is untouched. Free some space or give another directory."
        ) from error


def _refused_by_the_disk(error: BaseException) -> OSError | None:
    """The OSError behind an error: torch.save's zip writer trips over it and raises its own."""
    if not isinstance(error, OSError | RuntimeError):
        return None
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause


def versions() -> dict[str, str]:
    """Versions of what decides numbers."""
    return {
        "pyro_vae": metadata.version("pyro-vae"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "numpy": np.__version__,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What decides times."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        name = next(named, platform.processor() or platform.machine())
    return {"processor": name, "cores": cores, "device": str(device)}


def finite(value: Any) -> Any:
    """A value of JSON, with None in the place of NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
