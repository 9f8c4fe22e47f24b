"""The script of figures 4 and 5: its grid against the normal's shares, and that it goes on."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from scripts import runner

SCRIPT = Path(__file__).parents[1] / "experiments" / "aevb_manifold.py"
NAMES = runpy.run_path(str(SCRIPT))


run = runner(SCRIPT)


def test_each_point_of_the_plane_stands_for_an_equal_share_of_the_prior():
    points = NAMES["plane"](5)
    shares = torch.distributions.Normal(0.0, 1.0).cdf(points)
    torch.testing.assert_close(shares[2, :, 0], torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    torch.testing.assert_close(shares[:, 3, 1], torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1]))
    draws = torch.randn(40_000, 2, generator=torch.Generator().manual_seed(0))
    cells = (torch.distributions.Normal(0.0, 1.0).cdf(draws) * 5).long()
    counts = torch.bincount(cells[:, 0] * 5 + cells[:, 1], minlength=25)
    assert (counts - 1600).abs().max() < 5 * 1600**0.5


def test_every_image_stands_whole_in_its_place():
    images = torch.arange(2 * 3 * 20.0).view(2, 3, 20)
    canvas = NAMES["mosaic"](images, (4, 5))
    assert canvas.shape == (8, 15)
    for row in range(2):
        for column in range(3):
            cell = canvas[4 * row : 4 * row + 4, 5 * column : 5 * column + 5]
            assert torch.equal(cell.flatten(), images[row, column])


def test_means_are_those_of_the_decoder_at_each_point():
    model, _ = NAMES["build"](NAMES["KINDS"]["grey_digits"], 6, 2, 3, seed=0)
    z = NAMES["plane"](4)
    found = NAMES["means"](model, z)
    assert found.shape == (4, 4, 6)
    torch.testing.assert_close(found[1, 2], model.likelihood(z[1, 2]).mean)
    assert ((found > 0) & (found < 1)).all()


def test_it_trains_once_and_leaves_figures_and_picture(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    run(monkeypatch, "--smoke", "--out", str(out))
    figures = json.loads((out / "results.json").read_text())
    trained = [(row["data"], row["latent_dim"]) for row in figures["rows"]]
    assert trained == [("digits", 2), ("digits", 3), ("grey_digits", 2)]
    for row in figures["rows"]:
        assert row["log_evidence"]["value"] >= row["elbo"]
        assert row["epochs"] == 2
    assert (out / "aevb_manifold.png").stat().st_size > 1000
    assert "nats per datum, after 2 of 2 epochs" in capsys.readouterr().out
    run(monkeypatch, "--smoke", "--out", str(out))
    assert "nats per datum, after" not in capsys.readouterr().out
    assert json.loads((out / "results.json").read_text()) == figures


def test_a_mistake_is_one_line(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"aevb_manifold\.py: root: "):
        run(monkeypatch, "--data", "frey_faces", "--root", str(tmp_path))
