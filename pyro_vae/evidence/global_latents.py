r"""Evidence of pairs with latents that all data share, such as the weights of a decoder.

.. math:: p(\theta) \prod_n p(x_n, z_n|\theta), \qquad q(\theta) \prod_n q(z_n|x_n, \theta)

Such a pair has no weight per datum, but one weight for the whole data set,

.. math:: \log w_k = \log\frac{p(\theta_k)}{q(\theta_k)}
          + \sum_n \log\frac{p(x_n, z_{kn}|\theta_k)}{q(z_{kn}|x_n, \theta_k)},

and new data have a posterior predictive density,

.. math:: p(x|X) \approx \frac1S \sum_{s=1}^S \hat p(x|\theta_s), \quad \theta_s \sim q(\theta),

with importance weights of the local latents in each term. Theta is drawn once for all data, which
are then processed in blocks, with noise seeded by draw and block; densities are unscaled, as in
``log_weights``.

References: Kingma and Welling, "Auto-encoding variational Bayes" (2014), appendix F; Burda, Grosse
and Salakhutdinov, "Importance weighted autoencoders" (2016).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.context import at_rest, device_of, on_device
from pyro_vae.evidence.blocks import Weigher, check_options, data_blocks, of_data
from pyro_vae.evidence.compare import fingerprint
from pyro_vae.evidence.estimate import PredictiveEstimate
from pyro_vae.evidence.given import Draw, GlobalLatents
from pyro_vae.evidence.importance import Sums
from pyro_vae.evidence.pareto import pareto_k
from pyro_vae.evidence.particles import Arguments, Pair
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.data_plate import data_size
from pyro_vae.inference.handlers import Program

__all__ = ["joint_log_weights", "log_predictive"]


def joint_log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int,
    seed: int = 0,
    data_plate: str | None = None,
) -> Tensor:
    r"""Log importance weights of the whole data set, for pairs with global latents.

    Their mean is an unbiased estimate of the ELBO of the whole set, of standard error
    ``std() / K**0.5``; ``logsumexp(0) - log(K)`` lies below log p(X) on average too, and above
    their mean. Cost: K passes over the data; memory does not grow with N.

    Args:
        model: A Pyro model.
        guide: Its guide, with latent sites of the same names.
        args: What both take, with the whole data set; see ``log_weights``.
        num_particles: Number of weights K, each of one draw of all latents.
        seed: Seed of the guide's draws; the caller's random state is left alone.
        data_plate: Name of the plate over the data; see ``log_weights``.

    Returns:
        Log-weights ``(K,)`` in nats, summed over the data, float64, on the CPU.

    Raises:
        ValueError: Model, guide and data do not fit; no latent stands outside the data plate, or
            the guide gives one a value without a density; a weight is NaN or infinite.

    Example:
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("mean", dist.Normal(1.75, 0.125**0.5))  # the posterior
        >>> x = torch.full((7,), 2.0)
        >>> [f"{w:.3f}" for w in pv.joint_log_weights(model, guide, x, num_particles=3)]
        ['-9.222', '-9.222', '-9.222']
    """
    check_options(num_particles, None, compile=False)
    args = on_device(args, device_of(model, guide))
    with at_rest(model, guide):
        latents = GlobalLatents(model, guide, args, data_plate)
        if latents.points:
            raise ValueError(
                f"site {latents.points[0]!r}: the guide gives it a value (Delta) without a "
                "density, so there is no bound on log p(X). Give it a distribution, or judge the "
                "point by log_predictive."
            )
        draws = [latents.draw("global", seed, k) for k in range(num_particles)]
        total = torch.stack([draw.log_weight for draw in draws])
        options: dict[str, Any] = {"chunk_size": None, "compile": False}
        for k, _, weights in _given(latents, draws, args, 1, seed=seed, **options):
            total[k] += sum(log_w.double().sum() for log_w in weights)
    return total.cpu()


def log_predictive(
    model: Program,
    guide: Program,
    *args: Any,
    num_global: int,
    num_particles: int,
    seed: int = 0,
    data_plate: str | None = None,
    chunk_size: int | None = None,
    compile: Compile = "auto",
) -> PredictiveEstimate:
    r"""The posterior predictive log-density of held-out data, for pairs with global latents.

    Averaged over q(theta) in place of the posterior: it is log p(x|X) where they agree. Cost: S K
    evaluations of the decoder per datum, and a few numbers of memory for each draw and datum.

    Args:
        model: A Pyro model.
        guide: Its guide, with latent sites of the same names.
        args: What both take, with the held-out data; see ``log_weights``.
        num_global: Number of draws S of the global latents, the same for all data.
        num_particles: Number of importance weights K of the local latents, per draw and datum.
        seed: Seed of the guide's draws; the caller's random state is left alone.
        data_plate: Name of the plate over the data; see ``log_weights``.
        chunk_size: Particles that the model scores at once; see ``log_weights``.
        compile: Compute the weights by compiled kernels; see ``log_weights``.

    Returns:
        The estimate, with ``value``, ``standard_error`` and ``ess`` of shape ``(N,)``, in nats, on
        the CPU. Its errors hold both the draws of theta and the local particles; that of the mean
        allows for the draws that all data share.

    Raises:
        ValueError: Model, guide and data do not fit; no latent stands outside the data plate; a
            weight is NaN or infinite. The message names the site.

    Example:
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("mean", dist.Normal(1.75, 0.125**0.5))
        >>> e = pv.log_predictive(model, guide, torch.zeros(9), num_global=500, num_particles=1)
        >>> exact = dist.Normal(1.75, 1.125**0.5).log_prob(torch.tensor(0.0)).item()
        >>> abs(e.mean - exact) < 3 * e.mean_standard_error
        True
    """
    check_options(num_particles, chunk_size, compile=compile)
    if num_global < 1:
        raise ValueError(f"num_global: expected at least 1, got {num_global}.")
    moved = on_device(args, device_of(model, guide))
    size = data_size(moved)
    with at_rest(model, guide):
        latents = GlobalLatents(model, guide, moved, data_plate)
        draws = [latents.draw("global", seed, s) for s in range(num_global)]
        sums = Sums(num_global * size, draws[0].log_weight.device)
        options: dict[str, Any] = {"chunk_size": chunk_size, "compile": compile}
        for s, rows, weights in _given(latents, draws, moved, num_particles, seed=seed, **options):
            for log_w in weights:
                sums.add(log_w, slice(s * size + rows.start, s * size + rows.stop))
    each = sums.estimate(num_particles, "")
    log_p = each.value.view(num_global, size)
    share = torch.softmax(log_p, 0)
    ess = 1 / share.square().sum(0)
    # The delta method over draws, each with its own local particles; one draw has no spread.
    error = ((num_global / ess - 1).clamp_min(0) / max(num_global - 1, 1)).sqrt()
    return PredictiveEstimate(
        value=torch.logsumexp(log_p, 0) - math.log(num_global),
        standard_error=error if num_global > 1 else torch.full_like(error, math.nan),
        ess=ess,
        elbo=each.elbo.view(num_global, size).mean(0),
        num_particles=num_particles,
        data=fingerprint(args),
        pareto_k=pareto_k(log_p),
        share=share,
    )


def _given(
    latents: GlobalLatents,
    draws: Sequence[Draw],
    args: Arguments,
    num_particles: int,
    *,
    seed: int,
    chunk_size: int | None,
    compile: Compile,
) -> Iterator[tuple[int, slice, Iterator[Tensor]]]:
    """For each block of data and each draw: the draw's number, the rows, and blocks of weights.

    The blocks of data come outside, so that each is inspected once, and kernels that take a draw
    as an argument are compiled once.
    """
    model, guide = latents.pair()
    weigher = Weigher(data_size(args) * len(draws), num_particles, chunk_size, compile)
    start = 0
    for index, block in enumerate(data_blocks(args)):
        rows = slice(start, start + data_size(block))
        start = rows.stop
        pair = Pair(model, guide, (*block, draws[0].values), latents.plate)
        for s, draw in enumerate(draws):
            pair.args = (*block, draw.values)
            yield s, rows, of_data(pair, weigher, num_particles, ("given", seed, s, index))
