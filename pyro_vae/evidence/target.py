r"""A pair as two log-densities over one unconstrained vector per datum, with their gradients.

All latents of a datum are mapped to the reals, by :math:`z = T(u)`, and put beside one another.
Both densities carry the Jacobian,

.. math:: \log q(u|x) = \log q(T(u)|x) + \log|\det T'(u)|, \qquad
          \log p(x, u) = \log p(x, T(u)) + \log|\det T'(u)|,

so that their ratio is the weight of ``log_weights``. Discrete latents of the model that the guide
does not draw are summed out, as there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_vae.evidence.particles import Arguments, Pair
from pyro_vae.graph.arguments import flatten, rebuild
from pyro_vae.graph.capture import capture
from pyro_vae.graph.constant import folded
from pyro_vae.graph.lower import lower
from pyro_vae.inference.handlers import Site, Trace, latent_sites
from pyro_vae.inference.matching import kind_of

__all__ = [
    "PERIODIC",
    "Space",
    "State",
    "Target",
    "bounds_of",
    "compiled_target",
    "mix",
    "supports_of",
]

# Real to torch, but their densities repeat.
PERIODIC = {"VonMises", "SineBivariateVonMises", "SineSkewed"}


@dataclass(frozen=True)
class State:
    """Chains at points of the latent space, and all that a step from there needs.

    Attributes:
        u: The unconstrained latents, ``(chains, n, D)``.
        log_q: Log-densities of the guide there, ``(chains, n)``, in nats.
        log_p: Joint log-densities of the model.
        grad_q: Gradient of ``log_q``, ``(chains, n, D)``.
        grad_p: Gradient of ``log_p``.
    """

    u: Tensor
    log_q: Tensor
    log_p: Tensor
    grad_q: Tensor
    grad_p: Tensor

    def where(self, moved: Tensor, other: "State") -> "State":
        """The other state for the chains that moved ``(chains, n)``, this one for the rest."""
        wide = moved.unsqueeze(-1)
        return State(
            u=torch.where(wide, other.u, self.u),
            log_q=torch.where(moved, other.log_q, self.log_q),
            log_p=torch.where(moved, other.log_p, self.log_p),
            grad_q=torch.where(wide, other.grad_q, self.grad_q),
            grad_p=torch.where(wide, other.grad_p, self.grad_p),
        )


Target = Callable[[Tensor, Arguments], State]


def mix(beta: float, of_q: Tensor, of_p: Tensor) -> Tensor:
    """(1 - beta) times what belongs to the guide plus beta times what belongs to the model."""
    if beta == 1.0:
        return of_p  # wherever the guide may be infinite
    return torch.add((1.0 - beta) * of_q, of_p, alpha=beta)


class Space:
    """The latents of a pair on a block, as one vector for each chain and datum.

    Args:
        pair: The pair on the block, at rest.
        chains: Number of chains.
        supports: The support of each latent, from ``supports_of``.

    Attributes:
        dim: Number of unconstrained dimensions D.

    Raises:
        ValueError: The guide can't score values that it has not drawn.
    """

    def __init__(self, pair: Pair, chains: int, supports: dict[str, Any]) -> None:
        self.pair, self.chains = pair, chains
        self.template, _ = pair.draw(pair.args, chains)
        self._parts: list[_Part] = []
        start = 0
        for name, site in latent_sites(self.template):
            part = _Part(name, site, supports[name], pair, start)
            self._parts.append(part)
            start = part.stop
        self.dim = start
        try:
            pair.score_guide(pair.args, self.unflat(self.flat(self.template))[0], chains)
        except Exception as error:
            raise ValueError(
                f"the guide can't score values that it has not drawn ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'no reason given'}), as a flow "
                "without an inverse can't; start from pv.from_prior(model)."
            ) from error

    def flat(self, trace: Trace) -> Tensor:
        """The latents of a trace as vectors (chains, n, D)."""
        return torch.cat([part.flat(trace.nodes[part.name]["value"]) for part in self._parts], -1)

    def unflat(self, u: Tensor) -> tuple[Trace, Tensor]:
        """The trace with these latents, and the log-determinants (chains, n)."""
        trace = self.template.copy()
        total: Any = 0.0
        for part in self._parts:
            value, log_det = part.unflat(u[..., part.start : part.stop])
            trace.nodes[part.name] = {**trace.nodes[part.name], "value": value}
            total = total + log_det
        return trace, total

    def state(self, u: Tensor, args: Arguments) -> State:
        """Densities and gradients at points."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            trace, log_det = self.unflat(u)
            log_q = self.pair.score_guide(args, trace, self.chains) + log_det
            log_p = self.pair.score(args, trace, self.chains) + log_det
            (grad_q,) = torch.autograd.grad(
                log_q.sum(), u, retain_graph=True, materialize_grads=True
            )
            (grad_p,) = torch.autograd.grad(log_p.sum(), u, materialize_grads=True)
        return State(u.detach(), *(t.detach() for t in (log_q, log_p, grad_q, grad_p)))


class _Part:
    """One latent site among the dimensions of the vector."""

    def __init__(self, name: str, site: Site, support: Any, pair: Pair, start: int) -> None:
        self.name = name
        self.transform = biject_to(support)
        value = site["value"]
        self._batch_shape = value.shape[: value.dim() - site["fn"].event_dim]
        # From (..., chains, ..., n, ..., event) to (chains, n, everything else).
        self._axes = (
            len(self._batch_shape) - 1 - pair.nesting,
            len(self._batch_shape) + pair.dim,
        )
        self._shape = self.transform.inv(value).movedim(self._axes, (0, 1)).shape
        self.start = start
        self.stop = start + self._shape[2:].numel()

    def flat(self, value: Tensor) -> Tensor:
        free = self.transform.inv(value).movedim(self._axes, (0, 1))
        return free.reshape(*free.shape[:2], -1)

    def unflat(self, u: Tensor) -> tuple[Tensor, Tensor]:
        free = u.reshape(self._shape).movedim((0, 1), self._axes)
        value = self.transform(free)
        log_det = self.transform.log_abs_det_jacobian(free, value)
        log_det = log_det.expand(self._batch_shape).movedim(self._axes, (0, 1))
        return value, log_det.reshape(*log_det.shape[:2], -1).sum(-1)


def supports_of(pair: Pair) -> dict[str, Any]:
    """The support of each latent, where all can be moved along gradients.

    Raises:
        ValueError: A latent is discrete, fixed to a value, masked, periodic or on a curved space,
            its support depends on other latents, or the guide's support is another than the
            prior's; the message names the site.
    """
    drawn, _ = pair.draw(pair.args, 2)  # two, so that bounds that depend on latents differ
    in_model = dict(latent_sites(pair.replayed(pair.args, drawn, 2)))
    supports = {}
    for name, site in latent_sites(drawn):
        guide, prior = site["fn"], in_model[name]["fn"]
        if kind_of(guide) == "Delta":
            raise ValueError(
                f"site {name!r}: the guide gives it a fixed value (Delta), so there is no density "
                "to start from; give it a distribution, or start from pv.from_prior(model)."
            )
        if any(_is_masked(each["mask"]) for each in (site, in_model[name])):
            raise ValueError(
                f"site {name!r} is masked, and nothing holds the masked dimensions where they are; "
                "use log_evidence."
            )
        support = _of_one(prior.support)
        if support.is_discrete:
            raise ValueError(
                f"site {name!r} is discrete ({kind_of(prior)}), and Hamiltonian moves need "
                "gradients. Mark it for enumeration in the model and leave it out of the guide, so "
                "that it is summed out; or use log_evidence, which holds for any latents."
            )
        periodic = next((kind_of(d) for d in (prior, guide) if kind_of(d) in PERIODIC), None)
        if periodic is not None:
            raise ValueError(
                f"site {name!r}: {periodic} is a density of angles, and chains would leave its one "
                "period; use log_evidence."
            )
        try:
            biject_to(support)
        except NotImplementedError:
            raise ValueError(
                f"site {name!r}: no map from the reals to the support {support} of "
                f"{kind_of(prior)} is known, which Hamiltonian moves need; use log_evidence."
            ) from None
        if bounds_of(name, support) != bounds_of(name, _of_one(guide.support)):
            raise ValueError(
                f"site {name!r}: the guide's {kind_of(guide)} is over {guide.support}, the prior "
                f"({kind_of(prior)}) over {support}: chains that start from the guide would never "
                "reach the rest. Use a guide on the prior's support, or pv.from_prior(model)."
            )
        supports[name] = support
    return supports


def _is_masked(mask: Any) -> bool:
    return mask is False or (isinstance(mask, Tensor) and not bool(mask.all()))


def _of_one(support: Any) -> Any:
    """The support of a mixture's components, for which maps from the reals are known."""
    while isinstance(support, constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    return support


def bounds_of(name: str, support: Any) -> Any:
    """What tells one support from another: its kind and its bounds, without event dimensions.

    Raises:
        ValueError: The bounds are tensors of several values, which may depend on other latents.
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    bounds = []
    for key, value in sorted(vars(support).items()):
        if isinstance(value, Tensor):
            if not (value == value.reshape(-1)[0]).all():
                raise ValueError(
                    f"site {name!r}: the bounds of its support differ among data or depend on "
                    "other latents, which Hamiltonian moves can't follow; use log_evidence."
                )
            value = value.reshape(-1)[0].item()
        bounds.append((key, value))
    if support in (constraints.real, constraints.real_vector):
        return "real"
    return type(support).__name__.removesuffix("Eq"), tuple(bounds)  # an end has no mass


def compiled_target(space: Space) -> Target:
    """Densities and gradients by one compiled kernel, for blocks of the shape of the space's.

    Raises:
        CannotCompileError: The pair can't become a graph, or the compiler failed.
    """
    pair = space.pair

    def densities(u: Tensor, *data: Tensor) -> Sequence[Tensor]:
        state = space.state(u, rebuild(pair.args, iter(data)))
        return [state.log_q, state.log_p, state.grad_q, state.grad_p]

    inputs = [space.flat(space.template), *_tensors(pair.args)]
    inputs = [t.clone(memory_format=torch.contiguous_format) for t in inputs]
    others = [t.roll(1, 0) if t.dim() > 0 and len(t) > 1 else t.clone() for t in inputs]
    kernel = lower(folded(capture(densities, inputs, others=others)), [], inputs)

    def target(u: Tensor, args: Arguments) -> State:
        return State(u, *kernel([u, *_tensors(args)]))

    return target


def _tensors(args: Arguments) -> list[Tensor]:
    tensors: list[Tensor] = []
    flatten(args, tensors)
    return tensors
