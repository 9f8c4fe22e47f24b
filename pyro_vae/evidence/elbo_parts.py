"""What the split of a bound over a whole data set found, and what it says in words."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from pyro_vae.evidence.nats import Nats, table

__all__ = ["ElboParts"]

# A latent is used where the variance of its mean over the data is above this (Burda et al. 2016).
_ACTIVE = 0.01
# Nats of mutual information below which the latents tell nothing of the data.
_NOTHING = 0.05
# The share of its highest value, log N, above which the mutual information is cut off by it.
_CUT_OFF = 0.9


@dataclass(frozen=True, eq=False)
class ElboParts:
    r"""The ELBO of a data set in parts, each in nats per datum with its errors.

    .. math:: \mathrm{ELBO} = -\text{distortion} - \text{rate}, \quad
              \text{rate} = I_q(n; z) + \mathrm{KL}(q(z) \| p(z)), \quad
              \mathrm{KL}(q(z) \| p(z)) = \mathrm{TC} + \sum_d \mathrm{KL}(q(z_d) \| p(z_d))

    The parts of each draw add up, and so do the values. What is no part of this pair's bound is
    None, and the printed form says why.

    Attributes:
        elbo: The evidence lower bound.
        distortion: :math:`-E_q[\log p(x|z)]`.
        rate: :math:`\mathrm{KL}(q(z|x) \| p(z))`.
        mutual_information: :math:`I_q(n; z)`, what z tells about the index of the datum; at most
            log N.
        marginal_kl: :math:`\mathrm{KL}(q(z) \| p(z))`, what a perfect prior would save on these
            data; None where the prior differs from datum to datum.
        total_correlation: :math:`\mathrm{KL}(q(z) \| \prod_d q(z_d))`, of one latent site whose
            dimensions are independent under guide and prior; else None.
        dimension_kl: :math:`\sum_d \mathrm{KL}(q(z_d) \| p(z_d))`; likewise.
        kl_per_dim: The rate of each latent dimension, ``(Z,)``, those of several sites beside one
            another in the guide's order; NaN where a site's dimensions are not independent.
        kl_per_dim_error: Their Monte Carlo standard errors, ``(Z,)``.
        activity: The variance over the data of each latent's mean, ``(Z,)``.
        activity_error: Their Monte Carlo standard errors, ``(Z,)``; zero where means are known.
        dims: Number of dimensions of each latent site, by name.
        num_particles: Number of draws K for each datum.
    """

    elbo: Nats
    distortion: Nats
    rate: Nats
    mutual_information: Nats
    marginal_kl: Nats | None
    total_correlation: Nats | None
    dimension_kl: Nats | None
    kl_per_dim: Tensor
    kl_per_dim_error: Tensor
    activity: Tensor
    activity_error: Tensor
    dims: dict[str, int]
    num_particles: int

    @property
    def active(self) -> Tensor:
        """Which latent dimensions the data move: activity above 0.01 beyond doubt, ``(Z,)`` bool.

        Reference: Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders" (2016).
        """
        return self.activity > _ACTIVE + 2 * self.activity_error

    @property
    def active_units(self) -> dict[str, int]:
        """How many dimensions of each latent site are active, by name."""
        of_sites = self.active.split(list(self.dims.values()))
        return {name: int(of.sum()) for name, of in zip(self.dims, of_sites, strict=True)}

    @property
    def collapsed(self) -> bool:
        """Whether the latents tell nothing of the data, and the guide stands at the prior."""
        return self._silent and self.rate.mean <= self._nothing(self.rate)

    @property
    def _silent(self) -> bool:
        """Whether the latents tell nothing of the data."""
        information = self.mutual_information
        return not self.active.any() and information.mean <= self._nothing(information)

    @staticmethod
    def _nothing(part: Nats) -> float:
        return max(_NOTHING, 2 * part.mean_standard_error)

    def __str__(self) -> str:
        parts = [
            ("ELBO", self.elbo),
            ("distortion", self.distortion),
            ("rate", self.rate),
            ("  mutual information", self.mutual_information),
            ("  marginal KL", self.marginal_kl),
            ("    total correlation", self.total_correlation),
            ("    dimension-wise KL", self.dimension_kl),
        ]
        rows = [(name, part) for name, part in parts if part is not None]
        title = f"nats per datum; {len(self.elbo.value)} data, {self.num_particles} particles"
        return "\n".join([table(title, rows), *self._words()])

    def _words(self) -> Iterator[str]:
        """What the numbers mean, and what speaks against them."""
        used, of = int(self.active.sum()), len(self.active)
        yield f"{used} of {of} latent dimensions are used (the data move their means)."
        rate, information = max(self.rate.mean, 0.0), self.mutual_information.mean
        if self.collapsed:
            yield (
                f"The posterior has collapsed: the rate is {rate:.2f} nats, so the guide is the "
                "prior for all data and the decoder does without latents. Try a KL warm-up "
                "(`warmup=`), free bits (`pv.FreeBits`), or a weaker decoder."
            )
        elif self._silent:
            yield (
                f"The guide is the same for all data but is not the prior: the rate of {rate:.2f} "
                "nats buys no information. Train longer, or look at the encoder."
            )
        highest = math.log(len(self.elbo.value))
        if information > _CUT_OFF * highest:
            yield (
                f"The mutual information is near log N = {highest:.2f}, the most that it can be: "
                "the data have codes apart. With more data it would be larger and the marginal KL "
                "smaller, by as much."
            )
        if self.marginal_kl is None:
            yield (
                "No marginal KL: the prior differs from datum to datum, and q(z) has no one p(z) "
                "to be held against."
            )
        elif self.total_correlation is None:
            yield (
                "No total correlation: that takes one latent site, of independent dimensions under "
                "guide and prior."
            )
