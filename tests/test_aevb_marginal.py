"""The script of figure 3: its Hamiltonian moves against exact moments, and that it goes on."""

import argparse
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from scripts import runner

import pyro_vae as pv

SCRIPT = Path(__file__).parents[1] / "experiments" / "aevb_marginal.py"
NAMES = runpy.run_path(str(SCRIPT))


run = runner(SCRIPT)


def test_moves_leave_a_normal_of_every_row_as_it_is():
    """Rows of two kinds, N(1, 0.5^2) and N(-2, 1): coarse steps, which a bias would show."""
    loc = torch.tensor([[1.0], [-2.0]]).double().repeat(2000, 1)
    scale = torch.tensor([[0.5], [1.0]]).double().repeat(2000, 1)
    generator = torch.Generator().manual_seed(0)
    z, accepted = loc, 0.0
    for _ in range(15):
        z, accepted = NAMES["hmc_move"](
            lambda u: (-0.5 * ((u - loc) / scale).square()).sum(-1), z, 0.75, 3, generator
        )
    assert 0.5 < accepted < 0.95  # so that refusing is what keeps the moments
    whitened = (z - loc) / scale
    for kind in (whitened[::2], whitened[1::2]):
        assert kind.mean().abs() < 5 / 2000**0.5
        assert kind.var().item() == pytest.approx(1.0, abs=5 * (2 / 2000) ** 0.5)


def test_a_move_to_nowhere_is_refused():
    generator = torch.Generator().manual_seed(0)
    start = torch.zeros(3, 2)
    z, accepted = NAMES["hmc_move"](
        lambda u: torch.where(u == 0, -u, u + math.nan).sum(-1), start, 0.5, 2, generator
    )
    assert torch.equal(z, start)
    assert accepted == 0.0


def test_monte_carlo_em_learns_and_goes_on_where_it_was(tmp_path):
    x = torch.rand(1, 30).round().repeat(100, 1)
    model, _ = NAMES["build"](30, 2, 8, seed=0)
    em = NAMES["MonteCarloEM"](model, x, 0.1, 0, tmp_path / "em.pt")
    before = pv.log_evidence(model, pv.from_prior(model), x[:5], num_particles=100).mean
    for _ in range(4):
        em.run_pass()
    em.save()
    for _ in range(4):
        em.run_pass()
    after = pv.log_evidence(model, pv.from_prior(model), x[:5], num_particles=100).mean
    assert after > before + 5
    again, _ = NAMES["build"](30, 2, 8, seed=1)
    resumed = NAMES["MonteCarloEM"](again, x, 0.1, 0, tmp_path / "em.pt")
    assert resumed.passes == 4
    for _ in range(4):
        resumed.run_pass()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert torch.equal(em.z, resumed.z)


@pytest.mark.parametrize(
    ("method", "expected"), [("AEVB", [5, 22, 100]), ("Monte Carlo EM", [5, 25, 100])]
)
def test_epochs_are_judged_evenly_on_a_logarithmic_axis(tmp_path, monkeypatch, method, expected):
    results = pv.Results(tmp_path / "r.json", title="t", protocol={})
    args = argparse.Namespace(points=3, images=2)
    judge = NAMES["Judge"](results, torch.zeros(4, 2), torch.zeros(4, 2), 100, method, 0, args)
    monkeypatch.setitem(
        NAMES["Judge"].__call__.__globals__,
        "judged",
        lambda *_: {"": {"value": -9.0}, " annealed": {"value": found.pop()}},
    )
    found = [-2.0, -2.0, -1.0, -1.0, -3.0, -3.0]  # of training and test data, the first last
    for epoch in range(1, 101):
        if method == "AEVB" or epoch % 5 == 0:
            judge(torch.nn.Linear(1, 1), None, epoch, 0.0)
    assert [row["epochs"] for row in results.rows] == expected
    assert [row["of_epochs"] for row in results.rows] == [100] * 3
    assert [row["highest_test"] for row in results.rows] == [-3.0, -1.0, -1.0]
    assert judge.ended()
    args.points = 4
    with pytest.raises(ValueError, match=r"--points: .*r\.json has fewer"):
        judge.ended()


def test_it_trains_once_and_leaves_figures_and_picture(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    run(monkeypatch, "--smoke", "--out", str(out))
    figures = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in figures["rows"]] == ["AEVB", "wake-sleep", "Monte Carlo EM"]
    for row in figures["rows"]:
        assert row["epochs"] == row["of_epochs"] == 5
        for part in ("train", "test"):
            ours, annealed = row[part], row[f"{part} annealed"]
            error = ours["standard_error"] + annealed["standard_error"]
            assert abs(ours["value"] - annealed["value"]) < 6 * error + 0.5
            assert annealed["sampling_error"] > 0
    assert "as_reported" in figures
    assert (out / "aevb_marginal.png").stat().st_size > 1000
    assert "nats per datum" in capsys.readouterr().out
    run(monkeypatch, "--smoke", "--out", str(out))
    assert "nats per datum" not in capsys.readouterr().out
    assert json.loads((out / "results.json").read_text()) == figures


def test_a_mistake_is_one_line(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"aevb_marginal\.py: --sizes: expected 100 to 1297"):
        run(monkeypatch, "--data", "digits", "--sizes", "5000", "--out", str(tmp_path))
