"""Stochastic variational inference over any pair, used like ``pyro.infer.SVI``."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from pyro_vae.context import at_rest, bare
from pyro_vae.graph.work import WORTH_COMPILING, Work
from pyro_vae.inference.compiled import Compile, CompiledSteps
from pyro_vae.inference.handlers import Program
from pyro_vae.inference.losses import objective_of
from pyro_vae.inference.objectives import Terms
from pyro_vae.inference.parameters import Parameters

__all__ = ["SVI", "DivergedError", "OptimizerFactory"]

OptimizerFactory = Callable[[list[Tensor]], Optimizer]

_NOTHING_TO_TRAIN = (
    "SVI: the pair has no parameters to train. Register networks with pyro.module(name, network), "
    "use pyro.param, or write the pair as modules."
)


class DivergedError(ArithmeticError):
    """The loss or a parameter turned NaN or infinite; ``fit`` puts the pair back where it was."""


class SVI:
    """Minimise the loss of a model and a guide by stochastic gradients.

    The first call inspects the pair on its arguments (names, shapes, supports), finds its
    parameters, and makes the optimizer; later calls skip Pyro's validation.

    Args:
        model: A Pyro model: a function, an ``nn.Module``, or a ``PyroModule``.
        guide: Its guide, with latent sites of the same names.
        optimizer: A factory ``lambda params: torch.optim.Adam(params, lr=1e-3)``, a torch optimizer
            over those parameters that are to be trained, or a Pyro optimizer.
        loss: ``Trace_ELBO()`` (the default) or ``TraceMeanField_ELBO()``, an objective such as
            ``ImportanceWeighted(50)``, any other Pyro loss, or a function of
            ``(model, guide, *args)`` that returns a 0-d tensor to minimise.
        max_grad_norm: Clip the norm of the gradient of the summed loss, over all parameters.
        compile: Compile the step: loss, gradients and optimizer become one graph, which draws the
            same noise as the program itself. True compiles at the second step (some ten
            seconds), "auto" after so many steps that counted operations say 20 seconds; what
            can't be compiled is said once and runs as it is.

    Raises:
        TypeError: ``optimizer`` or ``loss`` is of another kind.

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> svi = pv.SVI(model, guide, lambda params: torch.optim.Adam(params, lr=1e-3))
        >>> loss = svi.step(torch.ones(5, 9))
        >>> loss.shape, bool(svi.evaluate_loss(torch.ones(5, 9)) > 0)
        (torch.Size([]), True)
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optimizer: OptimizerFactory | Optimizer | PyroOptim,
        loss: Any = None,
        *,
        max_grad_norm: float | None = None,
        compile: Compile = "auto",
    ) -> None:
        if not (isinstance(optimizer, Optimizer | PyroOptim) or callable(optimizer)):
            raise TypeError(
                "SVI: expected optimizer to be a torch optimizer, a factory such as "
                "lambda params: torch.optim.Adam(params, lr=1e-3), or a Pyro optimizer, got "
                f"{optimizer!r}."
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"SVI: expected max_grad_norm > 0 or None, got {max_grad_norm}.")
        if compile not in (True, False, "auto"):
            raise ValueError(f'SVI: expected compile to be True, False or "auto", got {compile!r}.')
        self.model = model
        self.guide = guide
        self.objective = objective_of(Trace_ELBO() if loss is None else loss)
        self.max_grad_norm = max_grad_norm
        self._given = optimizer
        self._optimizer: Optimizer | PyroOptim | None = None
        self._parameters: Parameters | None = None
        self._gradients_checked = False
        self.compile: Compile = compile
        self._steady = False
        self._patience: int | None = None  # steps before "auto" compiles, counted in the first
        self._compiled: CompiledSteps | None = None

    @property
    def parameters(self) -> Parameters:
        """The pair's parameters, known after ``setup`` or the first step."""
        if self._parameters is None:
            raise RuntimeError("the parameters of the pair are unknown before setup or a step.")
        return self._parameters

    @property
    def optimizer(self) -> Optimizer | PyroOptim:
        """The optimizer, made at ``setup`` or the first step."""
        if self._parameters is not None and not self._parameters.named:
            raise ValueError(_NOTHING_TO_TRAIN)
        if self._optimizer is None:
            raise RuntimeError("the optimizer does not exist before setup or a step.")
        return self._optimizer

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Inspect the pair on arguments, find its parameters, make the optimizer; no step.

        Values are checked against supports unless Pyro's validation is switched off around it.

        Args:
            args: What the pair takes, e.g. a minibatch ``(B, D)``.
            kwargs: Likewise.

        Raises:
            ValueError: Model, guide and data do not fit, or there is nothing to train.
        """
        with at_rest(self.model, self.guide), poutine.trace(param_only=True) as capture:
            self.objective.prepare(self.model, self.guide, args, kwargs)
        if isinstance(self._given, PyroOptim):
            _register(self.model, self.guide)
        self._parameters = Parameters(self.model, self.guide)
        self._parameters.collect(capture.trace)
        if self._parameters.named:
            self._make_optimizer()

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take one gradient step.

        Args:
            args: What the pair takes, e.g. a minibatch ``(B, D)``.
            kwargs: Likewise.

        Returns:
            The loss before the step, summed over the minibatch, in nats: a detached 0-d tensor,
            so that nothing waits for the device.
        """
        return self.update(*args, **kwargs).loss

    def update(self, *args: Any, **kwargs: Any) -> Terms:
        """Take one gradient step, and return the loss with its parts (see ``Terms``).

        Raises:
            DivergedError: The pair fails, and a parameter is not finite: where the loss would turn
                NaN in silence, what draws bits or categories refuses NaN (on a GPU by CUDA's own
                error, after which nothing runs there any more).
        """
        if self._parameters is None:
            self.setup(*args, **kwargs)
        try:
            return self._updated(args, kwargs)
        except (RuntimeError, ValueError) as error:
            self._raise_if_diverged(error)
            raise

    def _updated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Terms:
        if self._steady and self._compiled is not None and not kwargs:
            terms = self._compiled.again(args)
            if terms is not None:
                return terms
        if self.compile is True:
            self._patience = 0
        if self.compile is not False and self._patience is not None and self._has_state():
            if self._compiled is None:
                self._compiled = self._compiler(self._patience)
            terms = self._compiled.step(args, kwargs, self.max_grad_norm)
            if terms is not None:
                return terms
        if self.compile == "auto" and self._patience is None:
            with Work() as work:
                terms = self._uncompiled(args, kwargs)
            self._patience = math.ceil(WORTH_COMPILING / work.seconds(1, 1))
            return terms
        return self._uncompiled(args, kwargs)

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Promise that nothing changes between steps but the tensors that they are handed.

        At every call a compiled step compares what its graph has frozen (attributes of the pair,
        options of the optimizer, handlers around it) with what is there now; in this context only
        the first one does. ``fit`` takes a few steps at a time in it.

        Example:
            >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
            >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
            >>> model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
            >>> svi = pv.SVI(model, guide, lambda params: torch.optim.Adam(params, lr=1e-3))
            >>> with svi.steady():
            ...     losses = [svi.step(x) for x in torch.ones(3, 5, 9)]
        """
        if self._compiled is not None:
            self._compiled.forget()
        self._steady = True
        try:
            yield
        finally:
            self._steady = False

    def _uncompiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Terms:
        with pyro.validation_enabled(is_validate=False), poutine.trace(param_only=True) as capture:
            terms = self.objective.terms(self.model, self.guide, args, kwargs)
        self._take_up(self.parameters.collect(capture.trace))
        params = list(self.parameters.named.values())
        if terms.loss.requires_grad:
            terms.loss.backward()
        if not self._gradients_checked:
            self._check_gradients()
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self.max_grad_norm)
        if isinstance(self.optimizer, PyroOptim):
            self.optimizer(params)
        else:
            self.optimizer.step()
        for param in params:
            param.grad = None
        return terms._replace(loss=terms.loss.detach())

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss without a step.

        Args:
            args: What the pair takes, e.g. a minibatch ``(B, D)``.
            kwargs: Likewise.

        Returns:
            The loss, summed over the data, in nats: a 0-d tensor.
        """
        return self.evaluate(*args, **kwargs).loss

    def evaluate(self, *args: Any, **kwargs: Any) -> Terms:
        """The loss with its parts (see ``Terms``), without a step or gradients.

        Raises:
            DivergedError: As ``update``.
        """
        if self._parameters is None:
            self.setup(*args, **kwargs)
        try:
            with torch.no_grad(), pyro.validation_enabled(is_validate=False):
                return self.objective.terms(self.model, self.guide, args, kwargs)
        except (RuntimeError, ValueError) as error:
            self._raise_if_diverged(error)
            raise

    def _raise_if_diverged(self, error: Exception) -> None:
        if broken := self.parameters.not_finite():
            said = str(error).partition("\n")[0]
            raise DivergedError(
                f"the pair fails, and its parameter {broken[0]!r} is not finite any more: {said}. "
                "Go back to the parameters before; try a smaller learning rate or max_grad_norm=."
            ) from error

    def _has_state(self) -> bool:
        """Whether the optimizer has taken a step, here or in the run that is gone on with."""
        optimizer = self._optimizer
        if isinstance(optimizer, PyroOptim):
            return bool(optimizer.optim_objs)
        return optimizer is not None and (bool(optimizer.state) or self._gradients_checked)

    def _compiler(self, patience: int) -> CompiledSteps:
        return CompiledSteps(
            self.model,
            self.guide,
            self.objective,
            self.parameters,
            self.optimizer,
            patience=patience,
        )

    def _make_optimizer(self) -> None:
        params = list(self.parameters.named.values())
        if isinstance(self._given, Optimizer | PyroOptim):
            self._optimizer = self._given
        else:
            self._optimizer = self._given(params)
            if not isinstance(self._optimizer, Optimizer):
                raise TypeError(
                    "SVI: expected the optimizer factory to return a torch optimizer, got "
                    f"{self._optimizer!r}."
                )

    def _take_up(self, new: list[Tensor]) -> None:
        """Train parameters that a later call of the pair has brought to light."""
        if self._optimizer is None:
            if not self.parameters.named:
                raise ValueError(_NOTHING_TO_TRAIN)
            self._make_optimizer()
        elif new and not isinstance(self._given, Optimizer | PyroOptim):
            self.optimizer.add_param_group({"params": new})  # type: ignore[union-attr]

    def _check_gradients(self) -> None:
        self._gradients_checked = True
        named = self.parameters.named
        idle = [name for name, param in named.items() if param.grad is None]
        advice = (
            "Where a new network was registered under the name of an older one, call "
            "pyro.clear_param_store() before making the new pair."
        )
        if len(idle) == len(named):
            raise ValueError(
                f"SVI: the loss depends on none of the pair's {len(named)} parameters. {advice}"
            )
        if idle:
            warnings.warn(
                f"{len(idle)} of {len(named)} parameters got no gradient at the first step, e.g. "
                f"{idle[0]!r}. {advice}",
                UserWarning,
                stacklevel=5,
            )


def _register(*programs: Program) -> None:
    """Pyro's optimizers look names up in the parameter store: put plain modules there."""
    store = pyro.get_param_store()
    for role, program in zip(("model", "guide"), map(bare, programs), strict=True):
        if isinstance(program, torch.nn.Module):
            for name, parameter in program.named_parameters():
                if parameter.requires_grad and parameter not in store._param_to_name:
                    store[f"{role}.{name}"] = parameter
