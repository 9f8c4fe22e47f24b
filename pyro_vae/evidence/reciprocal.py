r"""The estimator of the AEVB paper's appendix D: reciprocal importance sampling.

Draw from the posterior by Hamiltonian Monte Carlo, fit a density r to the draws, draw afresh, and

.. math:: \frac{1}{p(x)} = \mathbb E_{p(z|x)}\left[\frac{r(z)}{p(x, z)}\right]
          \approx \frac1L \sum_l \frac{r(z_l)}{p(x, z_l)},

which is exact for any r that integrates to one within the posterior's support. Here r is a normal
with the mean and covariance of the draws, in unconstrained coordinates. In more than about five
dimensions no density that is fitted to draws comes close enough to the posterior.

References: Kingma and Welling, "Auto-encoding variational Bayes" (2014), appendix D; Gelfand and
Dey, "Bayesian model choice: asymptotics and exact calculations" (1994).
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.context import at_rest, device_of, on_device
from pyro_vae.evidence.blocks import check_options, data_blocks
from pyro_vae.evidence.chains import ChainEstimate, Tally, Walk
from pyro_vae.evidence.compare import fingerprint
from pyro_vae.evidence.hmc import move, tune
from pyro_vae.evidence.particles import Pair
from pyro_vae.evidence.path import Plan, Targets, check_plan, resting
from pyro_vae.evidence.target import State
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.data_plate import data_size
from pyro_vae.inference.handlers import Program

__all__ = ["reciprocal_evidence"]

_MOST_DIMENSIONS = 5


def reciprocal_evidence(
    model: Program,
    guide: Program,
    *args: Any,
    num_chains: int = 16,
    num_draws: int = 250,
    leapfrog_steps: int = 10,
    acceptance: float = 0.8,
    seed: int = 0,
    data_plate: str | None = None,
    compile: Compile = "auto",
    progress: Callable[[int], object] | None = None,
) -> ChainEstimate:
    r"""Estimate log p(x) per datum from draws of the posterior and a density fitted to them.

    For models of few latent dimensions, as a check of the other estimators: it needs nothing of the
    guide but a place to start. Cost: 2 L gradients of the model
    for each draw, besides the pilot run.

    Args:
        model: A Pyro model with continuous latents; discrete ones of its own are summed out.
        guide: Where the chains start: its guide, or any other.
        args: What both take; see ``log_weights``.
        num_chains: Number of chains K per datum.
        num_draws: Draws of each chain for the fit, and again for the estimate.
        leapfrog_steps: Leapfrog steps L of each move.
        acceptance: The acceptance that the pilot run aims at, for each datum.
        seed: Seed of all noise; the caller's random state is left alone.
        data_plate: Name of the plate over the data; see ``log_weights``.
        compile: Compute densities and gradients by one compiled kernel; see ``log_weights``.
        progress: Called after each move with the number of chain-data that moved.

    Returns:
        The estimate, with ``value``, ``standard_error``, ``ess`` and ``acceptance`` of shape
        ``(N,)``, in nats, on the CPU. Its errors are by the differences among the chains of a
        datum; on average it lies above log p(x).

    Raises:
        ValueError: As ``ais``.

    Warns:
        UserWarning: The latents of a datum have more than five dimensions.

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> x = torch.ones(3, 9)
        >>> estimate = pv.reciprocal_evidence(model, guide, x, num_draws=30, leapfrog_steps=2)
        >>> exact = pv.log_evidence(model, guide, x, num_particles=2000)
        >>> abs(estimate.mean - exact.mean) < 0.1
        True
    """
    check_options(num_chains, None, compile=compile, name="num_chains")
    if num_draws < 2:
        raise ValueError(f"num_draws: expected at least 2, got {num_draws}.")
    plan = check_plan(torch.tensor([0.0, 1.0]), leapfrog_steps, acceptance, seed)
    plan = Plan([*plan.betas, *[1.0] * (2 * num_draws)], leapfrog_steps, acceptance, seed)
    moved = on_device(args, device_of(model, guide))
    tally = Tally(num_chains, sign=-1)
    targets = Targets(plan, compile, rows=num_chains * data_size(moved))
    for index, block in enumerate(data_blocks(moved)):
        with at_rest(model, guide):
            pair = Pair(model, guide, block, data_plate)
        with resting(pair, "reciprocal", seed, index):
            if index == 0:
                _warn_of_dimensions(targets(pair, num_chains)[0].dim)
            tally.walked([_walk(pair, targets, plan, num_chains, num_draws, progress)])
    return tally.estimate(
        fingerprint(args),
        "reciprocal importance sampling",
        moves=2 * num_draws,
        gradients=plan.gradients(data_size(moved), num_chains, pilot=num_chains),
    )


def _walk(
    pair: Pair,
    targets: Targets,
    plan: Plan,
    chains: int,
    draws: int,
    progress: Callable[[int], object] | None,
) -> Walk:
    """Chains through the posterior of a block: their mean reciprocal weights."""
    space, target = targets(pair, chains)
    trace, _ = pair.draw(pair.args, chains)
    state = target(space.flat(trace), pair.args)
    count, options = plan.leapfrog_steps, {"acceptance": plan.acceptance, "moves": plan.pilot_moves}
    state, found = tune(target, pair.args, state, [1.0] * plan.places, count=count, **options)
    accepted, divergent = torch.zeros_like(state.log_p), torch.zeros_like(state.log_p)

    def onwards(state: State) -> State:
        moves = move(target, pair.args, state, 1.0, found[-1], count)
        accepted.add_(moves.acceptance)
        divergent.add_(moves.divergent)
        if progress is not None:
            progress(state.log_p.numel())
        return moves.state

    fit = _Moments(state.u)
    for _ in range(draws):
        state = onwards(state)
        fit.add(state.u)
    fitted = fit.normal()
    total = torch.full_like(state.log_p, -math.inf, dtype=torch.float64)
    for _ in range(draws):
        state = onwards(state)
        total = torch.logaddexp(total, fitted.log_prob(state.u.double()) - state.log_p.double())
    return Walk(math.log(draws) - total, accepted.mean(0).double() / (2 * draws), divergent.sum(0))


class _Moments:
    """Mean and covariance of the draws of each datum, over chains, in float64."""

    def __init__(self, u: Tensor) -> None:
        self.origin = u.double().mean(0)
        self.count = 0
        self.first = torch.zeros_like(self.origin)
        self.second = torch.zeros(*self.origin.shape, u.shape[-1]).to(self.origin)

    def add(self, u: Tensor) -> None:
        away = u.double() - self.origin
        self.count += len(away)
        self.first += away.sum(0)
        self.second += torch.einsum("kni,knj->nij", away, away)

    def normal(self) -> torch.distributions.MultivariateNormal:
        """The normal with these moments, of batch shape (n,)."""
        mean = self.first / self.count
        covariance = self.second / self.count - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        # Where a chain has not moved at all the covariance is singular: a little is added.
        least = 1e-10 * covariance.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-20)
        covariance = covariance + torch.diag_embed(least.unsqueeze(-1).expand_as(mean))
        return torch.distributions.MultivariateNormal(
            self.origin + mean, covariance_matrix=covariance, validate_args=False
        )


def _warn_of_dimensions(dim: int) -> None:
    if dim > _MOST_DIMENSIONS:
        warnings.warn(
            f"reciprocal_evidence: the latents of a datum have {dim} dimensions; above "
            f"{_MOST_DIMENSIONS} the fitted density misses too much of the posterior, and the "
            "estimate is far too noisy for its error bar. Use pv.ais.",
            UserWarning,
            stacklevel=3,
        )
