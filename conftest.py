"""Names that the doctests use without importing them."""

from typing import Any

import numpy as np
import pyro
import pytest
import torch

import pyro_vae as pv


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(pv=pv, torch=torch, np=np, pyro=pyro, dist=pyro.distributions)


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    """Every test starts from the same random state and an empty parameter store."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
