r"""Bounds on log p(x) from both sides, where draws of the posterior are known: simulated data.

The path of ``ais`` can be walked backwards. From an exact draw of the posterior the weights satisfy

.. math:: \mathbb E\Big[\frac1w\Big] = \frac1{p(x)}, \qquad
          \mathbb E\Big[-\log\frac1K\sum_k \frac1{w_k}\Big] \ge \log p(x),

by Jensen's inequality the other way round. Such a draw is had with every datum that the model
simulates: z from the prior, then x given z; z is a draw of p(z|x). The two bounds tell how much
annealing is enough for a model, which nothing can tell of real data.

Reference: Grosse, Ghahramani and Adams, "Sandwiching the marginal likelihood using bidirectional
Monte Carlo" (2015).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae.context import at_rest, device_of, on_device, seeded
from pyro_vae.evidence.blocks import check_options, data_blocks
from pyro_vae.evidence.chains import ChainEstimate, Tally
from pyro_vae.evidence.compare import fingerprint
from pyro_vae.evidence.particles import Arguments, Pair
from pyro_vae.evidence.path import AnnealingPath, Targets, chain_blocks, check_plan
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.data_plate import data_size
from pyro_vae.inference.handlers import Program, Trace, in_particles
from pyro_vae.inference.simulation import check_joint_draw, observed_places, put, simulated

__all__ = ["Bidirectional", "bidirectional"]


@dataclass(frozen=True, eq=False)
class Bidirectional:
    """Bounds on log p(x) from both sides, of simulated data.

    Attributes:
        lower: Annealing from the guide to the posterior: below log p(x) on average, ``(N,)``.
        upper: From an exact draw of the posterior to the guide: above log p(x) on average.
        data: The simulated data: the arguments of the pair.
    """

    lower: ChainEstimate
    upper: ChainEstimate
    data: Arguments

    @property
    def gap(self) -> Tensor:
        """Upper minus lower bound of each datum, ``(N,)``, in nats; not below zero on average."""
        return self.upper.value - self.lower.value

    @property
    def mean_gap(self) -> float:
        """The mean gap, nats per datum: neither bound is further from the truth than this."""
        return self.gap.mean().item()

    @property
    def mean_standard_error(self) -> float:
        """The standard error of the mean gap; NaN for one datum.

        By the scatter over the data, which are independent: what the upper bounds claim is too
        little where chains have not forgotten their common start.
        """
        n = len(self.gap)
        return self.gap.std().item() / n**0.5 if n > 1 else math.nan

    def __str__(self) -> str:
        return (
            f"{self.lower.mean:.3f} to {self.upper.mean:.3f} nats per datum: a gap of "
            f"{self.mean_gap:.3f} +- {self.mean_standard_error:.3f}, the largest "
            f"{self.gap.max().item():.2f}; {len(self.gap)} simulated data, {self.lower._drawn()}"
        )


def bidirectional(
    model: Program,
    guide: Program,
    *args: Any,
    num_chains: int = 16,
    temperatures: int | Tensor = 1000,
    leapfrog_steps: int = 10,
    acceptance: float = 0.65,
    seed: int = 0,
    data_plate: str | None = None,
    compile: Compile = "auto",
    progress: Callable[[int], object] | None = None,
) -> Bidirectional:
    r"""Bounds on log p(x) from both sides, for data that the model simulates.

    Cost: a little less than twice that of ``ais``. A datum's chains downwards all begin at its one
    exact draw, and agree until they have forgotten it: the error of the upper bound of a datum is
    too small, and far too small where temperatures are few. That of the mean gap is right.

    Args:
        model: A Pyro model; see ``ais``.
        guide: Its guide, or any other to start from.
        args: What both take. The observed values among them are replaced by simulated ones of the
            same shape, one for each datum; labels, masks and the like stay.
        num_chains: Number of chains K per datum, in each direction.
        temperatures: Number of steps T, or a schedule; see ``ais``.
        leapfrog_steps: Leapfrog steps L of each move.
        acceptance: The acceptance that the pilot run aims at, for each datum.
        seed: Seed of all noise; the caller's random state is left alone.
        data_plate: Name of the plate over the data; see ``log_weights``.
        compile: Compute densities and gradients by one compiled kernel; see ``log_weights``.
        progress: Called after each move, and after the pilot run of a block, with the number of
            chain-data that moved.

    Returns:
        Both bounds and the simulated data.

    Raises:
        ValueError: As ``ais``; or an observed value is none of the arguments, so that nothing tells
            where simulated ones belong.

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> x = torch.ones(7, 9)
        >>> bounds = pv.bidirectional(model, guide, x, temperatures=10, leapfrog_steps=2)
        >>> bounds.gap.shape, abs(bounds.mean_gap) < 0.5
        (torch.Size([7]), True)
    """
    check_options(num_chains, None, compile=compile, name="num_chains")
    plan = check_plan(temperatures, leapfrog_steps, acceptance, seed)
    moved = on_device(args, device_of(model, guide))
    lower, upper, pilot = Tally(num_chains), Tally(num_chains, sign=-1), 0
    targets = Targets(plan, compile, rows=2 * num_chains * data_size(moved))
    drawn: list[Arguments] = []
    for index, template in enumerate(data_blocks(moved)):
        with at_rest(model, guide):
            pair = Pair(model, guide, template, data_plate)
            exact, block = _simulate(pair, ("simulate", seed, index))
            pair = Pair(model, guide, block, data_plate)
            _, again = _simulate(pair, ("simulate", seed, index))
            check_joint_draw((block, {}), (again, {}))
        drawn.append(block)
        sizes = chain_blocks(num_chains, pair.device)
        pilot = sizes[0]
        path = AnnealingPath(pair, targets, plan, index, pilot, progress)
        lower.walked([path.up(chains, number, progress) for number, chains in enumerate(sizes)])
        space, _ = targets(pair, sizes[0])
        u = space.flat(exact)
        down = [
            path.down(u.expand(chains, -1, -1).contiguous(), number, progress)
            for number, chains in enumerate(sizes)
        ]
        upper.walked(down)
    data = _together(moved, drawn)
    below, above = (
        tally.estimate(
            fingerprint(data),
            kind,
            moves=plan.moves,
            gradients=plan.gradients(data_size(moved), num_chains, pilot=before),
        )
        for tally, kind, before in (
            (lower, "annealed importance sampling", pilot),
            (upper, "annealing backwards, from above", 0),
        )
    )
    return Bidirectional(below, above, data)


def _simulate(pair: Pair, stream: tuple[int | str, ...]) -> tuple[Trace, Arguments]:
    """A draw of all latents and data: its trace, of one particle, and the arguments with the data.

    Raises:
        ValueError: See ``bidirectional``.
    """
    program = in_particles(pair.model, 1, pair.nesting)
    with seeded(*stream, device=pair.device), pyro.validation_enabled(is_validate=False):
        trace = simulated(program, pair.args, {})
    return trace, put(trace, observed_places(trace, pair.args, {}), pair.args, {})[0]


def _together(args: Arguments, blocks: list[Arguments]) -> Arguments:
    """The blocks of the data, one after another."""
    size = data_size(args)
    return tuple(
        torch.cat(parts) if isinstance(arg, Tensor) and arg.dim() > 0 and len(arg) == size else arg
        for arg, *parts in zip(args, *blocks, strict=True)
    )
