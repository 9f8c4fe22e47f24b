"""Fit a pair to data: the training loop with its device, run directory, stopping and resuming."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.context import at_rest, bare, forked, seeded
from pyro_vae.data import Split
from pyro_vae.graph.work import WORTH_COMPILING, Work
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.handlers import Program
from pyro_vae.inference.loop import Loop, Record
from pyro_vae.inference.svi import SVI, OptimizerFactory
from pyro_vae.runs.checks import as_tuple, check_alike, check_options, check_values, set_up
from pyro_vae.runs.config import (
    Data,
    algorithm,
    check_weights,
    continued,
    hyperparameters,
    run_config,
    schedule,
    write_examples,
)
from pyro_vae.runs.device import resolve_device
from pyro_vae.runs.directory import Run
from pyro_vae.runs.pictures import draw_run
from pyro_vae.runs.training import train as train_loop

__all__ = ["History", "fit"]


@dataclass
class History:
    """What a training did.

    Attributes:
        records: One dict an epoch, with ``epoch``, ``elbo``, ``valid_elbo``, ``distortion``,
            ``rate`` (nats per datum, without the KL weight), ``loss`` (with it), ``kl_weight``,
            ``learning_rate`` and ``seconds``; NaN where something is unknown. Under ``ema_decay``
            ``valid_elbo`` is that of the averages, all else that of the parameters themselves.
        best_epoch: The epoch of the best validation bound, whose parameters (or averages) the pair
            has now: the tighter of the ELBO and the objective's own, which importance weighting
            raises while the ELBO falls. None without validation data.
        stopped: Why training ended: "epochs", "patience", "callback" or "time".
        run: The run directory, if any.
    """

    records: list[Record] = field(default_factory=list)
    best_epoch: int | None = None
    stopped: str = "epochs"
    run: Path | None = None

    def __getitem__(self, key: str) -> list[Any]:
        """One column of the records, e.g. ``history["valid_elbo"]``."""
        return [record[key] for record in self.records]


def fit(
    model: Program,
    guide: Program,
    data: Data,
    *,
    valid: Tensor | Sequence[Tensor] | None = None,
    loss: Any = None,
    optimizer: OptimizerFactory | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    seed: int = 0,
    lr_schedule: Callable[[Optimizer], LRScheduler] | None = None,
    kl_weight: float | Callable[[int], float] = 1.0,
    max_grad_norm: float | None = None,
    ema_decay: float | None = None,
    patience: int | None = None,
    max_seconds: float | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    device: str | torch.device = "auto",
    compile: Compile = "auto",
    callbacks: Sequence[Callable[[Record], object]] = (),
    notes: Mapping[str, Any] | None = None,
    pictures: bool = True,
    progress: bool = True,
) -> History:
    """Train a model and a guide by stochastic variational inference.

    With validation data the pair ends up with the parameters of its best validation bound. With
    ``out=`` everything is kept in a run directory, from which ``resume=True`` goes on bit for bit
    (on a CPU) as if training had never stopped. Ctrl-C finishes the step, saves, and says how to
    go on.

    Args:
        model: A Pyro model.
        guide: Its guide, with latent sites of the same names.
        data: A ``Split``; or training data ``(N, ...)``; or a tuple of such tensors, for pairs of
            several arguments.
        valid: Validation data like ``data``, where that is no ``Split``.
        loss: ``Trace_ELBO()`` (the default), ``TraceMeanField_ELBO()``, an objective such as
            ``ImportanceWeighted(50)``, any other Pyro loss, or a function of
            ``(model, guide, *args)``. The gradient is that of the sum over a minibatch, as in Pyro.
        optimizer: Makes the optimizer from the list of parameters; the fused Adam with a learning
            rate of 1e-3 by default.
        epochs: Number of passes over the training data, in all: a resumed run counts on.
        batch_size: Data per step.
        seed: Seed of the order of the data and of all noise in training and validation. The initial
            weights are the pair's own: call ``torch.manual_seed`` before making it.
        lr_schedule: Makes a learning-rate schedule from the optimizer; stepped once an epoch.
        kl_weight: Weight of the latent terms, or a function from the epoch (1, 2, ...) to it,
            such as ``warmup(100)``. Logged bounds are unweighted.
        max_grad_norm: Clip the norm of the gradient of the summed loss.
        ema_decay: Decay per step of an exponential moving average of the parameters; 0.999 averages
            over about 1,000 steps, which should be a small part of all. The averages are what is
            validated, and what the pair has when training is over; callbacks meet the parameters
            themselves. They pay where a learning rate stays high; one that falls to zero leaves
            little to average. Buffers, as of batch normalisation, stay those of the last step.
        patience: Stop after so many epochs without a better validation bound, once the KL weight
            has reached its last value.
        max_seconds: Stop after the epoch in which this call has trained for so long, compiling and
            validating included; ``resume=True`` goes on, as if it had never stopped.
        out: The run directory to make.
        resume: Go on with the run in ``out``, from its beginning if it was killed before its first
            epoch was saved; the pair, the data and the options, those of the optimizer and of the
            schedules too, have to be those with which it was started (``epochs`` may grow).
        device: "auto" (a GPU where there is one and both programs are modules), "cpu", "cuda"...
        compile: Compile the step (see ``SVI``); "auto" does so before training where counted
            operations say that it would take longer than 20 seconds without.
        callbacks: Called with the record of each epoch; one that returns True stops training.
        notes: Kept in ``config.json`` under "notes" as they are: what you want to know of the run
            later; JSON values.
        pictures: Draw the run's pictures and its report when training is done; without them a sweep
            of many short runs is faster.
        progress: Show a bar on a terminal, lines elsewhere (on standard error).

    Returns:
        The history.

    Raises:
        ValueError: Something about the arguments or the data; the message says what to do.
        DivergedError: The loss turned NaN, or the parameters made the pair fail; names the site.
            The pair and the checkpoint are those of the last good epoch.
        OSError: The run directory can't be written, or another training is under way in it.
        KeyboardInterrupt: After Ctrl-C, when all is saved.

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> bits = torch.rand(100, 9).round()
        >>> history = pv.fit(model, guide, bits, epochs=3, batch_size=50, progress=False)
        >>> len(history["elbo"])
        3
    """
    check_options(
        epochs, batch_size, patience, max_seconds, optimizer, ema_decay, resume=resume, out=out
    )
    if isinstance(data, Split) and valid is not None:
        raise ValueError("valid: a Split has its own validation part; leave valid= out.")
    train = as_tuple(data.train if isinstance(data, Split) else data, "data")
    held_out = data.valid if isinstance(data, Split) else valid
    validation = None if held_out is None else as_tuple(held_out, "valid")
    if validation is not None:
        check_alike(train, validation)
    if patience is not None and validation is None:
        raise ValueError("patience: early stopping needs validation data; give valid=.")
    if batch_size > len(train[0]):
        raise ValueError(
            f"batch_size: {batch_size} is larger than the training set of {len(train[0])} data; "
            f"give at most {len(train[0])}."
        )
    target = resolve_device(device, model, guide)
    for program in map(bare, (model, guide)):
        if isinstance(program, nn.Module):
            program.to(target)
    train = tuple(t.to(target) for t in train)
    validation = None if validation is None else tuple(t.to(target) for t in validation)
    weight = kl_weight if callable(kl_weight) else lambda epoch: float(kl_weight)
    weights = [float(weight(epoch)) for epoch in range(1, epochs + 1)]
    if not all(w >= 0 for w in weights):
        raise ValueError(f"kl_weight: expected weights >= 0, got {min(weights)}.")
    run = None if out is None else (Run.open(out) if resume else Run.create(out))

    svi = SVI(
        model,
        guide,
        optimizer or (lambda params: torch.optim.Adam(params, lr=1e-3, fused=True)),
        loss=Trace_ELBO() if loss is None else loss,
        max_grad_norm=max_grad_norm,
        compile=compile,
    )
    claim = nullcontext() if run is None else run.claimed()
    with claim, seeded(seed, "fit", device=target):
        refresh = data.refresh if isinstance(data, Split) else None
        first = tuple(t[:batch_size] for t in train)
        if refresh is not None:
            first = (refresh(first[0]), *first[1:])
        set_up(svi, data, first)
        if not isinstance(data, Split):
            check_values(svi, [train] if validation is None else [train, validation])
        if compile == "auto":
            steps = epochs * math.ceil(len(train[0]) / batch_size)
            svi.compile = _worth_compiling(svi, first, steps)
        if run is not None and resume and compile == "auto":  # to repeat what was never stopped
            svi.compile = bool(run.config["options"].get("compile", False))
        loop = Loop(
            svi,
            train,
            validation,
            batch_size=batch_size,
            seed=seed,
            refresh=refresh,
            weight=weight,
            scheduler=None if lr_schedule is None else lr_schedule(svi.optimizer),  # type: ignore[arg-type]
            ema_decay=ema_decay,
        )
        if run is not None:
            options = {
                "loss": _loss_name(Trace_ELBO() if loss is None else loss),
                "optimizer": repr(svi.optimizer),
                "algorithm": algorithm(svi.optimizer),
                "epochs": epochs,
                "batch_size": batch_size,
                "seed": seed,
                "hyperparameters": hyperparameters(svi.optimizer),
                "lr_schedule": None if loop.scheduler is None else _name(loop.scheduler),
                "schedule": schedule(loop.scheduler),
                "kl_weight": {"first": weights[0], "last": weights[-1]},
                "max_grad_norm": max_grad_norm,
                "ema_decay": ema_decay,
                "patience": patience,
                "device": str(target),
                "compile": svi.compile,
            }
            config = run_config(model, guide, data, validation, svi, options, dict(notes or {}))
            if resume:
                config = continued(run.config, config)
                if run.has_begun:
                    state = run.load_checkpoint(target)
                    check_weights(state["records"], weights)
                    config["options"]["epochs"] = max(epochs, len(state["records"]))
                    loop.load_state_dict(state)
            # First of all files: a folder that has it can be gone on with, whenever it was killed.
            run.write_json("config.json", config)
            if not run.has_begun:
                write_examples(run, data, train, validation)
        bound = "ELBO" if not isinstance(data, Split) or data.is_density else "score"
        stopped = train_loop(
            loop,
            run,
            callbacks,
            epochs=epochs,
            patience=patience,
            max_seconds=max_seconds,
            bound=bound,
            shown=progress,
        )
        loop.restore_best()
    history = History(
        records=[dict(record) for record in loop.records],
        best_epoch=None if loop.best is None else loop.best["epoch"],
        stopped=stopped,
        run=None if run is None else run.path,
    )
    if run is not None and pictures:
        try:
            draw_run(run, model, guide)
        except Exception as error:  # a picture must never cost a training
            warnings.warn(
                f"training is done and saved, but not all pictures could be drawn "
                f"({type(error).__name__}: {error}).",
                UserWarning,
                stacklevel=2,
            )
    return history


def _worth_compiling(svi: SVI, batch: tuple[Tensor, ...], steps: int) -> bool:
    with at_rest(svi.model, svi.guide), forked(device=batch[0].device), Work() as work:
        svi.evaluate(*batch)
    # Gradients cost twice what the loss costs.
    return work.seconds(3 * steps, steps) >= WORTH_COMPILING


def _loss_name(loss: Any) -> str:
    if hasattr(loss, "terms"):
        return repr(loss)
    particles = getattr(loss, "num_particles", 1)
    return _name(loss) if particles == 1 else f"{_name(loss)}(num_particles={particles})"


def _name(thing: Any) -> str:
    return getattr(thing, "__name__", type(thing).__name__)
