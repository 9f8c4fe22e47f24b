"""Finished blocks of an estimate, kept so that an estimation that was killed goes on.

They are kept in a mapping of the caller's: a dict, or one whose items are files. Each is kept under
a digest of the options and of the data, those of the first block and its own, so that blocks of
other ones are never mixed, and more data add to fewer. Parameters have no such digest that would be
the same for every program; instead one log-weight of each of the first data is kept too, which is
as good as certain to differ where the pair has changed. Blocks without it are nobody's.
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

# What kernels and machines may differ by, in nats of one log-weight. Sums of thousands of terms
# differ by some 1e-6 of themselves; an epoch more of training by nats.
_ROUNDING = {"rtol": 1e-5, "atol": 1e-3}


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
        self._keys: list[str] = []
        self._prefix = name
        if not self._active:
            return
        for index, block in enumerate(data_blocks(args)):
            # What is handed over whole is the same in every block.
            cut = tuple(a for a, whole in zip(block, args, strict=True) if a is not whole)
            if index == 0:
                text = f"{fingerprint(block)} {options!r}"
                self._prefix += f"-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
            self._keys.append(f"{self._prefix}-{fingerprint(cut)}-{index}")

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
        if (
            before is None
            or before.shape != now.shape
            or not torch.allclose(before, now, **_ROUNDING, equal_nan=True)
        ):
            for key in [key for key in self._mapping if key.startswith(f"{self._prefix}-")]:
                self._mapping.pop(key, None)  # another process may have been faster
            # Not where blocks stay, or many small changes of the pair would add up unseen.
            self._mapping[f"{self._prefix}-probe"] = now

    def finished(self) -> dict[int, Tensor]:
        """The blocks that were finished before, by their numbers."""
        found = ((i, self._mapping.get(key)) for i, key in enumerate(self._keys))
        return {index: block for index, block in found if block is not None}

    def put(self, index: int, block: Tensor) -> None:
        """Keep a finished block."""
        if self._active:
            self._mapping[self._keys[index]] = block
