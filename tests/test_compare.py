"""Paired differences: certain where the models differ little and the data much."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import LinearGaussian, library_pair

import pyro_vae as pv
from pyro_vae.evidence.compare import fingerprint
from pyro_vae.runs import plots


def judged(truth: LinearGaussian, x: torch.Tensor, seed: int = 0) -> pv.Estimate:
    return pv.log_evidence(truth.model, truth.guide, x, num_particles=10, seed=seed)


def test_the_difference_of_exact_evidences_and_its_error():
    truth = LinearGaussian.random()
    other = replace(truth, bias=truth.bias + 0.1)
    x = truth.sample(3000)
    found = pv.compare(judged(truth, x), judged(other, x))
    exact = truth.log_evidence(x) - other.log_evidence(x)
    torch.testing.assert_close(found.difference, exact)
    assert found.mean == pytest.approx(exact.mean().item())
    assert found.mean_standard_error == pytest.approx(exact.std().item() / math.sqrt(3000))
    assert found.share == (exact > 0).double().mean().item()
    assert found.estimator_error < 1e-6
    # The reason for pairing: the means themselves are more than five times as uncertain.
    assert found.mean_standard_error < 0.2 * judged(truth, x).sampling_error * 2**0.5


def test_the_standard_error_covers_new_data():
    truth = LinearGaussian.random()
    other = replace(truth, scale=0.8)
    estimates = [
        pv.compare(judged(truth, x), judged(other, x)) for x in truth.sample(40_000).split(400)
    ]
    means = torch.tensor([e.mean for e in estimates])
    error = torch.tensor([e.mean_standard_error for e in estimates]).mean().item()
    assert means.std().item() == pytest.approx(error, rel=0.25)


def test_it_is_printed_with_both_errors():
    text = str(pv.compare(*(judged(LinearGaussian.random(), torch.zeros(4, 5).double()),) * 2))
    assert "+0.000 nats per datum, +- 0.000 (paired, of which 0.000 the estimators)" in text
    assert "better on 0% of 4 data" in text


def test_one_datum_has_no_error_of_the_mean():
    truth = LinearGaussian.random()
    x = truth.sample(1)
    assert math.isnan(pv.compare(judged(truth, x), judged(truth, x, seed=1)).mean_standard_error)


def test_other_data_are_refused():
    model, guide, (x,) = library_pair()
    whole = pv.log_evidence(model, guide, x, num_particles=5)
    with pytest.raises(ValueError, match="expected estimates of the same data, got 7 and 6 data"):
        pv.compare(whole, pv.log_evidence(model, guide, x[1:], num_particles=5))
    with pytest.raises(ValueError, match="other data, or of the same in another order"):
        pv.compare(whole, pv.log_evidence(model, guide, 1 - x, num_particles=5))
    with pytest.raises(ValueError, match="other data"):
        pv.compare(whole, pv.log_evidence(model, guide, x.flip(0), num_particles=5))


def test_several_models_are_held_against_the_first():
    truth = LinearGaussian.random()
    x = truth.sample(200)
    models = {"true": truth, "moved": replace(truth, bias=truth.bias + 0.1)}
    models["noisy"] = replace(truth, scale=0.8)
    estimates = [judged(model, x) for model in models.values()]
    found = pv.compare(*estimates, names=list(models))
    assert list(found.estimates) == list(models)
    assert list(found.differences) == ["moved", "noisy"]
    for name, estimate in zip(models, estimates, strict=True):
        row = next(row for row in found.rows if row["name"] == name)
        assert row["log_evidence"] == estimate.mean
        if name == "true":
            assert row["difference"] is None
            continue
        expected = pv.compare(estimate, estimates[0])
        assert torch.equal(found.differences[name].difference, expected.difference)
        assert row["difference"] == expected.mean
        assert row["difference_error"] == expected.mean_standard_error
        assert f"{expected.mean:+.2f}" in str(found)
    assert len(str(found).splitlines()) == 4
    picture = plots.differences(found.rows)
    assert [text.get_text() for text in picture.axes[0].get_yticklabels()] == list(models)


def test_the_same_estimate_under_two_names_differs_by_nothing():
    truth = LinearGaussian.random()
    estimate = judged(truth, truth.sample(5))
    found = pv.compare(estimate, estimate, names=["a", "b"])
    assert found.differences["b"].mean == 0


@pytest.mark.parametrize("names", [["a"], ["a", "a", "b"], ["a", "b", "c", "d"]])
def test_names_are_one_for_each(names):
    truth = LinearGaussian.random()
    estimate = judged(truth, truth.sample(5))
    with pytest.raises(ValueError, match=r"a name for each of 3 estimates, .* got \['a'"):
        pv.compare(estimate, estimate, estimate, names=names)
    with pytest.raises(ValueError, match=r"expected names=\[\.\.\.\] for 3 estimates"):
        pv.compare(estimate, estimate, estimate)  # type: ignore[call-overload]


def test_estimates_of_different_kinds_are_refused_unless_told():
    truth = LinearGaussian.random()
    x = truth.sample(5)
    plain = judged(truth, x)
    smooth = pv.log_evidence(truth.model, truth.guide, x, num_particles=10, smooth=True)
    with pytest.raises(ValueError, match=r"by importance weighting, the other by Pareto-smoothed"):
        pv.compare(plain, smooth)
    with pytest.raises(ValueError, match=r"judge both models alike, or say different_kinds=True"):
        pv.compare(plain, plain, smooth, names=["a", "b", "c"])
    assert abs(pv.compare(plain, smooth, different_kinds=True).mean) < 1e-9
    assert len(pv.compare(plain, smooth, names=["a", "b"], different_kinds=True).rows) == 2


def test_a_refined_pair_is_judged_on_the_same_data():
    model, guide, (x,) = library_pair()
    before = pv.log_evidence(model, guide, x, num_particles=20)
    after = pv.log_evidence(*pv.refine(model, guide, x, steps=3), num_particles=20)
    assert pv.compare(after, before).difference.shape == (len(x),)
    other = pv.log_evidence(model, guide, 1 - x, num_particles=20)
    with pytest.raises(ValueError, match="other data"):
        pv.compare(after, other)


def test_an_index_that_picks_rows_is_data():
    x = torch.randn(4, 2)
    assert fingerprint((x, torch.arange(4))) == fingerprint((x,))
    assert fingerprint((x, torch.tensor([1, 0, 2, 3]))) != fingerprint((x,))
