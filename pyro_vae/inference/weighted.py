r"""Objectives made of importance weights per datum, for any pair.

With :math:`w_{kn} = p(x_n, z_{kn}) / q(z_{kn}|x_n)` and the normalised weights
:math:`\bar w_{kn} = w_{kn} / \sum_j w_{jn}`:

=======================  =====================================  =================================
objective                minimises                              gradient of the guide
=======================  =====================================  =================================
``ImportanceWeighted``   -log mean of the weights (IWAE), or    of that, through the draws and
                         the Renyi bound of order alpha         the density
``DReG``                 the same, of order 0                   :math:`\sum_k \bar w_k^2\,
                                                                \partial_z \log w_k\,\partial z_k`
``StickingTheLanding``   -ELBO                                  :math:`\frac1K \sum_k
                                                                \partial_z \log w_k\,\partial z_k`
``ReweightedWakeSleep``  -log mean of the weights               :math:`\sum_k \bar w_k\,
                                                                \partial \log q(z_k|x)`
=======================  =====================================  =================================

In the last three the gradient of the model is :math:`\sum_k \bar w_k\,\partial \log p(x, z_k)`
(:math:`1/K` in place of :math:`\bar w_k` for sticking the landing). A KL weight multiplies latent
terms of every log-weight; scales of subsampling multiply the sum over the data.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.inference.data_plate import data_dim, data_size, per_datum
from pyro_vae.inference.handlers import (
    Program,
    Trace,
    in_particles,
    latent_sites,
    observed_sites,
    traces,
    unweighted_scale,
)
from pyro_vae.inference.objectives import Terms
from pyro_vae.inference.structure import Structure, inspect, kind_of

__all__ = ["DReG", "ImportanceWeighted", "ReweightedWakeSleep", "StickingTheLanding"]


@dataclass
class _Weighted:
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

    def _weights(self, model_trace: Trace, guide_trace: Trace) -> "_Weights":
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
        return _Weights(likelihood, prior, q, *_scales(model_trace, guide_trace))


@dataclass
class _Weights:
    """Log-densities (K, N), the scale of the sum over the data, and the KL weight."""

    log_likelihood: Any
    log_prior: Any
    log_q: Any
    scale: Any
    beta: Any

    @property
    def log_p(self) -> Tensor:
        return self.log_likelihood + self.beta * self.log_prior

    @property
    def log_w(self) -> Tensor:
        return self.log_p - self.beta * self.log_q

    def terms(self, per_datum: Tensor) -> Terms:
        """The loss from what is to be minimised for each datum (N,)."""
        loss = (self.scale * per_datum.sum()).to(per_datum.dtype)
        distortion = -self.scale * self.log_likelihood.detach().mean(0).sum()
        rate = self.scale * (self.log_q - self.log_prior).detach().mean(0).sum()
        return Terms(loss, distortion, rate)


@dataclass
class ImportanceWeighted(_Weighted):
    r"""The importance-weighted bound, or the Renyi bound of order alpha, per datum.

    .. math:: L_\alpha = -\sum_n \frac{1}{1-\alpha}
              \log \frac1K \sum_{k=1}^K w_{kn}^{1-\alpha}

    Order 0 is the IWAE; order 1 is minus the ELBO.

    Args:
        num_particles: Number of draws K from the guide, for each datum.
        alpha: The order of the Renyi divergence.
        data_plate: Name of the plate over the data, where the observed sites share several.

    References: Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders" (2016); Li and
    Turner, "Renyi divergence variational inference" (2016).

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> pair = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> loss = pv.ImportanceWeighted(num_particles=50)
        >>> svi = pv.SVI(*pair, lambda params: torch.optim.Adam(params, lr=1e-3), loss)
        >>> svi.step(torch.ones(5, 9)).shape
        torch.Size([])
    """

    alpha: float = 0.0

    def _terms(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Terms:
        weights = self._weights(*traces(model, guide, args, kwargs))
        return weights.terms(-_bound(weights.log_w, self.alpha))


@dataclass
class _Pathwise(_Weighted):
    """Objectives whose guide learns through its draws alone, and not through its density.

    The guide runs twice: to draw, and to score the draws. Noise of its own, such as dropout, would
    be another the second time.
    """

    def _shares(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """The shares (K, N) of the draws in the gradients of the model and of the guide."""
        raise NotImplementedError

    def _value(self, log_w: Tensor) -> Tensor:
        raise NotImplementedError

    def _terms(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Terms:
        if not torch.is_grad_enabled():
            weights = self._weights(*traces(model, guide, args, kwargs))
            return weights.terms(-self._value(weights.log_w))
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        # The draws as leaves: what the weights change with them is all that the guide learns from.
        leaves, values = [], []
        held: Trace = drawn.copy()
        for name, site in latent_sites(drawn):
            values.append(site["value"])
            leaves.append(site["value"].detach().requires_grad_())
            held.nodes[name] = {**site, "value": leaves[-1]}
        scored = [
            poutine.util.prune_subsample_sites(
                poutine.trace(poutine.replay(program, trace=held)).get_trace(*args, **kwargs)
            )
            for program in (model, guide)
        ]
        weights = self._weights(*scored)
        of_model, of_guide = (share.detach() for share in self._shares(weights.log_w))
        slopes = torch.autograd.grad((of_guide * weights.log_w).sum(), leaves, retain_graph=True)
        path = sum((s * z).sum() for s, z in zip(slopes, values, strict=True))
        value = self._value(weights.log_w).detach()
        terms = weights.terms(-value)
        gain = (of_model * weights.log_p).sum() + path
        return terms._replace(loss=_with_gradient(terms.loss, -weights.scale * gain))


@dataclass
class DReG(_Pathwise):
    r"""The importance-weighted bound with doubly reparameterized gradients.

    The value is that of ``ImportanceWeighted``; the gradient of the guide has the same expectation,
    and no noise where q is the exact posterior.

    Args:
        num_particles: Number of draws K from the guide, for each datum.
        data_plate: Name of the plate over the data, where the observed sites share several.

    Reference: Tucker et al., "Doubly reparameterized gradient estimators for Monte Carlo
    objectives" (2019).

    Example:
        >>> pv.DReG(num_particles=50)
        DReG(num_particles=50)
    """

    def _shares(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.softmax(log_w, 0)
        return share, share.square()

    def _value(self, log_w: Tensor) -> Tensor:
        return _bound(log_w, 0.0)


@dataclass
class StickingTheLanding(_Pathwise):
    r"""The ELBO with the path derivative alone: no noise is left where q is the exact posterior.

    Args:
        num_particles: Number of draws K from the guide, for each datum.
        data_plate: Name of the plate over the data, where the observed sites share several.

    Reference: Roeder, Wu and Duvenaud, "Sticking the landing" (2017).

    Example:
        >>> pv.StickingTheLanding()
        StickingTheLanding(num_particles=1)
    """

    num_particles: int = 1

    def _shares(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.full_like(log_w, 1 / self.num_particles)
        return share, share

    def _value(self, log_w: Tensor) -> Tensor:
        return log_w.mean(0)


@dataclass
class ReweightedWakeSleep(_Weighted):
    r"""Reweighted wake-sleep: model and guide both fit draws in the proportion of their weights.

    The guide needs no pathwise gradient, so latents may be discrete. Wake phase alone.

    Args:
        num_particles: Number of draws K from the guide, for each datum.
        data_plate: Name of the plate over the data, where the observed sites share several.

    Reference: Bornschein and Bengio, "Reweighted wake-sleep" (2015).

    Example:
        >>> pv.ReweightedWakeSleep(num_particles=10)
        ReweightedWakeSleep(num_particles=10)
    """

    pathwise = False

    def _terms(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Terms:
        with torch.no_grad():
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        scored = [
            poutine.util.prune_subsample_sites(
                poutine.trace(poutine.replay(program, trace=drawn)).get_trace(*args, **kwargs)
            )
            for program in (model, guide)
        ]
        weights = self._weights(*scored)
        share = torch.softmax(weights.log_w, 0).detach()
        terms = weights.terms(-_bound(weights.log_w, 0.0).detach())
        gain = (share * (weights.log_p + weights.log_q)).sum()
        return terms._replace(loss=_with_gradient(terms.loss, -weights.scale * gain))


def _bound(log_w: Tensor, alpha: float) -> Tensor:
    """The bound on log p(x) for each datum (N,), in nats."""
    if alpha == 1.0:
        return log_w.mean(0)
    order = 1.0 - alpha
    return (torch.logsumexp(order * log_w, 0) - math.log(len(log_w))) / order


def _with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """This value with the gradient of another."""
    surrogate = surrogate.to(value.dtype)
    return value.detach() + (surrogate - surrogate.detach())


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
