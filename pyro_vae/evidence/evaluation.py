r"""The evidence of a data set: weigh all data, and anneal a sample of those where weighing failed.

Importance weighting is cheap and says itself for which data it is not to be believed: U of N, say.
Annealing all of them may be too dear. A random sample of m of them tells what they lack on average,

.. math:: \overline{\log p} \approx \frac1N \sum_{n=1}^N \ell_n
          + \frac UN \cdot \frac1m \sum_{j=1}^m (a_j - \ell_j),

with the values :math:`\ell` of weighting and :math:`a` of annealing. The correction is right
whatever weighting missed. Its error is that of the sample, which vanishes with m = U, and that of
annealing; the errors that weighting claims enter for the trusted data alone.

References: Neal, "Annealed importance sampling" (2001); Cochran, "Sampling techniques" (1977), on
difference estimators.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evidence.annealed import ais
from pyro_vae.evidence.chains import ChainEstimate
from pyro_vae.evidence.estimate import Estimate
from pyro_vae.evidence.importance import log_evidence
from pyro_vae.evidence.path import check_plan
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.data_plate import data_size
from pyro_vae.inference.handlers import Program

__all__ = ["Evaluation", "evaluate"]

# A gradient is a pass through the decoder and one back, which costs two.
PASSES = 3


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The evidence of a data set: what weighting found, and what annealing adds to it.

    Attributes:
        weighted: Importance weighting of all data.
        rows: Which data were annealed, ``(m,)``: a random sample of the untrusted ones.
        annealed: Their annealing, None where nothing was annealed.
        wanted: Number of data that weighting can't be trusted for, U.
        budget_for_all: The budget that would have annealed all of them.
    """

    weighted: Estimate
    rows: Tensor
    annealed: ChainEstimate | None
    wanted: int
    budget_for_all: float

    @property
    def value(self) -> Tensor:
        """The best estimate of each datum, ``(N,)``, in nats: annealed where it was."""
        value = self.weighted.value.clone()
        if self.annealed is not None:
            value[self.rows] = self.annealed.value
        return value

    @property
    def missing(self) -> float:
        """What weighting lacks for each untrusted datum, on average, in nats; 0 if unknown."""
        return 0.0 if self.annealed is None else self._lacks.mean().item()

    @property
    def mean(self) -> float:
        """The mean over the data, nats per datum."""
        return self.weighted.mean + self.wanted / self._size * self.missing

    @property
    def mean_standard_error(self) -> float:
        """The estimators' standard error of the mean, for these data.

        Of the untrusted data that no annealing stands for it holds the error that they claim.
        """
        claimed = self.weighted.standard_error.square()
        if self.annealed is None:
            return claimed.sum().sqrt().item() / self._size
        kept = claimed[self.weighted.trusted].sum().item()
        m, wanted = len(self.rows), self.wanted
        noise = self.annealed.standard_error.square().mean().item()
        unseen = (1 - m / wanted) * self._lacks.var().item() / m if m < wanted else 0.0
        return math.sqrt(kept + wanted**2 * (unseen + noise / wanted)) / self._size

    @property
    def sampling_error(self) -> float:
        """The standard error of the mean as an estimate for new data; NaN for one datum."""
        if self._size == 1:
            return math.nan
        spread = self.weighted.value.std().item() / self._size**0.5
        return math.hypot(spread, self.mean_standard_error)

    @property
    def advice(self) -> str:
        """What was done about the data that weighting can't be trusted for, in words."""
        if self.wanted == 0:
            return self.weighted.advice
        said = f"{self.wanted} of {self._size} data can't be trusted to weighting"
        if self.annealed is None:
            return (
                f"{said}, and the budget is too small to anneal any: their part of the mean is "
                f"too low by an unknown amount. budget={self.budget_for_all:.2g} anneals all."
            )
        did = f"{said}; {len(self.rows)} of them were annealed"
        more = (
            f" (all with budget={self.budget_for_all:.2g})" if len(self.rows) < self.wanted else ""
        )
        return f"{did}{more}. {self.annealed.advice.replace('data', 'annealed data', 1)}"

    def to_dict(self) -> dict[str, Any]:
        """Its figures, for a JSON file; every nat per datum."""
        return {
            "log_evidence": self.mean,
            "mean_standard_error": self.mean_standard_error,
            "sampling_error": self.sampling_error,
            "elbo": self.weighted.elbo.mean().item(),
            "num_data": self._size,
            "weighted": self.weighted.mean,
            "num_particles": self.weighted.num_particles,
            "untrusted": self.wanted,
            "annealed": len(self.rows),
            "missing": self.missing,
            "num_chains": 0 if self.annealed is None else self.annealed.num_particles,
            "advice": self.advice,
            "data": self.weighted.data,
        }

    def __str__(self) -> str:
        lines = [
            f"log p(x)   {self.mean:.3f} nats per datum, +- {self.mean_standard_error:.3f} "
            f"(estimator) +- {self.sampling_error:.2f} (test set)",
            f"weighting  {self.weighted}",
        ]
        if self.annealed is not None:
            lines.append(
                f"annealing  {self.missing:+.3f} nats for each of {len(self.rows)} data: "
                f"{self.annealed}"
            )
        return "\n".join([*lines, self.advice])

    @property
    def _size(self) -> int:
        return len(self.weighted.value)

    @property
    def _lacks(self) -> Tensor:
        assert self.annealed is not None
        return self.annealed.value - self.weighted.value[self.rows]


def evaluate(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 5000,
    budget: float = 1.0,
    num_chains: int = 16,
    temperatures: int | Tensor = 1000,
    leapfrog_steps: int = 10,
    seed: int = 0,
    data_plate: str | None = None,
    compile: Compile = "auto",
) -> Evaluation:
    r"""The evidence of a data set, with an error bar that can be believed.

    All data are weighed; of those that weighting says itself not to be trusted for, as many are
    annealed as the budget bears, drawn at random, and what they gain corrects the mean.

    Args:
        model: A Pyro model; see ``ais`` for what can be annealed.
        guide: Its guide.
        args: What both take; see ``log_weights``.
        num_particles: Number of importance weights K per datum.
        budget: What annealing may cost, in units of what weighting costs, N K passes through the
            decoder; a gradient counts three. 0 anneals nothing.
        num_chains: Number of annealed chains per datum.
        temperatures: Number of steps of each, or a schedule; see ``ais``.
        leapfrog_steps: Leapfrog steps of each move.
        seed: Seed of all noise; the caller's random state is left alone.
        data_plate: Name of the plate over the data; see ``log_weights``.
        compile: Compute by compiled kernels; see ``log_weights``.

    Returns:
        The evaluation: ``mean`` with its errors in nats per datum, ``value`` ``(N,)``, and
        ``advice`` in words.

    Raises:
        ValueError: As ``log_evidence``, and as ``ais`` where something is annealed; the budget is
            negative.

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> found = pv.evaluate(model, guide, torch.ones(7, 9), num_particles=500)
        >>> found.value.shape, found.mean < 0
        (torch.Size([7]), True)
    """
    if not budget >= 0:
        raise ValueError(f"budget: expected a number that is not negative, got {budget}.")
    plan = check_plan(temperatures, leapfrog_steps, 0.5, seed)
    weighted = log_evidence(
        model,
        guide,
        *args,
        num_particles=num_particles,
        seed=seed,
        data_plate=data_plate,
        compile=compile,
    )
    size = data_size(args)
    untrusted = (~weighted.trusted).nonzero().squeeze(1)
    price = (
        PASSES * plan.gradients(1, num_chains, pilot=min(num_chains, 16)) / (size * num_particles)
    )
    count = min(len(untrusted), math.floor(budget / price + 1e-9))
    annealed = None
    if count < min(2, len(untrusted)):  # one of several has no spread, and so no error
        count = 0
    order = torch.randperm(len(untrusted), generator=torch.Generator().manual_seed(seed))
    rows = untrusted[order[:count]].sort().values
    if count:
        chosen = (
            a[rows.to(a.device)] if isinstance(a, Tensor) and a.dim() > 0 and len(a) == size else a
            for a in args
        )
        annealed = ais(
            model,
            guide,
            *chosen,
            num_chains=num_chains,
            temperatures=temperatures,
            leapfrog_steps=leapfrog_steps,
            seed=seed,
            data_plate=data_plate,
            compile=compile,
        )
    return Evaluation(weighted, rows, annealed, len(untrusted), len(untrusted) * price)
