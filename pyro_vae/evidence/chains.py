"""Estimates that are made by chains, and how they are put together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_vae.evidence.estimate import Estimate
from pyro_vae.evidence.importance import Sums

__all__ = ["ChainEstimate", "Tally", "Walk"]

_COLUMNS = ("value", "standard_error", "ess", "elbo")
# A share of divergent trajectories that is worth a word.
_DIVERGENT = 0.01


@dataclass(frozen=True, eq=False)
class ChainEstimate(Estimate):
    """An estimate of log p(x) per datum by chains of Hamiltonian moves.

    The chains of a datum are independent, so the errors are those of an average of K weights, as in
    any ``Estimate``.

    Attributes:
        num_particles: Number of chains K per datum.
        elbo: The mean of the chains' log-weights, a bound too: below log p(x) on average where
            ``value`` is, and above it where that is.
        acceptance: The mean acceptance of the moves of each datum, ``(N,)``.
        divergent: The share of trajectories of each datum that diverged, ``(N,)``.
        num_moves: Number of moves of a chain.
        gradients: Evaluations of the densities with their gradients, over all data.
        sign: 1 where ``value`` is below log p(x) on average, -1 where it is above.
    """

    acceptance: Tensor = field(kw_only=True)
    divergent: Tensor = field(kw_only=True)
    num_moves: int = field(kw_only=True)
    gradients: int = field(kw_only=True)
    sign: int = field(default=1, kw_only=True)

    @property
    def bias(self) -> float:
        """About how far the mean lies above the truth, below it where negative; see ``Estimate``.

        An average of reciprocal weights is that of 1 / p(x): its logarithm is too low too, and so
        what stands here is too high.
        """
        return self.sign * super().bias

    def _remedy(self, k: Tensor) -> str:
        if self.num_particles == 1:
            return "One chain has no error bar: give more."
        said = "Few of the chains carry the weight: take more temperatures, then more chains."
        if self.divergent.max() > _DIVERGENT:
            said += " Trajectories diverge: take more leapfrog steps, or ask for more acceptance."
        return said

    def _drawn(self) -> str:
        text = f"{self.num_particles} chains of {self.num_moves} moves"
        if self.num_moves:
            text += f", acceptance {self.acceptance.median().item():.2f}"
        diverged = self.divergent.mean().item()
        return text + (f", {diverged:.2%} of the moves divergent" if diverged else "")


@dataclass(frozen=True)
class Walk:
    """What chains brought back.

    Attributes:
        log_w: Their log-weights ``(chains, n)``, float64.
        acceptance: The mean acceptance of each datum, ``(n,)``; NaN where nothing moved.
        divergent: The number of divergent trajectories of each datum, ``(n,)``.
    """

    log_w: Tensor
    acceptance: Tensor
    divergent: Tensor


class Tally:
    """Puts walks together, block of data by block.

    Args:
        num_chains: Number of chains of each datum.
        sign: -1 where the reciprocals of the weights are averaged, of posterior draws.
    """

    def __init__(self, num_chains: int, sign: int = 1) -> None:
        self.num_chains = num_chains
        self.sign = sign
        self._parts: list[Tensor] = []

    def walked(self, walks: Sequence[Walk]) -> None:
        """Add all walks of one block of data.

        Raises:
            ValueError: A weight is NaN or infinite.
        """
        self.add(self.columns(walks))

    def columns(self, walks: Sequence[Walk]) -> Tensor:
        """What all walks of one block of data come to, ``(6, n)``, float64, on the CPU.

        Raises:
            ValueError: A weight is NaN or infinite.
        """
        log_w = self.sign * torch.cat([walk.log_w for walk in walks])
        bad = ~(log_w < math.inf)
        if bad.any():
            raise ValueError(
                f"{int(bad.any(0).sum())} of {log_w.shape[1]} data of a block have a chain whose "
                "weight is NaN or infinite: a density of model or guide is not finite where the "
                "chain was. log_weights says at which site."
            )
        sums = Sums(log_w.shape[1], log_w.device)
        sums.add(log_w, slice(None))
        part = sums.estimate(self.num_chains, "")
        chains = torch.tensor([len(walk.log_w) for walk in walks], dtype=torch.float64)
        share = (chains / chains.sum()).to(log_w.device)
        acceptance = share @ torch.stack([walk.acceptance for walk in walks])
        divergent = torch.stack([walk.divergent for walk in walks]).sum(0)
        return torch.stack(
            [*(getattr(part, name) for name in _COLUMNS), acceptance.cpu(), divergent.cpu()]
        )

    def add(self, columns: Tensor) -> None:
        """Add a block of data by its ``columns``."""
        self._parts.append(columns)

    def estimate(self, data: str, kind: str, *, moves: int, gradients: int) -> ChainEstimate:
        """The estimate of all data.

        Args:
            data: The fingerprint of the data.
            kind: The estimator in words.
            moves: Number of moves of a chain.
            gradients: Evaluations of gradients, over all data.
        """
        *found, acceptance, divergent = torch.cat(self._parts, 1)
        columns = dict(zip(_COLUMNS, found, strict=True))
        for name in ("value", "elbo"):
            columns[name] = self.sign * columns[name]
        return ChainEstimate(
            **columns,
            num_particles=self.num_chains,
            data=data,
            kind=kind,
            acceptance=acceptance,
            divergent=divergent / max(moves * self.num_chains, 1),
            num_moves=moves,
            gradients=gradients,
            sign=self.sign,
        )
