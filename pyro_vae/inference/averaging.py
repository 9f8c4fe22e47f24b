"""The mean of the parameters over the last steps: what stochastic steps scatter about."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pyro_vae.inference.parameters import Parameters

__all__ = ["Averages", "check_decay"]


class Averages:
    r"""An exponential moving average of a pair's parameters :math:`\theta_1, \theta_2, \dots`.

    .. math:: a_t = \frac{1 - \beta}{1 - \beta^t} \sum_{s=1}^t \beta^{t-s} \theta_s

    Divided by the sum of its weights it owes nothing to where training started: it is the plain
    mean of the first few steps, and that of about the last :math:`1 / (1 - \beta)` later on. The
    steps of a parameter that the programs make later are counted from there. Unconstrained values
    are averaged, in their own precision; buffers, such as the statistics of batch normalisation,
    are not.

    Args:
        parameters: Those of the pair.
        decay: :math:`\beta`, within [0, 1).

    Raises:
        ValueError: ``decay`` is outside.

    Reference: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992);
    Izmailov et al., "Averaging weights leads to wider optima and better generalization" (2018).
    """

    def __init__(self, parameters: Parameters, decay: float) -> None:
        check_decay(decay)
        self.parameters = parameters
        self.decay = decay
        self._values: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Take up the parameters as they are after a step."""
        alike: dict[int, list[str]] = {}  # names by number of steps, most often all of them
        for name, leaf in self.parameters.named.items():
            if name not in self._values:
                self._values[name] = leaf.detach().clone()
            self._steps[name] = self._steps.get(name, 0) + 1
            alike.setdefault(self._steps[name], []).append(name)
        for steps, names in alike.items():
            new = (1 - self.decay) / (1 - self.decay**steps)
            leaves = [self.parameters.named[name] for name in names]
            get_ema_multi_avg_fn(1 - new)([self._values[name] for name in names], leaves, None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the pair have the averages meanwhile."""
        known = {n: leaf for n, leaf in self.parameters.named.items() if n in self._values}
        kept = {name: leaf.detach().clone() for name, leaf in known.items()}
        try:
            _put(self._values, known)
            yield
        finally:
            _put(kept, known)

    def state_dict(self) -> dict[str, Any]:
        """The averages, as the pair's own state with them in place, and the numbers of steps."""
        with self.in_place():
            averaged = copy.deepcopy(self.parameters.state_dict())
        return {"parameters": averaged, "steps": dict(self._steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state; the pair has its averages then.

        Args:
            state: What ``state_dict`` returned.
        """
        self.parameters.load_state_dict(state["parameters"])
        self._steps = dict(state["steps"])
        named = self.parameters.named
        self._values = {name: named[name].detach().clone() for name in self._steps}


def check_decay(decay: float) -> None:
    """Refuse what is no decay per step."""
    if not 0 <= decay < 1:
        raise ValueError(
            f"ema_decay: expected at least 0 and less than 1, got {decay}; 0.999 averages over "
            "about 1,000 steps."
        )


@torch.no_grad()
def _put(values: dict[str, Tensor], leaves: dict[str, Tensor]) -> None:
    for name, leaf in leaves.items():
        leaf.copy_(values[name])
