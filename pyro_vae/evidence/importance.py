r"""Importance-weighted log-evidence of any model and guide.

.. math:: \log p(x) \approx \log \frac1K \sum_{k=1}^K w_k, \qquad
          w_k = \frac{p(x, z_k)}{q(z_k|x)}, \quad z_k \sim q(z|x)

The average of the weights is unbiased for p(x), so its logarithm is a lower bound in expectation
that tightens as K grows. Weights are computed from unscaled log-densities: neither KL weights nor
subsampling scales reach them; masks do.

Noise is drawn per block of 100 data and 50 particles from a stream seeded by the block, and the
estimate is accumulated over blocks in float64. So memory does not grow with K or N, more particles
extend fewer, and a datum's weights depend on its place among the data but not on ``chunk_size``.

References: Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders" (2016);
Rezende, Mohamed and Wierstra, "Stochastic backpropagation" (2014).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.context import at_rest, device_of, on_device, seeded
from pyro_vae.evidence.data_plate import data_dim
from pyro_vae.evidence.estimate import Estimate
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

__all__ = ["log_evidence", "log_weights"]

DATA_BLOCK = 100
PARTICLE_BLOCK = 50


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int,
    seed: int = 0,
    data_plate: str | None = None,
    chunk_size: int | None = None,
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
        chunk_size: Particles that the model scores at once, at most 50 (the default): smaller
            needs less memory and gives the same weights.

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
    columns = [
        torch.cat(list(blocks))
        for blocks in _blocks(model, guide, args, num_particles, seed, data_plate, chunk_size)
    ]
    return torch.cat(columns, dim=1)


def log_evidence(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int,
    seed: int = 0,
    data_plate: str | None = None,
    chunk_size: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Estimate:
    r"""Importance-weighted estimate of log p(x) per datum, with its error.

    Constant in memory for any K: weights are folded into running sums in float64 as they come.
    Cost: K evaluations of the decoder per datum, and K / 50 of the encoder.

    Args:
        model: A Pyro model.
        guide: Its guide, with latent sites of the same names.
        args: What both take; see ``log_weights``.
        num_particles: Number of weights K per datum.
        seed: Seed of the guide's draws; the caller's random state is left alone.
        data_plate: Name of the plate over the data; see ``log_weights``.
        chunk_size: Particles that the model scores at once; see ``log_weights``.
        progress: Called after each block with the number of particle-data scored in it.

    Returns:
        The estimate, with ``value``, ``standard_error`` and ``ess`` of shape ``(N,)``, on the CPU.
        It is of the values that are handed over: for those of a prepared ``Split``, add
        ``data.log_jacobian`` to speak of the values as they were.

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
    parts = []
    for blocks in _blocks(model, guide, args, num_particles, seed, data_plate, chunk_size):
        sums: _Sums | None = None
        for log_w in blocks:
            sums = _Sums(log_w) if sums is None else sums.merged(_Sums(log_w))
            if progress is not None:
                progress(log_w.numel())
        assert sums is not None
        parts.append(sums)
    return Estimate(
        value=torch.cat([s.log_mean() for s in parts]).cpu(),
        standard_error=torch.cat([s.standard_error() for s in parts]).cpu(),
        ess=torch.cat([s.ess() for s in parts]).cpu(),
        elbo=torch.cat([s.elbo() for s in parts]).cpu(),
        num_particles=num_particles,
    )


class _Sums:
    """Running sums over particles of exp(log w - top), its square, and log w; float64, (N,)."""

    def __init__(self, log_w: Tensor) -> None:
        log_w = log_w.double()
        self.count = len(log_w)
        self.top = log_w.amax(0).clamp_min(torch.finfo(torch.float64).min)
        w = (log_w - self.top).exp()
        self.first = w.sum(0)
        self.second = w.square().sum(0)
        self.total = log_w.sum(0)

    def merged(self, other: "_Sums") -> "_Sums":
        top = torch.maximum(self.top, other.top)
        a, b = (self.top - top).exp(), (other.top - top).exp()
        self.first = self.first * a + other.first * b
        self.second = self.second * a.square() + other.second * b.square()
        self.total = self.total + other.total
        self.count += other.count
        self.top = top
        return self

    def log_mean(self) -> Tensor:
        return self.top + self.first.log() - math.log(self.count)

    def elbo(self) -> Tensor:
        return self.total / self.count

    def ess(self) -> Tensor:
        return self.first.square() / self.second

    def standard_error(self) -> Tensor:
        # Delta method: sd(mean w) / mean w, with the unbiased variance of w; one particle has none.
        if self.count < 2:
            return torch.full_like(self.first, math.nan)
        relative_second_moment = self.count * self.second / self.first.square()
        return ((relative_second_moment - 1).clamp_min(0) / (self.count - 1)).sqrt()


def _blocks(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    num_particles: int,
    seed: int,
    data_plate: str | None,
    chunk_size: int | None,
) -> Iterator[Iterator[Tensor]]:
    """For each block of data, an iterator over its blocks of log-weights (k, n)."""
    if num_particles < 1:
        raise ValueError(f"num_particles: expected at least 1, got {num_particles}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 particle or None, got {chunk_size}.")
    args = on_device(args, device_of(model, guide))
    size = _data_size(args)

    def particle_blocks(index: int, block: tuple[Any, ...]) -> Iterator[Tensor]:
        # Gradients are off and modules at rest only while a block is computed, not between.
        with at_rest(model, guide):
            pair = _Pair(model, guide, block, data_plate)
        for number, start in enumerate(range(0, num_particles, PARTICLE_BLOCK)):
            particles = min(PARTICLE_BLOCK, num_particles - start)
            with at_rest(model, guide), pyro.validation_enabled(is_validate=False):
                log_w = pair.log_weights(particles, (seed, index, number), chunk_size or particles)
            if not (log_w < math.inf).all():
                raise ValueError(pair.blame(particles, (seed, index, number)))
            yield log_w

    for index, start in enumerate(range(0, size, DATA_BLOCK)):
        block = tuple(
            a[start : start + DATA_BLOCK]
            if isinstance(a, Tensor) and a.dim() > 0 and len(a) == size
            else a
            for a in args
        )
        yield particle_blocks(index, block)


class _Pair:
    """A pair on one block of data: draws particles and scores them."""

    def __init__(
        self, model: Program, guide: Program, args: tuple[Any, ...], data_plate: str | None
    ) -> None:
        structure = inspect(model, guide, args, {})
        self.model, self.guide, self.args = model, guide, args
        self.nesting = structure.max_plate_nesting
        self.dim = data_dim(structure, _data_size(args), data_plate)
        self.device = device_of(model, guide) or _first_device(args)

    def log_weights(self, particles: int, seed: tuple[int, ...], chunk_size: int) -> Tensor:
        """Log-weights (particles, n) of one block of noise."""
        with seeded("evidence", *seed, device=self.device):
            guide_trace = self._trace(self.guide, particles)
        log_q = self._per_datum(dict(latent_sites(guide_trace)), particles)
        scores = []
        for start in range(0, particles, chunk_size):
            chunk = slice(start, min(start + chunk_size, particles))
            trace = self._replayed(guide_trace, chunk, particles)
            sites = {**dict(latent_sites(trace)), **dict(observed_sites(trace))}
            scores.append(self._per_datum(sites, chunk.stop - chunk.start))
        return torch.cat(scores) - log_q

    def blame(self, particles: int, seed: tuple[int, ...]) -> str:
        """Which site made a weight NaN or infinite."""
        with at_rest(self.model, self.guide), pyro.validation_enabled(is_validate=False):
            with seeded("evidence", *seed, device=self.device):
                guide_trace = self._trace(self.guide, particles)
            trace = self._replayed(guide_trace, slice(0, particles), particles)
            blamed = site_to_blame(trace, guide_trace)
        if blamed is None:
            return "some log-weights are NaN: infinite log-densities of model and guide cancel."
        return f"{blamed} for some data. Did training diverge? Check the pair's parameters."

    def _trace(self, program: Program, particles: int) -> Trace:
        inside = in_particles(program, particles, self.nesting)
        try:
            return poutine.trace(inside).get_trace(*self.args)
        except Exception as error:
            error.add_note(
                f"(while running the pair with {particles} particles on the left of its batch "
                "dimensions; a network has to keep every dimension on the left of the last)"
            )
            raise

    def _replayed(self, guide_trace: Trace, chunk: slice, particles: int) -> Trace:
        if chunk.stop - chunk.start < particles:
            guide_trace = guide_trace.copy()
            for name, site in latent_sites(guide_trace):
                at = site["value"].dim() - site["fn"].event_dim - 1 - self.nesting
                part = site["value"].narrow(at, chunk.start, chunk.stop - chunk.start)
                guide_trace.nodes[name] = {**site, "value": part}
        replayed = poutine.replay(self.model, trace=guide_trace)
        return self._trace(replayed, chunk.stop - chunk.start)

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


def _data_size(args: tuple[Any, ...]) -> int:
    for arg in args:
        if isinstance(arg, Tensor) and arg.dim() > 0:
            if len(arg) == 0:
                raise ValueError("the data are empty: expected at least one datum.")
            return len(arg)
    raise ValueError(
        "expected data: at least one tensor of shape (N, ...) among the arguments of the pair, "
        f"such as data.test of a Split; got {', '.join(type(a).__name__ for a in args) or 'none'}."
    )


def _first_device(args: tuple[Any, ...]) -> torch.device | None:
    return next((a.device for a in args if isinstance(a, Tensor)), None)
