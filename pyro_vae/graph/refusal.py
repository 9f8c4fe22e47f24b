"""Why a program is not compiled, and how its user is told."""

import sys
import warnings
from pathlib import Path

__all__ = ["CannotCompileError", "ThisTimeError", "warn_uncompiled"]


class CannotCompileError(RuntimeError):
    """A program can't become compiled code; the message says where and why."""


class ThisTimeError(CannotCompileError):
    """A program can't run compiled this time; the next time it may."""


def warn_uncompiled(what: str, error: Exception) -> None:
    """Say once, at the user's line, why something runs uncompiled.

    Args:
        what: What runs uncompiled.
        error: The reason.
    """
    ours = Path(__file__).parents[1].as_posix()
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        level, frame = level + 1, frame.f_back
    # Pyro adds the shapes of all sites to what is raised inside a program.
    reason = (str(error) or type(error).__name__).splitlines()[0]
    warnings.warn(
        f"{what}: {reason}. Pass compile=False to silence this.",
        UserWarning,
        stacklevel=level,
    )
