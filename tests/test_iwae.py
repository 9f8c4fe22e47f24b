"""The table of importance weighted autoencoders: its schedule, programs, protocols and runs."""

import dataclasses
import json
import runpy
from collections.abc import Callable
from itertools import accumulate, count, groupby
from itertools import chain as chained
from pathlib import Path
from typing import Any

import pytest
import torch
from affine import Variables
from scripts import runner
from torch import nn

import pyro_vae as pv
from pyro_vae.runs.directory import Run

PATH = Path(__file__).parents[1] / "experiments" / "iwae.py"
SCRIPT = runpy.run_path(str(PATH))


def test_the_schedule_has_eight_stages_of_three_to_the_i_epochs():
    rates = [SCRIPT["stages"](epoch, 3280) for epoch in range(3280)]
    stages = [(rate, len(list(epochs))) for rate, epochs in groupby(rates)]
    assert [length for _, length in stages] == [3**i for i in range(8)]
    # 1e-4 round(10^(1 - i / 7), 1) for a first rate of 1e-3.
    expected = [1.0, 0.72, 0.52, 0.37, 0.27, 0.19, 0.14, 0.1]
    assert [rate for rate, _ in stages] == pytest.approx(expected)
    ends = [0, *accumulate(3**i for i in range(8))]
    assert [SCRIPT["stages"](epoch, 328) for epoch in range(328)] == rates[::10]
    assert SCRIPT["stages"](ends[-1], 328) == rates[-1]


@pytest.mark.parametrize("dims", [(2,), (3, 2)], ids=["one", "two"])
def test_with_the_exact_posterior_every_weight_is_the_evidence(dims):
    chain = Variables()
    chain.add(f"z{len(dims)}", dims[-1], 1.0)
    if len(dims) == 2:
        chain.add("z1", dims[0], 0.8, "z2")
    chain.add("x", 5, 0.7, "z1")
    below = [chain.steps["z1"]] if len(dims) == 2 else []
    prior = pv.priors.StandardNormal(dims[-1]).double()
    model = SCRIPT["Generative"](prior, [*below, chain.steps["x"]])
    upwards = [("z1", "x"), ("z2", "z1")][: len(dims)]
    guide = SCRIPT["Recognition"]([chain.given(*pair) for pair in upwards])
    x = chain.marginal("x").sample((7,))
    exact = chain.marginal("x").log_prob(x)
    weights = pv.log_weights(model, guide, x, num_particles=9)
    torch.testing.assert_close(weights, exact.expand(9, 7), rtol=0, atol=1e-9)
    for objective in SCRIPT["OBJECTIVES"].values():
        svi = pv.SVI(model, guide, lambda p: torch.optim.Adam(p), objective(4), compile=False)
        assert svi.evaluate_loss(x).item() == pytest.approx(-exact.sum().item(), abs=1e-8)


@pytest.mark.parametrize("recipe", ["paper", "ours"])
def test_a_decoder_that_ignores_its_latents_starts_at_the_mean_of_the_data(recipe):
    mean = torch.tensor([0.0, 0.2, 0.7, 1.0])
    model, guide = SCRIPT["build"](mean, [6, 5], SCRIPT["RECIPES"][recipe])
    *_, last = [m for m in model.conditionals[-1].modules() if isinstance(m, nn.Linear)]
    nn.init.zeros_(last.weight)
    starts = model.conditionals[-1](torch.randn(3, 6)).mean
    torch.testing.assert_close(starts, mean.clamp(0.001, 0.999).expand(3, 4))
    shapes = [q.event_shape for q in pv.encode(guide, torch.rand(3, 4).round()).values()]
    assert shapes == [(6,), (5,)]


def test_the_paper_s_networks_start_as_glorot_s_do_with_scales_of_one():
    """Each parameter of a normal is the output of a layer of its own, and exp(0) = 1."""
    _, guide = SCRIPT["build"](torch.full((300,), 0.5), [50], SCRIPT["RECIPES"]["paper"])
    first, second, last = (m for m in guide.modules() if isinstance(m, nn.Linear))
    own = (first.weight, second.weight, *last.weight.chunk(2))
    for weight, fans in zip(own, (300 + 200, 200 + 200, 200 + 50, 200 + 50), strict=True):
        bound = (6 / fans) ** 0.5
        assert bound * 0.99 < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert all(not layer.bias.any() for layer in (first, second, last))
    nn.init.zeros_(last.weight)
    scale = pv.encode(guide, torch.rand(3, 300).round()).base_dist.scale
    torch.testing.assert_close(scale, torch.ones(3, 50))


def test_our_weights_decay_and_our_biases_do_not():
    """A step without a gradient is the decay alone: 1 - rate * decay, decoupled."""
    recipe = SCRIPT["RECIPES"]["ours"]
    model, guide = SCRIPT["build"](torch.full((4,), 0.5), [6, 5], recipe)
    params = [*model.parameters(), *guide.parameters()]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    recipe.optimizer(params).step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - 1e-4 if p.dim() == 2 else 1))


def test_the_dynamic_protocol_keeps_400_images_and_draws_each_test_afresh():
    raw = pv.load_data(torch.randint(0, 256, (1000, 4)), valid_fraction=0.45, test_fraction=0.1)
    mnist = dataclasses.replace(raw, name="mnist")
    divided = SCRIPT["divided"](mnist)
    assert "500 training, 400 validation and 100 test" in divided.summary()
    drawn = divided.binarize_dynamic(0)
    both = torch.cat([raw.train, raw.valid])
    assert torch.equal(drawn.train, both[:500] / 255)  # intensities, drawn from in every minibatch
    assert drawn.refresh is not None
    assert not torch.equal(drawn.refresh(drawn.train), drawn.refresh(drawn.train))
    assert torch.equal(divided.valid, both[500:])
    assert SCRIPT["divided"](raw) is raw


def test_active_units_are_those_whose_means_the_data_move():
    """Means of known variance: z1 is w x for bits x, and z2 copies z1 times a factor."""
    model, guide = SCRIPT["build"](torch.full((4,), 0.5), [4, 3], SCRIPT["RECIPES"]["ours"])
    for encoder, weights in zip(
        guide.encoders, ((1.0, 0.5, 0.1, 0.0), (1.0, 0.05, 0.0)), strict=True
    ):
        encoder.network = pv.networks.mlp(4, (2, len(weights)), hidden_dims=())
        layer = next(m for m in encoder.network.modules() if isinstance(m, nn.Linear))
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, 0.0)
        for i, weight in enumerate(weights):
            layer.weight.data[i, i] = weight
    x = torch.rand(200, 4).round()
    # Variances of z1: 0.25, 0.0625, 0.0025, 0; of z2: 0.25, 0.0025 * 0.0625, 0.
    assert pv.elbo_parts(model, guide, x, num_particles=10).active_units == {"z1": 2, "z2": 1}


ONLY = ["--layers", "2", "--objectives", "IWAE", "--out"]


run = runner(PATH, "--smoke")


def rows_of(out: Path) -> list[dict[str, Any]]:
    """All but the time."""
    rows = json.loads((out / "results.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k != "train_seconds"} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a call that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        run(patch, *ONLY, str(out))
    return out


def test_the_table_is_made_once_and_gone_on_with(whole, monkeypatch, tmp_path, capsys):
    rows = rows_of(whole)
    assert [row["name"] for row in rows] == ["2 layers, VAE, k = 1", "2 layers, IWAE, k = 3"]
    for row in rows:
        assert row["log_evidence"] >= row["elbo"]
        assert (row["epochs"], row["of_epochs"], len(row["active_units"])) == (2, 2, 2)
    assert (whole / "iwae.png").stat().st_size > 1000
    monkeypatch.setattr("pyro_vae.fit", lambda *args, **options: pytest.fail("trained again"))
    run(monkeypatch, *ONLY, str(whole))
    assert f"{rows[1]['log_evidence']:.3f}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another protocol: recipe"):
        run(monkeypatch, *ONLY, str(whole), "--recipe", "ours")
    with pytest.raises(SystemExit, match="root"):
        run(monkeypatch, "--data", "binarized_mnist", "--root", str(tmp_path))
    # A datum without any weight has an evidence of minus infinity, which JSON calls null.
    figures = json.loads((whole / "results.json").read_text())
    figures["rows"][0] |= {"log_evidence": None, "mean_standard_error": None, "elbo": None}
    (tmp_path / "results.json").write_text(json.dumps(figures))
    run(monkeypatch, *ONLY, str(tmp_path))
    assert "nan +- nan" in capsys.readouterr().out


def a_clock_that_jumps() -> Callable[[], float]:
    """The first training begins at the time at which the script did; 10 seconds at every look."""
    clock = chained([0, 0], count(10, 10))
    return lambda: float(next(clock))


def test_a_budget_cuts_a_training_that_goes_on_at_the_next_call(
    whole, monkeypatch, tmp_path, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr("time.monotonic", a_clock_that_jumps())
        run(patch, *ONLY, str(tmp_path), "--budget", "1e-6")
    assert [(row["epochs"], row["finished"]) for row in rows_of(tmp_path)] == [(1, False)]
    assert "2 layers, IWAE, k = 3: no time left; call again" in capsys.readouterr().out
    run(monkeypatch, *ONLY, str(tmp_path))
    assert rows_of(tmp_path) == rows_of(whole)
    assert all(row["finished"] for row in rows_of(tmp_path))


def test_what_was_published_keeps_a_row_until_it_is_run(monkeypatch, tmp_path):
    digits = dataclasses.replace(pv.load_data("digits"), name="mnist")
    monkeypatch.setattr("pyro_vae.load_data", lambda *args, **options: digits)
    one = ["--objectives", "VAE", "--layers", "1", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr("time.monotonic", a_clock_that_jumps())
        run(patch, "--data", "mnist", *one, "--budget", "1e-6")
    (row,) = rows_of(tmp_path)
    assert (row["name"], row["as_reported"]) == ("1 layer, VAE, k = 1", -86.76)
    told = json.loads((tmp_path / "results.json").read_text())["as_reported"]
    assert (told["2 layers, IWAE, k = 50"], told["1 layer, DReG, k = 5"]) == (-82.90, -84.90)
    assert len(told) == len(set(told)) == 11
    assert told[row["name"]] == row["as_reported"]


def test_more_draws_may_begin_where_the_vae_ends(monkeypatch, tmp_path, capsys):
    """The VAE is trained though nobody named it, and until it is through, those after it wait.

    They begin there also where they were killed before their first checkpoint.
    """
    call = ["--layers", "1", "--objectives", "DReG", "--after-vae", "1", "--out", str(tmp_path)]
    fit, starts = pv.fit, {}

    def watched(model: nn.Module, *args: Any, out: Path, **options: Any) -> pv.History:
        starts[out.name] = [p.detach().clone() for p in model.parameters()]
        with monkeypatch.context() as patch:
            if out.name == "1_DReG_3_0" and not out.exists():
                patch.setattr(Run, "save_checkpoint", killed)
            return fit(model, *args, out=out, **options)

    def killed(*args: Any) -> None:
        raise SystemExit(9)

    monkeypatch.setattr("pyro_vae.fit", watched)
    with monkeypatch.context() as patch:
        patch.setattr("time.monotonic", a_clock_that_jumps())
        run(patch, *call, "--budget", "1e-6")
    names = ["1 layer, VAE, k = 1", "1 layer, DReG, k = 1", "1 layer, DReG, k = 3"]
    assert [row["name"] for row in rows_of(tmp_path)] == names[:1]
    assert f"{names[2]}: left out until {names[0]} has come to its end" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(monkeypatch, *call)
    assert not (tmp_path / "1_DReG_3_0" / "checkpoint.pt").exists()
    run(monkeypatch, *call)
    assert [(row["name"], row["epochs"]) for row in rows_of(tmp_path)] == list(
        zip(names, (2, 2, 1), strict=True)
    )
    recipe = SCRIPT["RECIPES"]["paper"]._replace(hidden_dims=((8,), (8,)))
    model, guide = SCRIPT["build"](torch.full((64,), 0.5), [2], recipe)
    vae, _ = pv.load(tmp_path / "1_VAE_1_0", model=model, guide=guide)
    for parameter, start in zip(vae.parameters(), starts["1_DReG_3_0"], strict=True):
        assert torch.equal(parameter, start)


def test_what_takes_more_draws_is_trained_in_bfloat16_where_that_is_asked(monkeypatch, tmp_path):
    fit, precisions = pv.fit, {}

    def watched(out: Path, **options: Any) -> pv.History:
        modules = [*options["model"].modules(), *options["guide"].modules()]
        precisions[out.name] = {m.autocast for m in modules if isinstance(m, pv.Conditional)}
        return fit(out=out, **options)

    monkeypatch.setattr("pyro_vae.fit", watched)
    call = [*ONLY, str(tmp_path), "--bfloat16"]
    run(monkeypatch, *call)
    assert precisions == {"2_VAE_1_0": {None}, "2_IWAE_3_0": {torch.bfloat16}}
    with pytest.raises(SystemExit, match=r"another protocol: recipe.*bfloat16 for k"):
        run(monkeypatch, *call[:-1])


def test_those_that_diverge_stop_no_other_and_cost_their_time(monkeypatch, tmp_path, capsys):
    """A budget of 6 minutes, and a clock that trainings and judging move by one each."""
    fit, judge, now, shares = pv.fit, pv.evaluate_run, [0.0], []

    def trained(*pair: Any, loss: Any, max_seconds: float, **options: Any) -> pv.History:
        shares.append(max_seconds)
        now[0] += 60.0
        if isinstance(loss, pv.DReG):
            return fit(*pair, loss=loss, **options)
        fit(*pair, loss=loss, **options | {"epochs": 1})
        raise pv.DivergedError("the loss turned NaN")

    def judged(*args: Any, **options: Any) -> pv.Evaluation:
        now[0] += 60.0
        return judge(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("time.monotonic", lambda: now[0])
        patch.setattr("pyro_vae.fit", trained)
        patch.setattr("pyro_vae.evaluate_run", judged)
        out = ["--layers", "1", "--objectives", "DReG", "VAE", "--out", str(tmp_path)]
        run(patch, *out, "--budget", "6")
    assert shares == pytest.approx([360 / 4, 240 / 3, 120 / 2, 60])
    *good, broken, _ = rows_of(tmp_path)
    assert all(row["log_evidence"] < 0 for row in good)
    assert (broken["diverged"], broken["epochs"], broken["of_epochs"]) == (True, 1, 2)
    assert "the loss turned NaN" in (said := capsys.readouterr().out)
    assert "1 of 2, diverged" in said
    monkeypatch.setattr("pyro_vae.fit", lambda *args, **options: pytest.fail("trained again"))
    run(monkeypatch, *out)


MISTAKES = [("--num-particles", "1"), ("--ks", "1", "0"), ("--after-vae", "-1")]


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("budget", ["0", "nan"])
def test_mistakes_are_said_in_a_line(mistake, budget, monkeypatch, tmp_path, capsys):
    for args in (mistake, ("--budget", budget)):
        with pytest.raises(SystemExit):
            run(monkeypatch, "--out", str(tmp_path / "none"), *args)
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("iwae.py: error: expected --ks >= 1")
    assert not (tmp_path / "none").exists()
