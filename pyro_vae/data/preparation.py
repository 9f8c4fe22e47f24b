"""Explicit preparation: what may be done to values before they are modelled, and in which words.

Each step is taken at most once, from raw values, and returns new data that carry a sentence to be
printed beside every figure and whatever it takes to make a figure of the prepared values one of
the values as they were.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from pyro_vae.data.kinds import PARTS, Kind, densities, describe_values
from pyro_vae.data.noise import fixed_bernoulli, fixed_in_cell, fresh_in_cell

__all__ = ["PREPARATIONS", "Preparable"]

PREPARATIONS = (
    "binarize",
    "binarize_static",
    "binarize_dynamic",
    "dequantize",
    "standardize",
    "intensities",
)


class Preparable:
    """The preparation methods of a `Split`, which has the attributes named here."""

    train: Tensor
    kind: Kind
    num_levels: int | None
    name: str
    preparation: tuple[str, ...]
    steps: tuple[tuple[str, dict[str, Any]], ...]

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
        num_levels, dim = self.num_levels or 0, self.train.shape[1]
        parts = {part: getattr(self, part) / num_levels for part in PARTS}
        for index, part in enumerate(PARTS[1:], start=1):
            parts[part] = fixed_in_cell(parts[part], num_levels, seed, index)
        sentence = (
            f"uniform dequantization of {num_levels} levels: training data drawn anew in every "
            f"minibatch, validation and test data drawn once, under seed {seed}; the "
            f"log-density minus {dim} log {num_levels} nats bounds log P(levels) from below"
        )
        return self._prepared(
            ("dequantize", {"seed": seed}),
            sentence,
            kind=Kind.UNIT_INTERVAL,
            refresh=partial(fresh_in_cell, num_levels=num_levels),
            log_jacobian=-dim * math.log(num_levels),
            **parts,
        )

    def standardize(
        self, *, loc: Sequence[float] | None = None, scale: Sequence[float] | None = None
    ) -> Self:
        r"""Shift and scale every dimension: y = (x - m) / s.

        The density of x is that of y divided by \prod_d s_d, so that `log_jacobian` is
        -\sum_d log s_d, in nats per datum, and log p(y) + `log_jacobian` is log p(x) exactly. What
        a model generates is in units of y; m and s stand in `steps`.

        Args:
            loc: m, a number a dimension; by default the mean of `train`. To prepare new data like
                old ones, give the old numbers.
            scale: s, likewise; by default the deviation of `train`, and 1 for a dimension that
                never changes there.
        """
        self._require("standardize", Kind.UNIT_INTERVAL, Kind.REAL)
        train = self.train.double()
        m = train.mean(0) if loc is None else train.new_tensor(loc)
        s = train.std(0, correction=0) if scale is None else train.new_tensor(scale)
        if m.shape != train.shape[1:] or s.shape != train.shape[1:]:
            raise ValueError(
                f"loc, scale: expected {train.shape[1]} numbers each, one for each dimension, got "
                f"shapes {tuple(m.shape)} and {tuple(s.shape)}"
            )
        s = torch.where(s > 0, s, torch.ones_like(s))
        parts = {part: ((getattr(self, part) - m) / s).float() for part in PARTS}
        sentence = (
            "every dimension shifted and scaled by mean and deviation of the training data; "
            "figures are densities of the values as they were"
        )
        return self._prepared(
            ("standardize", {"loc": m.tolist(), "scale": s.tolist()}),
            sentence,
            kind=Kind.REAL,
            log_jacobian=-s.log().sum().item(),
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
            self,  # type: ignore[type-var]
            preparation=preparation,
            steps=(step,),
            num_levels=None,
            **changes,
        )
