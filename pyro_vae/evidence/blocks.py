"""Log-weights in blocks of data and particles, each with its own stream of noise.

A block is what is drawn under one seed; it never depends on memory or on the compiler. Within it
the model scores as many particles at once as a memory budget allows.
"""

import math
from collections.abc import Iterator

import pyro
import torch
from torch import Tensor

from pyro_vae.context import at_rest, device_of, forked, on_device, seeded
from pyro_vae.evidence.compiled import CompiledWeights
from pyro_vae.evidence.particles import Arguments, Pair
from pyro_vae.graph.refusal import CannotCompileError, warn_uncompiled
from pyro_vae.graph.work import WORTH_COMPILING, Work
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.data_plate import data_size
from pyro_vae.inference.handlers import Program

__all__ = ["Weigher", "blocks", "check_options", "data_blocks", "of_data"]

DATA_BLOCK = 100
# A GPU is idle between blocks: there they are larger, and its noise is another anyway.
PARTICLE_BLOCK = {"cpu": 100, "cuda": 500}
# Bytes for the largest tensor of a chunk; a few of that size are alive at once. On a CPU they stay
# in its caches; a GPU wants large kernels.
MEMORY_BUDGET = {"cpu": 1 << 23, "cuda": 1 << 28}


def blocks(
    model: Program,
    guide: Program,
    args: Arguments,
    num_particles: int,
    *,
    seed: int,
    data_plate: str | None,
    chunk_size: int | None,
    compile: Compile,
    autocast: torch.dtype | None,
) -> Iterator[Iterator[Tensor]]:
    """For each block of data, an iterator over its blocks of log-weights (k, n).

    Raises:
        ValueError: See ``log_weights``.
    """
    check_options(num_particles, chunk_size, compile=compile)
    args = on_device(args, device_of(model, guide))
    weigher = Weigher(data_size(args), num_particles, chunk_size, compile)
    for index, block in enumerate(data_blocks(args)):
        # Gradients are off and modules at rest only while a block is computed, not between.
        with at_rest(model, guide):
            pair = Pair(model, guide, block, data_plate, autocast)
        yield of_data(pair, weigher, num_particles, ("evidence", seed, index))


def check_options(
    num_particles: int,
    chunk_size: int | None,
    *,
    compile: Compile,
    name: str = "num_particles",
) -> None:
    """Refuse options that make no sense; ``name`` is what the caller calls the first."""
    if num_particles < 1:
        raise ValueError(f"{name}: expected at least 1, got {num_particles}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 particle or None, got {chunk_size}.")
    if compile not in (True, False, "auto"):
        raise ValueError(f'compile: expected True, False or "auto", got {compile!r}.')


def data_blocks(args: Arguments) -> Iterator[Arguments]:
    """The arguments of a pair, cut along the data."""
    size = data_size(args)
    for start in range(0, size, DATA_BLOCK):
        yield tuple(
            a[start : start + DATA_BLOCK]
            if isinstance(a, Tensor) and a.dim() > 0 and len(a) == size
            else a
            for a in args
        )


def of_data(
    pair: Pair, weigher: "Weigher", num_particles: int, stream: tuple[int | str, ...]
) -> Iterator[Tensor]:
    """The log-weights (k, n) of one block of data, block of particles by block.

    Args:
        pair: The pair on that block of data.
        weigher: Computes the weights.
        num_particles: Number of particles.
        stream: The seed of the data's block, to which that of each block of particles is added.

    Raises:
        ValueError: A weight is NaN or infinite; the message names the site.
    """
    at_once = PARTICLE_BLOCK[_device_type(pair)]
    starts = range(0, num_particles, at_once)
    # Flags of their own would be small tensors between large ones, and the heap would grow.
    finite = torch.ones(len(starts), dtype=torch.bool, device=pair.device)
    for number, start in enumerate(starts):
        particles = min(at_once, num_particles - start)
        with at_rest(pair.model, pair.guide), pyro.validation_enabled(is_validate=False):
            log_w = weigher(pair, particles, (*stream, number))
        finite[number] = (log_w < math.inf).all()
        yield log_w
    # Read once for all particles, since reading waits for the device.
    for number, good in enumerate(finite.tolist()):
        if not good:
            particles = min(at_once, num_particles - number * at_once)
            raise ValueError(pair.blame(particles, (*stream, number)))


class Weigher:
    """Decides for each shape of block how it is computed, and computes it.

    Args:
        size: Number of data in all, counted as often as they are weighed.
        num_particles: Number of particles for each datum.
        chunk_size: Particles that the model scores at once, or None.
        compile: Compile the weights; see ``log_weights``.
    """

    def __init__(
        self, size: int, num_particles: int, chunk_size: int | None, compile: Compile
    ) -> None:
        self.size = size
        self.num_particles = num_particles
        self.chunk_size = chunk_size
        self.compile = compile
        self._plans: dict[tuple[int, int], CompiledWeights | int] = {}

    def __call__(self, pair: Pair, particles: int, seed: tuple[int | str, ...]) -> Tensor:
        """Log-weights (particles, n) of one block of noise."""
        shape = (data_size(pair.args), particles)
        if shape not in self._plans:
            self._plans[shape] = self._plan(pair, *shape)
        plan = self._plans[shape]
        with seeded(*seed, device=pair.device):
            if isinstance(plan, CompiledWeights) and plan.fits(pair, particles):
                return plan(pair)
            chunk = plan.chunk_size if isinstance(plan, CompiledWeights) else plan
            return pair.log_weights(particles, chunk)

    def _plan(self, pair: Pair, size: int, particles: int) -> CompiledWeights | int:
        """Kernels for blocks of this shape, or the chunk of particles to score at once."""
        try:
            with forked(device=pair.device), Work() as work:
                pair.log_weights(1, 1)
            two = min(2, particles)
            with forked(device=pair.device), Work() as of_two:
                pair.log_weights(two, two)
        except Exception:  # a mistake in the pair, which reads better of all the particles
            return self.chunk_size or particles
        memory = MEMORY_BUDGET[_device_type(pair)]
        chunk = self.chunk_size or max(1, memory // _added(work.made, of_two.made))
        chunk = min(chunk, particles)
        if self.compile is False:
            return chunk
        data_blocks = self.size // DATA_BLOCK if size == DATA_BLOCK else 1
        at_once = PARTICLE_BLOCK[_device_type(pair)]
        particle_blocks = self.num_particles // at_once if particles == at_once else 1
        calls = data_blocks * particle_blocks
        # What the user asks for is compiled for the first shape; remainders have to be worth it.
        asked = self.compile is True and not self._plans
        chunks = calls * math.ceil(particles / chunk)
        once = 2 * work.seconds(1, 0) - of_two.seconds(1, 0)  # what particles don't add to
        each = work.seconds(1, 0) - once
        seconds = calls * particles * each + chunks * once + work.seconds(0, calls)
        if not asked and seconds < WORTH_COMPILING:
            return chunk
        even = max(d for d in range(1, chunk + 1) if particles % d == 0)
        try:
            with forked(device=pair.device):
                return CompiledWeights(pair, particles, even)
        except CannotCompileError as error:
            warn_uncompiled("the log-weights are computed without compiling", error)
            self.compile = False
            return chunk


def _added(one: list[int], two: list[int]) -> int:
    """Bytes by which the largest of the tensors that particles share out grows with each.

    What a prior makes of its parameters alone stays as large as it is.
    """
    added = [b - a for a, b in zip(one, two, strict=True)] if len(one) == len(two) else one
    return max([1, *added])


def _device_type(pair: Pair) -> str:
    return "cuda" if pair.device is not None and pair.device.type == "cuda" else "cpu"
