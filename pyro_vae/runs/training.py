"""Training that stops when it should, saves what it has, and survives Ctrl-C and full disks."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from pyro_vae.inference.loop import Loop, Record
from pyro_vae.inference.svi import DivergedError
from pyro_vae.runs.directory import Run
from pyro_vae.runs.progress import Progress

__all__ = ["train"]


def train(
    loop: Loop,
    run: Run | None,
    callbacks: Sequence[Callable[[Record], object]],
    *,
    epochs: int,
    patience: int | None,
    max_seconds: float | None,
    bound: str,
    shown: bool,
) -> str:
    """Run epochs until the end, patience, a callback or the clock stops them; returns which.

    Args:
        loop: The state of training.
        run: The run directory, or None.
        callbacks: Called with each record; one that returns True stops training.
        epochs: Number of epochs in all.
        patience: Epochs without a better validation bound, or None.
        max_seconds: Stop after the epoch in which this call has run for so long, or None.
        bound: What the bound is called in the log: "ELBO", or "score" where it is none.
        shown: Whether progress is shown.
    """
    saver = _Saver(loop, run)
    end = math.inf if max_seconds is None else time.monotonic() + max_seconds
    total, done = epochs * loop.steps_per_epoch, loop.epoch * loop.steps_per_epoch + loop.step
    bar = Progress(total, what="step", label="training", shown=shown, done=done)
    try:
        with _interruptible() as interrupted:

            def after_step(loss: Tensor, size: int) -> bool:
                bar.advance()
                if bar.due():
                    per_datum = loss.item() / size
                    bar.show([f"epoch {loop.epoch + 1}/{epochs}", f"loss {per_datum:.2f}"])
                return interrupted.is_set()

            # The last epoch with another KL weight than the last one: patience begins after it.
            changing = (e for e in range(epochs, 0, -1) if loop.weight(e) != loop.weight(epochs))
            warm = next(changing, 0) if patience is not None else 0
            # A run that had stopped for good before it was resumed stays as it was.
            reason = _reason_to_stop(loop, epochs, patience, warm)
            while reason is None:
                if not loop.run_epoch(after_step):
                    break
                record = loop.records[-1]
                bar.line(_line(record, epochs, bound))
                asked_to_stop = False
                for callback in callbacks:
                    asked_to_stop |= callback(dict(record)) is True
                stop = _reason_to_stop(loop, epochs, patience, warm)
                reason = "callback" if asked_to_stop else stop
                if reason is None and time.monotonic() >= end:
                    reason = "time"
                saver.save(final=reason is not None)
                if interrupted.is_set():
                    break
            if reason is None:
                raise _interruption(saver, run)
            return reason
    except DivergedError:
        saver.save(final=False, due=True)  # a full disk must not hide which site diverged
        raise
    finally:
        bar.close()


def _reason_to_stop(loop: Loop, epochs: int, patience: int | None, warm: int) -> str | None:
    if loop.epoch >= epochs:
        return "epochs"
    if patience is None or loop.best is None:
        return None
    waited = loop.epoch - max(loop.best["epoch"], warm)
    return "patience" if waited >= patience else None


class _Saver:
    """Writes metrics and checkpoint, each after every epoch that took 20 times as long as it."""

    def __init__(self, loop: Loop, run: Run | None) -> None:
        self.loop = loop
        self.run = run
        self._metrics = _Pace()
        self._checkpoint = _Pace()

    def save(self, *, final: bool, due: bool = False) -> None:
        if self.run is None:
            return
        due = due or final or self._checkpoint.due
        try:
            # Metrics are never behind the checkpoint.
            if due or self._metrics.due:
                with self._metrics:
                    self.run.write_metrics(self.loop.records)
            if due:
                with self._checkpoint:
                    self.run.save_checkpoint(self.loop.state_dict())
        except OSError as error:
            if final:
                raise
            # The pair is in memory and the last good files are whole: try again at the next epoch.
            warnings.warn(f"{error} Training goes on.", UserWarning, stacklevel=3)


class _Pace:
    """When something that takes long enough to be noticed may be done again."""

    def __init__(self) -> None:
        self._started = self._cost = 0.0
        self._done = -math.inf

    @property
    def due(self) -> bool:
        return time.monotonic() - self._done >= 20 * self._cost

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._done = time.monotonic()
            self._cost = self._done - self._started


def _interruption(saver: _Saver, run: Run | None) -> KeyboardInterrupt:
    loop = saver.loop
    where = f"stopped after epoch {loop.epoch}"
    if loop.step > 0:
        where = f"stopped in epoch {loop.epoch + 1}, after step {loop.step} of "
        where += str(loop.steps_per_epoch)
    if run is None:
        return KeyboardInterrupt(f"{where}; nothing is saved without out=, the pair is as it is")
    saver.save(final=True)
    return KeyboardInterrupt(
        f"{where}; saved in {run.path}. Go on with resume=True (pyro-vae train --resume {run.path})"
    )


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Let the first Ctrl-C only ask for a stop, so that no step is cut in two; the second stops."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _line(record: Record, epochs: int, bound: str) -> str:
    known = not math.isnan(record["elbo"])
    parts = [f"{bound} {record['elbo']:.3f}" if known else f"loss {record['loss']:.3f}"]
    if not math.isnan(record["valid_elbo"]):
        parts.append(f"valid {bound} {record['valid_elbo']:.3f}")
    if known:
        parts.append(f"rate {record['rate']:.2f}")
    return f"epoch {record['epoch']:>4}/{epochs}  {'  '.join(parts)}  {record['seconds']:.1f} s"
