"""Full variational Bayes over a decoder's weights: the script, and the bound that it reports."""

import json
import runpy
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

PATH = Path(__file__).parents[1] / "experiments" / "full_vb.py"
SCRIPT = runpy.run_path(str(PATH))
X = torch.tensor([0.3, -1.2, 2.0, 0.7]).double().unsqueeze(-1)


def model(x: Tensor) -> None:
    """theta ~ N(0, 1), x_n ~ N(theta, 1)."""
    theta = pyro.sample("theta", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(theta, 1.0).to_event(1), obs=x)


def guide(x: Tensor, shift: float = 0.0) -> None:
    """The posterior, or beside it."""
    loc, scale = X.sum() / (len(X) + 1) + shift, (len(X) + 1) ** -0.5
    pyro.sample("theta", dist.Normal(loc.expand(1), scale).to_event(1))


def test_the_bound_of_the_set_is_log_p_of_all_data_less_the_guides_divergence():
    covariance = torch.eye(4).double() + 1
    normal = dist.MultivariateNormal(torch.zeros(4).double(), covariance)
    exact = normal.log_prob(X.squeeze(-1)).item() / 4
    found = SCRIPT["bound_of_the_set"]((model, guide), X, 5)
    assert found["bound of the set"]["value"] == pytest.approx(exact, abs=1e-9)
    assert found["bound of the set"]["standard_error"] == pytest.approx(0.0, abs=1e-9)
    assert found["tighter_bound"] == pytest.approx(exact, abs=1e-9)
    beside = SCRIPT["bound_of_the_set"]((model, lambda x: guide(x, 0.5)), X, 40)
    bound, error = beside["bound of the set"].values()
    assert bound == pytest.approx(exact - 0.5**2 / 2 * 5 / 4, abs=4 * error)
    assert bound < beside["tighter_bound"] == pytest.approx(exact, abs=0.1)


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", [PATH.name, "--smoke", "--out", str(out), *options])
    runpy.run_path(str(PATH), run_name="__main__")
    return json.loads((out / "results.json").read_text())


def without_times(figures: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in figures["rows"]]


def test_the_script_goes_on_where_its_budget_ended(monkeypatch, tmp_path, capsys):
    whole = call(monkeypatch, tmp_path / "whole", "--sizes", "25")
    (row,) = whole["rows"]
    assert (row["name"], row["epochs"], row["of_epochs"]) == ("25 data, seed 0", 2, 2)
    assert row["bound of the set"]["value"] <= row["tighter_bound"]
    gain = row["full"]["value"] - row["point"]["value"]
    assert row["full minus point"]["value"] == pytest.approx(gain)
    assert f"{row['name']}: bound of the set {row['bound of the set']['value']:.2f} +-" in (
        capsys.readouterr().out
    )
    assert (tmp_path / "whole" / "full_vb.png").stat().st_size > 1000
    out = tmp_path / "cut"
    cut = call(monkeypatch, out, "--sizes", "25", "--budget", "1e-9")
    assert [(row["epochs"], row["of_epochs"]) for row in cut["rows"]] == [(1, 2)]
    resumed = call(monkeypatch, out, "--sizes", "25")
    assert without_times(resumed) == without_times(whole)
    monkeypatch.setattr("pyro_vae.fit", None)  # nothing is left to train
    assert call(monkeypatch, out, "--sizes", "25") == resumed
    with pytest.raises(SystemExit, match=r"^full_vb\.py: .*results\.json holds .* model is"):
        call(monkeypatch, out, "--latent-dim", "4")
