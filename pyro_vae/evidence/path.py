r"""The path between a guide and a posterior, and chains that walk it in both directions.

Along :math:`f_t \propto q(z|x)^{1 - \beta_t}\, p(x, z)^{\beta_t}` a chain
:math:`z_0, \dots, z_{T-1}` collects

.. math:: \log w = \sum_t (\beta_t - \beta_{t-1}) \log\frac{p(x, z_{t-1})}{q(z_{t-1}|x)},

moving between one term and the next. Each block of data has a pilot run of its own, which finds how
its chains move; then nothing adapts.
"""

import bisect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae.context import at_rest, forked, seeded
from pyro_vae.evidence.chains import Walk
from pyro_vae.evidence.hmc import Kinetics, move, tune
from pyro_vae.evidence.particles import Pair
from pyro_vae.evidence.target import (
    Space,
    State,
    Target,
    bounds_of,
    compiled_target,
    supports_of,
)
from pyro_vae.graph.refusal import CannotCompileError, warn_uncompiled
from pyro_vae.graph.work import WORTH_COMPILING, Work
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.data_plate import data_size

__all__ = [
    "AnnealingPath",
    "Plan",
    "Targets",
    "chain_blocks",
    "check_plan",
    "resting",
    "sigmoid_schedule",
]

CHAIN_BLOCK = {"cpu": 16, "cuda": 128}
# The pilot run: so many places along the path, and moves at each.
_PLACES, _MOVES = 40, 5

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Plan:
    """What is asked of the chains.

    Attributes:
        betas: The schedule, from 0 to 1, ``(T + 1,)``.
        leapfrog_steps: Leapfrog steps of a move.
        acceptance: The acceptance that the pilot run aims at.
        seed: Seed of all noise.
    """

    betas: list[float]
    leapfrog_steps: int
    acceptance: float
    seed: int

    @property
    def moves(self) -> int:
        """Number of moves of a chain: one between each step of the schedule and the next."""
        return len(self.betas) - 2

    @property
    def places(self) -> int:
        """Number of places along the path at which the pilot run stops."""
        return min(_PLACES, -(-self.moves // 5))

    @property
    def pilot_moves(self) -> int:
        """Number of moves at each of them, four times as many at the first."""
        return _MOVES

    @property
    def trials(self) -> int:
        """Number of moves in the pilot run."""
        return (self.places + 3) * self.pilot_moves if self.moves else 0

    def steps(self, size: int, chains: int, *, pilot: int) -> int:
        """Moves of all chains and data, those of the pilot run too; see ``gradients``."""
        return size * (chains * self.moves + pilot * self.trials)

    def gradients(self, size: int, chains: int, *, pilot: int) -> int:
        """Evaluations of the gradient for so many data and chains.

        Args:
            size: Number of data.
            chains: Number of chains of each datum.
            pilot: Number of them in the pilot run.
        """
        walk = self.leapfrog_steps * self.moves + 1
        before = self.leapfrog_steps * self.trials + 1 if self.moves else 0
        return size * (chains * walk + pilot * before)


def sigmoid_schedule(temperatures: int) -> Tensor:
    r"""A schedule that is slow at both ends: :math:`\beta_t \propto \sigma(8t/T - 4) - \sigma(-4)`.

    Args:
        temperatures: Number of steps T.

    Returns:
        Betas ``(T + 1,)``, from 0 to 1, float64.
    """
    s = torch.linspace(-4.0, 4.0, temperatures + 1, dtype=torch.float64).sigmoid()
    return (s - s[0]) / (s[-1] - s[0])


def check_plan(
    temperatures: int | Tensor, leapfrog_steps: int, acceptance: float, seed: int
) -> Plan:
    """The plan of these options.

    Raises:
        ValueError: They make no sense.
    """
    if isinstance(temperatures, Tensor):
        betas = temperatures.detach().double().cpu()
        rising = betas.dim() == 1 and len(betas) > 1 and bool((betas.diff() > 0).all())
        if not rising or betas[0] != 0 or betas[-1] != 1:
            raise ValueError(
                "temperatures: expected a number, or a schedule that rises from 0 to 1, got "
                f"{betas.flatten()[:5].tolist()}... of shape {tuple(betas.shape)}."
            )
    elif not isinstance(temperatures, int) or temperatures < 1:
        raise ValueError(
            f"temperatures: expected a number of at least 1, or a schedule, got {temperatures!r}."
        )
    else:
        betas = sigmoid_schedule(temperatures)
    if leapfrog_steps < 1:
        raise ValueError(f"leapfrog_steps: expected at least 1, got {leapfrog_steps}.")
    if not 0 < acceptance < 1:
        raise ValueError(f"acceptance: expected a share between 0 and 1, got {acceptance}.")
    return Plan(betas.tolist(), leapfrog_steps, acceptance, seed)


def chain_blocks(num_chains: int, device: torch.device | None) -> list[int]:
    """Chains are drawn in blocks, each under a seed of its own, so that more extend fewer."""
    at_once = CHAIN_BLOCK["cuda" if device is not None and device.type == "cuda" else "cpu"]
    whole, rest = divmod(num_chains, at_once)
    return [at_once] * whole + [rest] * (rest > 0)


class Targets:
    """Densities with gradients for blocks of any shape, compiled where the work is worth it.

    Args:
        plan: What is asked of the chains.
        compile: Compile them; see ``ais``.
        rows: Number of chain-data that walk.
    """

    def __init__(self, plan: Plan, compile: Compile, *, rows: int) -> None:
        self.plan = plan
        self.compile = compile
        self.rows = rows
        self._known: dict[tuple[int, int], tuple[Space, Target]] = {}
        self._looked_at: Pair | None = None
        self._bounds: dict[str, Any] | None = None

    def __call__(self, pair: Pair, chains: int) -> tuple[Space, Target]:
        """The space of such a block, and its densities.

        Raises:
            ValueError: See ``ais``.
        """
        shape = (chains, data_size(pair.args))
        with forked(device=pair.device):
            if pair is not self._looked_at or shape not in self._known:
                supports = self._supports(pair)
                self._looked_at = pair
                if shape not in self._known:
                    space = Space(pair, chains, supports)
                    self._known[shape] = space, self._target(space, shape)
        return self._known[shape]

    def _supports(self, pair: Pair) -> dict[str, Any]:
        """The supports of a block's latents, which are those of every block."""
        supports = supports_of(pair)
        bounds = {name: bounds_of(name, support) for name, support in supports.items()}
        if self._bounds is not None and bounds != self._bounds:
            name = next(name for name in bounds if bounds[name] != self._bounds.get(name))
            raise ValueError(
                f"site {name!r}: the bounds of its support differ among data, which Hamiltonian "
                "moves can't follow; use log_evidence."
            )
        self._bounds = bounds
        return supports

    def _target(self, space: Space, shape: tuple[int, int]) -> Target:
        if self.compile is False:
            return space.state
        if self.compile == "auto":
            with Work() as work:
                space.state(space.flat(space.template), space.pair.args)
            walks = max(1, self.rows // (shape[0] * shape[1]))
            calls = walks * (self.plan.moves + self.plan.trials) * self.plan.leapfrog_steps
            if work.seconds(calls, calls) < WORTH_COMPILING:
                return space.state
        try:
            return compiled_target(space)
        except CannotCompileError as error:
            warn_uncompiled("the annealed chains run without compiling", error)
            self.compile = False
            return space.state


class AnnealingPath:
    """The path of one block of data, after its pilot run.

    Args:
        pair: The pair on the block.
        targets: Gives its densities.
        plan: What is asked.
        index: The number of the block, which seeds its noise.
        chains: Number of chains of the pilot run.
        progress: Told the number of chain-data that it moved.
    """

    def __init__(
        self,
        pair: Pair,
        targets: Targets,
        plan: Plan,
        index: int,
        chains: int,
        progress: Progress | None = None,
    ) -> None:
        self.pair, self.targets, self.plan, self.index = pair, targets, plan, index
        self._kinetics: list[Kinetics] = []
        count = plan.places
        self._places = [1 + round(i * (plan.moves - 1) / max(count - 1, 1)) for i in range(count)]
        if count == 0:
            return
        with self._resting("pilot", 0):
            space, target = targets(pair, chains)
            trace, _ = pair.draw(pair.args, chains)
            _, self._kinetics = tune(
                target,
                pair.args,
                target(space.flat(trace), pair.args),
                [plan.betas[place] for place in self._places],
                acceptance=plan.acceptance,
                count=plan.leapfrog_steps,
                moves=plan.pilot_moves,
            )
        if progress is not None:
            progress(chains * data_size(pair.args) * plan.trials)

    def up(self, chains: int, number: int, progress: Progress | None = None) -> Walk:
        """Chains from draws of the guide to the posterior; ``number`` seeds them."""
        with self._resting("up", number):
            space, target = self.targets(self.pair, chains)
            trace, _ = self.pair.draw(self.pair.args, chains)
            state = target(space.flat(trace), self.pair.args)
            return self._walk(target, state, range(1, len(self.plan.betas) - 1), progress)

    def down(self, u: Tensor, number: int, progress: Progress | None = None) -> Walk:
        """Chains from draws of the posterior ``(chains, n, D)`` to the guide."""
        with self._resting("down", number):
            _, target = self.targets(self.pair, len(u))
            state = target(u, self.pair.args)
            return self._walk(target, state, range(len(self.plan.betas) - 2, 0, -1), progress)

    def _walk(self, target: Target, state: State, places: range, progress: Progress | None) -> Walk:
        betas = self.plan.betas
        log_w = torch.zeros_like(state.log_p, dtype=torch.float64)
        accepted, divergent = torch.zeros_like(log_w), torch.zeros_like(log_w)
        last = places.start - places.step
        # Before each move, and once after the last, the weight of the step to the next density.
        for stop in (*places, places.stop):
            log_w += abs(betas[stop] - betas[last]) * (state.log_p.double() - state.log_q.double())
            last = stop
            if stop == places.stop:
                break
            moves = move(
                target,
                self.pair.args,
                state,
                betas[stop],
                self._kinetics_at(stop),
                self.plan.leapfrog_steps,
            )
            state = moves.state
            accepted += moves.acceptance
            divergent += moves.divergent
            if progress is not None:
                progress(log_w.numel())
        return Walk(log_w, accepted.mean(0) / (len(places) or math.nan), divergent.sum(0))

    def _kinetics_at(self, place: int) -> Kinetics:
        """Between two places of the pilot run, on a geometric path."""
        after = bisect.bisect_left(self._places, place)
        if after == len(self._places):
            return self._kinetics[-1]
        if self._places[after] == place:
            return self._kinetics[after]
        low, high = self._places[after - 1], self._places[after]
        share = (place - low) / (high - low)
        one, other = self._kinetics[after - 1], self._kinetics[after]
        return Kinetics(
            one.step_size.log().lerp(other.step_size.log(), share).exp(),
            one.scale.log().lerp(other.scale.log(), share).exp(),
        )

    def _resting(self, *stream: int | str) -> AbstractContextManager[None]:
        return resting(self.pair, "ais", self.plan.seed, self.index, *stream)


@contextmanager
def resting(pair: Pair, *stream: int | str) -> Iterator[None]:
    """A pair without validation, in evaluation mode, with a stream of noise of its own."""
    with (
        at_rest(pair.model, pair.guide),
        pyro.validation_enabled(is_validate=False),
        seeded(*stream, device=pair.device),
    ):
        yield
