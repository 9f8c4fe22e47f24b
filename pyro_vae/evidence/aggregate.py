r"""The aggregate posterior of a guide over given data, and its density at any latents.

.. math:: q(z) = \frac1N \sum_{n=1}^N q(z|x_n)

The sum is taken over all N data: the guide is run on each block of them and scores latents that
other data have drawn. They stand in the plate of particles, so a guide sees the shapes that it
knows, and several sites are one joint z. Cost: N densities of the guide for every latent.
"""

import math
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.context import forked
from pyro_vae.evidence.blocks import MEMORY_BUDGET, data_blocks
from pyro_vae.evidence.dimensions import log_probs
from pyro_vae.evidence.particles import Arguments, Pair
from pyro_vae.graph.arguments import flatten, rebuild
from pyro_vae.graph.capture import capture
from pyro_vae.graph.constant import folded
from pyro_vae.graph.lower import Kernel, lower
from pyro_vae.graph.refusal import CannotCompileError, warn_uncompiled
from pyro_vae.graph.work import WORTH_COMPILING, Work
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.data_plate import data_size, per_datum
from pyro_vae.inference.handlers import Trace, in_particles, latent_sites

__all__ = ["AggregatePosterior"]

# Latents of which the work is counted: enough that a network on the data alone weighs little.
_PROBE = 64


class AggregatePosterior:
    """Scores latents under the average of a guide over the data.

    Args:
        pair: A pair, inspected on some of the data, at rest.
        args: What it takes, with all the data, on their device.
        template: A trace of its guide on particles.
        by_dimension: Score each dimension by its own average too; there is one latent site, and
            its dimensions are independent.
        latents: How many latents will be scored in all.
        compile: Compile the densities; see ``log_weights``.
    """

    def __init__(
        self,
        pair: Pair,
        args: Arguments,
        template: Trace,
        *,
        by_dimension: bool,
        latents: int,
        compile: Compile,
    ) -> None:
        self.pair = pair
        self.size = data_size(args)
        self.blocks = list(data_blocks(args))
        self.template: Trace = poutine.util.prune_subsample_sites(template)
        self.by_dimension = by_dimension
        self.latents = latents
        self.compile = compile
        self._chunk = 0
        self._kernel: Kernel | None = None

    def log_density(self, trace: Trace) -> tuple[Tensor, Tensor | None]:
        """The log-density of the latents of a guide's trace under the aggregate posterior.

        Args:
            trace: A trace of the guide on K particles of n data.

        Returns:
            Joint log-densities log q(z), ``(K, n)``; and those of each dimension log q(z_d),
            ``(K, n, D)``, where they were asked for; float64.

        Raises:
            ValueError: The guide can't score a value that it did not draw.
        """
        sites = [(site["value"], site["fn"].event_dim) for _, site in latent_sites(trace)]
        first, event_dim = sites[0]
        shape = (first.shape[0], first.shape[first.dim() - event_dim + self.pair.dim])
        foreign = [self._foreign(value, event_dim) for value, event_dim in sites]
        if not self._chunk:
            self._plan(foreign)
        found: list[list[Tensor]] = []
        for start in range(0, len(foreign[0]), self._chunk):
            part = [value[start : start + self._chunk] for value in foreign]
            found.append(self._of_chunk(part))
        sums = [torch.cat(parts) for parts in zip(*found, strict=True)]
        joint = sums[0].view(shape)
        return joint, sums[1].view(*shape, -1) if self.by_dimension else None

    def _foreign(self, value: Tensor, event_dim: int) -> Tensor:
        """Values of particles and data as particles, of which all data are to see each."""
        axis = value.dim() - event_dim + self.pair.dim
        return value.movedim(axis, 1).flatten(0, 1).unsqueeze(axis)

    def _of_chunk(self, values: list[Tensor]) -> list[Tensor]:
        """The logarithms of the averages for some latents."""
        count = len(values[0])
        total: list[Tensor] = []
        for block in self.blocks:
            if self._kernel is not None and data_size(block) == data_size(self.blocks[0]):
                data: list[Tensor] = []
                flatten(block, data)
                sums = self._kernel([*(_filled(v, self._chunk) for v in values), *data])
                sums = [s[:count] for s in sums]
            else:
                sums = self._log_sums(values, block)
            sums = [s.double() for s in sums]
            total = [a.logaddexp(b) for a, b in zip(total, sums, strict=True)] if total else sums
        return [t - math.log(self.size) for t in total]

    def _log_sums(self, values: Sequence[Tensor], args: Arguments) -> list[Tensor]:
        """Sums of the densities over the data of a block: the joint ones, those of dimensions."""
        trace = self._replayed(values, args)
        if self.by_dimension:
            ((_, site),) = latent_sites(trace)
            each = log_probs(site, self.pair.dim)
            assert each is not None
            return [each.sum(-1).logsumexp(1), each.logsumexp(1)]
        sites = latent_sites(trace)
        log_q = per_datum(sites, len(values[0]), nesting=self.pair.nesting, dim=self.pair.dim)
        return [log_q.logsumexp(1)]

    def _replayed(self, values: Sequence[Tensor], args: Arguments) -> Trace:
        """The guide on the data of a block, at latents that it did not draw."""
        given: Trace = self.template.copy()
        for (name, site), value in zip(latent_sites(self.template), values, strict=True):
            shape = list(value.shape)
            shape[value.dim() - site["fn"].event_dim + self.pair.dim] = data_size(args)
            given.nodes[name] = {**site, "value": value.expand(shape)}
        guide = poutine.replay(self.pair.guide, trace=given)
        inside = in_particles(guide, len(values[0]), self.pair.nesting)
        with pyro.validation_enabled(is_validate=False):
            return poutine.trace(inside).get_trace(*args)

    def _plan(self, values: list[Tensor]) -> None:
        """How many latents are scored at once, and whether by a kernel."""
        probe = [value[:_PROBE] for value in values]
        block = self.blocks[0]
        try:
            with forked(device=self.pair.device), Work() as work:
                self._log_sums(probe, block)
        except (NotImplementedError, KeyError) as error:  # as transforms without an inverse raise
            raise ValueError(
                "the guide can't score a value that it did not draw, which its average over the "
                f"data takes ({type(error).__name__}: {error}); use transforms with an inverse."
            ) from error
        device = (
            "cuda" if self.pair.device is not None and self.pair.device.type == "cuda" else "cpu"
        )
        at_once = MEMORY_BUDGET[device] * len(probe[0]) // max(work.largest, 1)
        self._chunk = min(max(at_once, 1), len(values[0]))
        calls = self.latents / self._chunk * len(self.blocks)
        seconds = work.seconds(calls * self._chunk / len(probe[0]), int(calls))
        if self.compile is False or (self.compile == "auto" and seconds < WORTH_COMPILING):
            return
        try:
            with forked(device=self.pair.device):
                self._kernel = self._compiled([v[: self._chunk] for v in values], block)
        except CannotCompileError as error:
            warn_uncompiled("the aggregate posterior is scored without compiling", error)

    def _compiled(self, values: list[Tensor], block: Arguments) -> Kernel:
        data: list[Tensor] = []
        flatten(block, data)

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            given = iter(tensors[len(values) :])
            return self._log_sums(tensors[: len(values)], rebuild(block, given))

        contiguous = torch.contiguous_format
        inputs = [t.clone(memory_format=contiguous) for t in (*values, *data)]
        others: list[Any] = [t.roll(1, 0) if t.dim() else t.clone() for t in inputs]
        return lower(folded(capture(run, inputs, others=others)), [], inputs)


def _filled(values: Tensor, count: int) -> Tensor:
    """As many values as a kernel takes: the last one repeated."""
    missing = count - len(values)
    if not missing:
        return values
    return torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])
