"""The script of figure 2: its variances and its prior against closed forms, and that it goes on."""

import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scripts import runner
from torch import Tensor, nn

import pyro_vae as pv

SCRIPT = Path(__file__).parents[1] / "experiments" / "aevb_bound.py"
NAMES = runpy.run_path(str(SCRIPT))


run = runner(SCRIPT)


def test_the_variance_of_both_estimators_is_the_exact_one():
    """q = N(m, s^2), p(z) = N(0, 1), p(x|z) = N(z, 1), z = m + s e, x = 0.5.

    By Monte Carlo the derivative for m is 2 z - x, for log s it is (2 z - x) s e - 1; with the KL
    in closed form z - x + m, and (z - x) s e + s^2 - 1.
    """
    m, s, x = 0.8, 0.3, 0.5

    def model(data: Tensor) -> None:
        with pyro.plate("data", 1):
            z = pyro.sample("z", dist.Normal(data.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(m, dtype=torch.float64))
            self.log_scale = nn.Parameter(torch.tensor(math.log(s), dtype=torch.float64))

        def forward(self, data: Tensor) -> None:
            with pyro.plate("data", 1):
                pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()))

    expected = [
        4 * s**2 + s**2 * (2 * m - x) ** 2 + 8 * s**4,
        s**2 + s**2 * (m - x) ** 2 + 2 * s**4,
    ]
    data = SimpleNamespace(test=torch.tensor([x], dtype=torch.float64), is_density=True)
    found = [NAMES["noise"](model, Guide(), data, 60, seed) for seed in range(6)]
    monte_carlo, closed, errors = torch.tensor(found, dtype=torch.float64).unbind(1)
    assert [monte_carlo.mean().item(), closed.mean().item()] == pytest.approx(expected, rel=0.25)
    # The error says how far ratios are from one another, as far as six of them tell.
    spread = (monte_carlo / closed).std()
    assert 0.4 < (errors.mean() / spread).item() < 2.5


def test_the_decay_of_the_weights_is_a_standard_normal_prior_once_in_an_epoch():
    model, guide = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizer = NAMES["adagrad"](model, guide, 0.1, 700)([])
    per_epoch = [group["weight_decay"] * 700 / NAMES["BATCH"] for group in optimizer.param_groups]
    assert per_epoch == pytest.approx([1.0, 0.0])


def test_the_thinned_curve_keeps_both_ends():

    records: Any = [{"epoch": i, "elbo": -i, "valid_elbo": -2 * i} for i in range(1, 2001)]
    curve = NAMES["thinned"](records, 50)
    assert len(curve["samples"]) <= 101
    assert (curve["samples"][0], curve["samples"][-1]) == (50, 100_000)
    assert curve["test"][-1] == -4000


def test_what_no_latents_reach_is_the_entropy_of_fitted_dimensions():
    data = pv.load_data("digits").binarize_static()
    p = data.test.double().mean(0)
    entropies = torch.special.entr(p) + torch.special.entr(1 - p)
    found = NAMES["without_latents"](NAMES["PANELS"]["digits"], data)
    assert found == pytest.approx(-entropies.sum().item(), abs=0.01)
    data = pv.load_data("digits").dequantize()
    normals = dist.Normal(data.test.mean(0), data.test.std(0, unbiased=False))
    found = NAMES["without_latents"](NAMES["PANELS"]["grey_digits"], data)
    assert found == pytest.approx(normals.log_prob(data.test).sum(-1).mean().item(), rel=1e-6)


def test_it_trains_once_and_leaves_figures_and_picture(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    run(monkeypatch, "--smoke", "--out", str(out))
    figures = json.loads((out / "results.json").read_text())
    rows = {row["name"]: row for row in figures["rows"]}
    assert len(rows) == 3
    for name, row in rows.items():
        assert row["epochs"] == row["of_epochs"] == 2
        assert 0 < row["test_bound"]["standard_error"] < row["test_bound"]["sampling_error"]
        assert figures["curves"][name]["samples"] == [row["num_train"], 2 * row["num_train"]]
        assert ("variance_gain" in row) == (row["method"] == "AEVB")
    assert "as_reported" in figures
    assert list(figures["without_latents"]) == ["grey_digits"]
    for row in figures["rows"]:
        above = row["test_bound"]["value"] - figures["without_latents"]["grey_digits"]
        assert figures["above_no_latents"][row["name"]] == pytest.approx(above)
    assert (out / "aevb_bound.png").stat().st_size > 1000
    assert "test nats per datum, 2 of 2 epochs" in capsys.readouterr().out
    before = (out / "results.json").read_text()
    run(monkeypatch, "--smoke", "--out", str(out))
    assert "nats per datum" not in capsys.readouterr().out
    assert json.loads((out / "results.json").read_text()) == json.loads(before)


def test_it_judges_the_last_parameters_and_not_those_of_the_best_test_bound(monkeypatch, tmp_path):
    fit, rows = pv.fit, []

    def spoiling(model: Any, guide: Any, *args: Any, **options: Any) -> pv.History:
        history = fit(model, guide, *args, **options)
        with torch.no_grad():  # as if the best had been others
            for parameter in (*model.parameters(), *guide.parameters()):
                parameter.zero_()
        return history

    for number, way in enumerate((fit, spoiling)):
        monkeypatch.setattr("pyro_vae.fit", way)
        run(monkeypatch, "--smoke", "--methods", "AEVB", "--out", str(tmp_path / str(number)))
        found = json.loads((tmp_path / str(number) / "results.json").read_text())["rows"]
        rows.append(
            [(row["train_bound"], row["test_bound"], row["variance_gain"]) for row in found]
        )
    assert rows[0] == rows[1] != []


def test_a_mistake_is_one_line(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"aevb_bound\.py: root: "):
        run(monkeypatch, "--data", "frey_faces", "--root", str(tmp_path))
