"""Pyro's own ``SVI`` with Pyro's own compiled losses, ``Jit..._ELBO``."""

from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import JitTrace_ELBO, JitTraceMeanField_ELBO

from experiments.benchmarks.contestant import Contestant, Objective
from experiments.benchmarks.contestants.pyro_svi import PyroSteps, TutorialPair
from experiments.benchmarks.workloads import Workload

__all__ = ["make"]


class _TracedOnce(JitTraceMeanField_ELBO):
    """Pyro 1.9.2 looks for its compiled loss under a name that it never stores it under.

    So the class as it is traces the pair anew at each step, some ten times slower.
    """

    @property
    def _loss_and_surrogate_loss(self) -> Any:
        return getattr(self, "_differentiable_loss", None)


def make(
    workload: Workload,
    objective: Objective,
    weights: dict[str, np.ndarray],
    batch: np.ndarray,
    *,
    device: str = "cpu",
    seed: int = 0,
) -> Contestant:
    """Make the contestant; see ``contestant.Make``."""
    pyro.set_rng_seed(seed)
    if objective == "meanfield":
        loss, name = _TracedOnce(ignore_jit_warnings=True), "JitTraceMeanField_ELBO (mended)"
    else:
        loss, name = JitTrace_ELBO(ignore_jit_warnings=True), "JitTrace_ELBO"
    x = torch.from_numpy(batch).to(device)
    return PyroSteps(TutorialPair(workload, weights, device), x, loss, name)
