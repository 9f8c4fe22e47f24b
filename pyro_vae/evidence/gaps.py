r"""Where the nats go, datum by datum: what the guide's family loses, and what its network loses.

.. math:: \log p(x) - \mathrm{ELBO}(q) =
          \underbrace{\log p(x) - \mathrm{ELBO}(q^*)}_{\text{approximation gap}} +
          \underbrace{\mathrm{ELBO}(q^*) - \mathrm{ELBO}(q)}_{\text{amortization gap}}

with the best member q* of the guide's family for each datum, found by ``refine``: the first part is
KL(q* || p(z|x)), which a richer family would save, the second what a better encoder would.

The two bounds are estimated from common draws of noise, z = z_0 under the guide and a + s z_0 under
the refined one, so what noise they share cancels in the difference; and where log p(x) is estimated
from the refined guide, in log p(x) - ELBO(q*) too. The errors are those of the differences.

Reference: Cremer, Li and Duvenaud, "Inference suboptimality in variational autoencoders" (2018).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.context import at_rest, device_of, on_device
from pyro_vae.evidence.blocks import Weigher, check_options, data_blocks, of_data
from pyro_vae.evidence.compare import fingerprint
from pyro_vae.evidence.estimate import Estimate, PredictiveEstimate
from pyro_vae.evidence.importance import Sums
from pyro_vae.evidence.nats import Nats, table
from pyro_vae.evidence.particles import Pair
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.data_plate import data_size
from pyro_vae.inference.handlers import Program, latent_sites
from pyro_vae.inference.refine import refine
from pyro_vae.inference.structure import inspect, kind_of

__all__ = ["Gaps", "gaps"]

# Below this many nats a gap on the wrong side of zero is no news.
_NEGLIGIBLE = 0.01


@dataclass(frozen=True, eq=False)
class Gaps:
    """The gap between log p(x) and the bound of a guide, in its two parts, per datum.

    Attributes:
        log_evidence: The estimate of log p(x) that the gaps are measured from.
        elbo: The bound of the guide.
        best_elbo: The bound of the refined guide.
        approximation: log p(x) minus the bound of the refined guide.
        amortization: The bound of the refined guide minus that of the guide.
        gap: Their sum, log p(x) minus the bound of the guide.
        exact: Whether the refined guide is the best of its family, which it is for one site of
            independent normals. Otherwise it is the best that shifts and scales reach: the
            amortization gap is then at least what stands here, the approximation gap at most.
        num_particles: Number of draws K for each bound and datum.
    """

    log_evidence: Estimate
    elbo: Nats
    best_elbo: Nats
    approximation: Nats
    amortization: Nats
    gap: Nats
    exact: bool
    num_particles: int

    def __str__(self) -> str:
        evidence = Nats(self.log_evidence.value, self.log_evidence.standard_error)
        rows = [
            ("log p(x)", evidence),
            ("ELBO of the guide", self.elbo),
            ("gap", self.gap),
            ("  approximation", self.approximation),
            ("  amortization", self.amortization),
        ]
        title = f"nats per datum; {len(self.gap.value)} data, {self.num_particles} particles"
        return "\n".join([table(title, rows), *self._words()])

    def _words(self) -> Iterator[str]:
        """What the numbers mean, and what speaks against them."""
        if self.exact:
            yield (
                "Approximation: what the best diagonal normal of each datum still loses. "
                "Amortization: what the network loses against it."
            )
        else:
            yield (
                "Approximation: what the guide still loses when it is shifted and scaled for each "
                "datum, which need not be the best of its family: at most this is the family's. "
                "Amortization: what that gains, so at least this is the network's."
            )
        if self.log_evidence.bias < -_NEGLIGIBLE:
            yield (
                f"log p(x) is too low by about {-self.log_evidence.bias:.2f}, and so are the gap "
                "and its approximation part: take more particles."
            )
        if _below_zero(self.approximation):
            yield (
                "The approximation gap is below zero, which it can't be: log p(x) is estimated too "
                "low; take more particles, or another estimator."
            )
        if _below_zero(self.amortization):
            yield (
                "The amortization gap is below zero: the refined guide is worse than the guide, so "
                "its optimisation has not arrived; take more steps, or more step_particles."
            )


def gaps(
    model: Program,
    guide: Program,
    *args: Any,
    log_evidence: Estimate | None = None,
    num_particles: int = 500,
    steps: int = 500,
    step_particles: int = 10,
    learning_rate: float = 0.05,
    seed: int = 0,
    data_plate: str | None = None,
    chunk_size: int | None = None,
    compile: Compile = "auto",
) -> Gaps:
    r"""Split log p(x) - ELBO into the approximation gap and the amortization gap, per datum.

    Cost: ``steps * step_particles`` gradients and 2 K evaluations of the decoder per datum.

    Args:
        model: A Pyro model.
        guide: Its guide; its latents are real and have a pathwise gradient (see ``refine``).
        args: What both take; see ``log_weights``.
        log_evidence: An estimate of log p(x) for these data, from any estimator. None estimates it
            by importance weighting with the refined guide, from the K draws of its bound. What it
            is too low by is missing in the approximation gap.
        num_particles: Number of draws K for each bound and datum.
        steps: Gradient steps of the refinement for each datum; see ``refine``. What it falls short
            of the best by is counted as approximation gap: more of them should change nothing.
        step_particles: Draws per datum and step of the refinement, whose noise it averages over.
        learning_rate: Of the refinement, at its first step.
        seed: Seed of all draws; the caller's random state is left alone.
        data_plate: Name of the plate over the data; see ``log_weights``.
        chunk_size: Particles that the model scores at once; see ``log_weights``.
        compile: Compile the refinement and the weights where that pays; see ``log_weights``.

    Returns:
        The gaps, ``(N,)`` each, in nats, with standard errors.

    Raises:
        ValueError: As ``refine`` and ``log_weights``; ``log_evidence`` is of other data; a bound is
            -infinity.

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> found = pv.gaps(model, guide, torch.ones(7, 9), steps=20, num_particles=10)
        >>> parts = found.approximation.value + found.amortization.value
        >>> torch.allclose(found.gap.value, parts), parts.shape
        (True, torch.Size([7]))
    """
    check_options(num_particles, chunk_size, compile=compile)
    if num_particles < 2:
        raise ValueError(
            "num_particles: expected at least 2 for gaps, whose spread is the standard error, got "
            f"{num_particles}."
        )
    digest = fingerprint(args)
    if log_evidence is not None:
        _check_estimate(log_evidence, args)
    args = on_device(args, device_of(model, guide))
    exact = _is_diagonal_normal(model, guide, args)
    refinement: dict[str, Any] = {
        "steps": steps,
        "num_particles": step_particles,
        "learning_rate": learning_rate,
    }
    common: dict[str, Any] = {"seed": seed, "data_plate": data_plate, "compile": compile}
    try:
        refined = refine(model, guide, *args, **refinement, **common)
    except ValueError as error:
        error.add_note(
            "(gaps needs a refined guide. The whole gap holds for any guide that log_evidence "
            "takes: estimate.value - estimate.elbo.)"
        )
        raise
    weigh: dict[str, Any] = {"num_particles": num_particles, "chunk_size": chunk_size, **common}
    both = zip(
        _log_weights(model, guide, args, **weigh),
        _log_weights(*_pair(refined), **weigh),
        strict=True,
    )
    sums: Sums | None = None
    found: dict[str, list[Nats]] = {}
    start = 0
    for own, best in both:
        rows = slice(start, start + own.shape[1])
        start = rows.stop
        if log_evidence is None:
            sums = sums or Sums(data_size(args), own.device)
            sums.add(best, rows)
            log_p, error = best.logsumexp(0) - math.log(num_particles), None
            # The delta method: of the mean of these the draws say how far log_p scatters too.
            log_p = log_p + (best - log_p).exp() - 1
        else:
            log_p = log_evidence.value[rows].to(own)
            error = log_evidence.standard_error[rows]
        parts = {
            "elbo": Nats.of_draws(own),
            "best_elbo": Nats.of_draws(best),
            "approximation": Nats.of_draws(log_p - best, error=error),
            "amortization": Nats.of_draws(best - own),
            "gap": Nats.of_draws(log_p - own, error=error),
        }
        for name, part in parts.items():
            found.setdefault(name, []).append(part)
    return Gaps(
        log_evidence=_estimate(sums, num_particles, digest)
        if log_evidence is None
        else log_evidence,
        exact=exact,
        num_particles=num_particles,
        **{name: _joined(parts) for name, parts in found.items()},
    )


def _log_weights(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    *,
    num_particles: int,
    seed: int,
    data_plate: str | None,
    chunk_size: int | None,
    compile: Compile,
) -> Iterator[Tensor]:
    """The log-weights (K, n) of each block of data, float64.

    The stream of noise is not that of ``log_evidence``, on whose independence errors rely.
    """
    weigher = Weigher(data_size(args), num_particles, chunk_size, compile)
    for index, block in enumerate(data_blocks(args)):
        with at_rest(model, guide):
            pair = Pair(model, guide, block, data_plate)
        stream = ("gaps", seed, index)
        log_w = torch.cat(list(of_data(pair, weigher, num_particles, stream))).double()
        if not log_w.isfinite().all():
            raise ValueError(
                "gaps: the guide draws latents under which some data have p(x|z) = 0, so a bound "
                "is -infinity and there is no gap; log_evidence still holds for such a pair."
            )
        yield log_w


def _pair(refined: tuple[Any, ...]) -> tuple[Program, Program, tuple[Any, ...]]:
    model, guide, *args = refined
    return model, guide, tuple(args)


def _estimate(sums: Sums | None, num_particles: int, digest: str) -> Estimate:
    assert sums is not None
    return sums.estimate(num_particles, digest)


def _joined(parts: list[Nats]) -> Nats:
    return Nats(
        torch.cat([part.value for part in parts]),
        torch.cat([part.standard_error for part in parts]),
    )


def _is_diagonal_normal(model: Program, guide: Program, args: tuple[Any, ...]) -> bool:
    """Whether the guide draws one site of independent normals."""
    with at_rest(model, guide):
        structure = inspect(model, guide, next(data_blocks(args)), {}, sums=True)
    sites = [site["fn"] for _, site in latent_sites(structure.guide_trace)]
    return len(sites) == 1 and kind_of(sites[0]) == "Normal"


def _check_estimate(estimate: Estimate, args: tuple[Any, ...]) -> None:
    if isinstance(estimate, PredictiveEstimate):
        raise TypeError(
            "log_evidence: expected an Estimate of log p(x), got a PredictiveEstimate, which is "
            "averaged over latents that all data share."
        )
    size = data_size(args)
    if len(estimate.value) != size:
        raise ValueError(
            f"log_evidence: expected an estimate of these {size} data, got one of "
            f"{len(estimate.value)}."
        )
    if estimate.data and estimate.data != fingerprint(args):
        raise ValueError(
            "log_evidence: the estimate is of other data, or of the same in another order; make it "
            "of the tensors that are handed over here."
        )
    if not (estimate.value.isfinite() & estimate.standard_error.isfinite()).all():
        raise ValueError(
            "log_evidence: expected finite values with finite errors for all data; one particle "
            "has no standard error, and a datum of p(x) = 0 no gap."
        )


def _below_zero(part: Nats) -> bool:
    return part.mean < -max(_NEGLIGIBLE, 2 * part.mean_standard_error)
