"""Small arrays of every kind, and runs that the command line makes of them."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_vae.cli import main

SMALL = ["--latent-dim", "2", "--hidden-dims", "8", "--epochs", "2", "--batch-size", "20"]

KINDS: dict[str, tuple[Any, str, str]] = {
    "binary": (lambda g: g.integers(0, 2, (80, 9)), "bernoulli", "binary values"),
    "bools": (lambda g: g.random((80, 3, 3)) < 0.5, "bernoulli", "binary values"),
    "levels": (lambda g: g.integers(0, 7, (80, 9)), "binomial", "integer levels"),
    "bytes": (lambda g: g.integers(0, 256, (80, 9), np.uint8), "binomial", "integer levels"),
    "unit": (lambda g: g.random((80, 9)), "normal", "values in [0, 1]"),
    "real": (lambda g: g.normal(3.0, 50.0, (80, 9)), "normal", "real values"),
}


def as_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """No pictures, which test_pictures looks at; warnings as a user sees them; an empty cache."""
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda *run: None)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    torch.manual_seed(0)


def array(kind: str) -> np.ndarray:
    return KINDS[kind][0](np.random.default_rng(0))


def saved(folder: Path, kind: str = "binary", suffix: str = ".npy") -> str:
    path = folder / f"{kind}{suffix}"
    if suffix == ".npy":
        np.save(path, array(kind))
    else:
        np.savez(path, x=array(kind), labels=np.arange(80) % 4)
    return str(path)


def trained(folder: Path, *options: str, kind: str = "binary") -> Path:
    out = folder / "run"
    assert main(["train", "--data", saved(folder, kind), "--out", str(out), *SMALL, *options]) == 0
    return out
