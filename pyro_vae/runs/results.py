"""The figures of an experiment, row by row, in a file that is whole after every write."""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from pyro_vae.runs.device import resolve_device
from pyro_vae.runs.directory import Run, finite, machine, versions

__all__ = ["Results"]

HEAD = ("title", "protocol", "machine", "versions", "rows")


class Results:
    """Rows of figures that were made under one protocol, kept as JSON.

    Every ``put`` and ``note`` writes the file at once, so that an experiment which was killed finds
    what it had finished, and makes the rest; what another process has put there meanwhile stays. A
    file of another protocol is never added to, and a damaged one is never written over. NaN and
    infinities become null.

    Args:
        path: The file, e.g. ``results.json``; it is made, with its folder, or taken up again.
        title: What was measured.
        protocol: What has to be equal for two figures to be comparable: data, model, training,
            epochs, particles, seed. What changes no figure, such as a budget, has no place in it.
        device: On which device the figures are made: "auto", "cpu", "cuda"...

    Attributes:
        path: The file.

    Raises:
        TypeError: The protocol holds something that JSON has no word for.
        ValueError: The file is of another title or protocol, is damaged, or is no results file.
        OSError: It can't be written.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = folder.name + "/results.json"
        >>> results = pv.Results(path, title="Priors", protocol={"data": "digits", "epochs": 3})
        >>> results.put("N(0, I)", log_evidence=-20.5, standard_error=0.01)
        >>> again = pv.Results(path, title="Priors", protocol={"data": "digits", "epochs": 3})
        >>> "N(0, I)" in again, "VampPrior" in again
        (True, False)
        >>> again["N(0, I)"]["log_evidence"]
        -20.5
        >>> pv.Results(path, title="Priors", protocol={"data": "digits", "epochs": 4})
        Traceback (most recent call last):
        ...
        ValueError: ...results.json holds figures of another protocol: epochs is 3 there, 4 here...
        >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | Path,
        *,
        title: str,
        protocol: dict[str, Any],
        device: str | torch.device = "auto",
    ) -> None:
        self.path = Path(path)
        target = resolve_device(device)
        self._here = {"machine": machine(target), "versions": versions()}
        wanted = {"title": title, "protocol": _as_read(protocol, "protocol")}
        if self.path.exists():
            self._kept = _read(self.path)
            _check_alike(self.path, self._kept, wanted)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write({**wanted, **self._here, "rows": []})

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order in which they came; copies."""
        return copy.deepcopy(self._kept["rows"])

    def __contains__(self, name: object) -> bool:
        """Whether there is a row of this name."""
        return any(row["name"] == name for row in self._kept["rows"])

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The row of a name, a copy.

        Raises:
            KeyError: There is none.
        """
        for row in self._kept["rows"]:
            if row["name"] == name:
                return copy.deepcopy(row)
        there = ", ".join(repr(row["name"]) for row in self._kept["rows"]) or "none yet"
        raise KeyError(f"no row {name!r} in {self.path}; rows there: {there}")

    def put(self, name: str, /, **figures: Any) -> None:
        """Add a row, or replace the one of this name where it stands; written at once.

        A row that was made on another machine, or by other versions, than the file says bears its
        own.

        Args:
            name: Its name.
            figures: Numbers, strings, lists or dicts of them.

        Raises:
            TypeError: A figure is none of these; a tensor says its number by ``.item()``.
            ValueError: A figure is called "name"; or the file has been damaged meanwhile, or is of
                another protocol now. What was to be added is in a note of the error.
            OSError: The file can't be written; it is as it was.
        """
        if "name" in figures:
            raise ValueError("put: 'name' is the name of the row; call the figure something else.")
        elsewhere = {key: fact for key, fact in self._here.items() if self._kept[key] != fact}
        row = {"name": name, **{k: _as_read(v, k) for k, v in figures.items()}, **elsewhere}
        self._look_again(row)
        rows = self.rows
        for i, old in enumerate(rows):
            if old["name"] == name:
                rows[i] = row
                break
        else:
            rows.append(row)
        self._write({**self._kept, "rows": rows})

    def note(self, **facts: Any) -> None:
        """Add facts beside the rows, such as ``as_reported={...}``; written at once.

        Args:
            facts: As the figures of a row.

        Raises:
            TypeError: A fact is nothing that JSON has a word for.
            ValueError: It is called like a part of the file; or as for ``put``.
            OSError: The file can't be written; it is as it was.
        """
        for key in facts:
            if key in HEAD:
                raise ValueError(f"note: {key!r} is a part of every results file; use other names.")
        told = {k: _as_read(v, k) for k, v in facts.items()}
        self._look_again(told)
        self._write({**self._kept, **told})

    def _look_again(self, added: dict[str, Any]) -> None:
        """What another process has written meanwhile is kept."""
        if not self.path.exists():
            return
        try:
            found = _read(self.path)
            _check_alike(self.path, found, self._kept)
        except ValueError as error:
            error.add_note(f"What was to be added: {json.dumps(added)}")
            raise
        self._kept = found

    def _write(self, kept: dict[str, Any]) -> None:
        Run(self.path.parent).write_json(self.path.name, kept)
        self._kept = kept


def _as_read(value: Any, name: str) -> Any:
    """A value as it comes back from the file, so that both are alike at any time."""
    try:
        return json.loads(json.dumps(finite(value), allow_nan=False))
    except TypeError as error:
        raise TypeError(
            f"{name}: expected numbers, strings, lists or dicts of them ({error}); give tensors as "
            ".item() or .tolist()."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore it from a copy, or delete it to begin anew."
        ) from error
    whole = isinstance(kept, dict) and all(key in kept for key in HEAD)
    rows, protocol = (kept["rows"], kept["protocol"]) if whole else (None, None)
    named = isinstance(rows, list) and all(isinstance(r, dict) and "name" in r for r in rows)
    if not named or not isinstance(protocol, dict):
        raise ValueError(
            f"{path} is no file of pv.Results: expected {', '.join(HEAD)}, and a name "
            "in each row; give another path, or delete it to begin anew."
        )
    return kept


def _check_alike(path: Path, kept: dict[str, Any], wanted: dict[str, Any]) -> None:
    there = {"title": kept["title"], **kept["protocol"]}
    here = {"title": wanted["title"], **wanted["protocol"]}
    names = [*here, *(name for name in there if name not in here)]
    other = [
        f"{name} is {_said(there, name)} there, {_said(here, name)} here"
        for name in names
        if (name in there, there.get(name)) != (name in here, here.get(name))
    ]
    if other:
        raise ValueError(
            f"{path} holds figures of another protocol: {'; '.join(other)}. Ask for the same, give "
            "another place, or delete the file to begin anew."
        )


def _said(entries: dict[str, Any], name: str) -> str:
    return repr(entries[name]) if name in entries else "missing"
