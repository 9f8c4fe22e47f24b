"""The ELBO with exact sums over discrete latents: Pyro's ``TraceEnum_ELBO``, in one graph."""

from dataclasses import dataclass, field
from typing import Any

import torch

from pyro_vae.graph.refusal import CannotCompileError
from pyro_vae.inference.enumeration import enumerated_traces, expectation, factors, is_marked
from pyro_vae.inference.handlers import Program, in_particles, latent_sites
from pyro_vae.inference.objectives import Foreign, Terms
from pyro_vae.inference.structure import Structure, inspect, kind_of

__all__ = ["Enumerated"]


@dataclass
class Enumerated:
    r"""The evidence lower bound with marked sites summed instead of drawn.

    .. math:: \mathrm{ELBO} = \sum_z q(z|x) \bigl(\log \sum_c p(x, z, c) - \log q(z|x)\bigr)

    Sites are marked as for Pyro: ``infer={"enumerate": "parallel"}`` or ``config_enumerate``. The
    others are drawn with a pathwise gradient; where one has none, Pyro's own loss is used.

    Attributes:
        pyro_loss: The ``TraceEnum_ELBO`` that selected it.
        structure: What an inspection of the pair found.
    """

    pyro_loss: Any
    structure: Structure | None = None
    _left_to_pyro: str | None = field(default=None, init=False, repr=False)

    def prepare(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Inspect the pair on its first arguments.

        Raises:
            ValueError: The pair does not fit.
        """
        self.structure = inspect(model, guide, args, kwargs, sums=True)
        for name, site in latent_sites(self.structure.guide_trace):
            if not is_marked(site) and not site["fn"].has_rsample:
                self._left_to_pyro = (
                    f"site {name!r}: the guide draws it without a pathwise gradient "
                    f"({kind_of(site['fn'])}); mark it for enumeration, "
                    "infer={'enumerate': 'parallel'}, to have the sum compiled"
                )

    def check_compilable(self) -> None:
        """Refuse guides with a site that is neither summed nor drawn by a pathwise gradient."""
        if self._left_to_pyro is not None:
            raise CannotCompileError(self._left_to_pyro)

    def terms(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Terms:
        """One estimate of the loss and its parts, summed over the data, mean over particles.

        What a sum out of the model joins counts as distortion.
        """
        if self.structure is None:
            raise RuntimeError("Enumerated.terms was called before prepare.")
        if self._left_to_pyro is not None:
            return Foreign(self.pyro_loss).terms(model, guide, args, kwargs)
        nesting, particles = self.structure.max_plate_nesting, self.pyro_loss.num_particles
        if particles > 1:
            model = in_particles(model, particles, nesting)
            guide = in_particles(guide, particles, nesting)
            nesting += 1
        model_trace, guide_trace = enumerated_traces(model, guide, args, kwargs, nesting)
        names = frozenset(name for name, _ in latent_sites(guide_trace))
        symbols = {
            name: site["infer"]["_enumerate_symbol"]
            for name, site in latent_sites(guide_trace)
            if "_enumerate_symbol" in site["infer"]
        }
        of_guide = factors(guide_trace, names)
        summed = [factor for factor in of_guide if factor.names[0] in symbols]
        distortion: Any = 0.0
        rate: Any = 0.0
        weighted: Any = 0.0
        for sign, found in ((-1.0, factors(model_trace, names)), (1.0, of_guide)):
            for factor in found:
                nats = sign * expectation(factor, summed, frozenset(symbols.values())) / particles
                if names.isdisjoint(factor.names) or len(factor.names) > 1:
                    distortion = distortion + nats * factor.unweighted
                else:
                    weighted = weighted + nats * factor.scale
                    rate = rate + nats.detach() * factor.unweighted
        distortion, rate = torch.as_tensor(distortion), torch.as_tensor(rate)
        loss = torch.as_tensor(distortion + weighted)
        return Terms(loss.to(distortion.dtype), distortion.detach(), rate)
