"""What the data are: three parts, the kind of their values, and what was done to prepare them.

Whether a number may be called log p(x) depends on the values as much as on the model: a Bernoulli
is no density for grey levels, and a normal is none for integers. A `Split` therefore knows what
its values are, prepares them only when told to, writes down every step in words that are printed
beside the figures, and refuses a likelihood that is no density for them.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_vae.data.kinds import (
    Kind,
    check_finite,
    check_support,
    check_values,
    densities,
    describe_values,
)
from pyro_vae.data.noise import fixed_bernoulli, fixed_in_cell, fresh_in_cell

__all__ = ["PARTS", "PREPARATIONS", "Kind", "Labels", "Split"]

PARTS = ("train", "valid", "test")
PREPARATIONS = ("binarize", "binarize_static", "binarize_dynamic", "dequantize", "intensities")


class Labels(NamedTuple):
    """The class of each datum, int64 of shape (N,), part by part."""

    train: Tensor
    valid: Tensor
    test: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Split:
    """Training, validation and test data, the kind of their values and their history.

    Attributes:
        train: The training part, float32 of shape (N, D) on the CPU; `valid` and `test` likewise.
        valid: The validation part.
        test: The test part.
        labels: The classes, where there are any; no model sees them.
        kind: What the values are.
        num_levels: L, for `Kind.LEVELS` only: the values are 0, ..., L - 1.
        name: What the set is called in reports.
        image_shape: (height, width) where a datum is an image, with height * width = D.
        preparation: Sentences that belong beside every number made from these data.
        source: The arguments with which `load_data` gives the raw set again; None for values that
            were handed over in memory.
        steps: The preparation methods applied since, with their arguments.
        refresh: Applied to every *training* minibatch, on any device, with noise from torch's
            global random state; None where training values are used as they are.
        is_density: False after `intensities`: then no figure is a log p(x).
        log_jacobian: Nats per datum to add to the log-density of the prepared values for (a bound
            on) the log-probability of the original levels.

    Raises:
        ValueError: A part is empty, misshapen or not finite, or is not what `kind` says.

    >>> levels = torch.tensor([[0.0, 3.0], [2.0, 1.0]])
    >>> data = Split(
    ...     train=levels, valid=levels, test=levels, kind=Kind.LEVELS, num_levels=4, name="toy"
    ... )
    >>> data
    toy: 2 training, 2 validation and 2 test data of 2 dimensions, integer levels 0..3.
    >>> data.binarize().train
    tensor([[0., 1.],
            [1., 0.]])
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    labels: Labels | None = None
    kind: Kind
    num_levels: int | None = None
    name: str
    image_shape: tuple[int, int] | None = None
    preparation: tuple[str, ...] = ()
    source: dict[str, Any] | None = None
    steps: tuple[tuple[str, dict[str, Any]], ...] = ()
    refresh: Callable[[Tensor], Tensor] | None = None
    is_density: bool = True
    log_jacobian: float = 0.0

    def __post_init__(self) -> None:
        if (self.kind is Kind.LEVELS) != (self.num_levels is not None):
            raise ValueError(
                "num_levels: expected the number of levels for Kind.LEVELS and None for every "
                f"other kind, got {self.num_levels} for {self.kind}"
            )
        for part in PARTS:
            self._check_part(part, getattr(self, part))
        if self.image_shape is not None and math.prod(self.image_shape) != self.dim:
            raise ValueError(
                f"image_shape: expected a height and a width with product {self.dim}, "
                f"got {self.image_shape}"
            )

    @property
    def dim(self) -> int:
        """The number of values in a datum, D."""
        return self.train.shape[1]

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """One paragraph for people: name, sizes, kind of the values, preparation."""
        image = f" ({self.image_shape[0]} x {self.image_shape[1]})" if self.image_shape else ""
        sizes = (
            f"{len(self.train):,} training, {len(self.valid):,} validation and "
            f"{len(self.test):,} test data of {self.dim} dimensions{image}"
        )
        return (
            "; ".join(
                (
                    f"{self.name}: {sizes}, {describe_values(self.kind, self.num_levels)}",
                    *self.preparation,
                )
            )
            + "."
        )

    def describe(self) -> dict[str, Any]:
        """What a run directory keeps of the data, fit for JSON; `restore` reads it back.

        Returns:
            Name, source, steps, kind, sizes and preparation, and under `fingerprint` the SHA-256
            of the three prepared parts.
        """
        digest = hashlib.sha256()
        for part in PARTS:
            values = getattr(self, part).numpy()
            digest.update(f"{part} {values.shape} ".encode())
            digest.update(np.ascontiguousarray(values).data)
        return {
            "name": self.name,
            "source": self.source,
            "steps": [[step, dict(arguments)] for step, arguments in self.steps],
            "kind": self.kind.name,
            "num_levels": self.num_levels,
            "image_shape": list(self.image_shape) if self.image_shape else None,
            "dim": self.dim,
            "sizes": {part: len(getattr(self, part)) for part in PARTS},
            "preparation": list(self.preparation),
            "is_density": self.is_density,
            "log_jacobian": self.log_jacobian,
            "fingerprint": digest.hexdigest(),
        }

    def binarize(self, threshold: float = 0.5) -> Self:
        """Set a value to 1 where it exceeds a fraction of the largest level, to 0 elsewhere.

        Args:
            threshold: The fraction, in [0, 1).
        """
        self._require("binarize", Kind.LEVELS, Kind.UNIT_INTERVAL)
        if not 0 <= threshold < 1:
            raise ValueError(
                f"threshold: expected a fraction of the largest level in [0, 1), got {threshold}"
            )
        parts = {part: (values > threshold).float() for part, values in self._intensities()}
        sentence = f"binarized at {threshold} of the largest level"
        step = ("binarize", {"threshold": threshold})
        return self._prepared(step, sentence, kind=Kind.BINARY, **parts)

    def binarize_static(self, seed: int = 0) -> Self:
        """Draw every value once, x ~ Bernoulli(level / largest level), in all three parts.

        Args:
            seed: Fixes the draw.
        """
        self._require("binarize_static", Kind.LEVELS, Kind.UNIT_INTERVAL)
        parts = {
            part: fixed_bernoulli(values, seed, index)
            for index, (part, values) in enumerate(self._intensities())
        }
        sentence = f"static binarization: every value drawn once, under seed {seed}"
        step = ("binarize_static", {"seed": seed})
        return self._prepared(step, sentence, kind=Kind.BINARY, **parts)

    def binarize_dynamic(self, seed: int = 0) -> Self:
        """Draw the training values anew in every minibatch, the other two parts once.

        `train` keeps the intensities in [0, 1], and `refresh` draws x ~ Bernoulli(intensity).

        Args:
            seed: Fixes the draw of validation and test data.
        """
        self._require("binarize_dynamic", Kind.LEVELS, Kind.UNIT_INTERVAL)
        parts = dict(self._intensities())
        for index, part in enumerate(PARTS[1:], start=1):
            parts[part] = fixed_bernoulli(parts[part], seed, index)
        sentence = (
            f"dynamic binarization: the {len(self.train):,} training data drawn anew in every "
            f"minibatch, validation and test data drawn once, under seed {seed}"
        )
        return self._prepared(
            ("binarize_dynamic", {"seed": seed}),
            sentence,
            kind=Kind.BINARY,
            refresh=torch.bernoulli,
            **parts,
        )

    def dequantize(self, seed: int = 0) -> Self:
        r"""Spread every level over its cell: y = (x + u) / L with u uniform on [0, 1).

        A density p of y gives the levels the probabilities

            P(x) = \int p(y) dy over the cell of x = L^{-D} \int_{[0, 1)^D} p((x + u) / L) du,

        and by Jensen's inequality

            E_u[log p((x + u) / L)] - D log L <= log P(x).

        `log_jacobian` is -D log L, so that the log-density of the prepared values plus
        `log_jacobian` is on average a lower bound on log P(x), in nats. `train` keeps x / L, the
        lower corner of the cell, and `refresh` draws u anew in every minibatch; validation and
        test data are drawn once.

        Args:
            seed: Fixes the draw of validation and test data.
        """
        self._require("dequantize", Kind.LEVELS)
        num_levels = self.num_levels or 0
        parts = {part: getattr(self, part) / num_levels for part in PARTS}
        for index, part in enumerate(PARTS[1:], start=1):
            parts[part] = fixed_in_cell(parts[part], num_levels, seed, index)
        sentence = (
            f"uniform dequantization of {num_levels} levels: training data drawn anew in every "
            f"minibatch, validation and test data drawn once, under seed {seed}; the "
            f"log-density minus {self.dim} log {num_levels} nats bounds log P(levels) from below"
        )
        return self._prepared(
            ("dequantize", {"seed": seed}),
            sentence,
            kind=Kind.UNIT_INTERVAL,
            refresh=partial(fresh_in_cell, num_levels=num_levels),
            log_jacobian=-self.dim * math.log(num_levels),
            **parts,
        )

    def intensities(self) -> Self:
        """Scale levels to [0, 1] and allow any likelihood: the deliberate override.

        The seeds' Bernoulli on grey levels, x log p + (1 - x) log(1 - p) with x in [0, 1], does
        not integrate to one. It may be trained and compared with itself; it is no log p(x).
        """
        self._require("intensities", Kind.LEVELS, Kind.UNIT_INTERVAL)
        sentence = "intensities in [0, 1], any likelihood allowed: figures are scores, no log p(x)"
        return self._prepared(
            ("intensities", {}),
            sentence,
            kind=Kind.UNIT_INTERVAL,
            is_density=False,
            **dict(self._intensities()),
        )

    def check_likelihood(self, distribution: Distribution, site: str) -> None:
        """Refuse a likelihood that is no density for these data.

        The support has to be discrete for binary values and levels, continuous for the others,
        and every value of the three parts has to lie in it. Nothing is checked after
        `intensities`. Bounds of the support that differ within the batch meet the data row by
        row, in turn.

        Args:
            distribution: p(x | z) as the observed site has it, for any batch of z.
            site: The name of the observed site.

        Raises:
            ValueError: With the name of the site and the likelihoods that are densities.
        """
        if not self.is_density:
            return
        event_shape = distribution.event_shape
        if event_shape and event_shape.numel() != self.dim:
            raise ValueError(
                f"site {site!r}: expected a likelihood of {self.dim} values a datum, as in "
                f"{self.name}, got event_shape {tuple(event_shape)}; give the network that makes "
                f"its params {self.dim} outputs each"
            )
        check_support(
            distribution,
            site,
            [(part, partial(self._as_scored, part)) for part in PARTS],
            kind=self.kind,
            num_levels=self.num_levels,
            advice=densities(self.kind, self.num_levels, raw=not self.steps),
        )

    def _as_scored(self, part: str) -> Tensor:
        """The values that a likelihood meets; one refreshed batch stands for a training part."""
        values = getattr(self, part)
        if part != "train" or self.refresh is None:
            return values
        with torch.random.fork_rng(devices=[]):
            return self.refresh(values[:1000])

    def _require(self, method: str, *kinds: Kind) -> None:
        if self.steps:
            raise ValueError(
                f"{method}: {self.name} is already prepared by {self.steps[0][0]}; call {method} "
                "on the raw data that load_data returns"
            )
        if self.kind not in kinds:
            raise ValueError(
                f"{method}: expected {' or '.join(kind.value for kind in kinds)}, got {self.name} "
                f"with {describe_values(self.kind, self.num_levels)}. "
                f"{densities(self.kind, self.num_levels)}"
            )

    def _intensities(self) -> list[tuple[str, Tensor]]:
        largest = 1 if self.num_levels is None else self.num_levels - 1
        return [(part, getattr(self, part) / largest) for part in PARTS]

    def _prepared(self, step: tuple[str, dict[str, Any]], sentence: str, **changes: Any) -> Self:
        preparation = (*self.preparation, sentence)
        return dataclasses.replace(
            self, preparation=preparation, steps=(step,), num_levels=None, **changes
        )

    def _check_part(self, part: str, values: Tensor) -> None:
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
        if values.shape[1] != self.dim:
            raise ValueError(
                f"{argument}: expected {self.dim} dimensions as in data.train, "
                f"got {values.shape[1]}"
            )
        check_finite(argument, values)
        drawn_later = part == "train" and self.refresh is not None
        kind = Kind.UNIT_INTERVAL if drawn_later else self.kind
        check_values(argument, values, kind, self.num_levels)
        if self.labels is not None:
            labels = getattr(self.labels, part)
            if labels.shape != values.shape[:1] or labels.dtype != torch.int64:
                raise ValueError(
                    f"labels.{part}: expected int64 of shape ({len(values)},), one for each "
                    f"datum, got {labels.dtype} of shape {tuple(labels.shape)}"
                )
