"""Full variational Bayes over a decoder's weights: the script, and the bound that it reports."""

import json
import runpy
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

import pyro_vae as pv

PATH = Path(__file__).parents[1] / "experiments" / "full_vb.py"
SCRIPT = runpy.run_path(str(PATH))
PRIOR = [(20 * 3, 3**-0.5), (20, 1.0), (8 * 20, 20**-0.5), (8, 1.0)]  # numbers, scales
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


def test_the_weights_begin_where_the_pair_has_gone():
    """A precision stands for a device: a pair is moved before its guide is called first."""
    torch.manual_seed(0)
    pair = SCRIPT["full_pair"](3, 20, 40, dim=8)
    torch.manual_seed(0)
    *_, likelihood = SCRIPT["pieces"](3, 20, 8)
    for program in pair:
        program.double()
    pair[1](torch.ones(5, 8).double())
    locations = attrgetter("weights.locs.likelihood")(pair[1])
    for name, parameter in likelihood.named_parameters():
        assert torch.equal(attrgetter(name)(locations), parameter.double())


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
    assert row["finished"] is True
    assert row["bound of the set"]["value"] <= row["tighter_bound"]
    gain = row["full"]["log_density"] - row["point"]["log_density"]
    assert row["full minus point"]["gain"] == pytest.approx(gain)
    said = [f"{row['full'][kind]:.2f}" for kind in ("log_density", "estimator_error")]
    assert f"full: log density {said[0]}, estimator error {said[1]}, sampling" in (
        capsys.readouterr().out
    )
    assert (tmp_path / "whole" / "full_vb.png").stat().st_size > 1000
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)  # takes time
    out = tmp_path / "cut"
    (cut,) = call(monkeypatch, out, "--sizes", "25", "--budget", "1e-9")["rows"]
    assert (cut["epochs"], cut["of_epochs"], cut["finished"]) == (1, 2, False)
    resumed = call(monkeypatch, out, "--sizes", "25")
    assert without_times(resumed) == without_times(whole)
    monkeypatch.setattr("pyro_vae.fit", None)  # nothing is left to train
    assert call(monkeypatch, out, "--sizes", "25") == resumed
    with pytest.raises(SystemExit, match=r"^full_vb\.py: .*results\.json holds .* model is"):
        call(monkeypatch, out, "--latent-dim", "4")


def test_judging_is_paid_from_the_budget_as_training_is(monkeypatch, tmp_path):
    now, shares = [0.0], []

    def fit(model: Any, guide: Any, *_: Any, max_seconds: float, **__: Any) -> Any:
        shares.append(max_seconds)
        now[0] += 10.0
        return pv.History(records=[{"seconds": 10.0}])

    def judged(*_: Any, **__: Any) -> pv.Estimate:
        now[0] += 20.0
        return pv.Estimate(*torch.ones(4, 3).double(), num_particles=2)

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    monkeypatch.setattr(pv, "fit", fit)
    monkeypatch.setattr(pv, "log_evidence", judged)
    monkeypatch.setattr(pv, "log_predictive", judged)
    monkeypatch.setattr(pv, "joint_log_weights", lambda *_, **__: torch.ones(3))
    call(monkeypatch, tmp_path, "--sizes", "25", "50", "--budget", "6")
    assert shares == [60.0, 75.0, 120.0, 90.0, 120.0, 210.0]


def test_a_training_that_diverged_stops_no_other_and_is_over(monkeypatch, tmp_path, capsys):
    fit = pv.fit

    def at_times(model: Any, *args: Any, **options: Any) -> pv.History:
        if type(model).__name__ == "FullModel":
            raise pv.DivergedError("the loss is nan")
        return fit(model, *args, **options)

    monkeypatch.setattr(pv, "fit", at_times)
    (row,) = call(monkeypatch, tmp_path, "--sizes", "25")["rows"]
    assert (row["epochs"], row["diverged"], row["finished"]) == (0, True, True)
    assert row["full"] == {"diverged": True}
    assert row["point"]["log_density"] < 0.0
    assert "full minus point" not in row
    assert "full: diverged; stopped: log density" in capsys.readouterr().out
    monkeypatch.setattr(pv, "fit", None)
    assert call(monkeypatch, tmp_path, "--sizes", "25")["rows"] == [row]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sizes", "25", "2000"), "--sizes: expected 1 to 1297, all training data, got 2000"),
        (("--sizes", "0"), "--sizes: expected 1 to 1297, all training data, got 0"),
        (("--budget", "0"), "--budget: expected more than 0 minutes, got 0.0"),
        (("--latent-dim", "0"), "--latent-dim: expected at least 1, got 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(monkeypatch, tmp_path, options, said):
    with pytest.raises(SystemExit, match=rf"^full_vb\.py: {said}\.$"):
        call(monkeypatch, tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_scales_that_no_data_bind_come_to_the_priors():
    """Under the KL alone, in a quarter of the steps of a reduced run, with its schedule."""
    _, guide = SCRIPT["full_pair"](3, 20, 25, 8)
    guide(torch.zeros(1, 8))
    steps = 75 * SCRIPT["STEPS"] // 4
    optimizer = SCRIPT["adam"](guide, list(guide.parameters()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    sites = [f"likelihood.network.layers.{layer}" for layer in (0, 2)]
    prior = torch.cat([torch.full((n,), sd) for n, sd in PRIOR])
    free = dict(guide.weights.named_parameters())
    names = [f"{site}.{kind}_unconstrained" for site in sites for kind in ("weight", "bias")]
    kl = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        scale = torch.cat([softplus(free[f"scales.{name}"]).flatten() for name in names])
        kl = (prior / scale).log() + (scale / prior).square() / 2 - 0.5
        kl.sum().backward()
        optimizer.step()
        schedule.step()
    assert kl.max() < 0.01
    assert kl.sum() < 0.1


def test_all_ways_start_from_the_same_weights():
    torch.manual_seed(3)
    point, encoder = SCRIPT["point_pair"](2, 4, 9)
    torch.manual_seed(3)
    _, guide = SCRIPT["full_pair"](2, 4, 25, 9)
    guide(torch.zeros(1, 9))
    for name, weight in point.likelihood.named_parameters():
        start = guide.weights.locs.likelihood
        assert torch.equal(attrgetter(name)(start), weight)
    for name, weight in encoder.named_parameters():
        assert torch.equal(attrgetter(name)(guide), weight)


def test_errors_over_seeds_hold_the_spread_and_are_not_averaged_over_shared_data():
    found = [{"value": v, "sampling_error": 3.0, "estimator_error": 0.1} for v in (0.0, 8.0)]
    of = SCRIPT["over_seeds"]
    assert of(found, "value", "sampling_error") == pytest.approx((4.0, 2 * 5.0))
    assert of(found, "value", "estimator_error") == pytest.approx((4.0, 2 * 4.0))
    assert of(found[:1], "value", "sampling_error") == pytest.approx((0.0, 6.0))
    assert of(found[:1], "value", "estimator_error") == pytest.approx((0.0, 0.2))
