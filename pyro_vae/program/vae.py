"""The common pair of programs, and what one does with a trained pair.

``Model`` and ``Guide`` are for the common case. ``encode``, ``decode``, ``reconstruct`` and
``generate`` take any pair: they read the sites of Pyro traces.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pyro
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae.context import at_rest, device_of, on_device, seeded
from pyro_vae.program.conditional import Conditional
from pyro_vae.program.recipe import recorded

__all__ = ["Guide", "Model", "decode", "encode", "generate", "reconstruct"]

Program = Callable[..., Any]
Site = Any


@recorded
class Model(PyroModule):
    r"""The generative program :math:`p(z)\,p(x|z)`, with sites ``z`` and ``x`` in plate ``data``.

    Args:
        prior: Module whose ``forward()`` returns p(z), of ``batch_shape ()``; or a ``Conditional``,
            whose ``forward(*context)`` returns p(z|context), e.g. of labels.
        likelihood: Module whose ``forward(z, *context)`` returns p(x|z), or p(x|z, context).

    Example:
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> model = pv.Model(pv.priors.StandardNormal(2), likelihood)
        >>> model(5).shape
        torch.Size([5, 9])
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        if not isinstance(prior, nn.Module):
            raise TypeError(
                "Model: expected prior to be a module whose forward() returns a distribution, such "
                f"as priors.StandardNormal(50), got {type(prior).__name__}."
            )
        self.prior = prior
        self.likelihood = likelihood

    def forward(self, x: Tensor | int, *context: Tensor) -> Tensor:
        """Score data, or draw them.

        Args:
            x: Data ``(B, D)``, or the number of data to draw.
            context: What else the likelihood sees, and a conditional prior, ``(B, C)`` each.

        Returns:
            The data ``(B, D)``, observed or drawn.
        """
        size, observed = (x, None) if isinstance(x, int) else (len(x), x)
        # Pyro's mark of a site that is drawn but stands for data, as poutine.uncondition sets it.
        drawn: Any = {"was_observed": True} if observed is None else None
        given = context if isinstance(self.prior, Conditional) else ()
        with pyro.plate("data", size, dim=-1):
            z = pyro.sample("z", self.prior(*given))
            return pyro.sample("x", self.likelihood(z, *context), obs=observed, infer=drawn)


@recorded
class Guide(PyroModule):
    """The inference program q(z|x), with site ``z`` in plate ``data``.

    Args:
        encoder: Module whose ``forward(x, *context)`` returns q(z|x).

    Example:
        >>> guide = pv.Guide(pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal))
        >>> guide(torch.zeros(5, 9)).shape
        torch.Size([5, 2])
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """Draw latents.

        Args:
            x: Data ``(B, D)``.
            context: What else the encoder sees, ``(B, C)`` each.

        Returns:
            One draw ``(B, Z)`` from q(z|x).
        """
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", self.encoder(x, *context))


def encode(guide: Program, *args: Any, seed: int = 0) -> Any:
    """The posterior approximation q(z|x) of any guide.

    Args:
        guide: A Pyro guide.
        args: What it takes, e.g. data ``(B, D)``.
        seed: Seed of the draws on which later latents of a hierarchical guide depend.

    Returns:
        The distribution of the guide's only latent site (``batch_shape (B,)``), or where there
        are several a dict from the site's name to its distribution.

    Example:
        >>> guide = pv.Guide(pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal))
        >>> pv.encode(guide, torch.zeros(5, 9)).mean.shape
        torch.Size([5, 2])
    """
    with at_rest(guide), seeded(seed, device=device_of(guide)):
        trace = poutine.trace(guide).get_trace(*on_device(args, device_of(guide)))
    return _only("guide", {name: site["fn"] for name, site in _latents(trace)})


def decode(model: Program, z: Tensor | dict[str, Tensor], *args: Any) -> Any:
    """The likelihood p(x|z) of any model at given latents.

    Args:
        model: A Pyro model.
        z: Latents ``(B, Z)`` of its only latent site, or a dict by the sites' names.
        args: What the model takes; observed values count for their shapes alone. Without, the
            number of data, which is what ``Model`` takes.

    Returns:
        The distribution of the only observed site, or a dict by the sites' names.

    Raises:
        ValueError: The model has several latent sites and ``z`` is one tensor, or ``z`` names a
            site that the model lacks.

    Example:
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> model = pv.Model(pv.priors.StandardNormal(2), likelihood)
        >>> pv.decode(model, torch.zeros(5, 2)).mean.shape
        torch.Size([5, 9])
    """
    device = device_of(model)
    if isinstance(z, Tensor):
        args = args or (len(z),)
        with at_rest(model), seeded(0, device=device):
            names = [name for name, _ in _latents(_drawn(model, on_device(args, device)))]
        if len(names) != 1:
            raise ValueError(
                f"decode: z is one tensor, but the model has the latent sites {names}; give a "
                "dict with a tensor for each."
            )
        z = {names[0]: z}
    args = args or (len(next(iter(z.values()))),)
    values = on_device(tuple(z.values()), device)
    given = poutine.condition(model, dict(zip(z, values, strict=True)))
    with at_rest(model), seeded(0, device=device):
        trace = poutine.trace(given).get_trace(*on_device(args, device))
    sites = dict(_samples(trace))
    if unknown := [name for name in z if name not in sites]:
        # Pyro would draw the latent that was meant, and nobody would notice.
        latent = [name for name, site in sites.items() if name in z or not _is_data(site)]
        raise ValueError(
            f"decode: z names {unknown}, but the model has the latent sites {latent}; give a "
            "tensor for each by its name."
        )
    data = {name: site["fn"] for name, site in _data(trace) if name not in z}
    return _only("model", data)


def reconstruct(
    model: Program,
    guide: Program,
    *args: Any,
    draw: bool = False,
    seed: int = 0,
) -> Any:
    """Encode data, and decode one draw from q(z|x).

    Args:
        model: A Pyro model.
        guide: Its guide.
        args: What they take, e.g. data ``(B, D)``.
        draw: Draw from p(x|z) instead of taking its mean.
        seed: Seed of all draws; the caller's random state is left alone.

    Returns:
        ``(B, D)``: the mean of p(x|z) or a draw from it, for the only observed site, or a dict by
        the sites' names.

    Example:
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        >>> model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> pv.reconstruct(model, guide, torch.ones(5, 9)).shape
        torch.Size([5, 9])
    """
    device = device_of(model, guide)
    args = on_device(args, device)
    with at_rest(model, guide), seeded(seed, device=device):
        guide_trace = poutine.trace(guide).get_trace(*args)
        replayed = poutine.replay(model, trace=guide_trace)
        trace = poutine.trace(poutine.uncondition(replayed) if draw else replayed).get_trace(*args)
    return _only("model", _values(trace, draw=draw))


def generate(model: Program, *args: Any, draw: bool = False, seed: int = 0) -> Any:
    """Generate data: latents from the prior, then the mean of p(x|z) or a draw from it.

    Args:
        model: A Pyro model.
        args: For a ``Model``, the number of data. For a model of your own, what it takes:
            observed values count for their shapes alone.
        draw: Draw from p(x|z) instead of taking its mean.
        seed: Seed of all draws; the caller's random state is left alone.

    Returns:
        ``(B, D)`` for the only observed site, or a dict by the sites' names.

    Example:
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> pv.generate(pv.Model(pv.priors.StandardNormal(2), likelihood), 3, draw=True).shape
        torch.Size([3, 9])
    """
    device = device_of(model)
    with at_rest(model), seeded(seed, device=device):
        trace = _drawn(model, on_device(args, device))
    return _only("model", _values(trace, draw=draw))


def _drawn(model: Program, args: tuple[Any, ...]) -> poutine.Trace:
    return poutine.trace(poutine.uncondition(model)).get_trace(*args)


def _samples(trace: poutine.Trace) -> Iterator[tuple[str, Site]]:
    for name, site in trace.nodes.items():
        if site.get("type") == "sample" and not site_is_subsample(site):
            yield name, site


def _is_data(site: Site) -> bool:
    return site["is_observed"] or site["infer"].get("was_observed", False)


def _data(trace: poutine.Trace) -> Iterator[tuple[str, Site]]:
    return ((name, site) for name, site in _samples(trace) if _is_data(site))


def _latents(trace: poutine.Trace) -> Iterator[tuple[str, Site]]:
    return ((name, site) for name, site in _samples(trace) if not _is_data(site))


def _values(trace: poutine.Trace, *, draw: bool) -> dict[str, Tensor]:
    return {name: site["value"] if draw else _mean(name, site["fn"]) for name, site in _data(trace)}


def _mean(name: str, distribution: Any) -> Tensor:
    try:
        return distribution.mean
    except NotImplementedError as error:
        raise ValueError(
            f"site {name!r}: its distribution has no mean in closed form; ask for draw=True."
        ) from error


def _only(program: str, by_site: dict[str, Any]) -> Any:
    if not by_site:
        raise ValueError(
            f"the {program} has no site to read: a guide needs a latent site, and a model an "
            "observed one (call a model of your own with data of the right shape)."
        )
    return next(iter(by_site.values())) if len(by_site) == 1 else by_site
