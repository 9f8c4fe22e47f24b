"""What a run directory says of how it was made, and the data it keeps for pictures."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.data import Split
from pyro_vae.inference.handlers import Program
from pyro_vae.inference.svi import SVI
from pyro_vae.program.recipe import NotDescribedError, describe
from pyro_vae.runs.directory import Run, finite, versions

__all__ = [
    "Data",
    "algorithm",
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
    valid: Sequence[Tensor] | None,
    svi: SVI,
    options: dict[str, Any],
    notes: dict[str, Any],
) -> dict[str, Any]:
    """What goes into ``config.json``: data, pair, options and versions."""
    if isinstance(data, Split):
        described = data.describe()
    else:
        tensors = [data] if isinstance(data, Tensor) else data
        described = {
            "name": "tensors",
            "source": None,
            "shapes": [list(t.shape) for t in tensors],
            "steps": [],
            "fingerprint": _digest(tensors),
            "valid": None if valid is None else _digest(valid),
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


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    return digest.hexdigest()


def algorithm(optimizer: Any) -> str:
    """What an optimizer is called; a subclass as torch's optimizer that it refines."""
    classes = type(optimizer).__mro__
    of_torch = (c for c in classes if c.__module__.startswith("torch.optim") and c is not Optimizer)
    return next(of_torch, classes[0]).__name__


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
        The old config, with the new number of epochs, KL weights and patience.

    Raises:
        ValueError: The data, the pair, or an option on which every number depends, are others.
    """
    if old["data"].get("fingerprint") != new["data"]["fingerprint"]:
        raise ValueError(
            f"resume: the run was started with other data ({old['data'].get('name')}); go on with "
            "the same, or start another run."
        )
    valid = new["data"].get("valid")
    if old["data"].get("valid", valid) != valid:  # earlier versions did not write it down
        raise ValueError(
            "resume: the run was started with "
            + ("other validation data" if old["data"]["valid"] else "no validation data")
            + "; go on with the same, or start another run: bounds of different data don't compare."
        )
    _check_pair(old.get("pair"), new["pair"])
    before, now = old["options"], new["options"]
    _check_same("optimizer", before.get("algorithm", now["algorithm"]), now["algorithm"])
    for key in ("loss", "lr_schedule", "batch_size", "seed", "max_grad_norm", "ema_decay"):
        _check_same(key, before.get(key), now[key])
    for key, what in (("hyperparameters", "the optimizer's"), ("schedule", "lr_schedule's")):
        was, given = before.get(key) or {}, now[key]
        for name in sorted(was.keys() & given.keys()):  # other versions of torch have others
            _check_same(f"{what} {name}", was[name], given[name])
    first = (before.get("kl_weight") or now["kl_weight"])["first"]  # epoch 1 may be half done
    _check_same("the kl_weight of epoch 1", first, now["kl_weight"]["first"])
    grown = {key: new["options"][key] for key in ("epochs", "kl_weight", "patience")}
    return {**old, "options": {**old["options"], **grown}}


def _check_pair(old: dict[str, Any] | None, new: dict[str, Any] | None) -> None:
    """Refuse another pair, as far as its recipe tells; parts of one's own have none."""
    if old is None or new is None:
        return
    was, given = map(_without_values, (old, new))
    parts = zip_longest(was["nodes"], given["nodes"], fillvalue={"make": "nothing", "with": {}})
    for one, other in parts:
        _check_same("a part of the pair", one["make"], other["make"])
        for name in {**one["with"], **other["with"]}:
            there, here = (json.dumps(of["with"].get(name)) for of in (one, other))
            _check_same(f"{name} of a {one['make']}", there, here)
    _check_same("the parts of the pair", was["objects"], given["objects"])


def _without_values(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as JSON keeps it, without what tensors started at, which may have been drawn."""

    def bare(found: dict[str, Any]) -> dict[str, Any]:
        is_tensor = found.keys() == {"shape", "dtype", "fill"}
        return {k: v for k, v in found.items() if not (is_tensor and k == "fill")}

    return json.loads(json.dumps(recipe), object_hook=bare)


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
