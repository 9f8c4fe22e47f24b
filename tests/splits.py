"""Splits that are made by hand."""

from typing import Any

import torch

from pyro_vae.data import Kind, Split


def split_of(values: Any, kind: Kind, num_levels: int | None = None, **fields: Any) -> Split:
    values = torch.as_tensor(values, dtype=torch.float32)
    fields = {"train": values, "valid": values, "test": values, "name": "toy"} | fields
    return Split(kind=kind, num_levels=num_levels, **fields)


def levels(num_data: int = 4_000, dim: int = 3, num_levels: int = 17) -> Split:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(num_levels, (num_data, dim), generator=generator)
    return split_of(values, Kind.LEVELS, num_levels)
