"""What a run directory says of how it was made, and the data it keeps for pictures."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data import Split
from pyro_vae.inference.handlers import Program
from pyro_vae.inference.svi import SVI
from pyro_vae.program.recipe import NotDescribedError, describe
from pyro_vae.runs.directory import Run, versions

__all__ = ["Data", "write_config", "write_examples"]

NUM_EXAMPLES = 1000

Data = Split | Tensor | Sequence[Tensor]


def write_config(
    run: Run,
    model: Program,
    guide: Program,
    data: Data,
    svi: SVI,
    options: dict[str, Any],
    notes: dict[str, Any],
) -> None:
    """Write ``config.json``: data, pair, options and versions."""
    if isinstance(data, Split):
        described = data.describe()
    else:
        tensors = [data] if isinstance(data, Tensor) else data
        shapes = [list(t.shape) for t in tensors]
        described = {"name": "tensors", "source": None, "shapes": shapes, "steps": []}
    try:
        pair = describe(model, guide)
    except NotDescribedError:
        pair = None
    run.write_json(
        "config.json",
        {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "data": described,
            "pair": pair,
            "parameters": sum(p.numel() for p in svi.parameters.named.values()),
            "options": options,
            "notes": notes,
            "versions": versions(),
        },
    )


def write_examples(
    run: Run, data: Data, train: tuple[Tensor, ...], valid: tuple[Tensor, ...] | None
) -> None:
    """Keep some held-out data, spread evenly, so that pictures need nothing but the run."""
    arrays: dict[str, np.ndarray] = {}
    source = (data.test,) if isinstance(data, Split) else (valid or train)
    rows = torch.linspace(0, len(source[0]) - 1, min(NUM_EXAMPLES, len(source[0]))).round().long()
    for i, tensor in enumerate(source):
        arrays[f"arg{i}"] = tensor[rows.to(tensor.device)].cpu().numpy()
    if isinstance(data, Split) and data.labels is not None:
        arrays["labels"] = data.labels.test[rows].numpy()
    run.write_arrays("examples.npz", **arrays)
