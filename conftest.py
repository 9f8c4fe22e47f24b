"""What all tests start from: names for doctests, a fresh state, the folder of real data."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch

import pyro_vae as pv

# Real data sets are tested where they are: in a folder that the user names, or beside the checkout.
BESIDE = Path(__file__).resolve().parents[1] / "shared" / "data"
if BESIDE.is_dir():
    os.environ.setdefault("PYRO_VAE_DATA", str(BESIDE))


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(pv=pv, torch=torch, np=np, pyro=pyro, dist=pyro.distributions)


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Every test starts from the same random state, parameter store and setting of Pyro's."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    local = pyro.settings.get("module_local_params")  # scripts turn it, for their own process
    yield
    pyro.settings.set(module_local_params=local)
