"""Loops over a few bits, and what two of them are compared by."""

import io
from typing import Any

import pyro
import torch
from helpers import TutorialPair, bernoulli_pair, leaves
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

import pyro_vae as pv
from pyro_vae.inference.loop import Loop

NUM_TRAIN, BATCH = 23, 10  # 10 + 10 + 3


def library() -> tuple[Any, Any]:
    return bernoulli_pair()


def tutorial() -> tuple[Any, Any]:
    pair = TutorialPair()
    return pair.model, pair.guide


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def sgd(rate: float, **options: Any) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, **options)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    train, valid = (torch.rand(n, 9, generator=generator).round() for n in (NUM_TRAIN, 7))
    return train, valid


def loop_of(
    make: Any = library,
    optimizer: Any = adam,
    loss: Any = None,
    schedule: Any = None,
    **options: Any,
) -> Loop:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide = make()
    train, valid = data()
    svi = pv.SVI(model, guide, optimizer, loss=loss)
    svi.setup(train[:BATCH])
    scheduler = None if schedule is None else schedule(svi.optimizer)
    pyro.set_rng_seed(1)
    options = {"batch_size": BATCH, "seed": 5} | options
    return Loop(svi, (train,), (valid,), scheduler=scheduler, **options)


def values(loop: Loop) -> dict[str, Tensor]:
    found = leaves(loop.svi.model, loop.svi.guide)
    return {name: leaf.detach().clone() for name, leaf in found.items()}


def without_seconds(loop: Loop) -> list[str]:
    """The records to the last digit; as text, in which NaN equals NaN."""
    return [repr({k: v for k, v in r.items() if k != "seconds"}) for r in loop.records]


def run_epochs(loop: Loop, epochs: int) -> None:
    for _ in range(epochs):
        loop.run_epoch()


def written(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a run directory keeps it: nothing is executed when it is read."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


SCHEDULES: dict[str, Any] = {
    "constant": None,
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=5),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
}
