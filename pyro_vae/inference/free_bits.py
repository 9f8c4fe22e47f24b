"""The ELBO with free bits: below a floor the rate costs nothing, so no latent is given up."""

from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_vae.inference.data_plate import data_dim, data_size
from pyro_vae.inference.handlers import Program, latent_sites, traces, unweighted_scale
from pyro_vae.inference.objectives import Terms, distortion_of, site_rates
from pyro_vae.inference.structure import Structure, inspect

__all__ = ["FreeBits"]


@dataclass
class FreeBits:
    r"""The ELBO in which the rate of every latent site counts from a floor on.

    .. math:: L = D + \sum_s \max(\beta R_s, \lambda N), \quad
              R_s = E_q[\log q(z_s|x) - \log p(z_s)]

    The floor holds for the mean over the minibatch, and for each latent site of a hierarchy.
    Logged rates and bounds are the true ones.

    Args:
        nats: The floor :math:`\lambda`, nats per datum and latent site.
        loss: ``TraceMeanField_ELBO()`` for the analytic KL, or ``Trace_ELBO()``.

    Raises:
        ValueError: ``nats`` is negative, or ``loss`` has several particles.
        TypeError: ``loss`` is another.

    Reference: Kingma et al., "Improved variational inference with inverse autoregressive flow"
    (2016), section C.8.

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> pair = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> loss = pv.FreeBits(0.5)
        >>> svi = pv.SVI(*pair, lambda params: torch.optim.Adam(params, lr=1e-3), loss)
        >>> svi.step(torch.ones(5, 9)).shape
        torch.Size([])
    """

    nats: float
    loss: Any = field(default_factory=TraceMeanField_ELBO, repr=False)
    structure: Structure | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.nats >= 0:
            raise ValueError(f"FreeBits: expected nats >= 0, got {self.nats}.")
        if type(self.loss) not in (Trace_ELBO, TraceMeanField_ELBO):
            raise TypeError(
                "FreeBits: expected loss to be TraceMeanField_ELBO() or Trace_ELBO(), got "
                f"{self.loss!r}."
            )
        if self.loss.num_particles != 1:
            raise ValueError(
                f"FreeBits: expected a loss of one particle, got {self.loss.num_particles}; the "
                "floor holds for a mean over the data."
            )

    def prepare(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Inspect the pair on its first arguments.

        Raises:
            ValueError: The pair does not fit, or its guide has no pathwise gradient.
        """
        analytic_kl = type(self.loss) is TraceMeanField_ELBO
        structure = inspect(model, guide, args, kwargs, analytic_kl=analytic_kl)
        if not structure.reparameterized:
            name, _ = structure.without_path()
            raise ValueError(
                f"site {name!r}: the guide draws it without a pathwise gradient, which FreeBits "
                "needs; use loss=Trace_ELBO()."
            )
        data_dim(structure, data_size((*args, *kwargs.values())))
        self.structure = structure

    def check_compilable(self) -> None:
        """Every step of it can become a graph."""

    def terms(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Terms:
        """One estimate of the loss and its parts, summed over the data."""
        if self.structure is None:
            raise RuntimeError("FreeBits.terms was called before prepare.")
        model_trace, guide_trace = traces(model, guide, args, kwargs)
        size = data_size((*args, *kwargs.values()))
        distortion = distortion_of(model_trace)
        latents = dict(latent_sites(guide_trace))
        loss, rate = distortion, 0.0
        for name, weighted, unweighted in site_rates(
            model_trace, guide_trace, self.structure.analytic
        ):
            floor = self.nats * size * unweighted_scale(latents[name])
            loss = loss + torch.clamp_min(weighted, floor)
            rate = rate + unweighted
        return Terms(loss, torch.as_tensor(distortion).detach(), torch.as_tensor(rate))
