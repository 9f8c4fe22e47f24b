"""Progress: a bar with the time left on a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

__all__ = ["Progress"]

INTERVAL = 30.0  # seconds between two lines of a log


class Progress:
    """A bar on a terminal; elsewhere a line now and then.

    Args:
        total: Number of steps.
        what: What is counted, e.g. "step".
        label: What stands before the bar.
        shown: Whether anything is shown at all.
        done: Steps that were done before, by an earlier run.
    """

    def __init__(
        self, total: int, *, what: str, label: str, shown: bool = True, done: int = 0
    ) -> None:
        self.total = total
        self.what = what
        self.label = label
        self.done = self.done_before = done
        self._started = self._told = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._shown = shown
        self._bar: Any = None
        if shown and self._terminal:
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=label,
                unit=what,
                unit_scale=True,
                dynamic_ncols=True,
                smoothing=0.05,
                leave=False,
            )

    def advance(self, steps: int = 1) -> None:
        """Count steps."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(steps)
        elif self._shown and time.monotonic() - self._told >= INTERVAL:
            self._told = time.monotonic()
            self.line(f"{self.label}: {self.done}/{self.total} {self.what}s, {self._time_left()}")

    def due(self) -> bool:
        """Whether it is time to show a new value; reading one may wait for a device."""
        return self._bar is not None and time.monotonic() - self._told > 0.5

    def show(self, values: Iterable[str]) -> None:
        """Put values beside the bar."""
        if self._bar is not None:
            self._told = time.monotonic()
            self._bar.set_postfix_str(", ".join(values))

    def line(self, text: str) -> None:
        """Print a line above the bar, or into the log."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def _time_left(self) -> str:
        rate = (self.done - self.done_before) / max(time.monotonic() - self._started, 1e-9)
        seconds = (self.total - self.done) / rate if rate else 0.0
        return f"about {tqdm.format_interval(seconds)} left"
