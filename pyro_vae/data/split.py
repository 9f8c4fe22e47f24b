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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_vae.data.kinds import (
    PARTS,
    Kind,
    check_part,
    check_support,
    densities,
    describe_values,
)
from pyro_vae.data.preparation import Preparable

__all__ = ["Labels", "Split"]


class Labels(NamedTuple):
    """The class of each datum, int64 of shape (N,), part by part."""

    train: Tensor
    valid: Tensor
    test: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Split(Preparable):
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
            drawn_later = part == "train" and self.refresh is not None
            check_part(
                part,
                getattr(self, part),
                dim=self.train.shape[-1],
                kind=Kind.UNIT_INTERVAL if drawn_later else self.kind,
                num_levels=self.num_levels,
                labels=None if self.labels is None else getattr(self.labels, part),
            )
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
