"""The pictures and the report of a run, drawn from its folder and its pair alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from pyro import poutine
from torch import Tensor

from pyro_vae.context import at_rest, device_of, on_device, seeded
from pyro_vae.evidence.evaluation import Evaluation
from pyro_vae.inference.handlers import Program, latent_sites
from pyro_vae.program.vae import decode, encode, generate, reconstruct
from pyro_vae.runs import plots, tiles
from pyro_vae.runs.canvas import save
from pyro_vae.runs.directory import Run, atomically
from pyro_vae.runs.report import write_report
from pyro_vae.runs.trust import trust

__all__ = ["draw_evidence", "draw_run"]

NUM_SHOWN = 10
NUM_SAMPLES = 64
NUM_STEPS = 11
GRID = 20


def draw_run(run: Run, model: Program | None, guide: Program | None) -> Path:
    """Draw every picture that this run allows, and write its report.

    Args:
        run: The run directory.
        model: The trained model, or None where it can't be had: then only the bound is drawn.
        guide: Its guide, or None.

    Returns:
        The path of ``report.html``.
    """
    records, _ = run.read_metrics()
    if records:
        averaged = run.config["options"].get("ema_decay") is not None
        save(plots.bound(records, averaged=averaged), run.path / "bound.png")
    if model is not None and guide is not None:
        examples = run.read_arrays("examples.npz")
        args = tuple(
            torch.as_tensor(examples[f"arg{i}"])
            for i in range(len(examples))
            if f"arg{i}" in examples
        )
        image_shape = run.config["data"].get("image_shape")
        with seeded(0, device=device_of(model, guide)):
            if args:
                _draw_pair(run, model, guide, args, examples.get("labels"), image_shape)
            _draw_graphs(run, model, guide, args)
    return write_report(run.path)


def draw_evidence(run: Run, found: Evaluation, summary: dict[str, Any]) -> None:
    """Draw the histogram of an evaluation, and what of it is to be trusted.

    Args:
        run: The run directory.
        found: The evaluation.
        summary: What stands in ``evidence.json``.
    """
    figure = plots.evidence(
        found.value.numpy(),
        summary["log_evidence"],
        summary["mean_standard_error"],
        summary["sampling_error"],
        name=summary["quantity"],
    )
    save(figure, run.path / "evidence.png")
    save(trust(found), run.path / "trust.png")


def _draw_pair(
    run: Run,
    model: Program,
    guide: Program,
    args: tuple[Tensor, ...],
    labels: np.ndarray | None,
    image_shape: list[int] | None,
) -> None:
    """Pictures of a pair with one latent and one observed site; others have too many to show."""
    x = args[0]
    shape = None if image_shape is None else (image_shape[0], image_shape[1])
    if not _infers(model, guide, args):  # p(x) itself has draws, and nothing to encode
        if len(args) == 1 and x.dim() == 2:
            draws = _generated(model, x, draw=True)
            save(tiles.samples(_array(draws), shape), run.path / "samples.png")
        return
    q = encode(guide, *args)
    shown = tuple(a[_spread(len(a), NUM_SHOWN)] for a in args)
    means = reconstruct(model, guide, *shown)
    if isinstance(q, dict) or not isinstance(means, Tensor) or x.dim() != 2:
        return
    if q.event_dim != 1 or means.shape != shown[0].shape:
        return
    draws = reconstruct(model, guide, *shown, draw=True)

    def draw(name: str, figure: Figure) -> None:
        save(figure, run.path / name)

    draw(
        "reconstructions.png",
        tiles.reconstructions(
            _array(x[_spread(len(x), NUM_SHOWN)]), _array(means), _array(draws), shape
        ),
    )
    if len(args) > 1:
        return  # a model of several arguments can't be asked for data without them
    z = q.mean if _has_mean(q) else q.sample()
    mean_of = _decoder(model, x)
    draw("samples.png", tiles.samples(_array(_generated(model, x)), shape))
    if len(z) > 1:
        half = min(len(z) // 2, 5)
        ends = z[_spread(len(z), 2 * half)]
        steps = torch.linspace(0, 1, NUM_STEPS, device=z.device)[:, None]
        ways = torch.lerp(ends[:half, None], ends[half:, None], steps)
        draw("interpolations.png", tiles.interpolations(mean_of(ways), shape))
    _draw_traversals(draw, mean_of, z, shape)
    _draw_latents(draw, mean_of, z, labels, shape)


def _draw_traversals(
    draw: Callable[[str, Figure], None], mean_of: Any, z: Tensor, shape: tuple[int, int] | None
) -> None:
    """Vary the latents that differ most between data, from -3 to 3, the others as in one datum."""
    spread = z.std(0) if len(z) > 1 else torch.ones_like(z[0])
    dims = spread.argsort(descending=True)[:NUM_SHOWN]
    steps = torch.linspace(-3, 3, NUM_STEPS, device=z.device)
    rows = z[0].repeat(len(dims), NUM_STEPS, 1)
    for row, dim in enumerate(dims):
        rows[row, :, dim] = steps
    names = [f"z{int(dim) + 1}" for dim in dims]
    draw("traversals.png", tiles.traversals(mean_of(rows), shape, names, steps.cpu().numpy()))


def _draw_latents(
    draw: Callable[[str, Figure], None],
    mean_of: Any,
    z: Tensor,
    labels: np.ndarray | None,
    shape: tuple[int, int] | None,
) -> None:
    if z.shape[1] == 2:
        quantiles = torch.linspace(0.5 / GRID, 1 - 0.5 / GRID, GRID, device=z.device)
        ticks = torch.special.ndtri(quantiles)
        grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1)
        draw("manifold.png", tiles.manifold(mean_of(grid), shape, ticks.cpu().numpy()))
        draw("latents.png", plots.latents(_array(z), labels))
    elif z.shape[1] > 2 and len(z) > 2:
        centred = (z - z.mean(0)).double()
        left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
        share = singular.square() / singular.square().sum()
        points = left[:, :2] * singular[:2]
        draw("latents.png", plots.latents(_array(points), labels, _array(share[:2])))


def _draw_graphs(run: Run, model: Program, guide: Program, args: tuple[Tensor, ...]) -> None:
    """The graphs of both programs, where graphviz is installed; it is no loss where it isn't."""
    try:
        import graphviz
    except ImportError:
        return
    data = on_device(tuple(a[:2] for a in args), device_of(model, guide))
    for name, program in (("graph_model.png", model), ("graph_guide.png", guide)):
        with at_rest(model, guide):
            graph: Any = pyro.render_model(program, model_args=data)
        try:
            picture = graph.pipe(format="png")
        except (graphviz.ExecutableNotFound, graphviz.CalledProcessError):
            return
        with atomically(run.path / name) as file:
            file.write(picture)


def _decoder(model: Program, like: Tensor) -> Callable[[Tensor], np.ndarray]:
    def mean_of(z: Tensor) -> np.ndarray:
        flat = z.reshape(-1, z.shape[-1])
        given = like[torch.zeros(len(flat), dtype=torch.long)]
        p = decode(model, flat, given)
        return _array(p.mean).reshape(*z.shape[:-1], -1)

    return mean_of


def _infers(model: Program, guide: Program, args: tuple[Tensor, ...]) -> bool:
    """Whether the guide has a latent to draw."""
    with at_rest(guide):
        trace = poutine.trace(guide).get_trace(*on_device(args, device_of(model, guide)))
    return any(True for _ in latent_sites(trace))


def _generated(model: Program, like: Tensor, *, draw: bool = False) -> Tensor:
    return generate(model, like[torch.zeros(NUM_SAMPLES, dtype=torch.long)], draw=draw)


def _has_mean(distribution: Any) -> bool:
    try:
        return bool(distribution.mean.isfinite().all())
    except NotImplementedError:
        return False


def _spread(size: int, count: int) -> Tensor:
    return torch.linspace(0, size - 1, min(size, count)).round().long()


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().numpy()
