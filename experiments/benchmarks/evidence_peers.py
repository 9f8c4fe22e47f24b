"""Other ways to score particles, to hold ``pv.log_weights`` against.

Each function returns a ``Job``: something to call, and how many particle-data one call scores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor

from experiments.benchmarks.torch_parts import network, normal_of
from experiments.benchmarks.workloads import Workload

__all__ = [
    "Job",
    "hand_written_log_weights",
    "matrix_product_rate",
    "pyro_importance",
    "pythae_nll",
]

# Pyro scores all particles that it is asked for at once; more than these do not fit into caches.
_PYRO_VALUES = 1 << 22


@dataclass(frozen=True)
class Job:
    """Work to be timed.

    Attributes:
        call: Does it, and returns what it found.
        particle_data: Number of particles times data that one call scores.
    """

    call: Callable[[], Any]
    particle_data: int


def pyro_importance(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x: Tensor,
    num_particles: int,
    *,
    chunk_size: int | None = None,
) -> Job:
    """Pyro's ``vectorized_importance_weights``, in as many calls as fit the memory.

    It sums the log-weights over the data, so that they say nothing of log p(x) of each datum; the
    work is the same.

    Args:
        model: A Pyro model whose deepest plate nesting is one.
        guide: Its guide.
        x: Data ``(N, D)``.
        num_particles: Number of particles K per datum.
        chunk_size: Particles that are scored at once; None for what fits into caches.

    Returns:
        A job whose result is the log-weights ``(K,)``, each summed over the data.
    """
    chunk_size = chunk_size or max(2, _PYRO_VALUES // x.numel())

    def call() -> Tensor:
        parts: list[Tensor] = []
        with torch.no_grad():
            for start in range(0, num_particles, chunk_size):
                particles = min(chunk_size, num_particles - start)
                found: Any = vectorized_importance_weights(
                    model, guide, x, num_samples=particles, max_plate_nesting=1
                )
                parts.append(found[0].reshape(particles))
        return torch.cat(parts)

    return Job(call, num_particles * len(x))


def hand_written_log_weights(
    workload: Workload,
    weights: dict[str, np.ndarray],
    x: Tensor,
    num_particles: int,
    *,
    compiled: bool,
    chunk_size: int = 50,
) -> Job:
    """Log-weights as one writes them without a library: encode once, then score in chunks.

    Args:
        workload: Sizes of the networks.
        weights: Their weights, see ``workloads.weights``.
        x: Data ``(N, D)``.
        num_particles: Number of particles K per datum, a multiple of ``chunk_size``.
        compiled: Whether a chunk's scores are compiled by ``torch.compile``.
        chunk_size: Particles that are scored at once.

    Returns:
        A job whose result is the log-weights ``(K, N)``.
    """
    if num_particles % chunk_size:
        raise ValueError(
            f"num_particles: expected a multiple of {chunk_size}, got {num_particles}."
        )
    encoder = network(workload, "encoder", weights).to(x.device)
    decoder = network(workload, "decoder", weights).to(x.device)

    def score(loc: Tensor, scale: Tensor) -> Tensor:
        noise = torch.randn(chunk_size, *loc.shape, dtype=loc.dtype, device=loc.device)
        z = loc + scale * noise
        logits = decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        log_likelihood = -F.binary_cross_entropy_with_logits(
            logits, x.expand_as(logits), reduction="none"
        ).sum(-1)
        # (z - loc) / scale is the noise, and log 2 pi cancels.
        log_ratio = 0.5 * (noise.square() - z.square()) + scale.log()
        return log_likelihood + log_ratio.sum(-1)

    chunk = torch.compile(score, fullgraph=True, dynamic=False) if compiled else score

    def call() -> Tensor:
        with torch.no_grad():
            loc, scale = normal_of(encoder(x))
            return torch.cat([chunk(loc, scale) for _ in range(num_particles // chunk_size)])

    return Job(call, num_particles * len(x))


def pythae_nll(
    workload: Workload,
    weights: dict[str, np.ndarray],
    x: Tensor,
    num_particles: int,
    *,
    batch_size: int = 100,
) -> Job:
    """Pythae's ``get_nll``, which despite its name returns the mean of +log p(x).

    It takes data one by one, encodes each once per particle, and rounds the number of particles to
    whole batches (a number below ``batch_size`` upwards).

    Args:
        workload: Sizes of the networks.
        weights: Their weights, see ``workloads.weights``.
        x: Data ``(N, D)``.
        num_particles: Number of particles K per datum, a multiple of ``batch_size``.
        batch_size: Particles that are scored at once; its default.

    Returns:
        A job whose result is the estimate of log p(x), averaged over the data.

    Raises:
        ImportError: pythae is not installed.
    """
    from experiments.benchmarks.contestants.pythae_trainer import pythae_vae

    if num_particles % batch_size:
        raise ValueError(
            f"num_particles: expected a multiple of {batch_size}, got {num_particles}."
        )
    vae = pythae_vae(workload, weights).to(x.device).eval()

    def call() -> float:
        with torch.no_grad():
            return float(vae.get_nll(x, n_samples=num_particles, batch_size=batch_size))

    return Job(call, num_particles * len(x))


def matrix_product_rate(
    rows: int,
    in_dim: int = 400,
    out_dim: int = 784,
    *,
    library: Literal["torch", "onednn"],
    device: str = "cpu",
) -> Job:
    """The matrix product of a decoder's last layer alone, the floor under every score.

    Args:
        rows: Particle-data in one product.
        in_dim: Width of the last hidden layer.
        out_dim: Number of pixels.
        library: What torch runs by itself (``torch.mm``), or oneDNN, which torch ships too.
        device: "cpu" or "cuda".

    Returns:
        A job of ``2 * rows * in_dim * out_dim`` floating-point operations.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, in_dim, generator=generator).to(device)
    weight = torch.randn(out_dim, in_dim, generator=generator).to(device)

    def call() -> Tensor:
        with torch.no_grad():
            if library == "torch":
                return torch.mm(x, weight.t())
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    return Job(call, rows)
