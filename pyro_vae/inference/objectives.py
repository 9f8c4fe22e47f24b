r"""Objectives: from the traces of a pair to a scalar loss.

The evidence lower bound is split into distortion and rate,

.. math:: \mathrm{ELBO} = -(D + R), \quad D = -E_q[\log p(x|z)], \quad
          R = E_q[\log q(z|x) - \log p(z)],

and what is minimised is :math:`D + \beta R` with the KL weight of ``kl_weight``. Everything is a
sum over the data in nats; sums over traces hold no ``.item()`` and no branch on data.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.context import device_of, forked
from pyro_vae.graph.refusal import CannotCompileError
from pyro_vae.inference.handlers import (
    Program,
    Trace,
    in_particles,
    latent_sites,
    observed_sites,
    traces,
    unscaled_log_prob,
    unweighted_scale,
)
from pyro_vae.inference.structure import Structure, inspect, kind_of

__all__ = [
    "ELBO",
    "Foreign",
    "Objective",
    "Terms",
    "distortion_of",
    "elbo_terms",
    "site_rates",
]


class Terms(NamedTuple):
    """One estimate of an objective, each a 0-d tensor in nats, summed over the data.

    Attributes:
        loss: What is minimised: distortion + beta * rate. Carries the gradient.
        distortion: -E_q[log p(x|z)], detached; NaN where a loss of the user's hides it.
        rate: E_q[log q(z|x) - log p(z)] without the KL weight, detached; likewise.
    """

    loss: Tensor
    distortion: Tensor
    rate: Tensor


def elbo_terms(
    model_trace: Trace, guide_trace: Trace, *, analytic: frozenset[str] = frozenset()
) -> Terms:
    r"""The negative ELBO of a pair of traces, as a pure sum over their sites.

    Args:
        model_trace: Trace of the model, replayed on the guide's latents.
        guide_trace: Trace of the guide.
        analytic: Latent sites at which :math:`\log q - \log p` is replaced by
            :math:`KL(q \| p)` in closed form.

    Returns:
        The terms, summed over data and particles.
    """
    distortion = distortion_of(model_trace)
    rate: Any = 0.0
    weighted_rate: Any = 0.0
    for _, weighted, unweighted in site_rates(model_trace, guide_trace, analytic):
        weighted_rate, rate = weighted_rate + weighted, rate + unweighted
    loss = torch.as_tensor(distortion + weighted_rate)
    return Terms(loss, torch.as_tensor(distortion).detach(), torch.as_tensor(rate))


def distortion_of(model_trace: Trace) -> Any:
    """The distortion, summed over observed sites and data; zero where nothing is observed."""
    distortion: Any = 0.0
    for _, site in observed_sites(model_trace):
        distortion = distortion - _scaled_sum(unscaled_log_prob(site), site["scale"])
    return distortion


def site_rates(
    model_trace: Trace, guide_trace: Trace, analytic: frozenset[str]
) -> Iterator[tuple[str, Any, Any]]:
    """For each latent site its name, its rate with the KL weight, and without it (detached)."""
    for name, q in latent_sites(guide_trace):
        if name in analytic:
            kl = kl_divergence(q["fn"], model_trace.nodes[name]["fn"])
            parts = [(scale_and_mask(kl, 1.0, q["mask"]), q)]
        else:
            parts = [(unscaled_log_prob(q), q)]
            if name in model_trace.nodes:  # auxiliary latents stand in the guide alone
                p = model_trace.nodes[name]
                parts.append((-unscaled_log_prob(p), p))
        weighted: Any = 0.0
        rate: Any = 0.0
        for nats, site in parts:
            weighted = weighted + _scaled_sum(nats, site["scale"])
            rate = rate + _scaled_sum(nats.detach(), unweighted_scale(site))
        yield name, weighted, rate


def _scaled_sum(nats: Tensor, scale: float | Tensor) -> Tensor:
    """The scaled sum over a site; ``poutine.scale`` also takes a tensor, one scale per datum."""
    if isinstance(scale, Tensor) and scale.dim() > 0:
        return (nats * scale).sum()
    return (nats.sum() * scale).to(nats.dtype)  # whatever the precision of a KL weight


@dataclass
class ELBO:
    """The evidence lower bound of any pair, as Pyro's ``Trace_ELBO`` or ``TraceMeanField_ELBO``.

    Attributes:
        analytic_kl: Use the closed-form KL at every site where one is registered and unbiased.
        num_particles: Number of draws K from the guide.
        vectorize_particles: Draw them at once in a plate left of the deepest one; else in a loop.
        pyro_loss: Pyro's own loss, for guides without a pathwise gradient.
    """

    analytic_kl: bool = False
    num_particles: int = 1
    vectorize_particles: bool = True
    pyro_loss: Any = None
    structure: Structure | None = None

    def prepare(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Inspect the pair on its first arguments.

        Raises:
            ValueError: The pair does not fit (see ``inspect``), or the analytic KL is asked of a
                guide without a pathwise gradient.
        """
        self.structure = inspect(model, guide, args, kwargs, analytic_kl=self.analytic_kl)
        if self.structure.reparameterized:
            return
        name, site = self.structure.without_path()
        if not self.analytic_kl:
            warnings.warn(
                f"site {name!r}: the guide draws it without a pathwise gradient "
                f"({kind_of(site['fn'])}), so its gradient is that of the score function "
                "(REINFORCE), which is noisy. A sum over all values is exact (config_enumerate and "
                "TraceEnum_ELBO), Stratified is for mixtures, ReweightedWakeSleep for any draws.",
                UserWarning,
                stacklevel=2,
            )
        else:
            raise ValueError(
                f"site {name!r}: the guide draws it without a pathwise gradient "
                f"({kind_of(site['fn'])}), which TraceMeanField_ELBO needs; use loss=Trace_ELBO()."
            )

    def terms(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Terms:
        """One estimate of the loss and its parts, summed over the data, mean over particles."""
        structure = self.structure
        if structure is None:
            raise RuntimeError("ELBO.terms was called before ELBO.prepare.")
        if not structure.reparameterized and torch.is_grad_enabled():
            # Without a pathwise gradient Pyro adds score-function terms to the loss.
            return Foreign(self.pyro_loss).terms(model, guide, args, kwargs)
        vectorized = self.vectorize_particles and self.num_particles > 1
        if vectorized:
            model = in_particles(model, self.num_particles, structure.max_plate_nesting)
            guide = in_particles(guide, self.num_particles, structure.max_plate_nesting)
        rounds = 1 if vectorized else self.num_particles
        sums: list[Any] = [0.0, 0.0, 0.0]
        for _ in range(rounds):
            estimate = elbo_terms(*traces(model, guide, args, kwargs), analytic=structure.analytic)
            sums = [a + b / self.num_particles for a, b in zip(sums, estimate, strict=True)]
        return Terms(*sums)

    def check_compilable(self) -> None:
        """Refuse guides without a pathwise gradient."""
        structure = self.structure
        if structure is not None and not structure.reparameterized:
            name, site = structure.without_path()
            raise CannotCompileError(
                f"site {name!r}: the guide draws it without a pathwise gradient "
                f"({kind_of(site['fn'])}), so Pyro's own loss is used"
            )


@dataclass
class Foreign:
    """A loss that this library does not know: Pyro's other losses, or a function of the user's.

    Attributes:
        loss: An object with Pyro's ``differentiable_loss`` or ``loss_and_grads``, or a function
            of ``(model, guide, *args, **kwargs)`` that returns a 0-d tensor.
    """

    loss: Any

    def prepare(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Evaluate the loss once, for the pair's parameters; nothing is known of its sites."""
        with torch.no_grad(), forked(device=device_of(model, guide)):
            self.terms(model, guide, args, kwargs)

    def terms(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Terms:
        """The loss; its parts are unknown.

        A loss that does its own backward pass (``loss_and_grads``) comes without a gradient.
        """
        if hasattr(self.loss, "differentiable_loss"):
            function = _with_gradients(self.loss.differentiable_loss)
        elif hasattr(self.loss, "loss_and_grads"):
            function = self.loss.loss_and_grads if torch.is_grad_enabled() else self.loss.loss
        else:
            function = self.loss
        loss = function(model, guide, *args, **kwargs)
        if not isinstance(loss, Tensor):  # Pyro's floats: float32 would round what they say
            loss = torch.tensor(loss, dtype=torch.float64)
        unknown = loss.new_full((), math.nan)
        return Terms(loss, unknown, unknown)

    def check_compilable(self) -> None:
        """Refuse losses that do their own backward pass."""
        loss = self.loss
        if not hasattr(loss, "differentiable_loss") and hasattr(loss, "loss_and_grads"):
            raise CannotCompileError(f"the loss {type(loss).__name__} does its own backward pass")


def _with_gradients(loss: Any) -> Any:
    """Pyro's losses refuse what has no gradient: make one, and drop it where none is wanted."""

    def call(*args: Any, **kwargs: Any) -> Any:
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():
            found = loss(*args, **kwargs)
        return found if wanted or not isinstance(found, Tensor) else found.detach()

    return call


class Objective(Protocol):
    """What ``SVI`` minimises: estimates of a loss, for one pair."""

    def prepare(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Inspect the pair on its first arguments, and refuse what does not fit."""
        ...

    def terms(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Terms:
        """One estimate of the loss and its parts, summed over the data."""
        ...

    def check_compilable(self) -> None:
        """Raise ``CannotCompileError`` where a step can't become a graph."""
        ...
