"""Every run gets the pictures that its pair and data allow, and a report from its folder alone."""

import re
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TutorialPair, bernoulli_pair, bits, hierarchical_pair

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.runs import pictures
from pyro_vae.runs.directory import Run

fit = partial(pv.fit, batch_size=20, epochs=1, progress=False)
ALWAYS = {"bound.png", "graph_model.png", "graph_guide.png"}
OF_A_PAIR = {
    "reconstructions.png",
    "samples.png",
    "interpolations.png",
    "traversals.png",
    "latents.png",
}


@pytest.fixture(autouse=True)
def _graphviz():
    """Graphs are drawn by another program, which need not be there."""
    graphviz = pytest.importorskip("graphviz")
    try:
        graphviz.version()
    except graphviz.ExecutableNotFound:
        pytest.skip("graphviz is not installed")


def drawn(run: Path) -> set[str]:
    """Names of the pictures, each of which is a PNG of a sensible size."""
    for path in run.glob("*.png"):
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG\r\n\x1a\n"), path.name
        assert 30 < width < 5000, path.name
        assert 30 < height < 5000, path.name
    return {path.name for path in run.glob("*.png")}


def shown(run: Path) -> int:
    """The number of pictures within the report, which refers to nothing outside itself."""
    page = (run / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    return page.count('src="data:image/png;base64,')


def images() -> pv.Split:
    """Labelled bits of 4 x 4 pixels."""
    x = torch.rand(3, 40, 4, 4).round()
    return pv.load_data(tuple(x), labels=tuple(torch.randint(0, 3, (3, 40))))


def test_two_latents_have_a_manifold_and_labels_colour_them(tmp_path, monkeypatch):
    coloured = []
    latents = pictures.plots.latents

    def watched(points: Any, labels: Any = None, explained: Any = None) -> Any:
        coloured.append((np.asarray(points).shape, labels, explained))
        return latents(points, labels, explained)

    monkeypatch.setattr(pictures.plots, "latents", watched)
    data, run = images(), tmp_path / "run"
    assert data.labels is not None
    fit(*bernoulli_pair(16), data, out=run)
    assert drawn(run) == ALWAYS | OF_A_PAIR | {"manifold.png"}
    assert shown(run) == 9
    ((shape, labels, explained),) = coloured
    assert shape == (40, 2)
    assert labels.tolist() == data.labels.test.tolist()
    assert explained is None


def test_more_latents_are_shown_by_principal_components_and_data_without_a_shape_as_curves(
    tmp_path,
):
    run = tmp_path / "run"
    fit(*bernoulli_pair(9, latent_dim=3), bits(40), out=run)
    assert Run(run).config["data"].get("image_shape") is None
    assert drawn(run) == ALWAYS | OF_A_PAIR
    assert shown(run) == 8


def test_one_latent_has_neither(tmp_path):
    run = tmp_path / "run"
    fit(*bernoulli_pair(9, latent_dim=1), bits(40), out=run)
    assert drawn(run) == ALWAYS | OF_A_PAIR - {"latents.png"}


def test_a_pair_of_two_arguments_has_reconstructions_only(tmp_path):
    encoder = pv.Conditional(pv.networks.mlp(12, (2, 2)), pv.families.normal)
    likelihood = pv.Conditional(pv.networks.mlp(5, (1, 9)), pv.families.bernoulli)
    model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
    run = tmp_path / "run"
    fit(model, guide, (bits(40), torch.rand(40, 3)), out=run)
    assert drawn(run) == ALWAYS | {"reconstructions.png"}
    assert shown(run) == 4


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_very_few_data_are_enough(tmp_path, size):
    run = tmp_path / "run"
    fit(*bernoulli_pair(), bits(size), batch_size=1, out=run)
    between = {"interpolations.png"} if size > 1 else set()
    assert drawn(run) == ALWAYS | OF_A_PAIR - {"interpolations.png"} | between | {"manifold.png"}


def test_a_foreign_pair_has_the_pictures_too(tmp_path):
    foreign, run = TutorialPair(), tmp_path / "run"
    fit(foreign.model, foreign.guide, bits(40), out=run)
    assert drawn(run) == ALWAYS | OF_A_PAIR | {"manifold.png"}


def test_a_hierarchical_pair_has_its_bound_its_graphs_and_a_report(tmp_path):
    model, guide, _ = hierarchical_pair()
    run = tmp_path / "run"
    x = bits(40).double()
    fit(model, guide, x, out=run)
    assert drawn(run) == ALWAYS
    assert shown(run) == 3
    pv.evaluate_run(run, data=x, model=model, guide=guide, num_particles=3, progress=False)
    assert drawn(run) == ALWAYS | {"evidence.png"}
    assert shown(run) == 4


def test_everything_is_drawn_again_from_the_folder_alone(tmp_path, capsys):
    run = tmp_path / "run"
    fit(*bernoulli_pair(16), images(), out=run)
    before = {name: (run / name).read_bytes() for name in drawn(run)}
    for path in [*run.glob("*.png"), run / "report.html"]:
        path.unlink()
    moved = run.rename(tmp_path / "moved")
    assert main(["report", str(moved)]) == 0
    assert capsys.readouterr().out.strip() == str(moved / "report.html")
    assert drawn(moved) == set(before)
    assert shown(moved) == len(before)
    # The noise of the pictures is seeded, so that they are the same ones.
    assert {name: (moved / name).read_bytes() for name in before} == before


def test_the_curves_of_a_foreign_run_are_drawn_again_and_the_rest_is_explained(tmp_path, capsys):
    foreign, run = TutorialPair(), tmp_path / "run"
    fit(foreign.model, foreign.guide, bits(40), out=run)
    for path in run.glob("*.png"):
        path.unlink()
    assert main(["report", str(run)]) == 0
    assert "Only the curves are drawn anew" in capsys.readouterr().err
    assert drawn(run) == {"bound.png"}
    assert shown(run) == 1


def test_the_callers_random_state_is_left_alone(tmp_path):
    pair, x = bernoulli_pair(), bits(40)
    before = torch.get_rng_state()
    fit(*pair, x, out=tmp_path / "run")
    assert torch.get_rng_state().equal(before)
