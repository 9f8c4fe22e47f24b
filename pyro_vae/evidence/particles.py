"""A pair on one block of data: draws particles from the guide, and scores them."""

from collections.abc import Iterable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.context import at_rest, device_of, seeded
from pyro_vae.inference.data_plate import add_up, data_dim, data_size, per_datum
from pyro_vae.inference.enumeration import factors, sums_out, unpacked
from pyro_vae.inference.handlers import (
    Program,
    Site,
    Trace,
    in_particles,
    latent_sites,
    observed_sites,
    site_to_blame,
)
from pyro_vae.inference.structure import inspect

__all__ = ["Arguments", "Pair"]

Arguments = tuple[Any, ...]


class Pair:
    """A pair, inspected on one block of data.

    Args:
        model: A Pyro model.
        guide: Its guide.
        args: What both take: one block of n data.
        data_plate: Name of the plate over the data; see ``log_weights``.
        autocast: A lower precision for the networks of the model, or None.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        args: Arguments,
        data_plate: str | None,
        autocast: torch.dtype | None = None,
    ) -> None:
        structure = inspect(model, guide, args, {}, sums=True)
        drawn = {name for name, _ in latent_sites(structure.guide_trace)}
        in_model = (name for name, _ in latent_sites(structure.model_trace))
        self.sums = any(name not in drawn for name in in_model)
        self.model, self.guide, self.args = model, guide, args
        self.structure = structure
        self.nesting = structure.max_plate_nesting
        self.dim = data_dim(structure, data_size(args), data_plate)
        self.device = device_of(model, guide) or _first_device(args)
        self.autocast = autocast

    def draw(self, args: Arguments, particles: int) -> tuple[Trace, Tensor]:
        """Particles from the guide: its trace, and their log-densities (particles, n)."""
        trace = self._trace(self.guide, args, particles)
        return trace, self._per_datum(latent_sites(trace), particles)

    def score_guide(self, args: Arguments, guide_trace: Trace, particles: int) -> Tensor:
        """Log-densities log q(z|x) of particles that a trace holds, whoever drew them."""
        trace = self._trace(poutine.replay(self.guide, trace=guide_trace), args, particles)
        return self._per_datum(latent_sites(trace), particles)

    def score(self, args: Arguments, guide_trace: Trace, particles: int) -> Tensor:
        """Joint log-densities log p(x, z) of particles that a guide's trace holds."""
        with torch.autocast(
            self.device.type if self.device is not None else "cpu",
            dtype=self.autocast,
            enabled=self.autocast is not None,
        ):
            trace = self.replayed(args, guide_trace, particles)
            if self.sums:
                return self._with_sums(trace, guide_trace, particles)
            return self._per_datum([*latent_sites(trace), *observed_sites(trace)], particles)

    def replayed(self, args: Arguments, guide_trace: Trace, particles: int) -> Trace:
        """The model's trace at particles that a guide's trace holds.

        What the model alone draws, and is marked, takes all its values.
        """
        if not self.sums:
            return self._trace(poutine.replay(self.model, trace=guide_trace), args, particles)
        inside = sums_out(in_particles(self.model, particles, self.nesting), self.nesting + 1)
        replayed = poutine.replay(inside, trace=guide_trace)
        return poutine.util.prune_subsample_sites(self._run(replayed, args, particles))

    def _with_sums(self, trace: Trace, guide_trace: Trace, particles: int) -> Tensor:
        """Joint log-densities with the discrete latents of the model's own summed out."""
        trace.symbolize_dims()
        drawn = frozenset(name for name, _ in latent_sites(guide_trace))
        log_probs = (
            (factor.names[0], unpacked(trace, factor, particles, self.nesting))
            for factor in factors(trace, drawn)
        )
        return add_up(log_probs, particles, nesting=self.nesting, dim=self.dim)

    def part(self, guide_trace: Trace, chunk: slice) -> Trace:
        """The trace of some of the particles."""
        guide_trace = guide_trace.copy()
        for name, site in latent_sites(guide_trace):
            at = site["value"].dim() - site["fn"].event_dim - 1 - self.nesting
            value = site["value"].narrow(at, chunk.start, chunk.stop - chunk.start)
            guide_trace.nodes[name] = {**site, "value": value}
        return guide_trace

    def log_weights(self, particles: int, chunk_size: int) -> Tensor:
        """Log-weights (particles, n) of fresh draws."""
        guide_trace, log_q = self.draw(self.args, particles)
        scores = []
        for start in range(0, particles, chunk_size):
            chunk = slice(start, min(start + chunk_size, particles))
            whole = chunk.stop - chunk.start == particles
            trace = guide_trace if whole else self.part(guide_trace, chunk)
            scores.append(self.score(self.args, trace, chunk.stop - chunk.start))
        return torch.cat(scores) - log_q

    def blame(self, particles: int, seed: tuple[int | str, ...]) -> str:
        """Which site made a weight NaN or infinite."""
        with at_rest(self.model, self.guide), pyro.validation_enabled(is_validate=False):
            with seeded(*seed, device=self.device):
                guide_trace, _ = self.draw(self.args, particles)
            replayed = poutine.replay(self.model, trace=guide_trace)
            blamed = site_to_blame(self._trace(replayed, self.args, particles), guide_trace)
        if blamed is None:
            return "some log-weights are NaN: infinite log-densities of model and guide cancel."
        return f"{blamed} for some data. Did training diverge? Check the pair's parameters."

    def _trace(self, program: Program, args: Arguments, particles: int) -> Trace:
        return self._run(in_particles(program, particles, self.nesting), args, particles)

    def _run(self, inside: Program, args: Arguments, particles: int) -> Trace:
        try:
            return poutine.trace(inside).get_trace(*args)
        except Exception as error:
            error.add_note(
                f"(while running the pair with {particles} particles on the left of its batch "
                "dimensions; a network has to keep every dimension on the left of the last)"
            )
            raise

    def _per_datum(self, sites: Iterable[tuple[str, Site]], particles: int) -> Tensor:
        return per_datum(sites, particles, nesting=self.nesting, dim=self.dim)


def _first_device(args: Arguments) -> torch.device | None:
    return next((a.device for a in args if isinstance(a, Tensor)), None)
