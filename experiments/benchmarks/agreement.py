"""Contestants that are timed against one another have to compute the same thing."""

from collections.abc import Mapping, Sequence
from statistics import fmean, variance
from typing import Any

from experiments.benchmarks.contestant import REFERENCE

__all__ = ["MOST_STANDARD_ERRORS", "TOLERANCES", "check"]

MOST_STANDARD_ERRORS = 5.0

# Number of training steps, and the relative difference that is allowed after them. Trajectories of
# other noise part: the losses of one contestant under several seeds spread by up to 0.1 % after 5
# or 20 steps, and by up to 2 % after 50, when the latents of the larger networks come into use.
TOLERANCES = {5: 0.005, 20: 0.01}


def check(
    losses_by_contestant: Mapping[str, Sequence[float]],
    *,
    steps: int = 0,
    reference: str = REFERENCE,
) -> dict[str, dict[str, Any]]:
    """Compare the mean losses of all contestants with the reference's.

    Args:
        losses_by_contestant: Independent estimates of the loss.
        steps: Number of training steps that each took before, a key of ``TOLERANCES``; 0 allows
            five standard errors of the difference.
        reference: Whose losses are right.

    Returns:
        For each contestant the mean, its difference from the reference's, that in standard errors
        of the difference, and relative to the reference's mean.

    Raises:
        SystemExit: A contestant disagrees; the message names it.
    """
    right = losses_by_contestant[reference]
    stage = f"after {steps} steps" if steps else "at the initial weights"
    report: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    for name, losses in losses_by_contestant.items():
        if name == reference:
            report[name] = {"mean": fmean(losses)}
            continue
        difference = fmean(losses) - fmean(right)
        error = (variance(losses) / len(losses) + variance(right) / len(right)) ** 0.5
        # A contestant whose noise is not fresh has no spread, and does not agree.
        deviation = difference / error if variance(losses) > 0 else float("inf")
        relative = difference / abs(fmean(right))
        report[name] = {
            "mean": fmean(losses),
            "difference": difference,
            "standard_errors": deviation,
            "relative": relative,
        }
        if steps:
            agrees = abs(relative) <= TOLERANCES[steps] and deviation != float("inf")
            limit = f"{TOLERANCES[steps]:.1%}"
        else:
            agrees = abs(deviation) <= MOST_STANDARD_ERRORS
            limit = f"{MOST_STANDARD_ERRORS:g} standard errors"
        if not agrees:  # also where something is NaN
            wrong.append(
                f"{name}: mean loss {fmean(losses):.3f}, expected {fmean(right):.3f} as "
                f"{reference} has it: {deviation:+.1f} standard errors, {relative:+.2%}, and "
                f"{limit} are allowed."
            )
    if wrong:
        raise SystemExit(f"The contestants disagree {stage}.\n" + "\n".join(wrong))
    return report
