"""Pyro's own ``SVI`` on a pair as in Pyro's tutorial, with Pyro's Adam and its validation."""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam  # type: ignore[attr-defined]  (made at run time)
from torch import Tensor

from experiments.benchmarks.contestant import Contestant, Objective
from experiments.benchmarks.torch_parts import network, normal_of, wait_for
from experiments.benchmarks.workloads import LEARNING_RATE, Workload

__all__ = ["PyroSteps", "TutorialPair", "make"]


class TutorialPair:
    """Model and guide as methods that register their networks by ``pyro.module``.

    Args:
        workload: Sizes of the networks.
        weights: Initial weights, see ``workloads.weights``.
        device: "cpu" or "cuda".
    """

    def __init__(self, workload: Workload, weights: dict[str, np.ndarray], device: str) -> None:
        self.latent_dim = workload.latent_dim
        self.encoder = network(workload, "encoder", weights).to(device)
        self.decoder = network(workload, "decoder", weights).to(device)

    def model(self, x: Tensor) -> None:
        """The prior p(z), and p(x|z)."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            loc = x.new_zeros((x.shape[0], self.latent_dim))
            scale = x.new_ones((x.shape[0], self.latent_dim))
            z = pyro.sample("latent", dist.Normal(loc, scale).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The approximate posterior q(z|x)."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = normal_of(self.encoder(x))
            pyro.sample("latent", dist.Normal(loc, scale).to_event(1))


class PyroSteps:
    """A contestant of ``pyro.infer.SVI``.

    Args:
        pair: The pair.
        x: The minibatch ``(B, D)``.
        loss: One of Pyro's losses.
        name: Its name.
    """

    def __init__(self, pair: TutorialPair, x: Tensor, loss: Any, name: str) -> None:
        self.svi = SVI(pair.model, pair.guide, Adam({"lr": LEARNING_RATE}), loss)
        self.x = x
        self.elbo = name

    def step(self) -> None:
        """Take one training step."""
        self.svi.step(self.x)
        wait_for(self.x.device)

    def loss(self) -> float:
        """One estimate of the loss."""
        loss: Any = self.svi.evaluate_loss(self.x)
        return loss

    def describe(self) -> str:
        """What runs."""
        return f"pyro.infer.SVI, {self.elbo}, Pyro {pyro.__version__}, torch {torch.__version__}"


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
    loss = TraceMeanField_ELBO() if objective == "meanfield" else Trace_ELBO()
    x = torch.from_numpy(batch).to(device)
    return PyroSteps(TutorialPair(workload, weights, device), x, loss, type(loss).__name__)
