r"""Where the nats go, for a whole data set: the parts of the ELBO itself.

.. math:: \mathrm{ELBO} = E_q[\log p(x|z)] - I_q(n; z) - \mathrm{KL}(q(z) \| p(z)), \quad
          q(z) = \frac1N \sum_n q(z|x_n)

z is drawn from the guide of each datum, and log q(z) is exact, the sum being over all N data, that
of z itself among them. So every part is a Monte Carlo mean over data and draws of a logarithm that
is known, and unbiased for the split of *this* set. That of the population is another: the mutual
information with N indices is at most log N, and what is missing stands in the marginal KL.

References: Hoffman and Johnson, "ELBO surgery" (2016); Chen, Li, Grosse and Duvenaud, "Isolating
sources of disentanglement in variational autoencoders" (2018).
"""

from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.context import at_rest, device_of, on_device, seeded
from pyro_vae.evidence.aggregate import AggregatePosterior
from pyro_vae.evidence.blocks import check_options, data_blocks
from pyro_vae.evidence.dimensions import activity, log_probs, means
from pyro_vae.evidence.elbo_parts import ElboParts
from pyro_vae.evidence.nats import Nats
from pyro_vae.evidence.particles import Arguments, Pair
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.data_plate import data_size, per_datum
from pyro_vae.inference.handlers import (
    Program,
    Trace,
    in_particles,
    latent_sites,
    observed_sites,
)
from pyro_vae.inference.structure import inspect, kind_of

__all__ = ["elbo_parts"]

# Latents of a block of data that are drawn at once.
_AT_ONCE = 2000


def elbo_parts(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 5,
    seed: int = 0,
    data_plate: str | None = None,
    compile: Compile = "auto",
) -> ElboParts:
    r"""Split the ELBO of a data set: distortion, mutual information, marginal KL and its parts.

    Several latent sites are one joint z; discrete ones are as good as real ones. Cost: K
    evaluations of the decoder per datum, and K N^2 densities of the guide in all: for ten thousand
    data and fifty latents some ten minutes on two cores, for two thousand half a minute.

    Args:
        model: A Pyro model.
        guide: Its guide, with latent sites of the same names.
        args: What both take, with all the data that q(z) averages over; see ``log_weights``.
        num_particles: Number of draws K for each datum, at least 2.
        seed: Seed of the guide's draws; the caller's random state is left alone.
        data_plate: Name of the plate over the data; see ``log_weights``.
        compile: Score the draws under all data by a compiled kernel; see ``log_weights``.

    Returns:
        The parts, ``(N,)`` each, in nats, with standard errors; and the rate of each latent
        dimension and how far the data move it, ``(Z,)``.

    Raises:
        ValueError: Model, guide and data do not fit; there is one datum alone; a latent stands
            outside the data plate, is summed out by the model, or has no density under the guide;
            the guide can't score what it did not draw. The message names the site.

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> parts = pv.elbo_parts(model, guide, torch.eye(9))
        >>> rate = parts.mutual_information.mean + parts.marginal_kl.mean
        >>> abs(rate - parts.rate.mean) < 1e-5, parts.kl_per_dim.shape
        (True, torch.Size([2]))
    """
    check_options(num_particles, None, compile=compile)
    if num_particles < 2:
        raise ValueError(
            "num_particles: expected at least 2 for elbo_parts, whose spread is the standard "
            f"error, got {num_particles}."
        )
    args = on_device(args, device_of(model, guide))
    size = data_size(args)
    if size < 2:
        raise ValueError(
            "elbo_parts: expected at least 2 data, got 1: what the latents tell about the index "
            "of a datum takes several."
        )
    aggregate: AggregatePosterior | None = None
    of_blocks: list[_Block] = []
    dims: dict[str, int] = {}
    one_prior = True
    for index, block in enumerate(data_blocks(args)):
        with at_rest(model, guide):
            pair = Pair(model, guide, block, data_plate)
            if aggregate is None:
                _check(model, guide, block)
            rounds = []
            at_once = max(1, _AT_ONCE // data_size(block))
            for number, start in enumerate(range(0, num_particles, at_once)):
                particles = min(at_once, num_particles - start)
                stream = ("parts", seed, index, number)
                drawn = _Drawn(pair, particles, stream)
                if aggregate is None:
                    dims, one_prior = drawn.dims, drawn.has_one_prior()
                    aggregate = AggregatePosterior(
                        pair,
                        args,
                        drawn.guide_trace,
                        by_dimension=len(dims) == 1 and drawn.factorizes,
                        latents=num_particles * size,
                        compile=compile,
                    )
                rounds.append(drawn.terms(aggregate))
        of_blocks.append(_Block.of_rounds(rounds))
    return _parts(of_blocks, dims, num_particles, one_prior=one_prior)


class _Drawn:
    """Draws for a block of data, and what model and guide say of them."""

    def __init__(self, pair: Pair, particles: int, stream: tuple[int | str, ...]) -> None:
        self.pair, self.particles = pair, particles
        with pyro.validation_enabled(is_validate=False):
            with seeded(*stream, device=pair.device):
                self.guide_trace, log_q = pair.draw(pair.args, particles)
            self.model_trace = self._model(pair.args)
        log_p = self._sum(latent_sites(self.model_trace))
        log_likelihood = self._sum(observed_sites(self.model_trace))
        log_w = log_likelihood + log_p - log_q
        if not (log_w < torch.inf).all():
            raise ValueError(pair.blame(particles, stream))
        if not log_w.isfinite().all():
            raise ValueError(
                "elbo_parts: the guide draws latents under which some data have p(x, z) = 0, so "
                "the ELBO is -infinity and has no parts."
            )
        self.log_q, self.log_p, self.log_likelihood = (
            t.double().expand(particles, data_size(pair.args))
            for t in (log_q, log_p, log_likelihood)
        )
        self._of_dims = [
            [
                log_probs(trace.nodes[name], pair.dim)
                for trace in (self.guide_trace, self.model_trace)
            ]
            for name, _ in latent_sites(self.guide_trace)
        ]
        self._means = [means(site, pair.dim) for _, site in latent_sites(self.guide_trace)]
        names = [name for name, _ in latent_sites(self.guide_trace)]
        self.dims = {n: m.shape[-1] for n, m in zip(names, self._means, strict=True)}
        self.factorizes = all(part is not None for parts in self._of_dims for part in parts)

    def has_one_prior(self) -> bool:
        """Whether the prior is the same for all data: other data give the draws the same p(z)."""
        size = data_size(self.pair.args)
        others = tuple(
            a.roll(1, 0) if isinstance(a, Tensor) and a.dim() > 0 and len(a) == size else a
            for a in self.pair.args
        )
        with pyro.validation_enabled(is_validate=False):
            log_p = self._sum(latent_sites(self._model(others))).double()
        return torch.allclose(log_p, self.log_p, rtol=1e-4, atol=1e-4)

    def terms(self, aggregate: AggregatePosterior) -> dict[str, Tensor]:
        """The parts of each draw, (K, n) and (K, n, Z), float64."""
        log_agg, log_agg_dims = aggregate.log_density(self.guide_trace)
        terms = {
            "elbo": self.log_likelihood + self.log_p - self.log_q,
            "distortion": -self.log_likelihood,
            "rate": self.log_q - self.log_p,
            "mutual_information": self.log_q - log_agg,
            "marginal_kl": log_agg - self.log_p,
            "kl_per_dim": torch.cat(list(map(_difference, self._of_dims, self._means)), -1),
            "means": torch.cat(self._means, -1),
        }
        if log_agg_dims is not None:
            independent = log_agg_dims.sum(-1)
            terms["total_correlation"] = log_agg - independent
            terms["dimension_kl"] = independent - self.log_p
        return terms

    def _model(self, args: Arguments) -> Trace:
        replayed = poutine.replay(self.pair.model, trace=self.guide_trace)
        inside = in_particles(replayed, self.particles, self.pair.nesting)
        return poutine.util.prune_subsample_sites(poutine.trace(inside).get_trace(*args))

    def _sum(self, sites: Any) -> Tensor:
        return per_datum(sites, self.particles, nesting=self.pair.nesting, dim=self.pair.dim)


def _difference(log_probs: list[Tensor | None], like: Tensor) -> Tensor:
    """Log q - log p of each dimension, NaN where they are not independent."""
    log_q, log_p = log_probs
    if log_q is None or log_p is None:
        return torch.full_like(like, torch.nan)
    return log_q.double() - log_p.double()


@dataclass
class _Block:
    """The parts of a block of data: their means over draws, and the variances of these means."""

    mean: dict[str, Tensor]
    variance: dict[str, Tensor]

    @classmethod
    def of_rounds(cls, rounds: list[dict[str, Tensor]]) -> "_Block":
        draws = {name: torch.cat([terms[name] for terms in rounds]) for name in rounds[0]}
        return cls(
            {name: d.mean(0).cpu() for name, d in draws.items()},
            {name: (d.var(0) / len(d)).cpu() for name, d in draws.items()},
        )


def _parts(
    of_blocks: list[_Block], dims: dict[str, int], num_particles: int, *, one_prior: bool
) -> ElboParts:
    mean, variance = (
        {name: torch.cat([kind[name] for kind in kinds]) for name in kinds[0]}
        for kinds in ([b.mean for b in of_blocks], [b.variance for b in of_blocks])
    )
    nats = {name: Nats(mean[name], variance[name].sqrt()) for name in mean if mean[name].dim() == 1}
    if not one_prior:
        nats = {
            name: part
            for name, part in nats.items()
            if name not in ("marginal_kl", "total_correlation", "dimension_kl")
        }
    found, error = activity(mean["means"], variance["means"], num_particles)
    return ElboParts(
        elbo=nats["elbo"],
        distortion=nats["distortion"],
        rate=nats["rate"],
        mutual_information=nats["mutual_information"],
        marginal_kl=nats.get("marginal_kl"),
        total_correlation=nats.get("total_correlation"),
        dimension_kl=nats.get("dimension_kl"),
        kl_per_dim=mean["kl_per_dim"].mean(0),
        kl_per_dim_error=variance["kl_per_dim"].sum(0).sqrt() / len(mean["kl_per_dim"]),
        activity=found,
        activity_error=error,
        dims=dims,
        num_particles=num_particles,
    )


def _check(model: Program, guide: Program, args: Arguments) -> None:
    """Refuse pairs whose rate is no expectation of log q(z|x) - log p(z)."""
    structure = inspect(model, guide, args, {}, sums=True)
    in_guide = dict(latent_sites(structure.guide_trace))
    for name, _ in latent_sites(structure.model_trace):
        if name not in in_guide:
            raise ValueError(
                f"site {name!r} is summed out by the model, which mixes p(z) and p(x|z): the ELBO "
                "has no parts, but log_evidence holds. Let the guide draw the site."
            )
    for name, site in in_guide.items():
        if kind_of(site["fn"]) == "Delta":
            raise ValueError(
                f"site {name!r}: the guide gives it a value (Delta) without a density, so there is "
                "no rate to split; give it a distribution."
            )
