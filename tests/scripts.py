"""Calling an experiment as its user does, within the process of the tests."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def runner(script: Path, *always: str) -> Callable[..., None]:
    """What calls a script, by ``run(monkeypatch, *words)``, with these words before the others."""

    def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
        monkeypatch.setattr("sys.argv", [script.name, *always, *words])
        runpy.run_path(str(script), run_name="__main__")

    return run


def figures(out: Path) -> dict[str, Any]:
    """What a script has left."""
    return json.loads((out / "results.json").read_text())
