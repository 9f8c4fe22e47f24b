"""Mixture guides without the noise of the choice among their components."""

import math
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.inference.handlers import Program, Trace, latent_sites, traces
from pyro_vae.inference.objectives import Terms
from pyro_vae.inference.structure import inspect, kind_of
from pyro_vae.inference.weighing import Weighted, bound

__all__ = ["Stratified"]


@dataclass
class Stratified(Weighted):
    r"""A bound for guides that are mixtures: draws from every component, weighed as the mixture.

    .. math:: L = -\sum_m \pi_m(x)\, E_{q_m}\bigl[\log p(x, z) - \log \textstyle\sum_l
              \pi_l(x)\, q_l(z|x)\bigr]

    Choosing a component has no pathwise gradient; here all are taken, so weights and components of
    the mixture both learn from exact derivatives. Of order 0 the average of the weights stands
    within the logarithm, which keeps components apart.

    Args:
        num_particles: Number of draws from *each* component, for each datum.
        data_plate: Name of the plate over the data, where the observed sites share several.
        alpha: The order of the bound: 1 for the ELBO, 0 for the importance-weighted bound.

    Reference: Morningstar et al., "Automatic differentiation variational inference with mixtures"
    (2021).

    Example:
        >>> from functools import partial
        >>> family = partial(pv.families.mixture, num_components=3)
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (9, 2)), family)
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> pair = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> svi = pv.SVI(*pair, lambda params: torch.optim.Adam(params, lr=1e-3), pv.Stratified())
        >>> svi.step(torch.ones(5, 9)).shape
        torch.Size([])
    """

    num_particles: int = 1
    alpha: float = 1.0
    _site: str = field(default="", init=False, repr=False, compare=False)
    _per_component: int = field(default=1, init=False, repr=False, compare=False)

    pathwise = False  # the mixture has none; its components are looked at here

    def prepare(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Inspect the pair on its first arguments, and find the mixture.

        Raises:
            ValueError: The guide has not exactly one mixture, the mixture stands in other plates
                than the data's, or something is drawn without a pathwise gradient.
        """
        found = inspect(model, guide, args, kwargs)
        latents = dict(latent_sites(found.guide_trace))
        mixtures = [n for n, site in latents.items() if isinstance(site["fn"], _MIXTURES)]
        if len(mixtures) != 1:
            raise ValueError(
                f"Stratified: expected one latent site of the guide to be a mixture "
                f"(MixtureSameFamily, or families.mixture), got {mixtures or 'none'} among "
                f"{sorted(latents)}."
            )
        if not self._site:
            self._per_component = self.num_particles
        self._site = mixtures[0]
        for name, site in latents.items():
            drawn = _parts(site["fn"])[1] if name == self._site else site["fn"]
            if not drawn.has_rsample:
                raise ValueError(
                    f"site {name!r}: the guide draws it without a pathwise gradient "
                    f"({kind_of(drawn)}), which Stratified needs."
                )
        self.num_particles = self._per_component * _parts(latents[self._site]["fn"])[0].shape[-1]
        super().prepare(model, guide, args, kwargs)
        assert self.structure is not None
        batch = latents[self._site]["fn"].batch_shape
        if any(size > 1 for dim, size in enumerate(batch, -len(batch)) if dim != self.dim):
            raise ValueError(
                f"site {self._site!r}: expected one mixture for each datum, got mixtures of batch "
                f"shape {tuple(batch)}; other plates have to stand within the event (to_event)."
            )

    def _terms(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Terms:
        draws = _EachComponent(self._site)
        model_trace, guide_trace = traces(model, draws(guide), args, kwargs)
        weights = self._weights(model_trace, guide_trace)
        log_share = self._log_share(guide_trace)
        weights.share = log_share.exp()
        return weights.terms(-bound(weights.log_w, self.alpha, log_share))

    def _log_share(self, guide_trace: Trace) -> Tensor:
        """Log of what each draw counts, (K, N)."""
        logits = _parts(guide_trace.nodes[self._site]["fn"])[0]
        count = logits.shape[-1]
        # All dimensions but those of the particles and of the data have size one.
        assert self.structure is not None
        lead, data = -2 - self.structure.max_plate_nesting, self.dim - 1
        others = [d for d in range(-logits.dim(), -1) if d not in (lead, data)]
        logits = logits.squeeze(others) if others else logits
        if logits.dim() < 3:
            logits = logits.expand(self.num_particles, *logits.shape)
        chosen = torch.arange(self.num_particles, device=logits.device) % count
        index = chosen[:, None, None].expand(-1, logits.shape[1], 1)
        return logits.gather(-1, index).squeeze(-1) - math.log(self._per_component)


class _EachComponent(Messenger):
    """Draw particle number p of a mixture from its component p modulo M."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] != self.name or msg["done"]:
            return
        # Within the plate of particles: its expansion is the last thing that happened to fn.
        _, components = _parts(msg["fn"])
        draws = components.rsample()  # (*batch, M, D)
        count, event = components.batch_shape[-1], components.event_shape
        at = draws.dim() - 1 - len(event)
        lead = draws.shape[0]
        chosen = torch.arange(lead, device=draws.device) % count
        index = chosen.view(lead, *(1,) * (draws.dim() - 1)).expand(
            *draws.shape[:at], 1, *draws.shape[at + 1 :]
        )
        msg["value"] = draws.gather(at, index).squeeze(at)
        msg["done"] = True


_MIXTURES = (dist.MixtureSameFamily, dist.MixtureOfDiagNormals)


def _parts(mixture: Any) -> tuple[Tensor, Any]:
    """The normalised log-weights (*batch, M) of a mixture, and its components, of (*batch, M)."""
    if isinstance(mixture, dist.MixtureOfDiagNormals):
        logits = torch.log_softmax(mixture.component_logits, -1)
        return logits, dist.Normal(mixture.locs, mixture.coord_scale).to_event(1)
    return mixture.mixture_distribution.logits, mixture.component_distribution
