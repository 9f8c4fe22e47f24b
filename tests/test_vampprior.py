"""The tables of the VampPrior: exact programs of two layers, known mixtures, and its runs."""

import argparse
import dataclasses
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from affine import Variables, affine
from scripts import runner
from torch import nn
from torch.distributions import MultivariateNormal

import pyro_vae as pv
from pyro_vae.runs.directory import Run

PATH = Path(__file__).parents[1] / "experiments" / "vampprior.py"
SCRIPT = runpy.run_path(str(PATH))
SIZES = SCRIPT["Sizes"](3, 8, 6)


def two_layers() -> tuple[Variables, pv.Conditional]:
    """Jointly normal z2, z1 and x, and p(x|z1, z2) with a path past z1."""
    chain = Variables()
    chain.add("z2", 2, 1.0)
    chain.add("z1", 3, 0.8, "z2")
    chain.add("x", 5, 0.7, "z1")
    past = torch.randn(5, 2, dtype=torch.float64)
    added = [past @ part for part in chain.loadings["z2"]]
    chain.loadings["x"] = [a + b for a, b in zip(added, chain.loadings["x"], strict=False)] + (
        chain.loadings["x"][len(added) :]
    )
    return chain, chain.given("x", "z1", "z2")


def test_with_the_exact_posterior_every_weight_is_the_evidence():
    chain, likelihood = two_layers()
    prior = pv.priors.StandardNormal(2).double()
    model = SCRIPT["TwoLayers"](prior, chain.given("z1", "z2"), likelihood)
    guide = SCRIPT["TopDown"](chain.given("z2", "x"), chain.given("z1", "x", "z2"))
    x = chain.marginal("x").sample((7,))
    weights = pv.log_weights(model, guide, x, num_particles=9)
    exact = chain.marginal("x").log_prob(x).expand(9, 7)
    torch.testing.assert_close(weights, exact, rtol=0, atol=1e-9)


def test_two_layers_under_a_vampprior_are_a_mixture_of_normals():
    """Each pseudo-input gives z2 a normal, and so x: log p(x) is known."""
    chain, likelihood = two_layers()
    z2_given_x = affine(torch.randn(2, 5).double(), torch.randn(2).double(), torch.eye(2).double())
    pseudo = torch.randn(4, 5, dtype=torch.float64)
    prior = pv.priors.VampPrior(z2_given_x, pseudo)
    model = SCRIPT["TwoLayers"](prior, chain.given("z1", "z2"), likelihood)
    # x is affine in z2: A z2 + b plus noise of covariance S.
    given = chain.given("x", "z2")
    b = given(torch.zeros(2, dtype=torch.float64)).mean
    a = torch.stack([given(row).mean - b for row in torch.eye(2, dtype=torch.float64)], -1)
    s = given(torch.zeros(2, dtype=torch.float64)).covariance_matrix
    means = z2_given_x(pseudo).mean @ a.T + b
    x = means[:3] + 0.3
    parts = MultivariateNormal(means, a @ a.T + s).log_prob(x.unsqueeze(1))
    exact = parts.logsumexp(-1) - math.log(4)
    guide = SCRIPT["TopDown"](
        affine(torch.zeros(2, 5).double(), prior().mean.detach(), 9 * torch.eye(2).double()),
        chain.given("z1", "x", "z2"),
    )
    found = pv.log_evidence(model, guide, x, num_particles=3000)
    assert (found.standard_error < 0.2).all()
    assert ((found.value - exact).abs() < 4 * found.standard_error).all()


def test_both_inputs_pass_the_joined_network_and_particles_are_broadcast():
    network = SCRIPT["Joined"]((4, 3), (2, 5), 8)
    x, z = torch.randn(6, 4), torch.randn(9, 6, 3)
    out = network(x, z)
    assert out.shape == (9, 6, 2, 5)
    torch.testing.assert_close(out[2, 3], network(x[3], z[2, 3]))
    assert not torch.allclose(out, network(x.flip(0), z))
    assert not torch.allclose(out, network(x, z.flip(0)))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("prior", SCRIPT["PRIORS"])
def test_a_pair_is_of_its_layers_and_every_parameter_gets_a_gradient(layers, prior):
    data = pv.load_data(torch.randint(0, 4, (60, 7)))
    model, guide = SCRIPT["build"](layers, SCRIPT["PRIORS"][prior], data, SIZES)
    latents = pv.encode(guide, data.train[:2])
    assert (list(latents) == ["z2", "z1"]) if layers == 2 else (latents.event_shape == (3,))
    svi = pv.SVI(model, guide, lambda p: torch.optim.SGD(p, lr=0.1), compile=False)
    before = {n: p.clone() for m in (model, guide) for n, p in m.named_parameters()}
    svi.step(data.train)
    after = {n: p for m in (model, guide) for n, p in m.named_parameters()}
    assert before
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_decay_shrinks_the_weights_of_linear_layers_alone():
    data = pv.load_data(torch.randint(0, 2, (60, 7)).float())
    programs = SCRIPT["build"](2, SCRIPT["PRIORS"]["VampPrior"], data, SIZES)
    args = argparse.Namespace(learning_rate=0.1, weight_decay=0.5)
    named = {id(p): (n, p) for program in programs for n, p in program.named_parameters()}
    names, params = zip(*named.values(), strict=True)
    before = [p.detach().clone() for p in params]
    adam = SCRIPT["adam"](list(params), programs, args)
    for p in params:
        p.grad = torch.zeros_like(p)  # Adam itself doesn't move, so what is left is the decay
    adam.step()
    for name, old, new in zip(names, before, params, strict=True):
        is_weight = name.endswith("weight")
        torch.testing.assert_close(new.detach(), old * 0.95 if is_weight else old)
    assert "prior.places" in names  # the pseudo-inputs


def test_levels_keep_the_smallest_scale_of_the_paper():
    data = pv.load_data(torch.randint(0, 256, (60, 2), dtype=torch.uint8))
    model, _ = SCRIPT["build"](1, SCRIPT["PRIORS"]["N(0, I)"], data, SIZES)
    sharpest = model.likelihood.family(torch.tensor([[0.0, 0.0], [-100.0, -100.0]]))
    mass = sharpest.log_prob(torch.tensor([127.0, 127.0])).div(2).exp().item()
    # A logistic around level 127.5; exp(-4.5) between 0 and 1 is 255 exp(-4.5) levels.
    assert mass == pytest.approx(1 / (1 + math.exp(-math.exp(4.5) / 255)) - 0.5, rel=1e-4)


def moved(data: pv.Split) -> float:
    """How far pseudo-inputs come in some steps of Adam, as a part of the range of the data."""
    torch.manual_seed(0)
    model, guide = SCRIPT["build"](1, SCRIPT["PRIORS"]["VampPrior"], data, SIZES)
    before = model.prior.pseudo_inputs.detach()
    assert torch.equal(before, data.train[:6])
    svi = pv.SVI(model, guide, lambda p: torch.optim.Adam(p, lr=0.01), compile=False)
    for _ in range(10):
        svi.step(data.train)
    after = model.prior.pseudo_inputs.detach()
    return ((after - before).abs().mean() / data.train.max()).item()


def test_pseudo_inputs_of_levels_are_learned_as_fast_as_those_of_bits():
    bits = torch.rand(100, 16).round()
    on_bits = moved(pv.load_data(bits))
    assert on_bits > 0.005  # of ten steps of 0.01; what moves beyond 0 and 1 is kept within
    levels = pv.load_data((255 * bits).to(torch.uint8))
    assert levels.num_levels == 256
    assert 1 / 4 < moved(levels) / on_bits < 4


def test_what_was_published_is_held_against_weighting_alone():
    row = {"name": "2 layers, VampPrior", "elbo": -1.0, "mean_standard_error": 0.1, "epochs": 2}
    row |= {"log_evidence": -80.0, "weighted": -90.0, "of_epochs": 2, "as_reported": -83.19}
    figure_of = SCRIPT["figure_of"]
    assert (figure_of(row, "weighted"), figure_of(row, "log_evidence")) == (-90.0, -80.0)
    levels = row | {"bits_per_dim": 4.0}
    assert (figure_of(levels, "weighted"), figure_of(levels, "log_evidence")) == (4.5, 4.0)
    assert figure_of({"log_evidence": -80.0}, "weighted") == -80.0
    assert "-90.000   -83.19" in SCRIPT["table"]([row])


run = runner(PATH, "--smoke")


def test_the_table_is_made_once_and_gone_on_with(monkeypatch, tmp_path, capsys):
    out = ["--out", str(tmp_path), "--layers", "2", "--priors", "mixture", "VampPrior"]
    out += ["--anneal", "0.1"]
    run(monkeypatch, *out)
    figures = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in figures["rows"]] == ["2 layers, mixture", "2 layers, VampPrior"]
    for row in figures["rows"]:
        assert row["log_evidence"] >= row["elbo"]
        for nats in ("weighted", "log_evidence"):
            found = SCRIPT["figure_of"](row, nats)
            assert found == pytest.approx(-row[nats] / (64 * math.log(2)))
        assert row["epochs"] == 2
    assert "start at the first training data" in figures["protocol"]["model"]
    assert (tmp_path / "vampprior.png").stat().st_size > 1000
    monkeypatch.setattr("pyro_vae.fit", lambda *args, **options: pytest.fail("trained again"))
    run(monkeypatch, *out)
    assert f"{figures['rows'][1]['log_evidence']:.3f}" in capsys.readouterr().out
    for other, decay in ((["--recipe", "ours"], "0.2"), (["--weight-decay", "0.1"], "0.1")):
        with pytest.raises(SystemExit, match=f"another protocol.*decoupled decay {decay} of"):
            run(monkeypatch, *out, *other)
    with pytest.raises(SystemExit, match="frey_rawface"):
        run(monkeypatch, "--data", "frey_faces", "--root", str(tmp_path))


def test_what_was_published_keeps_a_row_until_it_is_run(monkeypatch, tmp_path):
    digits = dataclasses.replace(pv.load_data("digits"), name="frey_faces")
    monkeypatch.setattr("pyro_vae.load_data", lambda *args, **options: digits)
    out = ["--out", str(tmp_path), "--layers", "1", "--priors", "N(0, I)", "--seeds", "0", "3"]
    run(monkeypatch, "--data", "frey_faces", *out)
    figures = json.loads((tmp_path / "results.json").read_text())
    own = [(row["name"], row["as_reported"]) for row in figures["rows"]]
    assert own == [("1 layer, N(0, I)", 4.63), ("1 layer, N(0, I), seed 3", 4.63)]
    rest = {"1 layer, VampPrior": 4.57, "2 layers, N(0, I)": 4.61, "2 layers, VampPrior": 4.51}
    assert figures["as_reported"] == {"1 layer, N(0, I)": 4.63, **rest}


def test_averages_are_kept_while_the_rate_is_only_halved(monkeypatch, tmp_path):
    out = ["--out", str(tmp_path), "--layers", "2", "--priors", "VampPrior", "--recipe", "ours"]
    run(monkeypatch, *out, "--ema-decay", "0.9")
    training = json.loads((tmp_path / "results.json").read_text())["protocol"]["training"]
    assert "cosine schedule to half of it" in training
    assert training.endswith("averages (decay 0.9 a step) of the best")
    folder = tmp_path / "2-layers-vampprior"
    assert json.loads((folder / "config.json").read_text())["options"]["ema_decay"] == 0.9
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    assert rates == pytest.approx([1e-3, (1 + math.cos(math.pi / 4)) / 2 * 1e-3])
    with pytest.raises(SystemExit, match=r"another protocol.*averages \(decay 0\.99 a step\)"):
        run(monkeypatch, *out, "--ema-decay", "0.99")


def test_more_draws_go_on_where_other_runs_have_ended(monkeypatch, tmp_path):
    fit, begun = pv.fit, []

    def watched(*, model: nn.Module, loss: Any, **options: Any) -> pv.History:
        begun.append((loss, {k: v.clone() for k, v in model.state_dict().items()}))
        history = fit(model=model, loss=loss, **options)
        begun.append((None, {k: v.clone() for k, v in model.state_dict().items()}))
        return history

    monkeypatch.setattr("pyro_vae.fit", watched)
    alike = ["--layers", "2", "--recipe", "ours", "--ema-decay", "0.9", "--priors"]
    first, second, third = all_three = [str(tmp_path / n) for n in ("first", "second", "third")]
    run(monkeypatch, *alike, "VampPrior", "--out", first)
    more = [*alike, "VampPrior", "--draws", "3", "--start", first, "--out", second]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_checkpoint", lambda *args: sys.exit(9))  # killed, nothing kept
        with pytest.raises(SystemExit):
            run(patch, *more, "--learning-rate", "1e-4")
    del begun[2:]
    run(monkeypatch, *more, "--learning-rate", "1e-4")
    run(monkeypatch, *alike, "VampPrior", "--draws", "5", "--start", second, "--out", third)
    (_, _), (_, ended), (loss, started), (_, again), (tighter, last) = begun[:5]
    assert (loss.num_particles, tighter.num_particles) == (3, 5)
    for before, after in ((ended, started), (again, last)):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(started[name], again[name]) for name in started)

    protocol = json.loads((tmp_path / "second" / "results.json").read_text())["protocol"]
    assert protocol["training"].startswith("importance weighted bound of 3 draws, batch 100, Adam")
    assert "learning rate 0.0001 with cosine schedule to half of it" in protocol["training"]
    chain = json.loads((tmp_path / "third" / "results.json").read_text())["protocol"]["start"]
    assert chain == f"{protocol['start']}; then {protocol['training']}, 2 epochs"
    assert chain.startswith("Monte Carlo ELBO, one particle")
    assert " of the best, 2 epochs; then " in chain
    rows = [json.loads((Path(out) / "results.json").read_text())["rows"][0] for out in all_three]
    assert "before" not in rows[0]
    assert [row["before"]["epochs"] for row in rows[1:]] == [2, 4]
    assert rows[2]["before"]["train_seconds"] == sum(row["train_seconds"] for row in rows[:2])

    with pytest.raises(SystemExit, match=r"another protocol: training is .*of 3 draws"):
        run(monkeypatch, *more, "--draws", "4")
    with pytest.raises(SystemExit, match="--start: 2 layers, mixture not at an end in"):
        run(monkeypatch, *alike, "mixture", "--start", first, "--out", str(tmp_path / "none"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text('{"rows": [{"name": "2 layers, VampPrior"}]}')
    with pytest.raises(SystemExit, match="--start: 2 layers, VampPrior not at an end in"):
        run(monkeypatch, *alike, "VampPrior", "--start", str(tmp_path / "other"))
    with pytest.raises(SystemExit, match="--start: expected a folder that this script has filled"):
        run(monkeypatch, *alike, "VampPrior", "--start", str(tmp_path / "none"))


def test_all_networks_are_trained_in_bfloat16_where_that_is_asked(monkeypatch, tmp_path):
    fit, precisions = pv.fit, []

    def watched(*, model: nn.Module, guide: nn.Module, **options: Any) -> pv.History:
        modules = [*model.modules(), *guide.modules()]
        precisions.append({m.autocast for m in modules if isinstance(m, pv.Conditional)})
        return fit(model, guide, **options)

    monkeypatch.setattr("pyro_vae.fit", watched)
    out = ["--out", str(tmp_path), "--priors", "VampPrior"]
    run(monkeypatch, *out, "--bfloat16")
    assert precisions == [{torch.bfloat16}] * 2
    with pytest.raises(SystemExit, match=r"another protocol.*networks in bfloat16"):
        run(monkeypatch, *out)
    (tmp_path / "results.json").unlink()
    run(monkeypatch, "--out", str(tmp_path / "full"), "--layers", "1", "--priors", "VampPrior")
    assert precisions[2:] == [{None}]


def test_one_that_diverges_stops_no_other_and_costs_its_time(monkeypatch, tmp_path, capsys):
    """A budget of 3 minutes, of which the one that diverges takes one."""
    fit, now, shares = pv.fit, [0.0], []

    def trained(*pair: Any, max_seconds: float, **options: Any) -> pv.History:
        shares.append(max_seconds)
        if len(shares) > 1:
            return fit(*pair, **options)
        now[0] += 60.0
        fit(*pair, **options | {"epochs": 1})
        raise pv.DivergedError("the loss turned NaN")

    with monkeypatch.context() as patch:
        patch.setattr("time.monotonic", lambda: now[0])
        patch.setattr("pyro_vae.fit", trained)
        out = ["--out", str(tmp_path), "--layers", "1", "--priors", "N(0, I)", "mixture"]
        run(patch, *out, "--budget", "3")
    assert shares == pytest.approx([90, 120])
    broken, good = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (broken["diverged"], broken["epochs"], broken["of_epochs"]) == (True, 1, 2)
    assert good["log_evidence"] < 0
    assert "1 of 2, diverged" in capsys.readouterr().out
    monkeypatch.setattr("pyro_vae.fit", lambda *args, **options: pytest.fail("trained again"))
    run(monkeypatch, *out)


MISTAKES = {"--num-particles": "1", "--budget": "0", "--weight-decay": "nan", "--ema-decay": "1"}
MISTAKES |= {"--draws": "0", "--learning-rate": "nan"}


@pytest.mark.parametrize("mistake", MISTAKES.items(), ids=MISTAKES)
def test_mistakes_are_said_in_a_line(mistake, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--out", str(tmp_path / "none"), *mistake)
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("vampprior.py: error: expected --num-particles from 2")
    assert not (tmp_path / "none").exists()
