"""What a run directory says of how it was made, and the data it keeps for pictures."""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.data import Split
from pyro_vae.inference.handlers import Program
from pyro_vae.inference.svi import SVI
from pyro_vae.program.recipe import NotDescribedError, describe
from pyro_vae.runs.directory import Run, finite, versions

__all__ = [
    "Data",
    "check_weights",
    "continued",
    "hyperparameters",
    "run_config",
    "schedule",
    "write_examples",
]

NUM_EXAMPLES = 1000
_PLAIN = (bool, int, float, str, type(None))
# How an optimizer computes, which may depend on the machine; and what a schedule says of the rate.
_NOT_COMPARED = {"capturable", "differentiable", "foreach", "fused", "initial_lr"}

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


def hyperparameters(optimizer: Any) -> dict[str, Any]:
    """What an optimizer was made with, as plain values; nothing of how fast it computes."""
    if isinstance(optimizer, PyroOptim):
        given = optimizer.pt_optim_args
        return _plain(given) if isinstance(given, dict) else {}
    found = {}
    for number, group in enumerate(getattr(optimizer, "param_groups", [])):
        of_group = f" of group {number}" if number else ""
        found |= {
            f"{key}{of_group}": v for key, v in _plain(group).items() if key not in _NOT_COMPARED
        }
    return found


def schedule(scheduler: LRScheduler | None) -> dict[str, Any]:
    """What a learning-rate schedule was made with, as plain values."""
    return {} if scheduler is None else _plain(scheduler.state_dict())


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON gives back as it was."""
    found = {}
    for key, value in state.items():
        value = list(value) if isinstance(value, tuple) else value
        parts = value if isinstance(value, list) else [value]
        if all(isinstance(part, _PLAIN) and finite(part) == part for part in parts):
            found[key] = value
    return found


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
    before, now = old["options"], new["options"]
    for key in ("loss", "lr_schedule", "batch_size", "seed", "max_grad_norm", "ema_decay"):
        _check_same(key, before.get(key), now[key])
    for key, what in (("hyperparameters", "the optimizer's"), ("schedule", "lr_schedule's")):
        was, given = before.get(key) or {}, now[key]
        for name in sorted(was.keys() & given.keys()):  # other versions of torch have others
            _check_same(f"{what} {name}", was[name], given[name])
    grown = {key: new["options"][key] for key in ("epochs", "kl_weight")}
    return {**old, "options": {**old["options"], **grown}}


def check_weights(records: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> None:
    """Refuse to go on with another KL weight than that of the epochs that are done."""
    for record, weight in zip(records, weights, strict=False):
        _check_same(f"the kl_weight of epoch {record['epoch']}", record["kl_weight"], weight)


def _check_same(what: str, was: Any, given: Any) -> None:
    if was != given:
        raise ValueError(
            f"resume: the run was started with {what}={was}, now it is {given}; go on with the "
            "same, or start another run."
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
