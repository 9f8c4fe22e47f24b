r"""The evidence of a data set: weigh all data, and anneal a sample of those where weighing failed.

Importance weighting is cheap and says itself for which data it is not to be believed: U of N, say.
Annealing all of them may be too dear. A random sample of m of them tells what they lack on average,

.. math:: \overline{\log p} \approx \frac1N \sum_{n=1}^N \ell_n
          + \frac UN \cdot \frac1m \sum_{j=1}^m (a_j - \ell_j),

with the values :math:`\ell` of weighting and :math:`a` of annealing. The correction is right
whatever weighting missed. Its error is that of the sample, which vanishes with m = U, and that of
annealing; the errors that weighting claims enter for the trusted data alone.

References: Neal, "Annealed importance sampling" (2001); Cochran, "Sampling techniques" (1977), on
difference estimators.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.context import device_of
from pyro_vae.evidence.annealed import ais
from pyro_vae.evidence.blocks import DATA_BLOCK, check_options
from pyro_vae.evidence.evaluation import FEWEST_ANNEALED, Evaluation
from pyro_vae.evidence.importance import log_evidence
from pyro_vae.evidence.kept import Kept
from pyro_vae.evidence.path import chain_blocks, check_plan
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.data_plate import data_size
from pyro_vae.inference.handlers import Program

__all__ = ["evaluate"]

# A gradient is a pass through the decoder and one back, which costs two.
PASSES = 3
# One word for all that is evaluated in this way, whether or not something had to be annealed; what
# can't be is weighted, and no more.
KIND = "weighting, and annealing where it fails"


def evaluate(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 5000,
    budget: float = 1.0,
    num_chains: int = 16,
    temperatures: int | Tensor = 1000,
    leapfrog_steps: int = 10,
    seed: int = 0,
    data_plate: str | None = None,
    compile: Compile = "auto",
    progress: Callable[[str, int, int], object] | None = None,
    kept: Kept | None = None,
) -> Evaluation:
    r"""The evidence of a data set, with an error bar that can be believed.

    All data are weighed; of those that weighting says itself not to be trusted for, as many are
    annealed as the budget bears, drawn at random, and what they gain corrects the mean.

    Args:
        model: A Pyro model; see ``ais`` for what can be annealed.
        guide: Its guide.
        args: What both take; see ``log_weights``.
        num_particles: Number of importance weights K per datum.
        budget: What annealing may cost, in units of what weighting costs, N K passes through the
            decoder; a gradient counts three. A sample has at least ten data. 0 anneals nothing,
            ``math.inf`` all of them.
        num_chains: Number of annealed chains per datum.
        temperatures: Number of steps of each, or a schedule; see ``ais``.
        leapfrog_steps: Leapfrog steps of each move.
        seed: Seed of all noise; the caller's random state is left alone.
        data_plate: Name of the plate over the data; see ``log_weights``.
        compile: Compute by compiled kernels; see ``log_weights``.
        progress: Called with what is being done, "weighing" and then "annealing", and with how much
            of how much of it is done: of particle-data, and of moves of chain-data. With ``kept``
            the first call of each tells what was there before.
        kept: A mapping in which finished blocks of data are kept, so that an evaluation that was
            killed goes on, and a larger budget adds to a smaller one, all but a last block of less
            than 100 data; see ``log_evidence``.

    Returns:
        The evaluation, an ``Estimate``: ``mean`` with its errors in nats per datum, ``value``
        ``(N,)``, and ``advice`` in words. Print it; ``to_dict()`` has its figures, and
        ``runs.trust.trust`` draws it. Where the pair can't be annealed, ``refused`` says why.

    Raises:
        ValueError: As ``log_evidence``; the budget is negative.

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> found = pv.evaluate(model, guide, torch.ones(7, 9), num_particles=500)
        >>> found.value.shape, found.mean < 0
        (torch.Size([7]), True)
    """
    if not budget >= 0:
        raise ValueError(f"budget: expected a number that is not negative, got {budget}.")
    check_options(num_chains, None, compile=compile, name="num_chains")
    plan = check_plan(temperatures, leapfrog_steps, 0.5, seed)
    size = data_size(args)
    weighted = log_evidence(
        model,
        guide,
        *args,
        num_particles=num_particles,
        seed=seed,
        data_plate=data_plate,
        compile=compile,
        progress=_counting(progress, "weighing", size * num_particles),
        kept=kept,
    )
    # What annealing gains on data without any weight is infinite, and no average of others.
    untrusted = (~weighted.trusted & weighted.value.isfinite()).nonzero().squeeze(1)
    pilot = chain_blocks(num_chains, device_of(model, guide))[0]
    price = PASSES * plan.gradients(1, num_chains, pilot=pilot) / (size * num_particles)
    count = math.floor(min(len(untrusted), budget / price + 1e-9))
    # Annealing cuts what has as many rows as there are data: nothing else may seem to be such.
    whole = {len(a) for a in args if isinstance(a, Tensor) and a.dim() > 0} - {size}
    while count > DATA_BLOCK and count in whole:
        count -= 1
    if count < min(FEWEST_ANNEALED, len(untrusted)):
        count = 0
    order = torch.randperm(len(untrusted), generator=torch.Generator().manual_seed(seed))
    rows = untrusted[order[:count]]  # in that order, so that a larger budget adds to them
    annealed, refused = None, ""
    if count:
        chosen = (
            a[rows.to(a.device)] if isinstance(a, Tensor) and a.dim() > 0 and len(a) == size else a
            for a in args
        )
        try:
            annealed = ais(
                model,
                guide,
                *chosen,
                num_chains=num_chains,
                temperatures=temperatures,
                leapfrog_steps=leapfrog_steps,
                seed=seed,
                data_plate=data_plate,
                compile=compile,
                progress=_counting(
                    progress, "annealing", plan.steps(count, num_chains, pilot=pilot)
                ),
                kept=kept,
            )
        except ValueError as error:  # what weighting found must not be lost with it
            rows, refused = rows[:0], str(error)
    return Evaluation.of(
        weighted,
        rows,
        annealed,
        budget_for_all=len(untrusted) * price,
        refused=refused,
        kind=KIND if budget and not refused else None,
    )


def _counting(
    progress: Callable[[str, int, int], object] | None, what: str, total: int
) -> Callable[[int], object] | None:
    """Tells how much is done where the estimators tell what they have just done."""
    if progress is None:
        return None
    done = 0

    def advance(steps: int) -> None:
        nonlocal done
        done += steps
        progress(what, done, total)

    return advance
