"""The figures that a run leaves: what they are of, by which name, and that they are right."""

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import LinearGaussian, TutorialPair, bernoulli_pair, bits
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.data import Split

fit = partial(pv.fit, batch_size=20, epochs=1, progress=False)
evaluate = partial(pv.evaluate_run, num_particles=6, progress=False)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda *run: None)


def evidence(run: Path) -> dict[str, Any]:
    return json.loads((run / "evidence.json").read_text())


def arrays(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "evidence.npz", allow_pickle=False) as file:
        return dict(file)


def normal_pair(dim: int) -> Any:
    encoder = pv.Conditional(pv.networks.mlp(dim, (2, 2), hidden_dims=(8,)), pv.families.normal)
    likelihood = pv.Conditional(
        pv.networks.mlp(2, (2, dim), hidden_dims=(8,)),
        partial(pv.families.normal, min_scale=0.05),
    )
    return pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)


def saved(folder: Path, array: Any) -> Path:
    path = folder / "mine.npy"
    np.save(path, array)
    return path


@pytest.fixture
def levels(tmp_path) -> Split:
    array = np.random.default_rng(0).integers(0, 8, (90, 9))
    array[0, 0] = 7
    return pv.load_data(saved(tmp_path, array))


def test_a_foreign_pair_with_the_exact_posterior_gets_the_exact_log_evidence(tmp_path):
    truth = LinearGaussian.random()
    x = truth.sample(40)

    def learned() -> LinearGaussian:
        weight = pyro.param("weight", lambda: truth.weight.clone())
        return LinearGaussian(weight, truth.bias, truth.scale)

    def model(x: Tensor) -> None:
        learned().model(x)

    def guide(x: Tensor) -> None:
        learned().guide(x)

    run = tmp_path / "run"
    fit(model, guide, x, optimizer=lambda params: torch.optim.SGD(params, lr=0.0), out=run)
    pyro.clear_param_store()
    estimate = evaluate(run, data=x, model=model, guide=guide)
    exact = truth.log_evidence(x)
    torch.testing.assert_close(estimate.value, exact, atol=1e-10, rtol=0)
    np.testing.assert_allclose(arrays(run)["value"], exact.numpy(), atol=1e-10)
    said = evidence(run)
    assert said["quantity"] == "log p(x)"
    assert said["log_evidence"] == pytest.approx(exact.mean().item(), abs=1e-10)
    assert said["elbo"] == pytest.approx(exact.mean().item(), abs=1e-10)
    assert said["mean_standard_error"] == pytest.approx(0, abs=1e-8)
    assert said["sampling_error"] == pytest.approx(exact.std().item() / 40**0.5)
    assert said["ess_min"] == said["ess_median"] == pytest.approx(6)


def test_the_figures_are_those_of_log_evidence_with_all_that_they_depend_on(tmp_path):
    run, x = tmp_path / "run", bits(50)
    model, guide = bernoulli_pair()
    fit(model, guide, x, out=run)
    estimate = evaluate(run, data=x, seed=3)
    direct = pv.log_evidence(model, guide, x, num_particles=6, seed=3)
    said, per_datum = evidence(run), arrays(run)
    for name in ("value", "standard_error", "ess", "elbo"):
        assert getattr(estimate, name).equal(getattr(direct, name))
        np.testing.assert_array_equal(per_datum[name], getattr(direct, name).numpy())
        assert per_datum[name].shape == (50,)
    assert said["log_evidence"] == direct.mean
    assert said["mean_standard_error"] == direct.mean_standard_error
    assert said["sampling_error"] == direct.sampling_error
    assert said["elbo"] == direct.elbo.mean().item()
    assert said["ess_median"] == direct.ess.median().item()
    assert said["ess_min"] == direct.ess.min().item()
    assert (said["num_particles"], said["num_data"], said["seed"]) == (6, 50, 3)
    assert said["seconds"] > 0
    assert {"torch", "pyro", "pyro_vae", "numpy", "python"} <= set(said["versions"])
    assert "bits_per_dim" not in said
    assert (run / "evidence.png").is_file()
    shown = re.search(r"\N{MINUS SIGN}([\d.]+) ± ", (run / "report.html").read_text())
    assert shown is not None
    assert -float(shown[1]) == pytest.approx(direct.mean, abs=0.006)


def test_the_callers_random_state_is_left_alone(tmp_path):
    run, x = tmp_path / "run", bits(50)
    fit(*bernoulli_pair(), x, out=run)
    before = torch.get_rng_state()
    evaluate(run, data=x)
    assert torch.get_rng_state().equal(before)


def test_data_out_of_a_file_are_found_prepared_and_judged_by_the_run_alone(tmp_path, levels):
    data, run = levels.binarize_static(seed=2), tmp_path / "run"
    model, guide = bernoulli_pair()
    fit(model, guide, data, out=run)
    estimate = evaluate(run)
    direct = pv.log_evidence(model, guide, data.test, num_particles=6)
    assert estimate.value.equal(direct.value)
    assert evidence(run)["part"] == "test"
    assert any("static binarization" in line for line in evidence(run)["preparation"])


@pytest.mark.parametrize("part", ["train", "valid", "test", "all"])
def test_the_part_that_is_asked_for_is_judged(tmp_path, levels, part):
    data, run = levels.binarize(), tmp_path / "run"
    model, guide = bernoulli_pair()
    fit(model, guide, data, out=run)
    parts = (data.train, data.valid, data.test)
    x = torch.cat(parts) if part == "all" else getattr(data, part)
    estimate = evaluate(run, part=part)
    assert estimate.value.equal(pv.log_evidence(model, guide, x, num_particles=6).value)
    assert evidence(run)["part"] == part
    assert evidence(run)["num_data"] == len(x)


def test_training_data_that_are_drawn_anew_are_judged_on_one_draw(tmp_path, levels):
    run = tmp_path / "run"
    fit(*bernoulli_pair(), levels.binarize_dynamic(), out=run)
    first, again = evaluate(run, part="train"), evaluate(run, part="train")
    assert first.value.equal(again.value)
    assert len(first.value) == len(levels.train)


@pytest.mark.parametrize(("limit", "rows"), [(4, [0, 3, 6, 9]), (1, [0]), (10, range(10))])
def test_a_limit_spreads_evenly_over_the_data(tmp_path, limit, rows):
    run, x = tmp_path / "run", bits(10)
    model, guide = bernoulli_pair()
    fit(model, guide, x, batch_size=5, out=run)
    estimate = evaluate(run, data=x, limit=limit)
    direct = pv.log_evidence(model, guide, x[list(rows)], num_particles=6)
    assert estimate.value.equal(direct.value)
    assert evidence(run)["num_data"] == len(rows)
    assert evaluate(run, data=x, limit=99).value.shape == (10,)


def test_what_one_particle_or_one_datum_cannot_tell_is_null(tmp_path):
    run, x = tmp_path / "run", bits(20)
    fit(*bernoulli_pair(), x, out=run)
    evaluate(run, data=x, num_particles=1)
    assert evidence(run)["mean_standard_error"] is None
    assert evidence(run)["log_evidence"] == evidence(run)["elbo"]
    evaluate(run, data=x, limit=1)
    assert evidence(run)["sampling_error"] is None


def test_dequantized_levels_get_the_jacobian_and_are_called_a_bound(tmp_path, levels):
    data, run = levels.dequantize(seed=1), tmp_path / "run"
    model, guide = normal_pair(9)
    fit(model, guide, data, out=run)
    estimate = evaluate(run)
    direct = pv.log_evidence(model, guide, data.test, num_particles=6)
    said = evidence(run)
    jacobian = -9 * math.log(8)
    assert data.log_jacobian == jacobian
    assert estimate.value.equal(direct.value + jacobian)
    np.testing.assert_array_equal(arrays(run)["value"], estimate.value.numpy())
    assert said["log_evidence"] == pytest.approx(direct.mean + jacobian, abs=1e-10)
    assert said["elbo"] == pytest.approx(direct.elbo.mean().item() + jacobian, abs=1e-10)
    assert said["bits_per_dim"] == pytest.approx(-said["log_evidence"] / (9 * math.log(2)))
    assert said["quantity"] == "bound on log P(x)"
    # A uniform distribution over 8 levels has 3 bits a dimension, and this pair knows no more.
    assert 2.5 < said["bits_per_dim"] < 40


def test_standardized_values_get_the_jacobian_and_are_log_densities_still(tmp_path):
    raw = np.random.default_rng(0).normal([5.0, -3.0], [10.0, 0.1], (90, 2))
    data, run = pv.load_data(saved(tmp_path, raw)).standardize(), tmp_path / "run"
    model, guide = normal_pair(2)
    fit(model, guide, data, out=run)
    evaluate(run)
    direct = pv.log_evidence(model, guide, data.test, num_particles=6)
    said = evidence(run)
    assert data.log_jacobian == pytest.approx(-math.log(10 * 0.1), abs=0.3)
    assert said["log_evidence"] == pytest.approx(direct.mean + data.log_jacobian, abs=1e-10)
    assert said["quantity"] == "log p(x)"
    assert "bits_per_dim" not in said


def test_levels_have_bits_per_dimension(tmp_path, levels):
    likelihood = pv.Conditional(
        pv.networks.mlp(2, (1, 9)), partial(pv.families.binomial, total_count=7)
    )
    model, run = pv.Model(pv.priors.StandardNormal(2), likelihood), tmp_path / "run"
    fit(model, bernoulli_pair()[1], levels, out=run)
    evaluate(run)
    said = evidence(run)
    assert said["bits_per_dim"] == pytest.approx(-said["log_evidence"] / (9 * math.log(2)))


def test_a_score_is_nowhere_called_a_log_probability(tmp_path, levels):
    data, run = levels.intensities(), tmp_path / "run"
    fit(*bernoulli_pair(), data, out=run)
    estimate = evaluate(run)
    said = evidence(run)
    assert said["quantity"] == "score"
    assert "bits_per_dim" not in said
    assert math.isfinite(estimate.mean)
    page = (run / "report.html").read_text()
    texts = [(run / "evidence.json").read_text(), page.split("data:image")[0]]
    for text in texts:  # the only log p(x) is the one that it is said not to be
        for name in ("log p(x)", "log P(x)"):
            places = [i for i in range(len(text)) if text.startswith(name, i)]
            assert all(text[:i].rstrip().endswith(" no") for i in places), text
    assert "score" in page
    assert "Log-evidence" not in page


def test_data_that_have_changed_since_are_not_judged(tmp_path, levels):
    data, run = levels.binarize(), tmp_path / "run"
    fit(*bernoulli_pair(), data, out=run)
    path = tmp_path / "mine.npy"
    array = np.load(path)
    np.save(path, 7 - array)
    with pytest.raises(ValueError, match=r"^data: mine has changed since: .*mine\.npy now gives"):
        evaluate(run)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"^data: expected a \.npy .* found none at"):
        evaluate(run)
    assert not (run / "evidence.json").exists()
    assert len(evaluate(run, data=data).value) == len(data.test)


def test_data_in_memory_have_to_be_given_again(tmp_path):
    run, x = tmp_path / "run", bits(20)
    fit(*bernoulli_pair(), x, out=run)
    with pytest.raises(ValueError, match=r"^data: tensors came from memory .* pass the data"):
        evaluate(run)


def test_a_pair_of_two_arguments_is_judged_on_both(tmp_path):
    encoder = pv.Conditional(pv.networks.mlp(12, (2, 2)), pv.families.normal)
    likelihood = pv.Conditional(pv.networks.mlp(5, (1, 9)), pv.families.bernoulli)
    model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
    x, y, run = bits(30), torch.rand(30, 3), tmp_path / "run"
    fit(model, guide, (x, y), out=run)
    estimate = evaluate(run, data=(x, y), limit=4)
    rows = [0, 10, 19, 29]
    assert estimate.value.equal(
        pv.log_evidence(model, guide, x[rows], y[rows], num_particles=6).value
    )


class Flattening(nn.Module):
    """A decoder that works in training, and takes the particles for data in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 9)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z.reshape(-1, 2)).unsqueeze(-2)


def test_a_network_that_drops_the_particles_is_named(tmp_path):
    likelihood = pv.Conditional(Flattening(), pv.families.bernoulli)
    model = pv.Model(pv.priors.StandardNormal(2), likelihood)
    guide, run, x = bernoulli_pair()[1], tmp_path / "run", bits(20)
    fit(model, guide, x, out=run)
    with pytest.raises(ValueError, match=r"network \(Flattening\) .*keep every batch dimension"):
        evaluate(run, data=x, model=model, guide=guide)
    assert not (run / "evidence.json").exists()


def test_a_foreign_network_that_drops_the_particles_is_named(tmp_path):
    linear = nn.Linear(2, 9)

    def model(x: Tensor) -> None:
        pyro.module("linear", linear)
        with pyro.plate("images", len(x)):
            loc = torch.zeros(len(x), 2)
            z = pyro.sample("latent", dist.Normal(loc, 1.0).to_event(1))
            logits = linear(z.reshape(-1, 2))
            pyro.sample("obs", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    guide, run, x = TutorialPair().guide, tmp_path / "run", bits(20)
    fit(model, guide, x, out=run)
    with pytest.raises(ValueError, match=r"at site obs dim -1, 20 vs 120"):
        evaluate(run, data=x, model=model, guide=guide)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"part": "tset"}, r"^part: expected one of train, valid, test, all; got 'tset'"),
        ({"limit": 0}, r"^limit: expected at least 1 datum, got 0"),
        ({"num_particles": 0}, r"^num_particles: expected at least 1, got 0"),
        ({"device": "gpu"}, r"^device: 'gpu' is not available"),
        ({"data": torch.ones(5, 8)}, r"expected input of shape \(\*batch, 9\), got \(5, 8\)"),
        ({"data": torch.ones(0, 9)}, r"the data are empty: expected at least one datum"),
        ({"data": 2 * torch.ones(5, 9)}, r"site 'x': 5 of 5 observed .* outside the support"),
        ({"data": torch.ones(5, 9) / 0}, r"^argument 0 of the pair has 45 NaN or infinite"),
        ({"model": bernoulli_pair()[0]}, r"^load: give both model= and guide="),
    ],
)
def test_a_mistake_is_named_and_the_last_figures_stay(change, match, tmp_path, levels):
    run = tmp_path / "run"
    fit(*bernoulli_pair(), levels.binarize(), out=run)
    evaluate(run)
    before = {path: path.read_bytes() for path in run.rglob("*.*")}
    with pytest.raises(ValueError, match=match):
        evaluate(run, **change)
    assert {path: path.read_bytes() for path in run.rglob("*.*")} == before


def test_parameters_that_are_nan_are_named_by_the_site(tmp_path):
    run, x = tmp_path / "run", bits(20)
    model, guide = bernoulli_pair()
    fit(model, guide, x, out=run)
    with torch.no_grad():
        next(guide.parameters()).fill_(torch.nan)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["parameters"]["modules"]["guide"] = guide.state_dict()
    torch.save(state, run / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"site 'z' of the guide: its value is NaN"):
        evaluate(run, data=x)
