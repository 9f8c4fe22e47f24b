"""The table of importance weighted autoencoders: its schedule, programs, protocols and runs."""

import dataclasses
import json
import runpy
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from affine import Variables
from torch import nn

import pyro_vae as pv

PATH = Path(__file__).parents[1] / "experiments" / "iwae.py"
SCRIPT = runpy.run_path(str(PATH))


def test_the_schedule_has_eight_stages_of_three_to_the_i_epochs():
    factor = SCRIPT["stages"](3280)
    stages = [(rate, len(list(epochs))) for rate, epochs in groupby(map(factor, range(3280)))]
    assert [length for _, length in stages] == [3**i for i in range(8)]
    # 1e-4 round(10^(1 - i / 7), 1) for a first rate of 1e-3.
    expected = [1.0, 0.72, 0.52, 0.37, 0.27, 0.19, 0.14, 0.1]
    assert [rate for rate, _ in stages] == pytest.approx(expected)
    short = SCRIPT["stages"](328)
    ends = [0, *accumulate(3**i for i in range(8))]
    assert all(short(epoch) == factor(10 * epoch) for epoch in range(328))
    assert short(ends[-1]) == factor(3279)


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


def test_the_dynamic_protocol_keeps_400_images_and_draws_each_test_afresh():
    raw = pv.load_data(torch.randint(0, 256, (1000, 4)), valid_fraction=0.45, test_fraction=0.1)
    mnist = dataclasses.replace(raw, name="mnist")
    drawn = SCRIPT["binarized"](mnist, 0)
    assert (len(drawn.train), len(drawn.valid)) == (500, 400)
    both = torch.cat([raw.train, raw.valid])
    assert torch.equal(drawn.train, both[:500] / 255)  # intensities, drawn from in every minibatch
    assert drawn.refresh is not None
    assert not torch.equal(drawn.refresh(drawn.train), drawn.refresh(drawn.train))
    other = SCRIPT["binarized"](mnist, 1)
    assert not torch.equal(drawn.test, other.test)
    assert drawn.test.mean().item() == pytest.approx(raw.test.mean().item() / 255, abs=0.1)
    bits = raw.binarize()
    assert SCRIPT["binarized"](bits, 0) is bits


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
    assert SCRIPT["active_units"](model, guide, x, 0) == {"z1": 2, "z2": 1}


def run(monkeypatch: Any, *args: str) -> None:
    monkeypatch.setattr("sys.argv", [PATH.name, "--smoke", *args])
    runpy.run_path(str(PATH), run_name="__main__")


def test_the_table_is_made_once_and_gone_on_with(monkeypatch, tmp_path, capsys):
    out = ["--out", str(tmp_path), "--layers", "2", "--objectives", "IWAE"]
    run(monkeypatch, *out)
    figures = json.loads((tmp_path / "results.json").read_text())
    names = ["2 layers, IWAE, k = 1", "2 layers, IWAE, k = 3"]
    assert [row["name"] for row in figures["rows"]] == names
    for row in figures["rows"]:
        assert row["log_evidence"] >= row["elbo"]
        assert (row["epochs"], row["of_epochs"], len(row["active_units"])) == (2, 2, 2)
    assert (tmp_path / "iwae.png").stat().st_size > 1000
    assert f"{figures['rows'][1]['log_evidence']:.3f}" in capsys.readouterr().out
    monkeypatch.setattr("pyro_vae.fit", lambda *args, **options: pytest.fail("trained again"))
    run(monkeypatch, *out)
    with pytest.raises(SystemExit, match="another protocol: recipe"):
        run(monkeypatch, *out, "--recipe", "ours")
    with pytest.raises(SystemExit, match="root"):
        run(monkeypatch, "--data", "binarized_mnist", "--root", str(tmp_path))
