"""Log-weights of a block as two compiled kernels: one draws the particles, one scores them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evidence.particles import Arguments, Pair
from pyro_vae.graph.arguments import flatten, rebuild
from pyro_vae.graph.capture import capture
from pyro_vae.graph.constant import folded
from pyro_vae.graph.lower import Kernel, lower
from pyro_vae.inference.handlers import Trace, latent_sites

__all__ = ["CompiledWeights"]


class CompiledWeights:
    """Computes what ``Pair.log_weights`` computes, for blocks of one shape and these parameters.

    Args:
        pair: A pair on a block of that shape, at rest.
        particles: Number of particles in a block.
        chunk_size: Particles that the model scores at once; divides ``particles``.

    Attributes:
        draw: From the tensors of a block of data to latents and their log-density.

    Raises:
        CannotCompileError: The pair can't become a graph, or the compiler failed.
    """

    def __init__(self, pair: Pair, particles: int, chunk_size: int) -> None:
        self.particles = particles
        self.chunk_size = chunk_size
        self.key = _key(pair.args)
        template, _ = pair.draw(pair.args, particles)
        self._axes = [
            site["value"].dim() - site["fn"].event_dim - 1 - pair.nesting
            for _, site in latent_sites(template)
        ]

        def draw(*data: Tensor) -> Sequence[Tensor]:
            trace, log_q = pair.draw(rebuild(pair.args, iter(data)), particles)
            return [*(site["value"] for _, site in latent_sites(trace)), log_q]

        def score(*tensors: Tensor) -> Sequence[Tensor]:
            given: Iterator[Tensor] = iter(tensors)
            trace: Trace = template.copy()
            for name, site in latent_sites(template):
                trace.nodes[name] = {**site, "value": next(given)}
            return [pair.score(rebuild(pair.args, given), trace, chunk_size)]

        data: list[Tensor] = []
        flatten(pair.args, data)
        values = [site["value"] for _, site in latent_sites(template)]
        first = self._part(values, 0)
        self.draw = _compiled(draw, data)
        self._score = _compiled(score, [*first, *data])

    def fits(self, pair: Pair, particles: int) -> bool:
        """Whether the kernels are for a block of this shape."""
        return particles == self.particles and _key(pair.args) == self.key

    def __call__(self, pair: Pair) -> Tensor:
        """Log-weights (particles, n) of fresh draws for the data of a block."""
        data: list[Tensor] = []
        flatten(pair.args, data)
        *values, log_q = self.draw(data)
        return self.score(values, data) - log_q

    def score(self, values: Sequence[Tensor], data: Sequence[Tensor]) -> Tensor:
        """Joint log-densities (particles, n) of latents, chunk after chunk."""
        scores = [
            self._score([*self._part(values, start), *data])[0]
            for start in range(0, self.particles, self.chunk_size)
        ]
        return torch.cat(scores) if len(scores) > 1 else scores[0]

    def _part(self, values: Sequence[Tensor], start: int) -> list[Tensor]:
        if self.chunk_size == self.particles:
            return list(values)
        return [
            value.narrow(axis, start, self.chunk_size)
            for value, axis in zip(values, self._axes, strict=True)
        ]


def _compiled(function: Callable[..., Sequence[Tensor]], data: list[Tensor]) -> Kernel:
    data = [t.clone(memory_format=torch.contiguous_format) for t in data]
    others = [t.roll(1, 0) if t.dim() > 0 and len(t) > 1 else t.clone() for t in data]
    return lower(folded(capture(function, data, others=others)), [], data)


def _key(args: Arguments) -> Any:
    return flatten(args, [])
