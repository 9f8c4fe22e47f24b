"""What values are, and which likelihoods are densities for them.

A likelihood is a density for a set of data where its measure is theirs (counting for levels,
Lebesgue for real values) and its support holds every one of them.
"""

import enum
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

__all__ = [
    "PARTS",
    "Kind",
    "check_finite",
    "check_part",
    "check_support",
    "check_values",
    "densities",
    "describe_values",
]

PARTS = ("train", "valid", "test")
_CHECKED_AT_ONCE = 2**22  # values, 16 MB


class Kind(enum.Enum):
    """What the values of a datum are."""

    BINARY = "binary values"
    LEVELS = "integer levels"
    UNIT_INTERVAL = "values in [0, 1]"
    REAL = "real values"


def describe_values(kind: Kind, num_levels: int | None) -> str:
    """The kind in words, with the range of the levels.

    >>> describe_values(Kind.LEVELS, 17)
    'integer levels 0..16'
    """
    return kind.value + (f" 0..{num_levels - 1}" if num_levels else "")


def densities(kind: Kind, num_levels: int | None, *, raw: bool = True) -> str:
    """The likelihoods that are densities for values of a kind, for people whose choice was none.

    Args:
        kind: What the values are.
        num_levels: L of `Kind.LEVELS`.
        raw: Whether the preparation methods can still be called.
    """
    binarized = (
        "families.bernoulli after data.binarize(), data.binarize_static() or "
        "data.binarize_dynamic(); data.intensities() is the deliberate override for a Bernoulli "
        "on grey levels, after which figures are scores and no log p(x)"
    )
    if kind is Kind.BINARY:
        return "Use families.bernoulli"
    if kind is Kind.LEVELS and num_levels is not None:
        return (
            f"Use families.binomial with total_count={num_levels - 1}, families.categorical with "
            f"{num_levels} params per dimension, families.discretized with "
            f"num_levels={num_levels}, families.normal or families.laplace after "
            f"data.dequantize(), or {binarized}"
        )
    if kind is Kind.REAL:
        return "Use families.normal, families.laplace or families.student_t"
    continuous = "Use families.continuous_bernoulli, families.normal or families.laplace"
    return f"{continuous}, or {binarized}" if raw else continuous


def check_part(
    part: str,
    values: Tensor,
    *,
    dim: int,
    kind: Kind,
    num_levels: int | None,
    labels: Tensor | None,
) -> None:
    """Refuse a part that is empty, misshapen, not finite, or not of its kind.

    Args:
        part: "train", "valid" or "test".
        values: Its values, to be float32 of shape (N, D).
        dim: D.
        kind: What the values have to be.
        num_levels: L of `Kind.LEVELS`.
        labels: Its labels, to be int64 of shape (N,), or None.
    """
    argument = f"data.{part}"
    if values.ndim != 2 or values.numel() == 0:
        raise ValueError(
            f"{argument}: expected shape (N, D) with at least one datum and one dimension, "
            f"got {tuple(values.shape)}"
        )
    if values.dtype != torch.float32 or values.device.type != "cpu":
        raise ValueError(
            f"{argument}: expected float32 on the CPU, got {values.dtype} on {values.device}; "
            "load_data converts"
        )
    if values.shape[1] != dim:
        raise ValueError(
            f"{argument}: expected {dim} dimensions as in data.train, got {values.shape[1]}"
        )
    check_finite(argument, values)
    check_values(argument, values, kind, num_levels)
    if labels is not None and (labels.shape != values.shape[:1] or labels.dtype != torch.int64):
        raise ValueError(
            f"labels.{part}: expected int64 of shape ({len(values)},), one for each datum, got "
            f"{labels.dtype} of shape {tuple(labels.shape)}"
        )


def check_finite(argument: str, values: Tensor) -> None:
    """Raise a ValueError that says where `values` (N, D) are not finite.

    >>> check_finite("data", torch.tensor([[0.0], [torch.nan]]))
    Traceback (most recent call last):
    ...
    ValueError: data: expected finite values, got 1 of 2 that is not, the first in row 1, ...
    """
    if torch.stack(torch.aminmax(values)).isfinite().all():
        return
    bad = ~values.isfinite()
    row, column = bad.nonzero()[0].tolist()
    count = int(bad.sum())
    raise ValueError(
        f"{argument}: expected finite values, got {count:,} of {values.numel():,} that "
        f"{'is' if count == 1 else 'are'} not, the first in row {row}, column {column} "
        f"({values[row, column]:g} in float32); drop these data or fill the gaps"
    )


def check_values(argument: str, values: Tensor, kind: Kind, num_levels: int | None) -> None:
    """Raise a ValueError that says where finite `values` (N, D) are not what `kind` says.

    >>> check_values("data", torch.tensor([[0.0, 0.5]]), Kind.BINARY, None)
    Traceback (most recent call last):
    ...
    ValueError: data: expected binary values, got 0.5 in row 0, column 1; ...
    """
    if kind is Kind.BINARY:
        outside = (values != 0) & (values != 1)
    elif kind is Kind.LEVELS and num_levels is not None:
        outside = (values < 0) | (values >= num_levels) | (values != values.round())
    elif kind is Kind.UNIT_INTERVAL:
        outside = (values < 0) | (values > 1)
    else:
        return
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{argument}: expected {describe_values(kind, num_levels)}, got "
            f"{values[row, column]:g} in row {row}, column {column}; change the values, or say "
            "what they are by kind= and num_levels="
        )


def check_support(
    distribution: Distribution,
    site: str,
    parts: Iterable[tuple[str, Callable[[], Tensor]]],
    *,
    kind: Kind,
    num_levels: int | None,
    advice: str,
) -> None:
    """Raise a ValueError where a likelihood is no density for the data.

    Args:
        distribution: p(x | z) for any batch of z.
        site: The observed site.
        parts: Names of the parts and what gives their values (N, D).
        kind: What the values are.
        num_levels: L of `Kind.LEVELS`.
        advice: The choices that are densities; it ends the message.
    """
    family = distribution
    while isinstance(family, Independent):
        family = family.base_dist
    refusal = (
        f"site {site!r}: {type(family).__name__} is no density for "
        f"{describe_values(kind, num_levels)}"
    )
    try:
        support: Any = distribution.support
    except NotImplementedError:
        support = None
    if support is None:
        raise ValueError(f"{refusal} as far as it says: give the distribution a `support`")
    if support.is_discrete != (kind in (Kind.BINARY, Kind.LEVELS)):
        measure = "discrete" if support.is_discrete else "continuous"
        raise ValueError(f"{refusal}: it is {measure}. {advice}")
    for part, values in parts:
        outside = ~_inside(distribution, support, values())
        if outside.any():
            raise ValueError(
                f"{refusal}: {int(outside.sum()):,} of {len(outside):,} data in data.{part} lie "
                f"outside of its support, the first in row {int(outside.int().argmax())}. {advice}"
            )


def _inside(distribution: Distribution, support: Any, values: Tensor) -> Tensor:
    """Which rows of `values` (N, D) lie in the support, bool (N,).

    The bounds of a support may have the distribution's batch shape (*, B). So the data are laid
    out as (blocks, 1, ..., B, *event_shape), which broadcasts against any of them.
    """
    batch, event = tuple(distribution.batch_shape), tuple(distribution.event_shape)
    if not event:  # independence over D is declared by a plate: the last batch dimension
        batch, event = batch[:-1], tuple(values.shape[1:])
    rows = batch[-1] if batch else 1
    ones = (1,) * (len(batch) - 1)
    at_once = max(1, _CHECKED_AT_ONCE // max(1, math.prod(batch) * values.shape[1]))
    blocks = min(at_once, math.ceil(len(values) / rows))
    device = _device(distribution)
    inside = []
    for start in range(0, len(values), blocks * rows):
        index = torch.arange(start, start + blocks * rows).clamp(max=len(values) - 1)
        laid_out = values[index].to(device).reshape(blocks, *ones, rows, *event)
        fits = support.check(laid_out).movedim(max(1, len(batch)), 1)
        inside.append(fits.reshape(blocks, rows, -1).all(-1).flatten().cpu())
    return torch.cat(inside)[: len(values)]


def _device(distribution: Distribution) -> torch.device:
    """Where the first tensor of a distribution lives."""
    for value in vars(distribution).values():
        if isinstance(value, Tensor):
            return value.device
        if isinstance(value, Distribution):
            return _device(value)
    return torch.device("cpu")
