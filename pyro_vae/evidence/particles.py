"""A pair on one block of data: draws particles from the guide, and scores them."""

from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.context import at_rest, device_of, seeded
from pyro_vae.evidence.data_plate import data_dim
from pyro_vae.inference.handlers import (
    Program,
    Site,
    Trace,
    in_particles,
    latent_sites,
    observed_sites,
    site_to_blame,
    unscaled_log_prob,
)
from pyro_vae.inference.structure import inspect

__all__ = ["Arguments", "Pair", "data_size"]

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
        structure = inspect(model, guide, args, {})
        self.model, self.guide, self.args = model, guide, args
        self.nesting = structure.max_plate_nesting
        self.dim = data_dim(structure, data_size(args), data_plate)
        self.device = device_of(model, guide) or _first_device(args)
        self.autocast = autocast

    def draw(self, args: Arguments, particles: int) -> tuple[Trace, Tensor]:
        """Particles from the guide: its trace, and their log-densities (particles, n)."""
        trace = self._trace(self.guide, args, particles)
        return trace, self._per_datum(dict(latent_sites(trace)), particles)

    def score(self, args: Arguments, guide_trace: Trace, particles: int) -> Tensor:
        """Joint log-densities log p(x, z) of particles that a guide's trace holds."""
        replayed = poutine.replay(self.model, trace=guide_trace)
        with torch.autocast(
            self.device.type if self.device is not None else "cpu",
            dtype=self.autocast,
            enabled=self.autocast is not None,
        ):
            trace = self._trace(replayed, args, particles)
            sites = {**dict(latent_sites(trace)), **dict(observed_sites(trace))}
            return self._per_datum(sites, particles)

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
        inside = in_particles(program, particles, self.nesting)
        try:
            return poutine.trace(inside).get_trace(*args)
        except Exception as error:
            error.add_note(
                f"(while running the pair with {particles} particles on the left of its batch "
                "dimensions; a network has to keep every dimension on the left of the last)"
            )
            raise

    def _per_datum(self, sites: dict[str, Site], particles: int) -> Tensor:
        """The sites' log-densities, summed over all dims but particles and data: (k, n)."""
        total: Any = 0.0
        for name, site in sites.items():
            log_prob = unscaled_log_prob(site)
            lead = -1 - self.nesting
            if log_prob.dim() < -lead or log_prob.shape[lead] != particles:
                raise ValueError(
                    f"site {name!r}: expected its batch shape to have {particles} particles at "
                    f"dimension {lead}, got {tuple(log_prob.shape)}; a network that flattens its "
                    "input has to keep the dimensions on its left."
                )
            others = [d for d in range(-log_prob.dim(), 0) if d not in (lead, self.dim)]
            total = total + (log_prob.sum(others) if others else log_prob)
        return total


def data_size(args: Arguments) -> int:
    """Number of data N among the arguments of a pair."""
    for arg in args:
        if isinstance(arg, Tensor) and arg.dim() > 0:
            if len(arg) == 0:
                raise ValueError("the data are empty: expected at least one datum.")
            return len(arg)
    raise ValueError(
        "expected data: at least one tensor of shape (N, ...) among the arguments of the pair, "
        f"such as data.test of a Split; got {', '.join(type(a).__name__ for a in args) or 'none'}."
    )


def _first_device(args: Arguments) -> torch.device | None:
    return next((a.device for a in args if isinstance(a, Tensor)), None)
