r"""Wake-sleep: model and guide learn from draws of one another, for any pair.

The wake phase fits the model to draws of the guide, the sleep phase the guide to dreams, which are
draws of latents and data from the model:

.. math:: -\nabla_\theta \sum_n \log p_\theta(x_n, z_n), \quad z_n \sim q_\phi(z|x_n);
          \qquad
          -\nabla_\phi \sum_n \log q_\phi(z'_n|x'_n), \quad (x'_n, z'_n) \sim p_\theta(x, z).

No gradient goes through a draw. What the guide descends is a Kullback-Leibler divergence the other
way round, and at the model's data in place of the given ones, so that the two phases have no loss
in common.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine

from pyro_vae.context import device_of, seeded
from pyro_vae.inference.handlers import (
    Program,
    Trace,
    latent_sites,
    traces,
    unscaled_log_prob,
    unweighted_scale,
)
from pyro_vae.inference.objectives import Terms, elbo_terms
from pyro_vae.inference.simulation import (
    Places,
    check_joint_draw,
    observed_places,
    put,
    simulated,
)
from pyro_vae.inference.structure import inspect, kind_of

__all__ = ["WakeSleep"]


@dataclass
class WakeSleep:
    r"""Wake-sleep: the model fits draws of the guide, the guide fits dreams of the model.

    .. math:: \nabla_\theta L = -E_{q(z|x)}[\nabla_\theta \log p_\theta(x, z)], \qquad
              \nabla_\phi L = -E_{p(x', z')}[\nabla_\phi \log q_\phi(z'|x')]

    The value of the loss is minus the ELBO, which only the gradient of the model descends. Latents
    may be discrete. A step has as many dreams as data; what the model does not observe of its
    arguments (labels, masks) stays as it is. A KL weight weighs p(z) in the wake phase.

    Raises:
        ValueError: When it first meets a pair: the model can't simulate what it observes (see
            ``bidirectional``), or the guide gives no density to the latents of its dreams.

    Reference: Hinton, Dayan, Frey and Neal, "The wake-sleep algorithm for unsupervised neural
    networks" (1995).

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (1, 3)), pv.families.bernoulli)
        >>> likelihood = pv.Conditional(pv.networks.mlp(3, (1, 9)), pv.families.bernoulli)
        >>> prior = pv.priors.Learned(pv.families.bernoulli, (1, 3))
        >>> pair = pv.Model(prior, likelihood), pv.Guide(encoder)
        >>> svi = pv.SVI(*pair, lambda params: torch.optim.Adam(params, lr=1e-3), pv.WakeSleep())
        >>> bool(svi.step(torch.ones(5, 9)) > 0)
        True
    """

    _places: Places | None = field(default=None, init=False, repr=False, compare=False)

    def prepare(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Inspect the pair on its first arguments, and dream once.

        Raises:
            ValueError: See the class.
        """
        structure = inspect(model, guide, args, kwargs)
        known = {name for name, _ in latent_sites(structure.model_trace)}
        for name in structure.latents:
            if name not in known:
                raise ValueError(
                    f"site {name!r} stands in the guide alone, so dreams of the model have no "
                    "value for it; WakeSleep needs a guide of the model's latents."
                )
        device = device_of(model, guide)
        with seeded("dream", device=device):
            dream = simulated(model, args, kwargs)
        places = observed_places(dream, args, kwargs)
        dreamt = put(dream, places, args, kwargs)
        with seeded("dream", device=device):
            check_joint_draw(dreamt, put(simulated(model, *dreamt), places, *dreamt))
        _check_scores(_scored(guide, dream, *dreamt), dream)
        self._places = places

    def terms(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Terms:
        """One estimate of the ELBO and its parts, summed over the data, with both gradients."""
        if self._places is None:
            raise RuntimeError("WakeSleep.terms was called before prepare.")
        if not torch.is_grad_enabled():
            return elbo_terms(*traces(model, guide, args, kwargs))
        with torch.no_grad():
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
            dream = simulated(model, args, kwargs)
        awake = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
        terms = elbo_terms(awake, drawn)
        scored = _scored(guide, dream, *put(dream, self._places, args, kwargs))
        asleep: Any = 0.0
        for _, site in latent_sites(scored):
            asleep = asleep - (unscaled_log_prob(site) * unweighted_scale(site)).sum()
        return terms._replace(loss=terms.loss + (asleep - asleep.detach()).to(terms.loss.dtype))

    def check_compilable(self) -> None:
        """Every step of it can become a graph."""


def _scored(guide: Program, dream: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """The guide on dreamt data, at the dreamt latents."""
    return poutine.trace(poutine.replay(guide, trace=dream)).get_trace(*args, **kwargs)


def _check_scores(scored: Trace, dream: Trace) -> None:
    """Refuse a guide that can't say how probable the latents of a dream are."""
    for name, site in latent_sites(scored):
        if site["value"] is not dream.nodes[name]["value"]:
            raise ValueError(
                f"site {name!r}: the guide ({kind_of(site['fn'])}) does not take a value that it "
                "is handed, so it can't score the model's dreams; WakeSleep needs a guide with an "
                "ordinary pyro.sample for it."
            )
        if not unscaled_log_prob(site).isfinite().all():
            raise ValueError(
                f"site {name!r}: the guide ({kind_of(site['fn'])}) gives no finite density to "
                "latents that the model draws; WakeSleep needs a guide whose support holds the "
                "prior's."
            )
