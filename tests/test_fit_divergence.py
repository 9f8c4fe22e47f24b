"""A loss that turns NaN: the site is named, and the last good state comes back."""

import re
from collections.abc import Callable

import pyro
import pytest
import torch
from fit_pairs import adam, fit, param_pair, parameters, same, state
from helpers import bernoulli_pair, bits
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import pyro_vae as pv
from pyro_vae.runs.directory import Run


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Those are for test_pictures."""
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda *run: None)


def explode(at: int) -> Callable[[torch.optim.Optimizer], LambdaLR]:
    """A learning rate that is past all reason from an epoch (1, 2, ...) on."""
    return lambda optimizer: LambdaLR(optimizer, lambda done: 1e30 if done + 1 >= at else 1.0)


@pytest.mark.parametrize("case", ["modules", "params"])
def test_a_loss_that_turns_nan_names_the_site_and_keeps_the_last_good_state(case, tmp_path):
    model, guide = bernoulli_pair() if case == "modules" else param_pair()
    seen, out = [], tmp_path / "run"
    with pytest.raises(pv.DivergedError) as caught:
        fit(
            model,
            guide,
            bits(60),
            epochs=5,
            optimizer=adam,
            lr_schedule=explode(3),
            callbacks=[lambda record: seen.append(parameters(model, guide))],
            out=out,
        )
    message = str(caught.value)
    assert re.match(r"the loss turned NaN or infinite in epoch 3, step [23]: site '[xz]'", message)
    assert "The pair is back at the end of epoch 2." in message
    assert len(seen) == 2
    assert same(parameters(model, guide), seen[1])
    assert [record["epoch"] for record in state(out)["records"]] == [1, 2]
    assert len(Run(out).read_metrics()[0]) == 2
    if case == "modules":
        assert same(parameters(*pv.load(out)), seen[1])


def test_parameters_that_are_past_all_reason_but_finite_are_no_good_state(tmp_path):
    model, guide = bernoulli_pair()
    seen, out = [], tmp_path / "run"
    with pytest.raises(
        pv.DivergedError, match=r"in epoch 4, step 1: .* back at the end of epoch 2"
    ):
        fit(
            model,
            guide,
            bits(60),
            epochs=5,
            batch_size=60,
            optimizer=adam,
            lr_schedule=explode(3),  # the only loss of epoch 3 comes before its only step
            callbacks=[lambda record: seen.append(parameters(model, guide))],
            out=out,
        )
    assert same(parameters(model, guide), seen[1])
    assert [record["epoch"] for record in state(out)["records"]] == [1, 2]


def test_parameters_that_the_last_step_of_an_epoch_broke_are_never_saved(tmp_path):
    model, guide = param_pair()

    def steep(x: Tensor) -> None:  # finite at 0, with a gradient that isn't
        pyro.factor("steep", 0 * pyro.param("slope", torch.zeros(())).square().sqrt())
        model(x)

    out = tmp_path / "run"
    with pytest.raises(pv.DivergedError, match=r"epoch 1, step 1: .*parameter '.*' was not finite"):
        fit(steep, guide, bits(60), batch_size=60, epochs=5, out=out)
    assert all(p.isfinite().all() for p in parameters(steep, guide).values())
    saved = state(out)
    assert saved["records"] == []
    assert all(p.isfinite().all() for p in saved["parameters"]["params"].values())
