r"""Hamiltonian Monte Carlo for every datum at once, towards a density between guide and model.

.. math:: \log f_\beta(u) = (1 - \beta) \log q(u|x) + \beta \log p(x, u)

Chains stand beside one another as ``(chains, n, D)``. A datum has a step size, and a scale for each
dimension, of its own; they are found in a pilot run and then held, since a chain that adapts leaves
no density invariant.

References: Neal, "MCMC using Hamiltonian dynamics" (2011); Andrieu and Thoms, "A tutorial on
adaptive MCMC" (2008), for the pilot.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.evidence.particles import Arguments
from pyro_vae.evidence.target import State, Target, mix

__all__ = ["Kinetics", "Moves", "leapfrog", "move", "tune"]

# An error of the energy this large is no accident of a step that is a little too long.
DIVERGENT = 1_000.0
# Steps vary by this share, drawn for each chain, so that no trajectory is a multiple of a period.
JITTER = 0.2
# How much a pilot's step follows one acceptance, averaged over the chains.
_GAIN = 0.3


@dataclass(frozen=True)
class Kinetics:
    """How chains move.

    Attributes:
        step_size: Of a leapfrog step, in units of ``scale``, ``(n,)``.
        scale: Of each latent dimension, ``(n, D)``; the square roots of the inverse masses.
    """

    step_size: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Moves:
    """What came of a move.

    Attributes:
        state: Where the chains are now.
        acceptance: The probability with which each move was accepted, ``(chains, n)``.
        divergent: Whether the trajectory diverged, ``(chains, n)``.
    """

    state: State
    acceptance: Tensor
    divergent: Tensor


def leapfrog(
    target: Target,
    args: Arguments,
    state: State,
    momentum: Tensor,
    beta: float,
    *,
    step: Tensor,
    scale: Tensor,
    count: int,
) -> tuple[State, Tensor]:
    """Follow the dynamics for a number of steps.

    Args:
        target: Densities and gradients.
        args: The block of data.
        state: Where the chains are.
        momentum: Their momenta in units of the scale, ``(chains, n, D)``.
        beta: The density to move in, between the guide's 0 and the model's 1.
        step: Step sizes, broadcast to ``(chains, n, 1)``.
        scale: Scales ``(n, D)``.
        count: Number of steps, each one evaluation of the gradients.

    Returns:
        State and momenta at the end. With the momenta negated it leads back to where it began.
    """
    reach, push = step * scale, 0.5 * step * scale
    momentum = torch.addcmul(momentum, push, mix(beta, state.grad_q, state.grad_p))
    for i in range(count):
        state = target(torch.addcmul(state.u, reach, momentum), args)
        kick = push if i == count - 1 else reach
        momentum = torch.addcmul(momentum, kick, mix(beta, state.grad_q, state.grad_p))
    return state, momentum


def move(
    target: Target, args: Arguments, state: State, beta: float, kinetics: Kinetics, count: int
) -> Moves:
    """Move every chain by one trajectory, which is accepted or refused.

    A trajectory to where a density is NaN or infinite is refused, as is one that diverged.
    """
    chains = state.u.shape[:2]
    momentum = torch.randn_like(state.u)
    jitter = 1 + JITTER * (
        2 * torch.rand(*chains, 1, dtype=state.u.dtype, device=state.u.device) - 1
    )
    threshold = torch.rand(chains, dtype=state.u.dtype, device=state.u.device)
    proposed, turned = leapfrog(
        target,
        args,
        state,
        momentum,
        beta,
        step=jitter * kinetics.step_size.unsqueeze(-1),
        scale=kinetics.scale,
        count=count,
    )
    after = _energy(proposed, turned, beta)
    error = _energy(state, momentum, beta) - after
    lost = ~proposed.u.isfinite().all(-1) | ~after.isfinite()
    acceptance = torch.where(lost, 0.0, error.clamp_max(0.0).exp())
    moved = threshold < acceptance
    return Moves(state.where(moved, proposed), acceptance, lost | (error < -DIVERGENT))


def _energy(state: State, momentum: Tensor, beta: float) -> Tensor:
    return 0.5 * momentum.square().sum(-1) - mix(beta, state.log_q, state.log_p)


def tune(
    target: Target,
    args: Arguments,
    state: State,
    betas: list[float],
    *,
    acceptance: float,
    count: int,
    moves: int,
) -> tuple[State, list[Kinetics]]:
    """Find step sizes and scales of every datum along a schedule: the pilot run.

    At each beta the chains move a few times; the logarithm of the step size follows the acceptance
    that the chains of the datum had on average, and the scales are the spread of the chains'
    positions, averaged with that at the beta before.

    Args:
        target: Densities and gradients.
        args: The block of data.
        state: Chains at draws from the guide.
        betas: Where along the way.
        acceptance: The share of moves that should be accepted.
        count: Leapfrog steps of a move.
        moves: Moves at each beta; four times as many at the first.

    Returns:
        Where the chains are at the end, and step sizes and scales at each beta.
    """
    dim = state.u.shape[-1]
    scale = _spread(state.u.unsqueeze(0), state.u.new_ones(()))
    # The length that the theory of many dimensions asks for, as a beginning.
    log_step = state.u.new_full(state.u.shape[1:2], -0.25 - 0.25 * math.log(dim))
    found = []
    for number, beta in enumerate(betas):
        trials = 4 * moves if number == 0 else moves
        visited, steps = [], []
        for trial in range(trials):
            result = move(target, args, state, beta, Kinetics(log_step.exp(), scale), count)
            state = result.state
            # Large at first; then a small one, that follows the density along the path.
            gain = max(_GAIN, 1.0 / (1 + trial)) if number == 0 else _GAIN
            log_step = log_step + gain * (result.acceptance.mean(0) - acceptance)
            visited.append(state.u)
            steps.append(log_step)
        scale = _spread(torch.stack(visited[-moves:]), scale)
        settled = torch.stack(steps[-moves:]).mean(0)
        found.append(Kinetics(settled.exp(), scale))
    return state, found


def _spread(visited: Tensor, before: Tensor) -> Tensor:
    """The standard deviation (n, D) of positions (moves, chains, n, D), half of it as before."""
    positions = visited.flatten(0, 1)
    if len(positions) == 1:  # a single chain, which has only begun
        return before.expand_as(positions[0])
    variance = positions.var(0)
    return ((variance + before.square()) / 2).sqrt()
