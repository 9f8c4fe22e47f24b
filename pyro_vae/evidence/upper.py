r"""An upper bound on log p(x) of held-out data, from the higher moments of importance weights.

.. math:: \mathrm{CUBO}_n = \frac1n \log \mathbb E_q[w^n] \;\ge\; \log \mathbb E_q[w] = \log p(x),
          \qquad n > 1

The bound holds for the expectation. What can be computed is an average over K particles, and its
logarithm is too *low* on average: a noisy estimate of an upper bound, which lies below the truth
where large weights are rare and none was drawn. It is only worth something where the average of
:math:`w^n` has settled, and the estimate says for which data it has not.

Reference: Dieng, Tran, Ranganath, Paisley and Blei, "Variational inference via chi upper bound
minimization" (2017).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evidence.blocks import blocks, check_options
from pyro_vae.evidence.compare import fingerprint
from pyro_vae.evidence.estimate import Estimate
from pyro_vae.evidence.importance import Sums
from pyro_vae.evidence.pareto import Tail
from pyro_vae.evidence.reach import out_of_reach
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.data_plate import data_size
from pyro_vae.inference.handlers import Program

__all__ = ["UpperBound", "upper_bound"]

# From this shape on the variance of an average is infinite, and its error bar means nothing.
HIGHEST_K = 0.5


@dataclass(frozen=True, eq=False)
class UpperBound(Estimate):
    r"""Estimates of an upper bound on log p(x) per datum, in nats, each too low on average.

    Attributes:
        value: Estimates of :math:`\mathrm{CUBO}_n`, ``(N,)``, float64.
        standard_error: Their standard errors by the delta method, ``(N,)``; ``interval`` is of the
            bound too, not of log p(x).
        ess: Effective number of particles in the average of :math:`w^n`,
            :math:`(\sum w^n)^2 / \sum w^{2n}`, ``(N,)``.
        pareto_k: The shape of the tail of :math:`w^n`, ``(N,)``, n times that of the weights. From
            1/2 on the variance of the average is infinite, from 1 on the bound itself.
        order: The order n.
        lower: The importance-weighted estimate of log p(x) from the same particles, ``(N,)``. The
            value is never below it, whatever the truth: that it is above proves nothing.

    Example:
        >>> columns = torch.tensor([[-0.9, -2.9], [0.1, 0.1], [50.0, 50.0], [-2.0, -4.0]]).double()
        >>> rest = {"pareto_k": torch.tensor([0.1, 0.9]), "lower": columns[0] - 0.2, "order": 2.0}
        >>> bound = pv.UpperBound(*columns, num_particles=100, **rest)
        >>> bound.trusted
        tensor([ True, False])
    """

    kind: str = "chi bound"
    order: float = field(kw_only=True)
    lower: Tensor = field(kw_only=True)

    @property
    def threshold(self) -> float:
        """The Pareto k of w^n up to which its average can be trusted: one of a finite variance."""
        return min(super().threshold, HIGHEST_K)

    @property
    def trusted(self) -> Tensor:
        """For which data the average of w^n has settled, ``(N,)``, bool: as for any estimate.

        Without a tail to look at, with K < 21, it is none. What no particle has met is in no
        diagnostic: a guide that misses a part of the posterior is trusted.
        """
        return super().trusted & self._has_tail

    @property
    def bias(self) -> float:
        """About how far the mean lies below the bound for these data: -n E[standard_error^2] / 2.

        The logarithm of an average is too low (Jensen), by this much to second order.
        """
        return -self.order * self.standard_error.square().mean().item() / 2

    @property
    def advice(self) -> str:
        """What to make of it, in words."""
        size, count = len(self.value), int((~self.trusted).sum())
        power = f"w^{self.order:g}"
        if self.caveat:
            return f"No upper bound for any of {size} data: {self.caveat}"
        if not count:
            return (
                f"The average of {power} has settled for all {size} data: upper bounds, as far as "
                "the particles have met what there is to meet."
            )
        return (
            f"No upper bound for {count} of {size} data: the average of {power} has not settled "
            f"(lowest ESS {self.ess.min().item():.1f}), and what is missing from it makes the "
            "value too low. Use a guide that is wider than the posterior, an order nearer to 1, or "
            "more particles; or bound simulated data from both sides."
        )

    def __str__(self) -> str:
        return (
            f"{self.mean:.3f} nats per datum as an upper bound (order {self.order:g}), +- "
            f"{self.mean_standard_error:.3f} (estimator), bias about {self.bias:.3f}; lower "
            f"estimate of the same {self.num_particles} particles {self.lower.mean().item():.3f}; "
            f"{len(self.value)} data. {self.advice}"
        )


def upper_bound(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int,
    order: float = 2.0,
    seed: int = 0,
    data_plate: str | None = None,
    chunk_size: int | None = None,
    compile: Compile = "auto",
) -> UpperBound:
    r"""A noisy upper bound on log p(x) per datum: the chi bound :math:`\mathrm{CUBO}_n`.

    .. math:: \hat U = \frac1n \log \frac1K \sum_{k=1}^K w_k^n, \qquad
              \mathrm{se} = \frac1n \Big(\frac{K}{K-1}
              \Big(\frac{\sum_k w_k^{2n}}{(\sum_k w_k^n)^2} - \frac1K\Big)\Big)^{1/2}

    It is tight where the guide is the posterior, and its slack grows with n. It asks much more of
    the guide than ``log_evidence`` does: :math:`w^n` needs a finite mean, and for an error bar a
    finite variance. So give it a guide that is wider than the posterior, look at ``trusted``, and
    read it beside ``log_evidence`` and never alone.

    Particles are those of ``log_evidence`` under the same seed, and so is the cost.

    Args:
        model: A Pyro model.
        guide: Its guide, with latent sites of the same names.
        args: What both take; see ``log_weights``.
        num_particles: Number of weights K per datum.
        order: The order n, above 1: nearer to 1 the bound is tighter and its average settles
            sooner, at 1 it is no upper bound but ``log_evidence``.
        seed: Seed of the guide's draws; the caller's random state is left alone.
        data_plate: Name of the plate over the data; see ``log_weights``.
        chunk_size: Particles that the model scores at once; see ``log_weights``.
        compile: Compute the weights by compiled kernels; see ``log_weights``.

    Returns:
        The bound, with ``value``, ``standard_error``, ``ess``, ``lower`` and ``pareto_k`` of shape
        ``(N,)``, in nats, on the CPU.

    Raises:
        ValueError: The order is not above 1; or as ``log_weights``.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.75))  # the posterior's scale is 0.71
        >>> x = torch.linspace(-2, 2, 5)
        >>> bound = pv.upper_bound(model, guide, x, num_particles=1000)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(x)
        >>> bool(bound.trusted.all()), bool((bound.value > exact - 0.01).all())
        (True, True)
    """
    if not 1 < order < math.inf:
        raise ValueError(
            f"upper_bound: expected an order above 1, such as 2, got {order}; the average of w "
            "itself is log_evidence, from below."
        )
    check_options(num_particles, chunk_size, compile=compile)
    of_data = blocks(
        model,
        guide,
        args,
        num_particles,
        seed=seed,
        data_plate=data_plate,
        chunk_size=chunk_size,
        compile=compile,
        autocast=None,
    )
    plain: Sums | None = None
    powers: Sums | None = None
    tail = Tail(num_particles)
    shapes = []
    start = 0
    for of_particles in of_data:
        width = 0
        for log_w in of_particles:
            width = log_w.shape[1]
            if plain is None or powers is None:
                plain, powers = (Sums(data_size(args), log_w.device) for _ in range(2))
            log_power = order * log_w.double()
            plain.add(log_w, slice(start, start + width))
            powers.add(log_power, slice(start, start + width))
            tail.add(order * log_w)  # in its own precision, which says what is rounding
        shapes.append(tail.finish()[0].cpu())
        start += width
    assert plain is not None
    assert powers is not None
    of_weights = plain.estimate(num_particles, fingerprint(args))
    of_powers = powers.estimate(num_particles, "")
    return UpperBound(
        value=of_powers.value / order,
        standard_error=of_powers.standard_error / order,
        ess=of_powers.ess,
        elbo=of_weights.elbo,
        num_particles=num_particles,
        data=of_weights.data,
        order=float(order),
        lower=of_weights.value,
        pareto_k=torch.cat(shapes),
        caveat=out_of_reach(model, guide, args, data_plate),
    )
