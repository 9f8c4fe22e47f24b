"""From a loss object, Pyro's or this library's, to the objective that it selects."""

import copy
from typing import Any

from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from pyro_vae.inference.enumerated import Enumerated
from pyro_vae.inference.objectives import ELBO, Foreign, Objective

__all__ = ["objective_of"]


def objective_of(loss: Any) -> Objective:
    """The objective that a loss object of Pyro's selects.

    Args:
        loss: ``Trace_ELBO()`` for Monte Carlo of all terms, ``TraceMeanField_ELBO()`` for the
            analytic KL, ``TraceEnum_ELBO()`` for exact sums over marked discrete sites, any other
            loss of Pyro's, or a function of
            ``(model, guide, *args, **kwargs)`` that returns a 0-d tensor to minimise; or an
            ``Objective``, such as ``ImportanceWeighted()``.

    Returns:
        The objective, for one pair.

    Raises:
        TypeError: ``loss`` is none of these.
    """
    if type(loss) in (Trace_ELBO, TraceMeanField_ELBO):
        return ELBO(
            analytic_kl=type(loss) is TraceMeanField_ELBO,
            num_particles=loss.num_particles,
            vectorize_particles=loss.vectorize_particles,
            pyro_loss=loss,
        )
    if type(loss) is TraceEnum_ELBO:
        return Enumerated(loss)
    if not isinstance(loss, type) and hasattr(loss, "prepare") and hasattr(loss, "terms"):
        return copy.copy(loss)
    if not isinstance(loss, type) and (hasattr(loss, "loss_and_grads") or callable(loss)):
        return Foreign(loss)
    raise TypeError(
        f"loss: expected a Pyro ELBO such as Trace_ELBO() or TraceMeanField_ELBO(), an objective "
        f"such as ImportanceWeighted(), or a function of (model, guide, *args), got {loss!r}."
    )
