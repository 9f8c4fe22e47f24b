"""The networks as plain torch modules, and the negative ELBO written by hand."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.benchmarks.contestant import Objective
from experiments.benchmarks.workloads import MIN_SCALE, Side, Workload

__all__ = ["HandWritten", "TorchSteps", "load_weights", "network", "normal_of", "wait_for"]


def network(workload: Workload, side: Side, weights: dict[str, np.ndarray]) -> nn.Sequential:
    """One of the two networks, ``(B, in) -> (B, out)``.

    Args:
        workload: Its sizes.
        side: Which one.
        weights: Initial weights, see ``workloads.weights``.
    """
    layers: list[nn.Module] = []
    for narrow, wide in workload.layers(side):
        layers += [nn.Linear(narrow, wide), nn.GLU(dim=-1) if workload.gated else nn.Softplus()]
    module = nn.Sequential(*layers[:-1])
    load_weights(module, side, weights)
    return module


def load_weights(module: nn.Module, side: Side, weights: dict[str, np.ndarray]) -> None:
    """Copy a network's initial weights into the affine maps of any module, in their order.

    Args:
        module: A module with as many ``Linear`` layers as the network.
        side: Which network it is.
        weights: Initial weights, see ``workloads.weights``.

    Raises:
        ValueError: The module has another number of affine maps.
    """
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    expected = sum(name.startswith(side) for name in weights) // 2
    if len(linears) != expected:
        raise ValueError(f"{side}: expected {expected} affine maps, got {len(linears)}.")
    with torch.no_grad():
        for i, linear in enumerate(linears):
            linear.weight.copy_(torch.from_numpy(weights[f"{side}.{i}.weight"]))
            linear.bias.copy_(torch.from_numpy(weights[f"{side}.{i}.bias"]))


def normal_of(params: Tensor) -> tuple[Tensor, Tensor]:
    """Loc and scale from the encoder's output, as ``pyro_vae.families.normal`` has them."""
    loc, unconstrained = params.chunk(2, dim=-1)
    return loc, F.softplus(unconstrained) + MIN_SCALE


class HandWritten(nn.Module):
    """The negative ELBO as one writes it without a library: ``forward(x)`` is the loss.

    Args:
        workload: Sizes of the networks.
        objective: "trace" draws log q - log p, "meanfield" integrates it.
        weights: Initial weights, see ``workloads.weights``.
    """

    def __init__(
        self, workload: Workload, objective: Objective, weights: dict[str, np.ndarray]
    ) -> None:
        super().__init__()
        self.encoder = network(workload, "encoder", weights)
        self.decoder = network(workload, "decoder", weights)
        self.analytic = objective == "meanfield"

    def forward(self, x: Tensor) -> Tensor:
        """The loss, summed over the minibatch, in nats."""
        loc, scale = normal_of(self.encoder(x))
        noise = torch.randn_like(loc)
        z = loc + scale * noise
        distortion = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        if self.analytic:
            rate = 0.5 * (loc.square() + scale.square() - 1) - scale.log()
        else:
            # (z - loc) / scale is the noise, and log 2 pi cancels.
            rate = 0.5 * (z.square() - noise.square()) - scale.log()
        return distortion + rate.sum()


class TorchSteps:
    """A contestant of a loss, ``backward`` and a torch optimizer.

    Args:
        pair: The loss and its parameters.
        optimizer: Its optimizer.
        x: The minibatch ``(B, D)``.
        description: What runs.
        step_loss: The loss as the step computes it; None for the pair itself.
    """

    def __init__(
        self,
        pair: HandWritten,
        optimizer: torch.optim.Optimizer,
        x: Tensor,
        description: str,
        *,
        step_loss: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.pair = pair
        self.optimizer = optimizer
        self.x = x
        self.description = description
        self.step_loss = pair if step_loss is None else step_loss

    def step(self) -> None:
        """Take one training step."""
        self.optimizer.zero_grad()
        self.step_loss(self.x).backward()
        self.optimizer.step()
        wait_for(self.x.device)

    def loss(self) -> float:
        """One estimate of the loss, computed eagerly."""
        with torch.no_grad():
            return self.pair(self.x).item()

    def describe(self) -> str:
        """What runs."""
        return f"{self.description}, torch {torch.__version__}"


def wait_for(device: torch.device) -> None:
    """Wait for a GPU; a CPU is done when the call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
