"""Calling an experiment as its user does, within the process of the tests."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest


def run_script(script: Path, first: str, monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    """Call a script with these words."""
    monkeypatch.setattr("sys.argv", [script.name, first, *args])
    runpy.run_path(str(script), run_name="__main__")


def figures(out: Path) -> dict[str, Any]:
    """What it has left."""
    return json.loads((out / "results.json").read_text())
