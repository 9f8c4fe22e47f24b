r"""Improve a guide for given data, datum by datum: semi-amortized inference.

Every latent of the guide gets a shift and a scale of its own for each datum,

.. math:: z = a_n + s_n \odot z_0, \quad z_0 \sim q(z|x_n), \quad
          \log q_n(z) = \log q(z_0|x_n) - \sum_d \log s_{nd},

which start at 0 and 1, where the guide is what it was, and climb the ELBO with the model and the
networks held. A diagonal normal becomes the best diagonal normal for each datum: the free q of
non-amortized inference. What the bound gains is what amortization had cost.

References: Kim et al., "Semi-amortized variational autoencoders" (2018); Cremer, Li and Duvenaud,
"Inference suboptimality in variational autoencoders" (2018).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import AffineTransform, constraints

from pyro_vae.context import at_rest, device_of, modules_of, on_device, seeded
from pyro_vae.inference.compiled import Compile
from pyro_vae.inference.data_plate import data_dim, data_size
from pyro_vae.inference.handlers import Program, Site, latent_sites
from pyro_vae.inference.structure import inspect, kind_of
from pyro_vae.inference.svi import SVI

__all__ = ["refine"]


def refine(
    model: Program,
    guide: Program,
    *args: Any,
    steps: int = 200,
    learning_rate: float = 0.05,
    num_particles: int = 1,
    batch_size: int = 500,
    seed: int = 0,
    data_plate: str | None = None,
    compile: Compile = "auto",
) -> tuple[Any, ...]:
    """A pair whose guide is refined for these data, and the arguments to call it with.

    Args:
        model: A Pyro model; it is left as it is.
        guide: Its guide; likewise. Its latents are real, and have a pathwise gradient.
        args: What both take; tensors that share the first one's leading dimension N are the data.
        steps: Gradient steps for each datum, the learning rate falling to zero.
        learning_rate: Of Adam, at the first step.
        num_particles: Draws per datum and step.
        batch_size: Data that are refined at a time; changes the noise alone.
        seed: Seed of the noise; the caller's random state is left alone.
        data_plate: Name of the plate over the data, where the observed sites share several.
        compile: Compile the step; see ``SVI``.

    Returns:
        ``(model, guide, *args, index)``: what ``log_evidence`` and the like take. The refined guide
        knows these data alone, by the index that is its last argument; the model ignores it.

    Raises:
        ValueError: A latent is discrete or bounded, has no pathwise gradient, or stands outside the
            plate over the data; the message names the site.

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> refined = pv.refine(model, guide, torch.ones(5, 9), steps=20)
        >>> pv.log_evidence(*refined, num_particles=10).value.shape
        torch.Size([5])
    """
    _check_options(steps=steps, num_particles=num_particles, batch_size=batch_size)
    args = on_device(args, device_of(model, guide))
    size = data_size(args)
    batch_size = min(batch_size, size)
    with at_rest(model, guide):
        structure = inspect(model, guide, _rows(args, size, 0, batch_size), {})
    dim = data_dim(structure, batch_size, data_plate)
    sites = dict(latent_sites(structure.guide_trace))
    for name, site in sites.items():
        _check(name, site)
    refined, held = _Refined(guide, sites, dim, size), _Held(model)
    loss = Trace_ELBO(num_particles=num_particles, vectorize_particles=num_particles > 1)
    block = _Refined(guide, sites, dim, batch_size)
    optimizer, svi = _stepper(held, block, loss, compile)
    for start in range(0, size, batch_size):
        rows = _rows(args, size, start, batch_size)
        count = data_size(rows)
        if count < batch_size:  # the last, smaller batch
            block = _Refined(guide, sites, dim, count)
            optimizer, svi = _stepper(held, block, loss, compile)
        _start_anew(block.tables(), optimizer)
        index = torch.arange(count, device=block.shift[0].device)
        with _only(block, held), seeded("refine", seed, start, device=index.device):
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * (1 - step / steps)
                svi.step(*rows, index)
        for whole, part in zip(refined.tables(), block.tables(), strict=True):
            whole.data[start : start + count] = part.data
    for table in refined.tables():
        table.requires_grad = False
    return (held, refined, *args, torch.arange(size, device=refined.shift[0].device))


class _Program(nn.Module):
    """A program as a module that holds the modules which the program reaches."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        if not isinstance(program, nn.Module):
            self.reached = nn.ModuleList(modules_of(program).values())


class _Held(_Program):
    """A model that ignores its last argument, the index of the data."""

    def forward(self, *args: Any) -> Any:
        return self.program(*args[:-1])


class _Refined(_Program):
    """A guide whose latents are shifted and scaled for each datum, by its index."""

    def __init__(self, guide: Program, sites: dict[str, Site], dim: int, size: int) -> None:
        super().__init__(guide)
        self.dim = dim
        self.names = list(sites)
        zeros = []
        for site in sites.values():
            shape = list(site["value"].shape)
            del shape[dim - site["fn"].event_dim]
            zeros.append(site["value"].new_zeros(size, *shape))
        self.shift = nn.ParameterList(zeros)
        self.log_scale = nn.ParameterList(z.clone() for z in zeros)

    def tables(self) -> list[nn.Parameter]:
        """What is learned, each (N, ...)."""
        return [*self.shift, *self.log_scale]

    def forward(self, *args: Any) -> Any:
        *given, index = args
        with _Move(self, index):
            return self.program(*given)


class _Move(Messenger):
    """Shift and scale the latents of a guide."""

    def __init__(self, refined: _Refined, index: Tensor) -> None:
        super().__init__()
        self.refined = refined
        self.index = index

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.refined.names or msg["is_observed"]:
            return
        number = self.refined.names.index(msg["name"])
        event_dim = msg["fn"].event_dim
        shift, log_scale = (
            self._rows(table[number], event_dim)
            for table in (self.refined.shift, self.refined.log_scale)
        )
        moved = AffineTransform(shift, log_scale.exp(), event_dim=event_dim)
        msg["fn"] = dist.TransformedDistribution(msg["fn"], [moved])

    def _rows(self, table: Tensor, event_dim: int) -> Tensor:
        rows = table.index_select(0, self.index)
        return rows.movedim(0, rows.dim() + self.refined.dim - event_dim)


def _check_options(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"refine: expected {name} >= 1, got {value}.")


def _check(name: str, site: Site) -> None:
    support = site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support not in (constraints.real, constraints.real_vector):
        raise ValueError(
            f"site {name!r}: expected real latents, which can be shifted and scaled, got a "
            f"{kind_of(site['fn'])} on {support}."
        )
    if not site["fn"].has_rsample:
        raise ValueError(
            f"site {name!r}: the guide draws it without a pathwise gradient "
            f"({kind_of(site['fn'])}), which refine needs."
        )


def _rows(args: tuple[Any, ...], size: int, start: int, count: int) -> tuple[Any, ...]:
    return tuple(
        a[start : start + count] if isinstance(a, Tensor) and a.dim() > 0 and len(a) == size else a
        for a in args
    )


def _stepper(
    held: "_Held", block: "_Refined", loss: Trace_ELBO, compile: Compile
) -> tuple[torch.optim.Optimizer, SVI]:
    optimizer = torch.optim.Adam(block.tables(), fused=True)
    return optimizer, SVI(held, block, optimizer, loss, compile=compile)


def _start_anew(tables: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """In place, so that a compiled step goes on with the next data."""
    held = [*tables, *(t for state in optimizer.state.values() for t in state.values())]
    for tensor in held:
        tensor.data.zero_()


@contextmanager
def _only(block: _Refined, held: _Held) -> Iterator[None]:
    """Gradients of the tables alone, everything in evaluation mode."""
    learned = {id(table) for table in block.tables()}
    parameters = [p for module in (block, held) for p in module.parameters()]
    before = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in learned)
        with at_rest(block, held), torch.enable_grad():
            yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
