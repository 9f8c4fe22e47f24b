"""What ``fit`` is handed, held against what it expects, before anything is trained or written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from pyro_vae.context import at_rest
from pyro_vae.data import Split
from pyro_vae.inference.averaging import check_decay
from pyro_vae.inference.structure import inspect
from pyro_vae.inference.svi import SVI
from pyro_vae.runs.config import Data

__all__ = ["as_tuple", "check_alike", "check_options", "check_values", "set_up"]


def check_options(
    epochs: int,
    batch_size: int,
    patience: int | None,
    max_seconds: float | None,
    optimizer: Any,
    ema_decay: float | None,
    *,
    resume: bool,
    out: str | Path | None,
) -> None:
    """Refuse options that make no sense, alone or together."""
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}.")
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds: expected more than 0 seconds, got {max_seconds}.")
    if ema_decay is not None:
        check_decay(ema_decay)
    if resume and out is None:
        raise ValueError("resume: say with out= which run directory to go on with.")
    if isinstance(optimizer, Optimizer | PyroOptim) or not (
        optimizer is None or callable(optimizer)
    ):
        raise TypeError(
            "optimizer: fit expects a factory such as lambda params: torch.optim.Adam(params, "
            f"lr=1e-3), got {type(optimizer).__name__}; pv.SVI takes optimizers of every kind."
        )


def as_tuple(data: Any, name: str) -> tuple[Tensor, ...]:
    """The data as a tuple of tensors of equal length, all of them finite."""
    if not isinstance(data, Tensor | tuple | list):
        raise TypeError(
            f"{name}: expected a Split, a tensor or a tuple of tensors, got {type(data).__name__}; "
            "load_data makes a Split of arrays and files."
        )
    tensors = (data,) if isinstance(data, Tensor) else tuple(data)
    if not tensors:
        raise ValueError(f"{name}: expected a tensor or a tuple of tensors, got an empty tuple.")
    for i, tensor in enumerate(tensors):
        which = name if len(tensors) == 1 else f"{name}[{i}]"
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{which}: expected a tensor, got {type(tensor).__name__}; load_data makes a Split "
                "of arrays and files."
            )
        if tensor.dim() == 0 or len(tensor) == 0:
            raise ValueError(f"{which}: expected at least one datum, got {tuple(tensor.shape)}.")
        if len(tensor) != len(tensors[0]):
            raise ValueError(
                f"{which}: expected {len(tensors[0])} rows as in {name}[0], got {len(tensor)}."
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad = ~tensor.isfinite()
            row = int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
            raise ValueError(
                f"{which}: {int(bad.sum())} of {bad.numel()} values are NaN or infinite, the first "
                f"in row {row}; remove those rows, or put any legal value there (nan_to_num()) and "
                "say by a mask that it is missing (pv.Masked)."
            )
    return tensors


def check_alike(train: tuple[Tensor, ...], valid: tuple[Tensor, ...]) -> None:
    """Refuse validation data of other shapes than the training data."""
    expected, given = ([tuple(t.shape[1:]) for t in part] for part in (train, valid))
    if expected != given:
        raise ValueError(
            f"valid: expected tensors with data of shapes {expected} as in the training data, got "
            f"{given}."
        )


def set_up(svi: SVI, data: Data, batch: tuple[Tensor, ...]) -> None:
    """Inspect the pair on a first minibatch, and hold its likelihood against the data."""
    if not isinstance(data, Split):
        svi.setup(*batch)
        _check_observes(svi)
        return
    try:
        with pyro.validation_enabled(is_validate=data.is_density):
            svi.setup(*batch)
    except ValueError:
        # The data know better than the site which likelihoods would do: let them speak first.
        with pyro.validation_enabled(is_validate=False):
            svi.setup(*batch)
        _check_likelihood(svi, data)
        raise
    _check_observes(svi)
    _check_likelihood(svi, data)


def _check_observes(svi: SVI) -> None:
    structure = getattr(svi.objective, "structure", None)
    if structure is not None and not structure.observed:
        raise ValueError(
            "fit: the model observes nothing, so there is nothing to fit; it needs a site with "
            "obs=. Are model and guide in their order, fit(model, guide, data)?"
        )


def check_values(svi: SVI, parts: Sequence[tuple[Tensor, ...]]) -> None:
    """Hold all data against the supports of the observed sites, as a step never does."""
    if getattr(svi.objective, "structure", None) is None:
        return
    for part in parts:
        for start in range(0, len(part[0]), 1000):
            batch = tuple(tensor[start : start + 1000] for tensor in part)
            with at_rest(svi.model, svi.guide):
                inspect(svi.model, svi.guide, batch, {})


def _check_likelihood(svi: SVI, data: Split) -> None:
    structure = getattr(svi.objective, "structure", None)
    if structure is None:
        return
    for name in structure.observed:
        site = structure.model_trace.nodes[name]
        if site["value"].shape[-1:] == data.train.shape[-1:] and site["mask"] is None:
            data.check_likelihood(site["fn"], name)
