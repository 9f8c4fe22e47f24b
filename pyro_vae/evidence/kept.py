"""Finished blocks of an estimate, kept so that an estimation that was killed goes on.

They are kept in a mapping of the caller's: a dict, or one whose items are files. Each is kept under
a digest of the data and of the options, so that blocks of other ones are never mixed. Parameters
have no such digest that would be the same for every program; instead one log-weight of each of the
first data is kept too, which is as good as certain to differ where the pair has changed.
"""

import hashlib
from collections.abc import MutableMapping
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae.context import at_rest, seeded
from pyro_vae.evidence.blocks import data_blocks
from pyro_vae.evidence.compare import fingerprint
from pyro_vae.evidence.particles import Arguments, Pair
from pyro_vae.inference.handlers import Program

__all__ = ["Kept", "KeptBlocks"]

Kept = MutableMapping[str, Tensor]

# What kernels and machines may differ by, in nats of one log-weight.
_ROUNDING = {"rtol": 1e-4, "atol": 1e-3}


class KeptBlocks:
    """The blocks of one estimate.

    Args:
        mapping: Where they are; None keeps nothing.
        name: What kind of blocks these are.
        args: The arguments of the pair.
        options: What else the blocks depend on.
    """

    def __init__(self, mapping: Kept | None, name: str, args: Arguments, options: Any) -> None:
        self._mapping: Kept = {} if mapping is None else mapping
        self._active = mapping is not None
        text = f"{fingerprint(args)} {options!r}" if self._active else ""
        self._prefix = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def forget_others(
        self, model: Program, guide: Program, args: Arguments, data_plate: str | None
    ) -> None:
        """Forget the blocks if another pair has left them."""
        if not self._active:
            return
        first = next(data_blocks(args))
        with at_rest(model, guide):
            pair = Pair(model, guide, first, data_plate)
            with (
                pyro.validation_enabled(is_validate=False),
                seeded("probe", device=pair.device),
            ):
                now = pair.log_weights(1, 1).double().cpu()
        before = self._mapping.get(f"{self._prefix}-probe")
        if before is not None and (
            before.shape != now.shape
            or not torch.allclose(before, now, **_ROUNDING, equal_nan=True)
        ):
            for key in [key for key in self._mapping if key.startswith(f"{self._prefix}-")]:
                del self._mapping[key]
        self._mapping[f"{self._prefix}-probe"] = now

    def finished(self, count: int) -> dict[int, Tensor]:
        """The blocks among so many that were finished before."""
        found = ((i, self._mapping.get(f"{self._prefix}-{i}")) for i in range(count))
        return {index: block for index, block in found if block is not None}

    def put(self, index: int, block: Tensor) -> None:
        """Keep a finished block."""
        if self._active:
            self._mapping[f"{self._prefix}-{index}"] = block
