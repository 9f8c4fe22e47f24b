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
                                                                (for a KL weight of 1)
``StickingTheLanding``   -ELBO                                  :math:`\frac1K \sum_k
                                                                \partial_z \log w_k\,\partial z_k`
``ReweightedWakeSleep``  -log mean of the weights               :math:`\sum_k \bar w_k\,
                                                                \partial \log q(z_k|x)`
=======================  =====================================  =================================

In the last three the gradient of the model is :math:`\sum_k \bar w_k\,\partial \log p(x, z_k)`
(:math:`1/K` in place of :math:`\bar w_k` for sticking the landing). A KL weight multiplies latent
terms of every log-weight; scales of subsampling multiply the sum over the data.
"""

from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.inference.handlers import Program, Trace, latent_sites, traces
from pyro_vae.inference.objectives import Terms
from pyro_vae.inference.weighing import Weighted, bound

__all__ = ["DReG", "ImportanceWeighted", "ReweightedWakeSleep", "StickingTheLanding"]


@dataclass
class ImportanceWeighted(Weighted):
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
        return weights.terms(-bound(weights.log_w, self.alpha))


@dataclass
class _Pathwise(Weighted):
    """Objectives whose guide learns through its draws alone, and not through its density.

    The guide runs twice: to draw, and to score the draws. Noise of its own, such as dropout, would
    be another the second time.
    """

    def _shares(self, log_w: Tensor, beta: Any) -> tuple[Tensor, Tensor]:
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
        of_model, of_guide = (s.detach() for s in self._shares(weights.log_w, weights.beta))
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
    and no noise where q is the exact posterior. Under a KL weight of beta it is

    .. math:: \sum_k \left((1-\beta)\,\bar w_k + \beta\,\bar w_k^2\right)
              \partial_z \log w_k\,\partial z_k

    Args:
        num_particles: Number of draws K from the guide, for each datum.
        data_plate: Name of the plate over the data, where the observed sites share several.

    Reference: Tucker et al., "Doubly reparameterized gradient estimators for Monte Carlo
    objectives" (2019).

    Example:
        >>> pv.DReG(num_particles=50)
        DReG(num_particles=50)
    """

    def _shares(self, log_w: Tensor, beta: Any) -> tuple[Tensor, Tensor]:
        share = torch.softmax(log_w, 0)
        # The density of the draws, whose gradient this replaces, is weighted by beta too.
        return share, share * (1 - beta + beta * share)

    def _value(self, log_w: Tensor) -> Tensor:
        return bound(log_w, 0.0)


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

    def _shares(self, log_w: Tensor, beta: Any) -> tuple[Tensor, Tensor]:
        share = torch.full_like(log_w, 1 / self.num_particles)
        return share, share

    def _value(self, log_w: Tensor) -> Tensor:
        return log_w.mean(0)


@dataclass
class ReweightedWakeSleep(Weighted):
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
        terms = weights.terms(-bound(weights.log_w, 0.0).detach())
        gain = (share * (weights.log_p + weights.log_q)).sum()
        return terms._replace(loss=_with_gradient(terms.loss, -weights.scale * gain))


def _with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """This value with the gradient of another."""
    surrogate = surrogate.to(value.dtype)
    return value.detach() + (surrogate - surrogate.detach())
