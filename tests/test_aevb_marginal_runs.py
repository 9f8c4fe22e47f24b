"""Trainings of figure 3: chains that reach the posterior, cuts, files of others, divergence."""

import argparse
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyro import poutine
from scripts import figures, runner

import pyro_vae as pv

SCRIPT = Path(__file__).parents[1] / "experiments" / "aevb_marginal.py"
NAMES = runpy.run_path(str(SCRIPT))


run = runner(SCRIPT, "--smoke")


def test_chains_of_em_begin_at_the_posterior(monkeypatch):
    """One latent, 20 bits that are all 1: the posterior is 3 away from the prior, by a grid."""
    model, _ = NAMES["build"](20, 1, 2, seed=0)
    hidden, out = (m for m in model.likelihood.modules() if isinstance(m, torch.nn.Linear))
    with torch.no_grad():
        hidden.weight[:], hidden.bias[:] = 1.0, -3.0
        out.weight[:], out.bias[:] = 2.0, 4.0
    z = torch.linspace(-8, 8, 4001)[:, None]
    log_p = model.prior().log_prob(z) + model.likelihood(z).log_prob(torch.ones(4001, 20))
    share = log_p.detach().double().softmax(0)
    mean = (share * z[:, 0]).sum().item()
    given = []

    def estimator(*pair: Any, **_: Any) -> Any:
        given.append(pair)
        return SimpleNamespace(mean=0.0, mean_standard_error=0.0, sampling_error=0.0)

    monkeypatch.setattr(pv, "reciprocal_evidence", estimator)
    monkeypatch.setattr(pv, "ais", estimator)
    args = argparse.Namespace(num_chains=4, leapfrog_steps=4, num_draws=50, temperatures=20)
    NAMES["judged"](model, None, torch.ones(300, 20), args)
    assert len(given) == 2
    for _, guide, *data in given:
        drawn = poutine.trace(guide).get_trace(*data).nodes["z"]["value"]
        assert mean > 2.5
        assert drawn.mean().item() == pytest.approx(mean, abs=0.4)


def em(path: Path, x: torch.Tensor, step: float = 0.1, seed: int = 0, hidden: int = 4) -> Any:
    model, _ = NAMES["build"](6, 2, hidden, seed=0)
    return NAMES["MonteCarloEM"](model, x, step, seed, path)


def test_em_goes_on_with_nothing_but_its_own(tmp_path):
    x, path = torch.ones(100, 6), tmp_path / "em.pt"
    em(path, x).save()
    em(path, x)
    others: list[tuple[torch.Tensor, dict[str, Any]]] = [
        (x, {"step": 0.2}),
        (x, {"seed": 1}),
        (x, {"hidden": 5}),
        (torch.zeros(100, 6), {}),
    ]
    for data, other in others:
        with pytest.raises(ValueError, match=r"em\.pt is not of .*delete the file"):
            em(path, data, **other)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"em\.pt is damaged; delete the file"):
        em(path, x)


def test_em_never_keeps_a_parameter_that_is_nan(tmp_path):
    mine = em(tmp_path / "em.pt", torch.ones(100, 6))
    mine.optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(pv.DivergedError, match="after pass 0"):
        mine.run_pass()


def test_a_cut_by_the_budget_changes_nothing(monkeypatch, tmp_path):
    """Also: called again after its end, nothing is trained."""
    some = ["--methods", "AEVB", "--latent-dim", "2"]
    run(monkeypatch, *some, "--out", str(tmp_path / "whole"))
    out = tmp_path / "cut"
    run(monkeypatch, *some, "--budget", "0.00001", "--out", str(out))
    assert (figures(out)["rows"], figures(out)["finished"]) == ([], False)
    run(monkeypatch, *some, "--out", str(out))
    whole, again = figures(tmp_path / "whole"), figures(out)
    for row in (*whole["rows"], *again["rows"]):
        del row["seconds"]
    assert again["rows"] == whole["rows"]
    assert again["finished"] is True
    monkeypatch.setattr(pv, "fit", None)
    run(monkeypatch, *some, "--out", str(out))


def test_what_diverges_gets_a_row_and_stops_no_other(monkeypatch, tmp_path, capsys):
    def diverging(*args: Any, **options: Any) -> Any:
        options["callbacks"][0]({"epoch": 3, "seconds": 0.0})
        raise pv.DivergedError("the loss is NaN")

    monkeypatch.setattr(pv, "fit", diverging)
    some = ["--methods", "AEVB", "Monte Carlo EM", "--out", str(tmp_path / "out")]
    run(monkeypatch, *some)
    assert "AEVB, seed 0, diverged: the loss is NaN" in capsys.readouterr().out
    found = figures(tmp_path / "out")
    assert [(row.get("diverged"), row["epochs"]) for row in found["rows"]] == [(True, 3), (None, 5)]
    assert found["finished"] is True
    run(monkeypatch, *some)
    assert "diverged" not in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--epochs", "--points", "--budget"])
def test_a_number_too_small_is_one_line(monkeypatch, tmp_path, flag):
    monkeypatch.setattr("sys.argv", [SCRIPT.name, "--out", str(tmp_path), flag, "0"])
    with pytest.raises(SystemExit, match=rf"^aevb_marginal\.py: {flag}: expected more than 0"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
