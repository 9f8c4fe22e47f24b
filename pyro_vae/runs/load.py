"""Take a trained pair out of a run directory."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyro import poutine

from pyro_vae.context import device_of, seeded
from pyro_vae.inference.handlers import Program
from pyro_vae.inference.parameters import Parameters
from pyro_vae.inference.structure import inspect
from pyro_vae.program.recipe import build
from pyro_vae.runs.directory import Run

__all__ = ["Pair", "load"]


class Pair(NamedTuple):
    """A trained model and its guide."""

    model: Any
    guide: Any


def load(
    run: str | Path,
    *,
    model: Program | None = None,
    guide: Program | None = None,
    last: bool = False,
) -> Pair:
    """The pair of a run, with the parameters of its best validation bound (else of its last epoch).

    Under ``fit(ema_decay=)`` these are averages; without validation data, the last ones.

    Nothing that lies in the run is executed: the pair is built again from the recipe in
    ``config.json`` out of this package's own pieces, and the checkpoint holds tensors only.

    Args:
        run: The run directory.
        model: For a pair that has parts of your own: the model as it was built for the run.
        guide: Its guide, likewise.
        last: Take those that training has come to, whichever validation bound was the best.

    Returns:
        The pair, on the CPU if it was built here.

    Raises:
        FileNotFoundError: The directory holds no run, or no checkpoint.
        ValueError: The checkpoint is damaged or of another pair, or the pair has parts of your
            own and was not given.

    Example:
        >>> import tempfile
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        >>> likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        >>> pair = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
        >>> bits = torch.rand(100, 9).round()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = pv.fit(*pair, bits, epochs=1, batch_size=50, out=folder, progress=False).run
        ...     model, guide = pv.load(run)
        >>> pv.reconstruct(model, guide, bits).equal(pv.reconstruct(*pair, bits))
        True
    """
    folder = Run.open(run)
    if (model is None) != (guide is None):
        raise ValueError("load: give both model= and guide=, or neither.")
    if model is None or guide is None:
        recipe = folder.config.get("pair")
        if recipe is None:
            raise ValueError(
                f"{folder.path}: the pair has parts that pyro_vae did not make, so it can't be "
                "built from the run alone; build it as before and pass model= and guide= in Python."
            )
        with seeded(0):  # initial values are drawn, to be replaced: not from the caller's stream
            model, guide = build(recipe)
        assert model is not None
        assert guide is not None
    state = folder.load_checkpoint(device_of(model, guide) or "cpu")
    best = None if last else state["best"]
    saved = (best or state.get("averages") or state)["parameters"]
    parameters = Parameters(model, guide)
    if saved["params"]:
        # Parameters of pyro.param come into being at the first call: call once.
        examples = folder.read_arrays("examples.npz")
        if not examples:
            raise ValueError(
                f"{folder.path}: examples.npz is missing, without which a pair with pyro.module or "
                "pyro.param can't be called for its parameters; restore it from a copy of the run."
            )
        args = [torch.as_tensor(examples[key][:2]) for key in sorted(examples) if key[:3] == "arg"]
        with poutine.trace(param_only=True) as capture:
            inspect(model, guide, tuple(args), {})
        parameters.collect(capture.trace)
    parameters.load_state_dict(saved)
    return Pair(model, guide)
