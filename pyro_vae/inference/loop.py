"""Epochs of stochastic variational inference, as a state that can be saved and taken up again.

The loop knows nothing of files, progress bars or signals: see ``pyro_vae.runs.fit``.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NoReturn

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae.context import forked, seeded
from pyro_vae.inference.averaging import Averages
from pyro_vae.inference.handlers import kl_weight, site_to_blame, traces
from pyro_vae.inference.objectives import Terms
from pyro_vae.inference.svi import SVI, DivergedError
from pyro_vae.inference.update_rules import load_state
from pyro_vae.inference.validation import validation_bounds

__all__ = ["Loop", "Record"]

Record = dict[str, Any]

# Losses that are read at once, and minibatches that are gathered at once if they are small.
TOGETHER = 50
_GATHERED_BYTES = 1 << 20  # more would leave the caches before it is used


class Loop:
    """Minibatches, epochs, and the validation bound of one training.

    Args:
        svi: The step.
        train: Training data, tensors of equal length N on the pair's device.
        valid: Validation data likewise, or None.
        batch_size: Data per step; the last minibatch of an epoch is smaller, never dropped.
        seed: Seed of the order of the data and of the validation noise.
        refresh: Applied to the first tensor of each training minibatch (dynamic binarization).
        weight: From the epoch (1, 2, ...) to the KL weight.
        scheduler: Learning-rate schedule, stepped once an epoch.
        ema_decay: Decay per step of the averages of the parameters, which are validated and kept in
            their place; None for none.

    Attributes:
        records: One dict an epoch; bounds in nats per datum, unweighted.
    """

    def __init__(
        self,
        svi: SVI,
        train: tuple[Tensor, ...],
        valid: tuple[Tensor, ...] | None,
        *,
        batch_size: int,
        seed: int,
        refresh: Callable[[Tensor], Tensor] | None = None,
        weight: Callable[[int], float] = lambda epoch: 1.0,
        scheduler: LRScheduler | None = None,
        ema_decay: float | None = None,
    ) -> None:
        self.svi = svi
        self.train = train
        self.valid = valid
        self.batch_size = batch_size
        self.seed = seed
        self.refresh = refresh
        self.weight = weight
        self.scheduler = scheduler
        self.averages = None if ema_decay is None else Averages(svi.parameters, ema_decay)
        self.records: list[Record] = []
        self.step = 0
        self.seconds = 0.0
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._unread: list[Terms] = []
        size = sum(tensor[0].nbytes for tensor in train) * batch_size
        self._together = min(max(_GATHERED_BYTES // max(size, 1), 1), TOGETHER)
        # An epoch's start is good only once a bound there was finite: else the one before is.
        self._start: dict[str, Any] | None = None
        self._good: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.records)

    @property
    def steps_per_epoch(self) -> int:
        """Number of minibatches in an epoch."""
        return math.ceil(len(self.train[0]) / self.batch_size)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first parameter group."""
        groups = getattr(self.svi.optimizer, "param_groups", None)
        return float(groups[0]["lr"]) if groups else math.nan

    def run_epoch(
        self, after_step: Callable[[Tensor, int], bool] = lambda loss, size: False
    ) -> bool:
        """Run one epoch, or the rest of one.

        Args:
            after_step: Called with the summed loss of each minibatch, a 0-d tensor on the device,
                and its number of data; returning True stops after this step.

        Returns:
            Whether the epoch was finished; if not, another call goes on with it.

        Raises:
            DivergedError: The loss is not finite, or the pair fails by its parameters. The state is
                that of the epoch's start, or of the epoch before, if already the first loss was.
        """
        if self.step == 0 or self._start is None:
            self._start = self._copied_state()
            # The bound of averages says nothing of the parameters themselves.
            known = self.records and self.averages is None
            if known and math.isfinite(self.records[-1]["valid_elbo"]):
                self._good = self._start
        order = self._order().to(self.train[0].device)
        steps, weight = self.steps_per_epoch, self.weight(self.epoch + 1)
        while self.step < steps:
            started, asked_to_stop = time.perf_counter(), False
            failed: Any = None
            with kl_weight(weight), self.svi.steady():
                for batch in self._batches(order):
                    try:
                        terms = self.svi.update(*batch)
                    except (DivergedError, RuntimeError, ValueError) as error:
                        failed = error, batch
                        break
                    if self.averages is not None:
                        self.averages.update()
                    self._unread.append(terms)
                    self.step += 1
                    asked_to_stop = after_step(terms.loss, len(batch[0]))
                    if asked_to_stop:
                        break
            if failed is not None:
                self._raise(*failed)
            last = self.step == steps
            if last or asked_to_stop or len(self._unread) >= TOGETHER:
                self._read()
            self.seconds += time.perf_counter() - started
            if not self._sums[0].isfinite():
                self._raise_diverged()
            if asked_to_stop and not last:
                return False
        # No loss has seen what the last step made of the parameters: a checkpoint must not keep it.
        if self.svi.parameters.not_finite():
            self._raise_diverged()
        self._finish_epoch()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how training goes on, as tensors and plain values."""
        optimizer: Any = self.svi.optimizer
        pyro_style = isinstance(optimizer, PyroOptim)
        self._read()
        device = self.train[0].device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return {
            "parameters": self.svi.parameters.state_dict(),
            "averages": None if self.averages is None else self.averages.state_dict(),
            "best": self.best,
            "optimizer": optimizer.get_state() if pyro_style else optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "random_state": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "records": self.records,
            "step": self.step,
            "sums": self._sums,
            "seconds": self.seconds,
        }

    def _copied_state(self) -> dict[str, Any]:
        """The state as it is now; what is never changed in place is shared, however long it is."""
        state = self.state_dict()
        shared = {"records": list(self.records), "best": self.best, "averages": state["averages"]}
        return {**copy.deepcopy({k: v for k, v in state.items() if k not in shared}), **shared}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back (or on) to a saved state.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            ValueError: The state belongs to another pair.
        """
        if self.averages is not None:
            self.averages.load_state_dict(state["averages"])
        self.svi.parameters.load_state_dict(state["parameters"])
        optimizer: Any = self.svi.optimizer
        if isinstance(optimizer, PyroOptim):
            # Pyro hands a state to optimizers when it makes them: let it make them anew.
            optimizer.optim_objs.clear()
            optimizer.grad_clip.clear()
            optimizer.set_state(state["optimizer"])
        else:
            load_state(optimizer, state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random_state"]["cpu"].cpu())
        if state["random_state"]["cuda"] is not None and self.train[0].is_cuda:
            torch.cuda.set_rng_state(state["random_state"]["cuda"].cpu(), self.train[0].device)
        self.best = state["best"]
        self.records = [dict(record) for record in state["records"]]
        self.step = state["step"]
        self.seconds = state["seconds"]
        self._sums = state["sums"].cpu().clone()
        self._unread.clear()

    def restore_best(self) -> None:
        """Put the parameters of the best validation bound into the pair, else their averages."""
        best = self.best
        if best is None and self.averages is not None:
            best = self.averages.state_dict()
        if best is not None:
            self.svi.parameters.load_state_dict(best["parameters"])

    def _order(self) -> Tensor:
        """The order of the data in this epoch: a function of the seed and the epoch alone."""
        with seeded(self.seed, "order", self.epoch):
            return torch.randperm(len(self.train[0]))

    def _batches(self, order: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The next minibatches, as many as are gathered from the data at once."""
        start = self.step * self.batch_size
        rows = order[start : start + self._together * self.batch_size]
        gathered = (t.index_select(0, rows).split(self.batch_size) for t in self.train)
        for batch in zip(*gathered, strict=True):
            yield (self.refresh(batch[0]), *batch[1:]) if self.refresh else batch

    def _read(self) -> None:
        """Add the losses that are not read yet, one after the other wherever reading is cut."""
        if self._unread:
            terms = torch.stack([torch.stack(t) for t in zip(*self._unread, strict=True)])
            terms = terms.detach().cpu().double()
            sums = self._sums.tolist()
            for step in terms.T.tolist():
                sums = [a + b for a, b in zip(sums, step, strict=True)]
            self._sums = torch.tensor(sums, dtype=torch.float64)
            # A loss is that of the parameters before its step.
            if terms[0].isfinite().any():
                self._good = self._start
            self._unread.clear()

    def _finish_epoch(self) -> None:
        loss, distortion, rate = (self._sums / len(self.train[0])).tolist()
        elbo = bound = math.nan
        with nullcontext() if self.averages is None else self.averages.in_place():
            if self.valid is not None:
                elbo, bound = validation_bounds(self.svi, self.valid, seed=self.seed)
            # No NaN: nothing would ever be better than it.
            if not math.isnan(bound) and (
                self.best is None or bound > self.best.get("bound", self.best["valid_elbo"])
            ):
                self.best = {
                    "epoch": self.epoch + 1,
                    "valid_elbo": elbo,
                    "bound": bound,
                    "parameters": copy.deepcopy(self.svi.parameters.state_dict()),
                }
        record: Record = {
            "epoch": self.epoch + 1,
            "seconds": self.seconds,
            "loss": loss,
            "elbo": -(distortion + rate),
            "distortion": distortion,
            "rate": rate,
            "kl_weight": float(self.weight(self.epoch + 1)),
            "learning_rate": self.learning_rate,
            "valid_elbo": elbo,
        }
        self.records.append(record)
        self.step = 0
        self._sums.zero_()
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss if self.valid is None else -bound)
        elif self.scheduler is not None:
            self.scheduler.step()

    def _raise(self, error: Exception, batch: tuple[Tensor, ...]) -> NoReturn:
        """Say what made a step fail: its parameters, if it works with those of the start."""
        assert self._start is not None
        self._read()
        if not isinstance(error, DivergedError):
            now = self._copied_state()
            self.load_state_dict(copy.deepcopy(self._good or self._start))
            with kl_weight(self.weight(self.epoch + 1)):
                if self._wrong_with(batch):
                    self.load_state_dict(now)
                    raise error
        self._raise_diverged(error)

    def _raise_diverged(self, error: Exception | None = None) -> NoReturn:
        """Return to the epoch's start, find the bad step again, and name what broke."""
        assert self._start is not None
        epoch = self.epoch + 1
        self.load_state_dict(copy.deepcopy(self._start))
        order = self._order().to(self.train[0].device)
        batch: tuple[Tensor, ...] = ()
        blamed = None
        while self.step < self.steps_per_epoch and blamed is None:
            batch = next(self._batches(order))
            self.step += 1
            with kl_weight(self.weight(epoch)):
                blamed = self._wrong_with(batch)
        said = "the loss itself" if error is None else str(error).partition("\n")[0]
        step, blamed = self.step, blamed or self._blame(batch, said)
        self.load_state_dict(self._good or self._start)
        self._start = None
        raise DivergedError(
            f"the loss turned NaN or infinite in epoch {epoch}, step {step}: {blamed}. The pair is "
            f"back at the end of epoch {self.epoch}. Try a smaller learning rate, max_grad_norm=, "
            "or a larger min_scale in the family."
        ) from error

    def _wrong_with(self, batch: tuple[Tensor, ...]) -> str | None:
        """What is wrong with the next step; where nothing is, it is taken."""
        said = "the loss itself"
        try:
            with forked(device=batch[0].device):
                good = self.svi.evaluate(*batch).loss.isfinite()
            if good:
                self.svi.update(*batch)
                return None
        except (DivergedError, RuntimeError, ValueError) as error:
            said = str(error).partition("\n")[0]
        return self._blame(batch, said)

    def _blame(self, batch: tuple[Tensor, ...], otherwise: str) -> str:
        """The first site that is not finite, or the first parameter that was not before."""
        try:
            # Pyro's validation would name the distribution, but not the site.
            with torch.no_grad(), pyro.validation_enabled(is_validate=False):
                site = site_to_blame(*traces(self.svi.model, self.svi.guide, batch, {}))
        except (ValueError, RuntimeError) as error:  # a sampler or a network refuses NaN
            site = str(error).partition("\n")[0]
        broken = self.svi.parameters.not_finite()
        after = f" (parameter {broken[0]!r} was not finite any more)" if broken else ""
        return f"{site or otherwise}{after}"
