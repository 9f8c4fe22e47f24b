r"""Latents that depend on discrete ones, drawn with these summed out.

.. math:: p(z_t | z_{<t}) = \sum_c p(c | z_{<t})\,p(z_t | c, z_{<t})

Each discrete latent takes all its values along a dimension of its own, left of all plates, as where
Pyro enumerates; what depends on it has that dimension too, and so shows that it does.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyro_vae.inference.handlers import Site

__all__ = ["Mixed", "Summed"]

# Plates stand at dimensions -1 to -LEFT, values left of them.
LEFT = 8


class _Factor(NamedTuple):
    """A log-density over values.

    Attributes:
        log_prob: In nats, ``(*values, *plates)``.
        dims: The values' dimensions that it has.
        own: The dimension of its site, if this takes all its values.
        plates: Names of the plates around its site.
    """

    log_prob: Tensor
    dims: frozenset[int]
    own: int | None
    plates: frozenset[str]


class Summed:
    """The discrete latents of one run of a model, and what is known of them."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._factors: list[_Factor] = []
        self._mixed: tuple[Any, frozenset[str]] | None = None

    def take_all_values(self, msg: Site) -> None:
        """Give a discrete site all its values, along a new dimension."""
        fn = msg["fn"]
        dim = -1 - LEFT - len(self._names)
        values = fn.enumerate_support(expand=False)
        msg["value"] = values.reshape(len(values), *(1,) * (-1 - dim), *fn.event_shape)
        msg["done"] = True
        self._names[dim] = msg["name"]
        log_prob = fn.log_prob(msg["value"])
        self._factors.append(_Factor(log_prob, _dims(log_prob.shape), dim, _plates(msg)))

    def mix(self, msg: Site) -> None:
        """Where a latent depends on discrete ones, make its distribution their mixture.

        Raises:
            ValueError: Some of them stand in other plates than it does.
        """
        self._mixed = None
        each, dims, plates = msg["fn"], _dims(msg["fn"].batch_shape), _plates(msg)
        if not dims:
            return
        tied = self._tied(dims)
        for factor in tied:
            if factor.plates != plates:
                raise ValueError(
                    f"site {msg['name']!r} depends on the sum over "
                    f"{sorted(self._names[d] for d in factor.dims)}, but stands in the plates "
                    f"{sorted(plates)} and they in {sorted(factor.plates)}: summed out, they leave "
                    "no prior that is a product over a plate. Put them in the same plates, or "
                    "write a guide that draws them all."
                )
        log_weights = tied[0].log_prob
        for factor in tied[1:]:
            log_weights = log_weights + factor.log_prob
        others = tuple(_dims(log_weights.shape) - dims)
        if others:
            log_weights = log_weights.logsumexp(others, keepdim=True)
        depth = max((-f.dim for f in msg["cond_indep_stack"] if f.vectorized), default=0)
        self._mixed = each, plates
        msg["fn"] = Mixed(each, log_weights, depth)

    def learn(self, msg: Site) -> None:
        """Note what the value of a latent says about those on which it depends."""
        if self._mixed is not None:
            each, plates = self._mixed
            log_prob = each.log_prob(msg["value"])
            self._factors.append(_Factor(log_prob, _dims(log_prob.shape), None, plates))

    def _tied(self, dims: frozenset[int]) -> list[_Factor]:
        """The factors that say how probable some values are; those left out sum to one.

        They are the densities of known latents, and of the discrete ones above these and above
        what is asked for; as far as a chain of shared dimensions leads there.
        """
        known = [f for f in self._factors if f.own is None]
        above = dims.union(*(f.dims for f in known))
        while more := _union(f.dims for f in self._factors if f.own in above) - above:
            above |= more
        rest = [f for f in self._factors if f.own is None or f.own in above]
        tied: list[_Factor] = []
        while found := [f for f in rest if f.dims & dims]:
            tied += found
            rest = [f for f in rest if not f.dims & dims]
            dims |= _union(f.dims for f in found)
        return tied


class Mixed(TorchDistribution):
    r"""A mixture :math:`\sum_c w_c\,p(z|c)` over the dimensions left of all plates.

    Args:
        each: p(z|c), of ``batch_shape (*values, *plates)``.
        log_weights: Log-weights that broadcast with it, up to a constant.
        depth: Number of the plates' dimensions.
    """

    arg_constraints: Any = {}  # noqa: RUF012 - any log-weights

    def __init__(self, each: Any, log_weights: Tensor, depth: int) -> None:
        shape = torch.broadcast_shapes(each.batch_shape, log_weights.shape)
        self.each = each.expand(shape)
        total = log_weights.logsumexp(tuple(range(log_weights.dim() - LEFT)), keepdim=True)
        self.log_weights = (log_weights - total).expand(shape)
        super().__init__(shape[len(shape) - depth :], each.event_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> Any:  # type: ignore[override]
        """That of the components."""
        return self.each.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Mixed":
        """The same distribution with a larger batch shape."""
        batch = torch.Size(batch_shape)
        full = (*self.each.batch_shape[:-LEFT], *(1,) * (LEFT - len(batch)), *batch)
        return Mixed(self.each.expand(full), self.log_weights.expand(full), len(batch))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - as torch's
        """Draws, ``sample_shape + batch_shape + event_shape``."""
        first, batch = tuple(sample_shape), tuple(self.batch_shape)
        with torch.no_grad():
            of_all = self.each.sample(first).reshape(*first, -1, *batch, *self.event_shape)
            logits = self.log_weights.reshape(-1, *batch).movedim(0, -1)
            chosen = torch.distributions.Categorical(logits=logits, validate_args=False)
            index = chosen.sample(first).unsqueeze(len(first))
            index = index.reshape(*index.shape, *(1,) * self.event_dim)
            index = index.expand(*first, 1, *batch, *self.event_shape)
            return of_all.gather(len(first), index).squeeze(len(first))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the mixture, ``(*batch,)``, in nats."""
        joint = self.log_weights + self.each.log_prob(value)
        total = joint.flatten(0, joint.dim() - LEFT - 1).logsumexp(0)
        depth = max(len(self.batch_shape), value.dim() - self.event_dim)
        return total.reshape(total.shape[LEFT - depth :])


def _dims(shape: Iterable[int]) -> frozenset[int]:
    """The dimensions of values, negative, along which a shape extends."""
    sizes = tuple(shape)
    return frozenset(d for d in range(-len(sizes), -LEFT) if sizes[d] > 1)


def _plates(msg: Site) -> frozenset[str]:
    return frozenset(frame.name for frame in msg["cond_indep_stack"] if frame.vectorized)


def _union(sets: Iterable[frozenset[int]]) -> frozenset[int]:
    return frozenset().union(*sets)
