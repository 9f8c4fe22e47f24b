"""A pair in a plate of particles, and its log-weights: what objectives of weights share."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vae.inference.data_plate import data_dim, data_size, per_datum
from pyro_vae.inference.handlers import (
    Program,
    Trace,
    in_particles,
    latent_sites,
    observed_sites,
    unweighted_scale,
)
from pyro_vae.inference.objectives import Terms
from pyro_vae.inference.structure import Structure, inspect, kind_of

__all__ = ["Weighted", "Weights", "bound"]


@dataclass
class Weighted:
    """What these objectives share: the pair in a plate of particles, and its log-weights."""

    num_particles: int = 5
    data_plate: str | None = field(default=None, kw_only=True, repr=False)
    structure: Structure | None = field(default=None, init=False, repr=False, compare=False)
    dim: int = field(default=-1, init=False, repr=False, compare=False)

    pathwise = True  # whether the guide has to be drawn with a pathwise gradient

    def __post_init__(self) -> None:
        if self.num_particles < 1:
            raise ValueError(
                f"{type(self).__name__}: expected num_particles >= 1, got {self.num_particles}."
            )

    def prepare(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Inspect the pair on its first arguments.

        Raises:
            ValueError: The pair does not fit, has no weights per datum, or no pathwise gradient.
        """
        structure = inspect(model, guide, args, kwargs)
        if self.pathwise and not structure.reparameterized:
            name, site = structure.without_path()
            raise ValueError(
                f"site {name!r}: the guide draws it without a pathwise gradient "
                f"({kind_of(site['fn'])}), which {type(self).__name__} needs; ReweightedWakeSleep "
                "does without."
            )
        size = data_size((*args, *kwargs.values()))
        self.dim = data_dim(structure, size, self.data_plate)
        self.structure = structure

    def check_compilable(self) -> None:
        """Every step of these objectives can become a graph."""

    def terms(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Terms:
        """One estimate of the loss and its parts, summed over the data."""
        if self.structure is None:
            raise RuntimeError(f"{type(self).__name__}.terms was called before prepare.")
        nesting = self.structure.max_plate_nesting
        model = in_particles(model, self.num_particles, nesting)
        guide = in_particles(guide, self.num_particles, nesting)
        return self._terms(model, guide, args, kwargs)

    def _terms(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Terms:
        raise NotImplementedError

    def _weights(self, model_trace: Trace, guide_trace: Trace) -> "Weights":
        assert self.structure is not None
        nesting = self.structure.max_plate_nesting
        groups = (
            torch.as_tensor(per_datum(sites, self.num_particles, nesting=nesting, dim=self.dim))
            for sites in (
                observed_sites(model_trace),
                latent_sites(model_trace),
                latent_sites(guide_trace),
            )
        )
        likelihood, prior, q = groups
        return Weights(likelihood, prior, q, *_scales(model_trace, guide_trace))


@dataclass
class Weights:
    """Log-densities (K, N), the scale of the sum over the data, and the KL weight."""

    log_likelihood: Any
    log_prior: Any
    log_q: Any
    scale: Any
    beta: Any
    share: Any = None  # what each draw counts, (K, N), where that is not 1/K

    @property
    def log_p(self) -> Tensor:
        """Log p(x, z), with the KL weight on its latents, (K, N)."""
        return self.log_likelihood + self.beta * self.log_prior

    @property
    def log_w(self) -> Tensor:
        """The log-weights, with the KL weight, (K, N)."""
        return self.log_p - self.beta * self.log_q

    def terms(self, per_datum: Tensor) -> Terms:
        """The loss from what is to be minimised for each datum (N,)."""
        loss = (self.scale * per_datum.sum()).to(per_datum.dtype)
        distortion = -self.scale * self._mean(self.log_likelihood)
        rate = self.scale * self._mean(self.log_q - self.log_prior)
        return Terms(loss, distortion, rate)

    def _mean(self, nats: Tensor) -> Tensor:
        """The mean over draws, summed over the data, without a gradient."""
        nats = nats.detach()
        return (nats.mean(0) if self.share is None else (self.share.detach() * nats).sum(0)).sum()


def bound(log_w: Tensor, alpha: float, log_share: Tensor | None = None) -> Tensor:
    """The Renyi bound of order alpha on log p(x) for each datum (N,), in nats.

    Args:
        log_w: Log-weights ``(K, N)``.
        alpha: The order: 0 for the importance-weighted bound, 1 for the ELBO.
        log_share: Log of what each draw counts, ``(K, N)``, adding up to one; 1/K by default.
    """
    order = 1.0 - alpha
    if log_share is None:
        if order == 0.0:
            return log_w.mean(0)
        return (torch.logsumexp(order * log_w, 0) - math.log(len(log_w))) / order
    if order == 0.0:
        return (log_share.exp() * log_w).sum(0)
    return torch.logsumexp(order * log_w + log_share, 0) / order


def _scales(model_trace: Trace, guide_trace: Trace) -> tuple[Any, Any]:
    """The scale of the sum over the data, and the KL weight: each one number for all sites."""
    sites = [
        *observed_sites(model_trace),
        *latent_sites(model_trace),
        *latent_sites(guide_trace),
    ]
    scale = unweighted_scale(sites[0][1])
    for name, site in sites:
        other = unweighted_scale(site)
        same = other is scale or (
            not isinstance(other, Tensor) and not isinstance(scale, Tensor) and other == scale
        )
        if not same:
            raise ValueError(
                f"site {name!r}: expected the scale {scale} of the other sites, got {other}; a "
                "weight of a datum has one scale for all its sites (a KL weight is pv.kl_weight)."
            )
    latents = [site for _, site in latent_sites(guide_trace)]
    if not latents or "unweighted_scale" not in latents[0]["infer"]:
        return scale, 1.0
    return scale, latents[0]["scale"] / scale
