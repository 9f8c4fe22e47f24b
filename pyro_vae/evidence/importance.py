r"""Importance-weighted log-evidence of any model and guide.

.. math:: \log p(x) \approx \log \frac1K \sum_{k=1}^K w_k, \qquad
          w_k = \frac{p(x, z_k)}{q(z_k|x)}, \quad z_k \sim q(z|x)

The average of the weights is unbiased for p(x), so its logarithm is a lower bound in expectation
that tightens as K grows. Weights are computed from unscaled log-densities: neither KL weights nor
subsampling scales reach them; masks do.

Noise is drawn per block of 100 data and 100 particles (500 on a GPU) from a stream seeded by the
block, and the estimate is accumulated over blocks in float64. So memory does not grow with K or N,
more particles extend fewer, and a datum's weights depend on its place among the data but not on
``chunk_size``.

The largest weights of each datum are kept until its last particle, for the shape of their tail and,
if asked for, its smoothing (``pareto.py``): a few hundred numbers for each datum of a block.

References: Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders" (2016);
Rezende, Mohamed and Wierstra, "Stochastic backpropagation" (2014).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae.context import device_of, on_device
from pyro_vae.evidence.blocks import DATA_BLOCK, blocks, check_options
from pyro_vae.evidence.compare import fingerprint
from pyro_vae.evidence.estimate import Estimate
from pyro_vae.evidence.kept import Kept, KeptBlocks
from pyro_vae.evidence.pareto import Tail
from pyro_vae.evidence.reach import out_of_reach
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.data_plate import data_size
from pyro_vae.inference.handlers import Program

__all__ = ["Sums", "log_evidence", "log_weights"]


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int,
    seed: int = 0,
    data_plate: str | None = None,
    chunk_size: int | None = None,
    compile: Compile = "auto",
    autocast: torch.dtype | None = None,
) -> Tensor:
    r"""Log importance weights, :math:`\log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn}|x_n)`.

    Args:
        model: A Pyro model.
        guide: Its guide, with latent sites of the same names.
        args: What both take; tensors that share the first one's leading dimension N are the data
            and are cut into blocks along it, everything else is handed over whole.
        num_particles: Number of weights K per datum.
        seed: Seed of the guide's draws; the caller's random state is left alone.
        data_plate: Name of the plate over the data, needed where the observed sites share several.
        chunk_size: Particles that the model scores at once; None lets the largest tensor take
            8 MiB, which caches hold, or 256 MiB on a GPU. The weights are the same for any number.
        compile: Compute the weights by compiled kernels, which draw the same noise. Compiling takes
            some ten seconds; "auto" compiles where counted operations say that the work would take
            longer than 20 seconds without. What can't be compiled is said once and runs as it is.
        autocast: A lower precision for the networks of the model, such as ``torch.bfloat16``. The
            guide, the densities and the sums keep theirs; ``docs/performance.md`` has the error.

    Returns:
        Log-weights ``(K, N)`` in nats, in the pair's precision, on its device, without gradients.

    Raises:
        ValueError: Model, guide and data do not fit; a latent stands outside the data plate; a
            weight is NaN or infinite. The message names the site.

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> pv.log_weights(model, guide, torch.ones(7, 9), num_particles=13).shape
        torch.Size([13, 7])
    """
    of_data = blocks(
        model,
        guide,
        args,
        num_particles,
        seed=seed,
        data_plate=data_plate,
        chunk_size=chunk_size,
        compile=compile,
        autocast=autocast,
    )
    columns = [torch.cat(list(of_particles)) for of_particles in of_data]
    return torch.cat(columns, dim=1)


def log_evidence(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int,
    seed: int = 0,
    data_plate: str | None = None,
    chunk_size: int | None = None,
    compile: Compile = "auto",
    autocast: torch.dtype | None = None,
    smooth: bool = False,
    progress: Callable[[int], object] | None = None,
    kept: Kept | None = None,
) -> Estimate:
    r"""Importance-weighted estimate of log p(x) per datum, with its error.

    Constant in memory for any K: weights are folded into running sums in float64 as they come, but
    for the largest 3 sqrt K, which are the tail of one block of data.
    Cost: K evaluations of the decoder per datum, and K / 100 of the encoder.

    Args:
        model: A Pyro model.
        guide: Its guide, with latent sites of the same names.
        args: What both take; see ``log_weights``.
        num_particles: Number of weights K per datum.
        seed: Seed of the guide's draws; the caller's random state is left alone.
        data_plate: Name of the plate over the data; see ``log_weights``.
        chunk_size: Particles that the model scores at once; see ``log_weights``.
        compile: Compute the weights by compiled kernels; see ``log_weights``.
        autocast: A lower precision for the model's networks; see ``log_weights``.
        smooth: Put a Pareto-smoothed tail in the place of the largest weights (``smoothed``): the
            estimate and its error change, and it is no lower bound in expectation any more.
        progress: Called after each block with the number of particle-data scored in it.
        kept: A mapping from strings to tensors into which finished blocks of data are put, and from
            which they are taken by a later call with the same pair, data and options: with one
            whose items are files, an estimation that was killed goes on.

    Returns:
        The estimate, with ``value``, ``standard_error``, ``ess`` and ``pareto_k`` of shape
        ``(N,)``, on the CPU; its ``trusted`` and ``advice`` say what of it to believe. It is of the
        values that are handed over: for those of a prepared ``Split``, add ``data.log_jacobian``
        to speak of the values as they were.

    Raises:
        ValueError: As ``log_weights``.

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> estimate = pv.log_evidence(model, guide, torch.ones(7, 9), num_particles=100)
        >>> estimate.value.shape, estimate.mean < 0
        (torch.Size([7]), True)
    """
    check_options(num_particles, chunk_size, compile=compile)
    of_data = blocks(
        model,
        guide,
        args,
        num_particles,
        seed=seed,
        data_plate=data_plate,
        chunk_size=chunk_size,
        compile=compile,
        autocast=autocast,
    )
    size = data_size(args)
    store = KeptBlocks(kept, "weights", args, (num_particles, seed, str(autocast), smooth))
    store.forget_others(model, guide, on_device(args, device_of(model, guide)), data_plate)
    starts = range(0, size, DATA_BLOCK)
    finished = store.finished()
    if kept is not None and progress is not None:
        progress(sum(block.shape[1] for block in finished.values()) * num_particles)
    sums: Sums | None = None
    tail = Tail(num_particles)  # of one block of data after another
    pareto_k = torch.full((size,), math.nan, dtype=torch.float64)
    for (index, start), of_particles in zip(enumerate(starts), of_data, strict=True):
        rows = slice(start, min(start + DATA_BLOCK, size))
        if index in finished:
            continue
        for log_w in of_particles:
            if sums is None:
                sums = Sums(size, log_w.device)
            sums.add(log_w, rows)
            tail.add(log_w)
            if progress is not None:
                progress(log_w.numel())
        assert sums is not None
        pareto_k[rows], raw, smoothed = tail.finish()
        if smooth:
            sums.replace(raw, smoothed, rows)
        store.put(index, torch.cat([sums.columns(rows), pareto_k[rows][None]]))
    sums = Sums(size, torch.device("cpu")) if sums is None else sums
    for index, block in finished.items():
        rows = slice(starts[index], starts[index] + block.shape[1])
        sums.restore(block[:-1], rows)
        pareto_k[rows] = block[-1]
    estimate = sums.estimate(num_particles, fingerprint(args))
    kind = f"Pareto-smoothed {estimate.kind}" if smooth else estimate.kind
    caveat = out_of_reach(model, guide, args, data_plate)
    return replace(estimate, pareto_k=pareto_k, kind=kind, caveat=caveat)


class Sums:
    """Running sums over particles of exp(log w - top), its square, and log w; float64, (N,).

    They stay where they are: new ones for every block, between its large tensors, would keep the
    heap from shrinking, and it would grow with K.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        lowest = torch.finfo(torch.float64).min
        self.top = torch.full((size,), lowest, dtype=torch.float64, device=device)
        self.first = torch.zeros_like(self.top)
        self.second = torch.zeros_like(self.top)
        self.total = torch.zeros_like(self.top)

    def add(self, log_w: Tensor, data: slice) -> None:
        """Add the log-weights (k, n) of some data."""
        log_w = log_w.double()
        before = self.top[data]
        top = torch.maximum(before, log_w.amax(0))
        shrink = (before - top).exp()
        w = (log_w - top).exp()
        before.copy_(top)
        self.first[data].mul_(shrink).add_(w.sum(0))
        self.second[data].mul_(shrink.square()).add_(w.square().sum(0))
        self.total[data].add_(log_w.sum(0))

    def replace(self, some: Tensor, others: Tensor, data: slice) -> None:
        """Put other log-weights in the place of some, both (m, n), in the first two sums."""
        top = self.top[data]
        for sums, power in ((self.first, 1), (self.second, 2)):
            before, after = ((power * (part - top)).exp().sum(0) for part in (some, others))
            # What is left of a sum without its largest terms is rounding where they were all of it.
            sums[data] = (sums[data] - before).clamp_min(0) + after

    def columns(self, data: slice) -> Tensor:
        """The sums of some data, ``(4, n)``, on the CPU."""
        return torch.stack([s[data] for s in (self.top, self.first, self.second, self.total)]).cpu()

    def restore(self, columns: Tensor, data: slice) -> None:
        """Put back what ``columns`` gave."""
        for sums, column in zip(
            (self.top, self.first, self.second, self.total), columns, strict=True
        ):
            sums[data] = column.to(sums.device)

    def estimate(self, count: int, data: str) -> Estimate:
        """The estimate of so many particles for each datum."""
        # Delta method: sd(mean w) / mean w, with the unbiased variance of w; one particle has none.
        relative_second_moment = count * self.second / self.first.square()
        error = ((relative_second_moment - 1).clamp_min(0) / max(count - 1, 1)).sqrt()
        return Estimate(
            value=(self.top + self.first.log() - math.log(count)).cpu(),
            standard_error=(error if count > 1 else torch.full_like(error, math.nan)).cpu(),
            ess=(self.first.square() / self.second).cpu(),
            elbo=(self.total / count).cpu(),
            num_particles=count,
            data=data,
        )
