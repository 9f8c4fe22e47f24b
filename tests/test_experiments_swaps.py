"""The experiments that compare swaps: their time, their divergences, and the gap they refine."""

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import LinearGaussian
from torch import Tensor

import pyro_vae as pv

FOLDER = Path(__file__).parents[1] / "experiments"
SCRIPTS = ["guides", "likelihoods", "priors"]
TWO = {
    "guides": ["mixture", "diagonal"],
    "likelihoods": ["discretized logistic", "binomial"],
    "priors": ["N(0, I)", "mixture"],
}


def run(script: str, monkeypatch: pytest.MonkeyPatch, out: Path, *args: str) -> dict[str, Any]:
    path = FOLDER / f"{script}.py"
    monkeypatch.setattr("sys.argv", [path.name, "--smoke", "--out", str(out), *args])
    runpy.run_path(str(path), run_name="__main__")
    return json.loads((out / "results.json").read_text())


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """They take most of the time of runs as short as these."""
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda *args: None)
    monkeypatch.setattr("pyro_vae.runs.evaluate.draw_evidence", lambda *args: None)


def prior_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))


def test_all_of_a_gap_that_refining_can_close_is_called_amortization():
    """Orthogonal columns of W make a diagonal posterior; the prior's bound is known too."""
    torch.manual_seed(0)
    random = LinearGaussian.random()
    weight = torch.linalg.qr(random.weight).Q * torch.tensor([1.0, 0.6])
    pair = LinearGaussian(weight, random.bias, random.scale)
    x = pair.sample(100)
    # E_prior log p(x|z) = log N(x; b, s^2 I) - tr(W W') / 2 s^2.
    at_mean = dist.Normal(pair.bias, pair.scale).to_event(1).log_prob(x)
    bound = at_mean - weight.square().sum() / (2 * pair.scale**2)
    gap = (pair.log_evidence(x) - bound).mean().item()
    refinement = runpy.run_path(str(FOLDER / "guides.py"))["refinement"]
    args = argparse.Namespace(num_particles=1000, steps=200, seed=0)
    found = refinement(pair.model, prior_guide, x, args)
    assert found["gap"] == pytest.approx(gap, abs=0.03)
    assert found["amortization"] == pytest.approx(gap, abs=0.05)
    before = pair.log_evidence(x) - bound
    assert found["amortization_error"] == pytest.approx(before.std().item() / 100**0.5, rel=0.1)


def test_what_decides_the_figures_is_said_and_never_mixed(monkeypatch, tmp_path):
    figures = run("guides", monkeypatch, tmp_path, "--only", "diagonal", "mixture")
    facts = {"name": "diagonal", "num_data": 10, "steps": 5}
    assert {key: figures["amortization"][key] for key in facts} == facts
    assert figures["baseline"] == "diagonal"
    monkeypatch.setattr("pyro_vae.compare_swaps", lambda *args, **options: pytest.fail("trained"))
    with pytest.raises(
        SystemExit, match=r"^guides.py: .* another protocol: baseline is 'diagonal'"
    ):
        run("guides", monkeypatch, tmp_path, "--only", "mixture", "diagonal")
    with pytest.raises(SystemExit, match=r"seed 0' there, .*seed 1' here"):
        run("guides", monkeypatch, tmp_path, "--only", "diagonal", "mixture", "--seed", "1")


class Moved:
    """A program that knows where it was moved to."""

    device = "nowhere"

    def to(self, device: str) -> None:
        self.device = device


@pytest.mark.parametrize("asked", ["auto", "cpu", "cuda:1"])
@pytest.mark.parametrize("script", ["guides", "likelihoods"])
def test_what_is_loaded_is_judged_on_the_device_that_was_asked_for(
    script, asked, monkeypatch, tmp_path
):
    judge = {"guides": "amortization", "likelihoods": "annealing"}[script]
    function = runpy.run_path(str(FOLDER / f"{script}.py"))[judge]
    pair = (Moved(), Moved())
    seen = []

    def judged(*programs: Moved, **options: Any) -> None:
        seen.extend(program.device for program in programs[:2])
        raise InterruptedError

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("pyro_vae.load", lambda run: pair)
    monkeypatch.setattr("pyro_vae.log_evidence", judged)
    args = argparse.Namespace(device=asked, refined=3, annealed=3, num_particles=2, seed=0)
    args.out = tmp_path
    data = pv.load_data(torch.randint(0, 4, (60, 7)))
    with pytest.raises(InterruptedError):
        function(args, data, tmp_path if script == "guides" else "binomial")
    assert seen == ["cuda" if asked == "auto" else asked] * 2


def figures_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "train_seconds"} for row in rows]


def test_a_budget_cuts_trainings_that_go_on_at_the_next_call(monkeypatch, tmp_path):
    only = ["--only", *TWO["priors"]]
    whole = run("priors", monkeypatch, tmp_path / "whole", *only)
    cut = run("priors", monkeypatch, tmp_path / "cut", *only, "--budget", "1e-6")
    assert [(row["epochs"], row["of_epochs"]) for row in cut["rows"]] == [(1, 2)] * 2
    gone_on = run("priors", monkeypatch, tmp_path / "cut", *only)
    assert figures_of(gone_on["rows"]) == figures_of(whole["rows"])
    # Nothing is left to do.
    monkeypatch.setattr("pyro_vae.runs.swaps.evaluate_run", None)
    again = run("priors", monkeypatch, tmp_path / "cut", *only)
    assert figures_of(again["rows"]) == figures_of(whole["rows"])


def test_there_is_no_gap_of_another_baseline(monkeypatch, tmp_path):
    figures = run("guides", monkeypatch, tmp_path, "--only", *TWO["guides"])
    assert (figures["baseline"], "amortization" in figures) == ("mixture", False)


def test_a_baseline_that_diverges_is_said_in_a_line(monkeypatch, tmp_path):
    def fails(*pair: Any, **options: Any) -> pv.History:
        raise pv.DivergedError("the loss turned NaN")

    monkeypatch.setattr("pyro_vae.runs.swaps.fit", fails)
    with pytest.raises(SystemExit, match=r"^priors.py: the loss turned NaN"):
        run("priors", monkeypatch, tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "mistake", [("--num-particles", "1"), ("--budget", "0"), ("--only", "mixture")]
)
def test_mistakes_are_said_in_a_line(script, mistake, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(script, monkeypatch, tmp_path / "none", *mistake)
    assert f"{script}.py: error: " in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "none").exists()
