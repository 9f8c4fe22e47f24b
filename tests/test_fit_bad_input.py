"""Mistakes in a call of `fit`: each is named, and none costs a parameter or a file."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from fit_pairs import dynamic, fit, parameters, same
from helpers import LinearGaussian, bernoulli_pair, bits
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.data import Split


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Those are for test_pictures."""
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda *run: None)


def spoiled(values: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    values = values.clone()
    values[at] = value
    return values


def no_latent(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("other", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def wide_guide() -> pv.Guide:
    return pv.Guide(pv.Conditional(pv.networks.mlp(9, (2, 3)), pv.families.normal))


def narrow_model() -> pv.Model:
    likelihood = pv.Conditional(pv.networks.mlp(2, (1, 8)), pv.families.bernoulli)
    return pv.Model(pv.priors.StandardNormal(2), likelihood)


def levels() -> Split:
    return pv.load_data(torch.randint(0, 5, (90, 9)))


X = torch.ones(60, 9)
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "NaN": (
        {"data": spoiled(X, (7, 3), torch.nan)},
        ValueError,
        "^data: 1 of 540 values are NaN or infinite, the first in row 7",
    ),
    "infinity": (
        {"valid": spoiled(X, (2, 0), torch.inf)},
        ValueError,
        "^valid: 1 of 540 values are NaN or infinite, the first in row 2",
    ),
    "NaN among labels": (
        {"data": (X, spoiled(torch.ones(60), (5,), torch.nan))},
        ValueError,
        r"^data\[1\]: 1 of 60 values .* row 5",
    ),
    "support": (
        {"data": 2 * X},
        ValueError,
        "site 'x': 20 of 20 observed .* outside the support",
    ),
    "kind": (
        {"data": levels()},
        ValueError,
        "site 'x': Bernoulli is no density for integer levels 0..4.*binomial",
    ),
    "features": (
        {"data": X[:, :8]},
        ValueError,
        r"expected input of shape \(\*batch, 9\), got \(20, 8\)",
    ),
    "features of a part": (
        {"valid": X[:, :8]},
        ValueError,
        r"^valid: expected tensors with data of shapes \[\(9,\)\] .* got \[\(8,\)\]",
    ),
    "arguments of a part": ({"valid": (X, X)}, ValueError, "^valid: expected tensors with"),
    "decoder": (
        {"model": narrow_model()},
        ValueError,
        r"site 'x': the observed value has shape \(20, 9\), but .* \(20, 8\)",
    ),
    "empty": ({"data": X[:0]}, ValueError, r"^data: expected at least one datum, got \(0, 9\)"),
    "empty validation": ({"valid": X[:0]}, ValueError, "^valid: expected at least one datum"),
    "nothing": ({"data": ()}, ValueError, "^data: expected a tensor or a tuple of tensors"),
    "no tensor": ({"data": [X.numpy()]}, TypeError, "^data: expected a tensor, got ndarray"),
    "batch": (
        {"batch_size": 61},
        ValueError,
        "^batch_size: 61 is larger than the training set of 60 data; give at most 60",
    ),
    "lengths": (
        {"data": (X, X[:59])},
        ValueError,
        r"^data\[1\]: expected 60 rows as in data\[0\], got 59",
    ),
    "two validations": ({"data": dynamic(), "valid": X}, ValueError, "^valid: a Split has its own"),
    "latent": (
        {"guide": no_latent},
        ValueError,
        r"the guide has no latent site 'z', .* the guide draws \['other'\]",
    ),
    "latent's shape": (
        {"guide": wide_guide()},
        ValueError,
        r"site 'z': the guide draws values of shape \(20, 3\), but the model expects \(20, 2\)",
    ),
    "patience": ({"patience": 3}, ValueError, "^patience: .*give valid="),
    "epochs": ({"epochs": 0}, ValueError, "^epochs: expected at least 1, got 0"),
    "no time": ({"max_seconds": 0.0}, ValueError, "^max_seconds: expected more than 0 .* got 0"),
    "unknown time": ({"max_seconds": float("nan")}, ValueError, "^max_seconds: .* got nan"),
    "weight": ({"kl_weight": -1.0}, ValueError, "^kl_weight: expected weights >= 0, got -1"),
    "clipping": ({"max_grad_norm": 0.0}, ValueError, "expected max_grad_norm > 0"),
    "optimizer": (
        {"optimizer": torch.optim.Adam([nn.Parameter(X)])},
        TypeError,
        "^optimizer: fit expects a factory such as lambda params: .* got Adam",
    ),
    "loss": ({"loss": "elbo"}, TypeError, "^loss: expected a Pyro ELBO"),
    "device": ({"device": "gpu"}, ValueError, "^device: 'gpu' is not available here"),
}


@pytest.mark.parametrize(("change", "error", "match"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_and_costs_nothing(change, error, match, tmp_path):
    model, guide = bernoulli_pair()
    before, out = parameters(model, guide), tmp_path / "run"
    arguments = {"model": model, "guide": guide, "data": X, "epochs": 2, "out": out}
    with pytest.raises(error, match=match):
        fit(**{**arguments, **change})
    assert same(parameters(model, guide), before)
    history = fit(**arguments)  # the same directory is free for the corrected call
    assert len(history.records) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"^device: 'cuda' is not available here .*use 'cpu'"):
        fit(*bernoulli_pair(), X, device="cuda")


def test_a_pair_without_parameters_is_named():
    truth = LinearGaussian.random()
    with pytest.raises(ValueError, match=r"no parameters to train.*pyro.module"):
        fit(truth.model, truth.guide, truth.sample(60), epochs=1)


def test_a_directory_with_anything_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"^out: .* is not empty; .*resume=True"):
        fit(*bernoulli_pair(), X, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_directory_that_cannot_be_made_is_named_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^out: can't write to .*file/run \(Not a directory\)"):
        fit(*bernoulli_pair(), X, out=tmp_path / "file" / "run")


def test_a_swapped_model_and_guide_are_refused():
    model, guide = bernoulli_pair()
    with pytest.raises(ValueError, match=r"fit: the model observes nothing.*in their order"):
        pv.fit(guide, model, bits(40), epochs=1, batch_size=20, progress=False)


@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_value_outside_the_support_is_found_wherever_it_stands(part):
    data = {"train": bits(400), "valid": bits(400)}
    data[part][333, 4] = 0.5
    with pytest.raises(ValueError, match=r"site 'x': 1 of .* observed data have values outside"):
        pv.fit(
            *bernoulli_pair(),
            data["train"],
            valid=data["valid"],
            epochs=1,
            batch_size=20,
            progress=False,
        )


def test_another_precision_than_the_pairs_is_named():
    message = r"argument 0 of the pair is torch.float64, .* parameters are torch.float32; convert"
    with pytest.raises(ValueError, match=message):
        pv.fit(*bernoulli_pair(), bits(40).double(), epochs=1, batch_size=20, progress=False)


def test_the_class_of_a_loss_is_no_loss():
    with pytest.raises(TypeError, match=r"loss: expected a Pyro ELBO such as Trace_ELBO\(\)"):
        pv.SVI(*bernoulli_pair(), torch.optim.Adam, loss=TraceMeanField_ELBO)
