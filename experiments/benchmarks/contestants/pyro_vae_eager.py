"""This library's ``SVI`` on its own pair, uncompiled."""

import numpy as np
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from experiments.benchmarks.contestant import Contestant, Objective
from experiments.benchmarks.torch_parts import load_weights, wait_for
from experiments.benchmarks.workloads import LEARNING_RATE, Workload

__all__ = ["SVISteps", "make", "pair"]


def pair(workload: Workload, weights: dict[str, np.ndarray]) -> tuple[pv.Model, pv.Guide]:
    """The pair of this library's pieces.

    Args:
        workload: Sizes of the networks.
        weights: Initial weights, see ``workloads.weights``.
    """

    def network(in_dim: int, out: tuple[int, int], hidden_dims: tuple[int, ...]) -> nn.Module:
        if workload.gated:
            return pv.networks.gated_mlp(in_dim, out, hidden_dims=hidden_dims)
        return pv.networks.mlp(in_dim, out, hidden_dims=hidden_dims)

    dim, latent_dim, hidden_dims = workload.data_dim, workload.latent_dim, workload.hidden_dims
    encoder = network(dim, (2, latent_dim), hidden_dims)
    decoder = network(latent_dim, (1, dim), hidden_dims[::-1])
    load_weights(encoder, "encoder", weights)
    load_weights(decoder, "decoder", weights)
    model = pv.Model(
        pv.priors.StandardNormal(latent_dim), pv.Conditional(decoder, pv.families.bernoulli)
    )
    return model, pv.Guide(pv.Conditional(encoder, pv.families.normal))


class SVISteps:
    """A contestant of ``pv.SVI``.

    Args:
        model: A model.
        guide: Its guide.
        x: The minibatch ``(B, D)``.
        objective: The loss.
        compile: Whether the step is compiled.
    """

    def __init__(
        self, model: pv.Model, guide: pv.Guide, x: Tensor, objective: Objective, *, compile: bool
    ) -> None:
        self.svi = pv.SVI(
            model,
            guide,
            lambda params: torch.optim.Adam(params, lr=LEARNING_RATE),
            TraceMeanField_ELBO() if objective == "meanfield" else Trace_ELBO(),
            compile=compile,
        )
        self.x = x
        self.compile = compile

    def step(self) -> None:
        """Take one training step."""
        self.svi.step(self.x)
        wait_for(self.x.device)

    def loss(self) -> float:
        """One estimate of the loss, computed eagerly."""
        return self.svi.evaluate_loss(self.x).item()

    def describe(self) -> str:
        """What runs."""
        return f"pyro_vae.SVI, compile={self.compile}, torch {torch.__version__}"


def make(
    workload: Workload,
    objective: Objective,
    weights: dict[str, np.ndarray],
    batch: np.ndarray,
    *,
    device: str = "cpu",
    seed: int = 0,
    compile: bool = False,
) -> Contestant:
    """Make the contestant; see ``contestant.Make``."""
    torch.manual_seed(seed)
    model, guide = pair(workload, weights)
    x = torch.from_numpy(batch).to(device)
    return SVISteps(model.to(device), guide.to(device), x, objective, compile=compile)
