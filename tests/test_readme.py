"""The README's code runs, and its commands exist."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_code_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    mean, error = (float(number) for number in printed.split()[:2])
    assert -200 < mean < -90
    assert 0 < error < 1
    assert "nats per datum" in printed


def test_every_make_target_exists():
    targets = re.findall(r"make ([a-z-]+)", README)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test", "check", "test-slow"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_link_leads_somewhere():
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.slow
def test_the_first_example_on_binarized_mnist():
    """The issue that started this library, word for word but for the folder."""
    if "PYRO_VAE_DATA" not in os.environ:
        pytest.skip("PYRO_VAE_DATA names no folder with the data")
    from pyro.infer import TraceMeanField_ELBO

    import pyro_vae as pv

    data = pv.load_data("binarized_mnist", root=os.environ["PYRO_VAE_DATA"])
    encoder = pv.Conditional(pv.networks.mlp(784, (2, 50), hidden_dims=(400,)), pv.families.normal)
    likelihood = pv.Conditional(
        pv.networks.mlp(50, (1, 784), hidden_dims=(400,)), pv.families.bernoulli
    )
    model = pv.Model(pv.priors.StandardNormal(50), likelihood)
    guide = pv.Guide(encoder)
    pv.fit(
        model,
        guide,
        data,
        loss=TraceMeanField_ELBO(),
        epochs=5,
        batch_size=128,
        seed=0,
        progress=False,
    )
    estimate = pv.log_evidence(model, guide, data.test[:1000], num_particles=500)
    assert -130 < estimate.mean < -90
    assert 0 < estimate.mean_standard_error < 0.1
    assert pv.log_weights(model, guide, data.test[:7], num_particles=13).shape == (13, 7)
