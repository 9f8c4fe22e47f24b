"""What an evaluation found: weighting of all data, annealing of some, and what both come to."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evidence.chains import ChainEstimate
from pyro_vae.evidence.estimate import Estimate

__all__ = ["FEWEST_ANNEALED", "Evaluation"]

# A sample of fewer data says too little of its own spread to correct a mean by.
FEWEST_ANNEALED = 10


@dataclass(frozen=True, eq=False)
class Evaluation(Estimate):
    r"""The evidence of a data set: what weighting found, and what annealing adds to it.

    An ``Estimate``, whose ``value`` is the annealed one where there is one, the weighted one where
    that is trusted or nothing is known better, and for the other untrusted data the weighted one
    plus what it lacks on average. So ``mean`` is the corrected mean.

    Attributes:
        weighted: Importance weighting of all data.
        rows: Which data were annealed, ``(m,)``: a random sample of those that weighting can't be
            trusted for, U of N.
        annealed: Their annealing, None where nothing was annealed.
        budget_for_all: The budget that would have annealed all U of them.
        refused: Why none of them could be annealed, in words; empty where that is not so.

    Example:
        >>> import dataclasses
        >>> columns = torch.tensor([[-1.0, -3.0], [0.3, 0.4], [9.0, 8.0], [-2.0, -4.0]]).double()
        >>> weighted = pv.Estimate(*columns, num_particles=10)
        >>> none = torch.tensor([], dtype=torch.long)
        >>> found = pv.Evaluation.of(weighted, none, None, budget_for_all=0.0)
        >>> found.mean, found.num_untrusted
        (-2.0, 0)
    """

    weighted: Estimate = field(kw_only=True)
    rows: Tensor = field(kw_only=True)
    annealed: ChainEstimate | None = field(kw_only=True)
    budget_for_all: float = field(kw_only=True)
    refused: str = field(kw_only=True, default="")

    @classmethod
    def of(
        cls,
        weighted: Estimate,
        rows: Tensor,
        annealed: ChainEstimate | None,
        *,
        budget_for_all: float,
        refused: str = "",
        kind: str | None = None,
    ) -> "Evaluation":
        """Put both estimates together; for the arguments see the attributes."""
        value, error = weighted.value.clone(), weighted.standard_error.clone()
        if annealed is not None:
            lacks = annealed.value - weighted.value[rows]
            others = ~weighted.trusted
            value[others] += lacks.mean()
            if len(rows) > 1:
                error[others] = lacks.std()
            value[rows], error[rows] = annealed.value, annealed.standard_error
        return cls(
            value,
            error,
            weighted.ess,
            weighted.elbo,
            weighted.num_particles,
            data=weighted.data,
            pareto_k=weighted.pareto_k,
            kind=weighted.kind if kind is None else kind,
            weighted=weighted,
            rows=rows,
            annealed=annealed,
            budget_for_all=budget_for_all,
            refused=refused,
        )

    def plus(self, constant: float) -> "Evaluation":
        """The same of other units of the data: a constant added to every log-density.

        Args:
            constant: Such as ``data.log_jacobian``, in nats.
        """

        def moved(estimate: Estimate) -> Any:
            return replace(estimate, value=estimate.value + constant, elbo=estimate.elbo + constant)

        annealed = None if self.annealed is None else moved(self.annealed)
        return self.of(
            moved(self.weighted),
            self.rows,
            annealed,
            budget_for_all=self.budget_for_all,
            refused=self.refused,
            kind=self.kind,
        )

    @property
    def num_untrusted(self) -> int:
        """Number of data U that weighting can't be trusted for."""
        return int((~self.weighted.trusted).sum())

    @property
    def gain(self) -> Tensor:
        """What annealing finds more than weighting, for each datum of ``rows``, ``(m,)``, nats."""
        if self.annealed is None:
            return torch.zeros(0, dtype=torch.float64)
        return self.annealed.value - self.weighted.value[self.rows]

    @property
    def missing(self) -> float:
        """What weighting lacks for each untrusted datum, on average, in nats; 0 if unknown."""
        return 0.0 if self.annealed is None else self.gain.mean().item()

    @property
    def mean_standard_error(self) -> float:
        """The estimators' standard error of the mean, for these data.

        Of the untrusted data that no annealing stands for it holds the error that they claim.
        """
        if self.annealed is None:
            return self.weighted.mean_standard_error
        size, wanted = len(self.value), self.num_untrusted
        kept = self.weighted.standard_error.square()[self.weighted.trusted].sum().item()
        noise = wanted * self.annealed.standard_error.square().mean().item()
        return math.hypot(math.sqrt(kept + noise) / size, self.shared_error)

    @property
    def shared_error(self) -> float:
        """The standard error that a sample of annealed data leaves in the mean.

        It is common to all data, so a paired comparison adds it.
        """
        m, wanted = len(self.rows), self.num_untrusted
        if self.annealed is None or m >= wanted:
            return 0.0
        unseen = (1 - m / wanted) * self.gain.var().item() / m
        return wanted * math.sqrt(unseen) / len(self.value)

    @property
    def bias(self) -> float:
        """About how far the mean lies below the truth for these data; see ``Estimate``."""
        if self.annealed is None:
            return self.weighted.bias
        size, wanted = len(self.value), self.num_untrusted
        squares = self.weighted.standard_error.square()[self.weighted.trusted].sum().item()
        squares += wanted * self.annealed.standard_error.square().mean().item()
        return -squares / (2 * size)

    @property
    def trusted(self) -> Tensor:
        """For which data the value and its error can be believed, ``(N,)``, bool.

        Those that only the average of others has corrected are not among them; the mean is right
        with them.
        """
        trusted = self.weighted.trusted
        if self.annealed is not None:
            trusted = trusted.clone()
            trusted[self.rows] = self.annealed.trusted
        return trusted

    @property
    def _freedom(self) -> Tensor:
        freedom = torch.full_like(self.value, self.num_particles - 1)
        if self.annealed is not None:
            freedom[~self.weighted.trusted] = len(self.rows) - 1
            freedom[self.rows] = self.annealed.num_particles - 1
        return freedom

    @property
    def advice(self) -> str:
        """What was done about the data that weighting can't be trusted for, in words."""
        wanted, size = self.num_untrusted, len(self.value)
        without = (~self.weighted.value.isfinite()).nonzero().squeeze(1).tolist()
        if without:
            return (
                f"{len(without)} of {size} data, {', '.join(map(str, without[:5]))} first, have no "
                "weight above zero, and the mean is infinite with them: the model or the guide "
                "can't explain them. Anneal those (pv.ais), or look at the data."
            )
        nothing_to_do = self.weighted.caveat and self.annealed is None and not self.refused
        if wanted == 0 or nothing_to_do:
            return self.weighted.advice
        said = f"{wanted} of {size} data can't be trusted to weighting"
        low = "their part of the mean is too low by an unknown amount"
        if self.refused:
            return f"{said}, and annealing can't be had: {low}. {self.refused}"
        if self.annealed is None:
            enough = self.budget_for_all * FEWEST_ANNEALED / wanted
            some = f"budget={_rounded_up(enough)} anneals {FEWEST_ANNEALED}, "
            some = some if wanted > FEWEST_ANNEALED else ""
            return (
                f"{said}, and the budget is too small to anneal a sample of them: {low}. "
                f"{some}budget={_rounded_up(self.budget_for_all)} anneals all."
            )
        did = f"{said}; {len(self.rows)} of them were annealed"
        if len(self.rows) < wanted:
            did += (
                " and stand for the others in the mean "
                f"(budget={_rounded_up(self.budget_for_all)} anneals all)"
            )
        return f"{did}. Annealed: {_lower(self.annealed._advice(self.rows))}"

    def to_dict(self) -> dict[str, Any]:
        """Its figures, for a JSON file; every nat per datum."""
        annealed = self.annealed
        return {
            "log_evidence": self.mean,
            "mean_standard_error": self.mean_standard_error,
            "sampling_error": self.sampling_error,
            "shared_error": self.shared_error,
            "bias": self.bias,
            "elbo": self.elbo.mean().item(),
            "num_data": len(self.value),
            "kind": self.kind,
            "weighted": self.weighted.mean,
            "weighted_error": self.weighted.mean_standard_error,
            "num_particles": self.num_particles,
            "ess_median": self.ess.median().item(),
            "ess_min": self.ess.min().item(),
            "num_untrusted": self.num_untrusted,
            "untrusted": self.untrusted,
            "num_annealed": len(self.rows),
            "missing": self.missing,
            "missing_error": self._missing_error,
            "num_chains": 0 if annealed is None else annealed.num_particles,
            "num_moves": 0 if annealed is None else annealed.num_moves,
            "gradients": 0 if annealed is None else annealed.gradients,
            "acceptance": None if annealed is None else annealed.acceptance.median().item(),
            "budget_for_all": self.budget_for_all,
            "advice": self.advice,
            "data": self.data,
        }

    def table(self, name: str = "log p(x)") -> str:
        """The estimate and what it was put together from, line by line, in nats per datum.

        Args:
            name: What the values are; "score" where they are no log-probability.
        """
        w = self.weighted
        bound = "ELBO" if name == "log p(x)" else "bound"
        lines = [
            ["", "nats per datum", "+- estimator", "+- test set", ""],
            [
                name,
                f"{self.mean:.3f}",
                f"{self.mean_standard_error:.3f}",
                f"{self.sampling_error:.2f}",
                f"{len(self.value)} data, bias about {self.bias:.3f}",
            ],
            [
                "weighting",
                f"{w.mean:.3f}",
                f"{w.mean_standard_error:.3f}",
                f"{w.sampling_error:.2f}",
                f"{w.num_particles} particles each, median ESS {w.ess.median().item():.1f}, lowest "
                f"{w.ess.min().item():.1f}; {self.num_untrusted} data not to be trusted",
            ],
        ]
        if self.annealed is not None:
            lines.append(
                [
                    "annealing",
                    f"{self.missing:+.3f}",
                    f"{self._missing_error:.3f}",
                    "",
                    f"more on {len(self.rows)} of those; {self.annealed._drawn()}",
                ]
            )
        lines.append([bound, f"{self.elbo.mean().item():.3f}", "", "", ""])
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if 0 < i < 4 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def __str__(self) -> str:
        return f"{self.table()}\n{self.advice}"

    @property
    def _missing_error(self) -> float:
        """The standard error of ``missing``, for the untrusted data there are; NaN for one."""
        m, wanted = len(self.rows), self.num_untrusted
        if self.annealed is None or m < min(2, wanted):
            return math.nan
        # The gains of a sample scatter by the noise too, so it is counted here for all U alone.
        noise = self.annealed.standard_error.square().mean().item() / wanted
        unseen = (1 - m / wanted) * self.gain.var().item() / m if m < wanted else 0.0
        return math.sqrt(noise + unseen)


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _rounded_up(number: float) -> str:
    """A number that is not negative to two digits, and no less than it is."""
    if number == 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return f"{math.ceil(number / unit - 1e-6) * unit:g}"
