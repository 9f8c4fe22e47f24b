"""What a run directory says of how it was made, and the data it keeps for pictures."""

import hashlib
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

__all__ = ["Data", "continued", "run_config", "write_examples"]

NUM_EXAMPLES = 1000

Data = Split | Tensor | Sequence[Tensor]


def run_config(
    model: Program,
    guide: Program,
    data: Data,
    svi: SVI,
    options: dict[str, Any],
    notes: dict[str, Any],
) -> dict[str, Any]:
    """What goes into ``config.json``: data, pair, options and versions."""
    if isinstance(data, Split):
        described = data.describe()
    else:
        tensors = [data] if isinstance(data, Tensor) else data
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
        described = {
            "name": "tensors",
            "source": None,
            "shapes": [list(t.shape) for t in tensors],
            "steps": [],
            "fingerprint": digest.hexdigest(),
        }
    try:
        pair = describe(model, guide)
    except NotDescribedError:
        pair = None
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": described,
        "pair": pair,
        "parameters": sum(p.numel() for p in svi.parameters.named.values()),
        "options": options,
        "notes": notes,
        "versions": versions(),
    }


def continued(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The config of a run that is taken up again.

    Args:
        old: The config with which the run was started.
        new: The config with which it is to go on.

    Returns:
        The old config, with the new number of epochs.

    Raises:
        ValueError: The data, or an option on which every number depends, are others.
    """
    if old["data"].get("fingerprint") != new["data"]["fingerprint"]:
        raise ValueError(
            f"resume: the run was started with other data ({old['data'].get('name')}); go on with "
            "the same, or start another run."
        )
    for key in ("loss", "lr_schedule", "batch_size", "seed", "max_grad_norm"):
        was, given = old["options"].get(key), new["options"][key]
        if was != given:
            raise ValueError(
                f"resume: the run was started with {key}={was}, now it is {given}; go on with "
                "the same, or start another run."
            )
    grown = {key: new["options"][key] for key in ("epochs", "kl_weight")}
    return {**old, "options": {**old["options"], **grown}}


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
