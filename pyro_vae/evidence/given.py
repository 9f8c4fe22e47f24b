"""A pair given its global latents: what all data share is drawn once, and then held.

A latent outside the plate over the data, such as the weights of a decoder, has no particle per
datum. With a value for it the pair is one like any other, of which every datum has weights.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.context import device_of, seeded
from pyro_vae.evidence.blocks import data_blocks
from pyro_vae.evidence.particles import Arguments
from pyro_vae.inference.data_plate import (
    check_auxiliary,
    data_frame,
    data_size,
    outside_latents,
)
from pyro_vae.inference.handlers import (
    Program,
    Trace,
    latent_sites,
    sample_sites,
    unscaled_log_prob,
)
from pyro_vae.inference.structure import inspect, kind_of

__all__ = ["Draw", "GlobalLatents", "given"]


@dataclass(frozen=True)
class Draw:
    """A draw of the global latents from the guide.

    Attributes:
        values: The value of each global site of the guide, by name.
        log_weight: log p(theta) - log q(theta) in nats, a 0-d tensor in float64.
    """

    values: dict[str, Tensor]
    log_weight: Tensor


class GlobalLatents:
    """The latents of a pair that stand outside the plate over the data.

    Args:
        model: A Pyro model.
        guide: Its guide.
        args: What both take, on their device.
        data_plate: Name of the plate over the data; see ``log_weights``.

    Attributes:
        names: The guide's global sites, in its order.
        plate: Name of the plate over the data.
        points: Those of the model to which the guide gives a value without a density.

    Raises:
        ValueError: There is none; a site is global in one program and not in the other; the
            guide has one that the model lacks; or their densities depend on the data. The message
            names the site.
    """

    def __init__(
        self, model: Program, guide: Program, args: Arguments, data_plate: str | None
    ) -> None:
        self.model, self.guide = model, guide
        self._block = next(data_blocks(args))
        structure = inspect(model, guide, self._block, {})
        self.plate: str = data_frame(structure, data_size(self._block), data_plate).name
        in_model, in_guide = (
            outside_latents(trace, self.plate)
            for trace in (structure.model_trace, structure.guide_trace)
        )
        for name, _ in latent_sites(structure.model_trace):
            if (name in in_model) != (name in in_guide):
                inside, outside = ("guide", "model") if name in in_model else ("model", "guide")
                raise ValueError(
                    f"site {name!r} stands in the plate {self.plate!r} in the {inside}, but "
                    f"outside it in the {outside}; put it inside in both, or outside in both."
                )
        if not in_model:
            raise ValueError(
                f"the model has no latent outside the plate {self.plate!r}, so every datum has "
                "weights of its own: use log_evidence, or log_weights."
            )
        check_auxiliary(in_model, in_guide)
        self.names = tuple(in_guide)
        one, other = self.draw("one"), self.draw("other")
        self._check_free_of_data(one)
        self.points = [
            name
            for name in in_model
            if kind_of(in_guide[name]["fn"]) == "Delta"
            and torch.equal(one.values[name], other.values[name])
        ]

    def draw(self, *stream: int | str) -> Draw:
        """Draw the global latents under a seed of its own."""
        device = device_of(self.model, self.guide)
        with seeded(*stream, device=device), pyro.validation_enabled(is_validate=False):
            trace: Trace = poutine.trace(self.guide).get_trace(*self._block)
            values = {name: trace.nodes[name]["value"].detach() for name in self.names}
            return Draw(values, self._log_weight(values, self._block))

    def pair(self) -> tuple[Program, Program]:
        """Model and guide that take the values of a draw as their last argument."""
        return given(self.model, self.names), given(self.guide, self.names)

    def _log_weight(self, values: dict[str, Tensor], args: Arguments) -> Tensor:
        log_p, log_q = (
            self._log_density(program, values, args) for program in (self.model, self.guide)
        )
        return log_p - log_q

    def _log_density(self, program: Program, values: dict[str, Tensor], args: Arguments) -> Tensor:
        """The unscaled log-density of values of the global latents, in one of the programs."""
        trace = poutine.trace(poutine.condition(program, data=values)).get_trace(*args)
        total: Any = 0.0
        for name, site in sample_sites(trace):
            if name not in values:
                continue
            log_prob = unscaled_log_prob(site).double().sum()
            if log_prob.isnan() or log_prob == torch.inf:
                role = "model" if program is self.model else "guide"
                raise ValueError(
                    f"site {name!r} of the {role}: its log-density is NaN or infinite at a draw "
                    "of the guide's. Did training diverge? Check the pair's parameters."
                )
            total = total + log_prob
        return total

    def _check_free_of_data(self, draw: Draw) -> None:
        """Refuse a guide whose global latents would be others for every block of data."""
        size = data_size(self._block)
        half = tuple(
            a[size // 2 :] if isinstance(a, Tensor) and a.dim() > 0 and len(a) == size else a
            for a in self._block
        )
        with (
            seeded("free of data", device=device_of(self.model, self.guide)),
            pyro.validation_enabled(is_validate=False),
        ):
            other = self._log_weight(draw.values, half)
        if not torch.allclose(other, draw.log_weight, rtol=1e-6, equal_nan=True):
            raise ValueError(
                f"the densities of the latents {list(self.names)}, which all data share, change "
                "with the data that are handed over. They have to be the same for every block of "
                "data: keep what the guide has learned of them in parameters."
            )


def given(program: Program, names: Collection[str]) -> Program:
    """A program whose latents of some names are fixed to values, its last argument, and hidden.

    Args:
        program: A model or a guide.
        names: Sites of which it has some.

    Returns:
        A program over ``(*args, values)``; what stands around it sees nothing of those sites.
    """

    def fixed(*args: Any) -> Any:
        *own, values = args
        with poutine.block(hide=list(names)), poutine.condition(data=values):
            return program(*own)

    return fixed
