"""Estimators of a gradient against the exact one of a linear-Gaussian pair."""

import argparse
import json
import math
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LinearGaussian
from pyro.distributions import MultivariateNormal
from torch import Tensor
from torch.distributions import kl_divergence

import pyro_vae as pv

PATH = Path(__file__).parents[1] / "experiments" / "estimator_study.py"
SCRIPT = runpy.run_path(str(PATH))
ESTIMATORS, gradients, noise_of = (SCRIPT[n] for n in ("ESTIMATORS", "gradients", "noise_of"))
WEIGHTED = ("importance weighted", "doubly reparameterized")  # with several draws, another bound
OF_THE_ELBO = [(e, k) for e in ESTIMATORS for k in (1, 3) if k == 1 or e not in WEIGHTED]
SCALE, COPIES, REPEATS = 0.7, 400, 30

pytestmark = pytest.mark.filterwarnings("ignore:.*REINFORCE")


def linear_pair(orthogonal: bool = False) -> tuple[pv.Model, pv.Guide, LinearGaussian]:
    """Affine encoder and decoder, so that bound and posterior are known exactly."""
    layers = partial(pv.networks.mlp, hidden_dims=())
    encoder = pv.Conditional(layers(5, (2, 2)), pv.families.normal)
    family = partial(pv.families.fixed_normal, scale=SCALE)
    likelihood = pv.Conditional(layers(2, (1, 5)), family)
    model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
    model, guide = model.double(), guide.double()
    parameters = dict(model.named_parameters())
    weight, bias = (parameters[f"likelihood.network.layers.0.{n}"] for n in ("weight", "bias"))
    with torch.no_grad():
        weight.copy_(torch.linalg.qr(weight).Q if orthogonal else 2 * weight)
    return model, guide, LinearGaussian(weight, bias, SCALE)


def exact_bound(guide: pv.Guide, oracle: LinearGaussian, x: Tensor) -> Tensor:
    """log p(x) - KL(q(z|x) || p(z|x)), mean over the data, in nats."""
    q: Any = pv.families.normal(guide.encoder.network(x)).base_dist  # type: ignore[operator]
    full = MultivariateNormal(q.loc, scale_tril=torch.diag_embed(q.scale))
    gap = kl_divergence(full, oracle.posterior(x))
    return (oracle.log_evidence(x) - gap).mean()


def exact_gradient(program: torch.nn.Module, bound: Tensor) -> Tensor:
    found = torch.autograd.grad(bound, list(program.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in found])


def z_scores(rows: Tensor, expected: Tensor) -> Tensor:
    """How many standard errors the mean of estimates (R, P) is off; rounding counts for none."""
    error = rows.std(0) / len(rows) ** 0.5 + 1e-9
    return (rows.mean(0) - expected) / error


@pytest.mark.parametrize(("name", "particles"), OF_THE_ELBO)
def test_all_estimators_but_the_detached_ones_are_unbiased(name, particles):
    model, guide, oracle = linear_pair()
    x = torch.randn(3, 5, dtype=torch.float64)
    bound = exact_bound(guide, oracle, x)
    loss, guide.encoder.family = ESTIMATORS[name]
    rows = gradients((model, guide), loss(particles), [x.repeat(COPIES, 1)] * REPEATS)
    assert z_scores(rows["decoder"], exact_gradient(model, bound)).abs().max() < 5
    off = z_scores(rows["encoder"], exact_gradient(guide, bound))
    if name.startswith("detached"):
        assert off.abs().max() > 30
    else:
        assert off.abs().max() < 5


def test_what_is_left_of_a_detached_gradient():
    """Nothing but noise, or the KL alone, which has no noise."""
    model, guide, _ = linear_pair()
    x = torch.randn(3, 5, dtype=torch.float64)
    q: Any = pv.families.normal(guide.encoder.network(x)).base_dist  # type: ignore[operator]
    kl = (q.scale.square() + q.loc.square() - 1).sum() / 2 - q.scale.log().sum()
    for name, expected in (("detached", 0.0), ("detached, exact KL", -kl / 3)):
        loss, guide.encoder.family = ESTIMATORS[name]
        rows = gradients((model, guide), loss(1), [x.repeat(COPIES, 1)] * REPEATS)["encoder"]
        if isinstance(expected, Tensor):
            assert rows.std(0).max() < 1e-12
            torch.testing.assert_close(rows[0], exact_gradient(guide, expected))
        else:
            assert z_scores(rows, torch.zeros(())).abs().max() < 5
            assert rows.std(0).max() > 0.01


def test_doubly_reparameterized_weights_have_the_gradient_of_the_weighted_bound():
    model, guide, _ = linear_pair()
    batches = [torch.randn(3, 5, dtype=torch.float64).repeat(COPIES, 1)] * REPEATS
    found = []
    for name in WEIGHTED:
        loss, guide.encoder.family = ESTIMATORS[name]
        found.append(gradients((model, guide), loss(4), batches)["encoder"])
    error = sum(rows.var(0) / len(rows) for rows in found) ** 0.5
    assert ((found[0].mean(0) - found[1].mean(0)) / error).abs().max() < 5
    assert found[1].var(0).sum() < found[0].var(0).sum()


def test_at_the_posterior_the_draws_path_has_no_noise_and_the_score_function_has():
    model, guide, oracle = linear_pair(orthogonal=True)
    x = torch.randn(50, 5, dtype=torch.float64)
    posterior = oracle.posterior(x)
    layer: Any = guide.encoder.network.layers[0]  # type: ignore[index, union-attr]
    with torch.no_grad():  # loc = covariance W'(x - b) / s^2, one scale for all
        covariance = posterior.covariance_matrix[0]
        layer.weight[:2] = covariance @ oracle.weight.T / SCALE**2
        layer.bias[:2] = -layer.weight[:2] @ oracle.bias
        layer.weight[2:] = 0.0
        layer.bias[2:] = (covariance.diagonal().sqrt() - 1e-6).expm1().log()
    noise = {}
    for name in ("sticking the landing", "Monte Carlo", "score function"):
        loss, guide.encoder.family = ESTIMATORS[name]
        rows = gradients((model, guide), loss(1), [x] * 20)["encoder"]
        noise[name] = rows.var(0).sum().item()
    assert noise["sticking the landing"] < 1e-20
    assert noise["Monte Carlo"] > 1e-4
    assert noise["score function"] > 1e-4


def test_noise_is_told_from_signal():
    truth = torch.tensor([0.3, -0.4], dtype=torch.float64)
    rows = 1.5 * truth + 2.0 * torch.randn(40_000, 2, dtype=torch.float64)
    found = noise_of(rows, truth)
    assert found["variance"] == pytest.approx(8.0, rel=0.03)
    assert found["snr"] == pytest.approx(0.75 / 8**0.5, rel=0.1)
    assert found["bias"]["value"] == pytest.approx(0.5, abs=0.1)
    assert found["bias"]["standard_error"] == pytest.approx((8 / 40_000) ** 0.5 / 0.5, rel=0.03)
    # What few estimates of nothing leave in the length of their mean is noise, and is taken off.
    nothing = [noise_of(torch.randn(10, 500), torch.ones(500))["snr"] for _ in range(20)]
    assert max(nothing) < 0.2 < (1 / 10) ** 0.5


def test_a_training_that_diverges_is_told_and_does_not_end_the_study(tmp_path):
    args = argparse.Namespace(hidden_dims=[4], latent_dim=2, out=tmp_path, device="cpu")
    job = SCRIPT["Training"](optimizer="SGD", rate=1e6)
    data = pv.load_data("digits").binarize()
    assert SCRIPT["trained"](job, data, 1, math.inf, args) == (None, [])


def test_a_call_that_is_repeated_measures_and_trains_nothing_again(monkeypatch, tmp_path, capsys):
    out = tmp_path / "run"

    def run(*more: str) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", [PATH.name, "--smoke", "--out", str(out), *more])
        runpy.run_path(str(PATH), run_name="__main__")
        return json.loads((out / "results.json").read_text())

    figures = run()
    assert len(figures["rows"]) == 3
    for row in figures["rows"]:
        assert row["epochs"] == row["of"] == 2
        assert math.isfinite(row["log_evidence"])
    assert list(figures["noise"]) == ["0", "1", "2"]
    start = next(m for m in figures["noise"]["0"] if m["estimator"] == "exact KL")
    assert figures["rows"][0]["encoder_snr_0"] == start["encoder_snr"]
    for stage in figures["noise"].values():
        assert {m["estimator"] for m in stage} == set(ESTIMATORS)
        assert all(m["decoder_variance"] > 0 and m["ms"] > 0 for m in stage)
    assert (out / "estimator_study.png").stat().st_size > 1000
    assert f"{figures['rows'][0]['log_evidence']:.3f}" in capsys.readouterr().out
    monkeypatch.setattr(pv, "fit", None)
    monkeypatch.setattr(pv, "SVI", None)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)  # takes seconds
    assert run() == figures
    with pytest.raises(SystemExit):
        run("--seeds", "1")
    assert "seeds is [0] there, [1] here" in capsys.readouterr().err
