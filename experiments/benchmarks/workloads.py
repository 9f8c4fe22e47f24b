"""What every contestant trains: a shape of networks, initial weights and one minibatch.

All of it comes from NumPy, so that contestants of every library start at the same point on the same
data. The pair is the same everywhere: a standard normal prior, an encoder whose last layer gives
loc and unconstrained scale of a normal (scale = ``MIN_SCALE`` + softplus, as in
``pyro_vae.families.normal``), and a decoder whose last layer gives Bernoulli logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

__all__ = ["LEARNING_RATE", "MIN_SCALE", "WORKLOADS", "Side", "Workload", "batch", "weights"]

Side = Literal["encoder", "decoder"]
Array = np.ndarray

LEARNING_RATE = 1e-3
MIN_SCALE = 1e-6  # the default of pyro_vae.families.normal


@dataclass(frozen=True)
class Workload:
    """Networks and a minibatch.

    Attributes:
        name: One letter.
        data_dim: Number of binary pixels D.
        hidden_dims: Widths of the encoder's hidden layers; the decoder has them in reverse.
        latent_dim: Number of latent dimensions Z.
        batch_size: Number of data B in the minibatch.
        gated: Gated layers, ``a * sigmoid(b)``, in place of softplus.
    """

    name: str
    data_dim: int
    hidden_dims: tuple[int, ...]
    latent_dim: int
    batch_size: int
    gated: bool

    def layers(self, side: Side) -> Iterator[tuple[int, int]]:
        """The ``(in, out)`` sizes of a network's affine maps; a gated layer's is twice its width.

        Args:
            side: Which of the two networks.
        """
        if side == "encoder":
            widths = [self.data_dim, *self.hidden_dims]
            last = 2 * self.latent_dim
        else:
            widths = [self.latent_dim, *reversed(self.hidden_dims)]
            last = self.data_dim
        for narrow, wide in pairwise(widths):
            yield narrow, 2 * wide if self.gated else wide
        yield widths[-1], last

    def describe(self) -> str:
        """The sizes in one line."""
        widths = [self.data_dim, *self.hidden_dims, self.latent_dim]
        sizes = "-".join(map(str, [*widths, *reversed(widths[:-1])]))
        return f"{sizes}, {'gated' if self.gated else 'softplus'}, batch {self.batch_size}"


WORKLOADS = {
    w.name: w
    for w in (
        Workload("a", 784, (400,), 50, 128, gated=False),
        Workload("b", 784, (300, 300), 40, 100, gated=True),
        Workload("c", 64, (64,), 2, 64, gated=False),
    )
}


def weights(workload: Workload, seed: int) -> dict[str, Array]:
    """Initial weights of both networks, distributed as torch's ``Linear`` draws them.

    Args:
        workload: The networks' shape.
        seed: Seed of the draw.

    Returns:
        float32 arrays by name: ``encoder.0.weight`` of shape ``(out, in)``, ``encoder.0.bias``, ...
    """
    rng = np.random.default_rng(seed)
    drawn: dict[str, Array] = {}
    sides: tuple[Side, ...] = ("encoder", "decoder")
    for side in sides:
        for i, (narrow, wide) in enumerate(workload.layers(side)):
            bound = narrow**-0.5
            for kind, shape in (("weight", (wide, narrow)), ("bias", (wide,))):
                drawn[f"{side}.{i}.{kind}"] = rng.uniform(-bound, bound, shape).astype(np.float32)
    return drawn


def batch(workload: Workload, seed: int) -> Array:
    """One minibatch of bits with something to learn in it: five directions, and dark on average.

    Args:
        workload: Its shape.
        seed: Seed of the draw.

    Returns:
        Zeros and ones ``(B, D)`` in float32.
    """
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((workload.batch_size, 5))
    logits = factors @ rng.standard_normal((5, workload.data_dim)) - 1.5
    bits = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
    return bits.astype(np.float32)
