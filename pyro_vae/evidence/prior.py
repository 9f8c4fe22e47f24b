r"""The model's own prior as a guide, and with it simple Monte Carlo.

.. math:: q(z|x) = p(z), \qquad w = \frac{p(x, z)}{p(z)} = p(x|z)

No encoder is needed and nothing is assumed, so this is the reference for other estimators. But the
draws that it takes grow like e to the KL of the posterior to the prior: to the nats that x tells
about z.
"""

from functools import partial
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.evidence.summed import Summed
from pyro_vae.inference.enumeration import is_marked
from pyro_vae.inference.handlers import Program, Site

__all__ = ["from_prior"]


def from_prior(model: Program) -> Program:
    r"""A guide that draws the latents of any model from the model's own prior.

    With it ``log_evidence`` is simple Monte Carlo, :math:`\log \frac1K \sum_k p(x|z_k)` with
    :math:`z_k \sim p(z)`. Plates, hierarchies and priors that are given something are the model's.
    Discrete latents that are marked for enumeration are not drawn: what depends on them is drawn
    with them summed out, :math:`p(z) = \sum_c p(c)\,p(z|c)`.

    The first run on arguments of some shapes is one of the whole model; later ones leave off at its
    last latent, so that drawing takes no pass of the decoder, compiled or not.

    Args:
        model: A Pyro model.

    Returns:
        The guide. It takes what the model takes, and has the model's modules and parameters.

    Raises:
        TypeError: ``model`` is no program.
        ValueError: When it runs: a latent depends on a marked one in other plates; the message
            names the site.

    Example:
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> model = pv.Model(pv.priors.StandardNormal(2), likelihood)
        >>> x = torch.ones(7, 9)
        >>> estimate = pv.log_evidence(model, pv.from_prior(model), x, num_particles=100)
        >>> estimate.value.shape
        torch.Size([7])
    """
    if not callable(model):
        raise TypeError(
            "from_prior: expected a Pyro model, a function or a module, got "
            f"{type(model).__name__}."
        )
    # Bound as Pyro binds its handlers: who looks for the program inside those finds the model.
    return partial(_run, _PriorMessenger(), model)


class _DrawnError(BaseException):
    """Every latent has been drawn; what follows in the model is not wanted."""

    def __init__(self, by: "_PriorMessenger") -> None:
        super().__init__()
        self.by = by


class _PriorMessenger(Messenger):
    """Shows the latents of a model alone, and leaves off at the last.

    Attributes:
        key: What the arguments of this run look like.
        last: The name of the last latent for arguments that look so, None where there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.key: Any = None
        self.last: dict[Any, str | None] = {}
        self._latest: str | None = None
        self._summed = Summed()

    def __enter__(self) -> "_PriorMessenger":
        self._latest, self._summed = None, Summed()
        super().__enter__()
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> Any:
        super().__exit__(exc_type, exc_value, traceback)
        self._summed = Summed()  # it holds tensors
        if exc_type is None:
            self.last[self.key] = self._latest
        return isinstance(exc_value, _DrawnError) and exc_value.by is self

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        if msg["is_observed"] or msg["infer"].get("was_observed"):
            msg["stop"] = True
        elif is_marked(msg):
            self._summed.take_all_values(msg)
            msg["stop"] = True
        else:
            self._latest = msg["name"]
            self._summed.mix(msg)

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] != self._latest:
            return
        self._summed.learn(msg)
        if self._latest == self.last.get(self.key):
            msg["continuation"] = self._leave

    def _leave(self, _: Site) -> None:
        raise _DrawnError(self)


def _run(messenger: _PriorMessenger, model: Program, *args: Any, **kwargs: Any) -> None:
    messenger.key = tuple(map(_look, (*args, *kwargs.values())))
    if messenger.last.get(messenger.key, "") is None:
        return  # there is nothing to draw
    with messenger:
        model(*args, **kwargs)


def _look(arg: Any) -> Any:
    """What of an argument may decide which latents there are."""
    if isinstance(arg, Tensor):
        return tuple(arg.shape)
    return arg if isinstance(arg, int | float | str) else type(arg)
