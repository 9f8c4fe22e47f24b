r"""Annealed importance sampling of any model and guide.

From the guide to the posterior leads a path of densities,
:math:`f_t \propto q(z|x)^{1 - \beta_t}\, p(x, z)^{\beta_t}`, with
:math:`0 = \beta_0 < \dots < \beta_T = 1`. A chain starts from the guide, moves in each density by
Hamiltonian Monte Carlo, and collects a weight,

.. math:: \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1})
          \log \frac{p(x, z_{t-1})}{q(z_{t-1}|x)}, \qquad \mathbb E[w] = p(x).

Step sizes and scales are found in a pilot run, for each datum and along the path, and then held:
the average above is exact for any moves that were chosen without looking at the chains.

References: Neal, "Annealed importance sampling" (2001); Wu, Burda, Salakhutdinov and Grosse, "On
the quantitative analysis of decoder-based generative models" (2017).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_vae.context import at_rest, device_of, on_device
from pyro_vae.evidence.blocks import check_options, data_blocks
from pyro_vae.evidence.chains import ChainEstimate, Tally
from pyro_vae.evidence.compare import fingerprint
from pyro_vae.evidence.kept import Kept, KeptBlocks
from pyro_vae.evidence.particles import Pair
from pyro_vae.evidence.path import AnnealingPath, Targets, chain_blocks, check_plan
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.data_plate import data_size
from pyro_vae.inference.handlers import Program

__all__ = ["ais"]


def ais(
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
    kept: Kept | None = None,
) -> ChainEstimate:
    r"""Estimate log p(x) per datum by annealed importance sampling.

    Chains start from the guide; to start from the prior, hand over ``pv.from_prior(model)``. One
    step, ``temperatures=1``, is importance sampling. Cost: T L gradients of the model for each
    chain and datum, and a pilot run of at most 215 L for at most 16 of the chains (128 on a GPU):
    a fifth more at T = 1000, twice as much below T = 200.

    Args:
        model: A Pyro model with continuous latents; discrete ones of its own are summed out.
        guide: Its guide, or any other to start from.
        args: What both take; see ``log_weights``.
        num_chains: Number of chains K per datum.
        temperatures: Number of steps T of a sigmoid schedule, or a schedule ``(T + 1,)`` that rises
            from 0 to 1.
        leapfrog_steps: Leapfrog steps L of each move.
        acceptance: The acceptance that the pilot run aims at, for each datum.
        seed: Seed of all noise; the caller's random state is left alone.
        data_plate: Name of the plate over the data; see ``log_weights``.
        compile: Compute densities and gradients by one compiled kernel; see ``log_weights``.
        progress: Called after each move, and after the pilot run of a block, with the number of
            chain-data that moved.
        kept: A mapping in which finished blocks of data are kept; see ``log_evidence``.

    Returns:
        The estimate, with ``value``, ``standard_error``, ``ess`` and ``acceptance`` of shape
        ``(N,)``, in nats, on the CPU.

    Raises:
        ValueError: Model, guide and data do not fit; a latent is discrete or on a curved space, or
            stands outside the data plate; a weight is NaN. The message names the site.

    Reference: Neal, "Annealed importance sampling" (2001).

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> estimate = pv.ais(model, guide, torch.ones(7, 9), num_chains=4, temperatures=9)
        >>> estimate.value.shape, estimate.mean < 0
        (torch.Size([7]), True)
    """
    check_options(num_chains, None, compile=compile, name="num_chains")
    plan = check_plan(temperatures, leapfrog_steps, acceptance, seed)
    moved = on_device(args, device_of(model, guide))
    tally, pilot = Tally(num_chains), 0
    targets = Targets(plan, compile, rows=num_chains * data_size(moved))
    store = KeptBlocks(kept, "chains", args, (num_chains, plan))
    store.forget_others(model, guide, moved, data_plate)
    finished = store.finished()
    if kept is not None and progress is not None:
        device = device_of(model, guide)
        pilot = chain_blocks(num_chains, device)[0]
        progress(plan.steps(sum(p.shape[1] for p in finished.values()), num_chains, pilot=pilot))
    for index, block in enumerate(data_blocks(moved)):
        with at_rest(model, guide):
            pair = Pair(model, guide, block, data_plate)
        sizes = chain_blocks(num_chains, pair.device)
        pilot = sizes[0]
        if index not in finished:
            path = AnnealingPath(pair, targets, plan, index, pilot, progress)
            finished[index] = tally.columns(
                [path.up(chains, number, progress) for number, chains in enumerate(sizes)]
            )
            store.put(index, finished[index])
        tally.add(finished[index])
    return tally.estimate(
        fingerprint(args),
        "annealed importance sampling",
        moves=plan.moves,
        gradients=plan.gradients(data_size(moved), num_chains, pilot=pilot),
    )
