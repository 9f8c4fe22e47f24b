"""What a contestant is: something that trains one workload, one step at a time."""

import importlib
from typing import Literal, Protocol, get_args

import numpy as np

from experiments.benchmarks.workloads import Workload

__all__ = ["NAMES", "REFERENCE", "Contestant", "Make", "Objective", "load", "objective_named"]

# Monte Carlo of all terms (Trace_ELBO), or the analytic KL (TraceMeanField_ELBO).
Objective = Literal["trace", "meanfield"]

NAMES = (
    "pyro_vae_compiled",
    "pyro_vae_eager",
    "pyro_svi",
    "pyro_svi_jit",
    "torch_eager",
    "torch_fused",
    "torch_compiled",
    "torch_whole_step",
    "numpyro_svi",
    "pythae_trainer",
)

REFERENCE = "torch_eager"  # whose losses the others have to agree with


class Contestant(Protocol):
    """A model, its weights, a minibatch and an optimizer."""

    def step(self) -> None:
        """Take one training step on the minibatch, and wait until it is done."""
        ...

    def loss(self) -> float:
        """One estimate of the loss at the present weights with fresh noise.

        Returns:
            The negative ELBO, summed over the minibatch, in nats.
        """
        ...

    def describe(self) -> str:
        """What runs, with versions, in one line."""
        ...


class Make(Protocol):
    """Makes a contestant."""

    def __call__(
        self,
        workload: Workload,
        objective: Objective,
        weights: dict[str, np.ndarray],
        batch: np.ndarray,
        *,
        device: str = "cpu",
        seed: int = 0,
    ) -> Contestant:
        """Make it.

        Args:
            workload: Sizes of the networks.
            objective: The loss.
            weights: Initial weights, see ``workloads.weights``.
            batch: The minibatch ``(B, D)``.
            device: "cpu" or "cuda".
            seed: Seed of the noise.

        Raises:
            ImportError: What it needs is not installed.
            NotImplementedError: It lacks this objective.
        """
        ...


def load(name: str) -> Make:
    """The maker of a contestant, whose libraries are imported now.

    Args:
        name: One of ``NAMES``.

    Raises:
        ImportError: What it needs is not installed.
    """
    if name not in NAMES:
        raise ValueError(f"contestant: expected one of {', '.join(NAMES)}, got {name!r}.")
    return importlib.import_module(f"experiments.benchmarks.contestants.{name}").make


def objective_named(name: str) -> Objective:
    """An objective from what somebody typed."""
    for objective in get_args(Objective):
        if objective == name:
            return objective
    raise ValueError(f"objective: expected one of {', '.join(get_args(Objective))}, got {name!r}.")
