"""What a run is not gone on with: another pair, other data, other options."""

import contextlib
import os
import re
import signal
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from fit_pairs import adam, dynamic, fast, fit, parameters, same, tutorial_pair
from helpers import TutorialPair, bernoulli_pair, bits
from pyro.infer import TraceMeanField_ELBO
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_vae as pv
from pyro_vae.runs.directory import Run

X = torch.ones(60, 9)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Those are for test_pictures."""
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda *run: None)


def test_a_run_of_another_pair_is_not_gone_on_with(tmp_path):
    out = tmp_path / "run"
    fit(*bernoulli_pair(), X, epochs=1, out=out)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    told = r"started with dim of a priors\.StandardNormal=2, now it is 3; go on with the same"
    with pytest.raises(ValueError, match=told):
        fit(*bernoulli_pair(latent_dim=3), X, epochs=2, out=out, resume=True)
    with pytest.raises(ValueError, match=r"of another pair: modules has .*'guide', 'model'"):
        fit(*tutorial_pair(), X, epochs=2, out=out, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


def test_parameters_of_other_shapes_are_another_pair(tmp_path):
    """Parts of one's own have no recipe: their parameters speak for them."""
    out = tmp_path / "run"
    fit(*tutorial_pair(), X, epochs=1, out=out)
    pyro.clear_param_store()
    foreign = TutorialPair(latent_dim=3)
    with pytest.raises(ValueError, match=r"of another pair: .*\(4, 8\) on disk and \(6, 8\)"):
        fit(foreign.model, foreign.guide, X, epochs=2, out=out, resume=True)


def pair_of(family: Any, prior: Any = None) -> tuple[pv.Model, pv.Guide]:
    """A pair whose parts have parameters of one shape, whatever the family."""
    encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
    likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), family)
    return pv.Model(prior or pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (partial(pair_of, pv.families.continuous_bernoulli), r"family of a \S*Conditional="),
        (partial(pair_of, pv.families.bernoulli), None),
    ],
)
def test_a_family_of_as_many_parameters_is_another_pair(other, match, tmp_path):
    out = tmp_path / "run"
    fit(*pair_of(pv.families.bernoulli), X, epochs=1, out=out)
    told = contextlib.nullcontext() if match is None else pytest.raises(ValueError, match=match)
    model, guide = other()
    with told:
        fit(model, guide, X, epochs=2, out=out, resume=True)


def test_where_a_part_starts_is_no_matter(tmp_path):
    """What a prior was handed as a start is drawn anew in each process."""
    out = tmp_path / "run"

    def pair() -> tuple[pv.Model, pv.Guide]:
        encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        prior = pv.priors.VampPrior(encoder, torch.rand(5, 9), low=0.0, high=1.0)
        likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        return pv.Model(prior, likelihood), pv.Guide(encoder)

    for epochs in (1, 2):
        history = fit(*pair(), X, epochs=epochs, out=out, resume=epochs > 1)
    assert len(history.records) == 2


def test_bounds_of_other_validation_data_do_not_choose_the_parameters(tmp_path):
    out, held_out = tmp_path / "run", bits(20)
    fit(*bernoulli_pair(), X, valid=held_out, epochs=1, out=out)
    with pytest.raises(ValueError, match=r"^resume: the run was started with other validation da"):
        fit(*bernoulli_pair(), X, epochs=2, out=out, resume=True)
    with pytest.raises(ValueError, match=r"^resume: the run was started with other validation da"):
        fit(*bernoulli_pair(), X, valid=1 - held_out, epochs=2, out=out, resume=True)
    fit(*bernoulli_pair(), X, valid=held_out.clone(), epochs=2, out=out, resume=True)
    fit(*bernoulli_pair(), X, epochs=1, out=(alone := tmp_path / "alone"))
    with pytest.raises(ValueError, match=r"^resume: the run was started with no validation data"):
        fit(*bernoulli_pair(), X, valid=held_out, epochs=2, out=alone, resume=True)


def test_a_run_of_an_earlier_version_says_less_and_is_gone_on_with(tmp_path):
    out = tmp_path / "run"
    fit(*bernoulli_pair(), X, valid=bits(20), optimizer=adam, epochs=1, out=out)
    config = Run(out).config
    del config["data"]["valid"], config["options"]["algorithm"]
    Run(out).write_json("config.json", config)
    history = fit(*bernoulli_pair(), X, valid=X, optimizer=adam, epochs=2, out=out, resume=True)
    assert len(history.records) == 2


def test_how_an_optimizer_computes_is_the_affair_of_the_machine(tmp_path):
    """A compiled step on a GPU makes its optimizer capturable, which none on a processor can be."""
    ways, reached = ("plain", "captured"), []
    for way in ways:
        pyro.clear_param_store()
        torch.manual_seed(0)
        fit(*bernoulli_pair(), X, optimizer=adam, epochs=1, out=tmp_path / way)
    path = tmp_path / "captured" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["optimizer"]["param_groups"][0]["capturable"] = True
    torch.save(saved, path)
    for way in ways:
        pair = bernoulli_pair()
        fit(*pair, X, optimizer=adam, epochs=3, out=tmp_path / way, resume=True)
        reached.append(parameters(*pair))
    assert same(*reached)


def test_a_run_says_until_when_it_was_trained(tmp_path):
    out = tmp_path / "run"
    fit(*bernoulli_pair(), X, valid=X, epochs=2, out=out)
    fit(*bernoulli_pair(), X, valid=X, epochs=1, patience=7, out=out, resume=True)
    options = Run(out).config["options"]
    assert (options["epochs"], options["patience"]) == (2, 7)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data": torch.zeros(61, 9)}, r"^resume: the run was started with other data"),
        ({"batch_size": 10}, r"^resume: .* batch_size=20, now it is 10"),
        ({"seed": 1}, r"^resume: .* seed=0, now it is 1"),
        ({"loss": TraceMeanField_ELBO()}, r"^resume: .* loss=\w+, now it is TraceMeanField_ELBO"),
    ],
)
def test_a_run_is_not_gone_on_with_under_other_conditions(change, match, tmp_path):
    out = tmp_path / "run"
    fit(*bernoulli_pair(), X, epochs=1, out=out)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=match):
        fit(*bernoulli_pair(), **{"data": X, **change}, epochs=2, out=out, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


def radam(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.RAdam(params, lr=0.01)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"optimizer": fast}, r"the optimizer's lr=0\.01, now it is 0\.03"),
        ({"optimizer": radam}, r"optimizer=Adam, now it is RAdam"),
        (
            {"lr_schedule": partial(CosineAnnealingLR, T_max=9)},
            r"lr_schedule's T_max=5, now it is 9",
        ),
        ({"kl_weight": pv.warmup(4)}, r"the kl_weight of epoch 1=0\.5, now it is 0\.25"),
        ({}, None),
    ],
)
def test_rates_and_weights_go_on_as_they_began(change, match, tmp_path):
    options: Any = {
        "optimizer": adam,
        "lr_schedule": partial(CosineAnnealingLR, T_max=5),
        "kl_weight": pv.warmup(2),
    }
    fit(*bernoulli_pair(), X, epochs=1, out=tmp_path / "run", **options)
    told = contextlib.nullcontext() if match is None else pytest.raises(ValueError, match=match)
    with told:
        options |= change
        fit(*bernoulli_pair(), X, epochs=2, out=tmp_path / "run", resume=True, **options)


def test_the_weight_of_an_epoch_that_is_half_done_stays(tmp_path, monkeypatch):
    out, took = tmp_path / "run", Adam.step

    def pressed(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(Adam, "step", took)
        signal.raise_signal(signal.SIGINT)
        return took(*args, **options)

    monkeypatch.setattr(Adam, "step", pressed)
    with pytest.raises(KeyboardInterrupt, match="stopped in epoch 1, after step 1 of 3"):
        fit(*bernoulli_pair(), X, epochs=1, optimizer=adam, out=out)
    with pytest.raises(ValueError, match=r"the kl_weight of epoch 1=1\.0, now it is 0\.1"):
        fit(*bernoulli_pair(), X, epochs=1, kl_weight=0.1, optimizer=adam, out=out, resume=True)
    fit(*bernoulli_pair(), X, epochs=1, optimizer=adam, out=out, resume=True)


def test_other_values_of_a_split_are_other_data(tmp_path):
    out = tmp_path / "run"
    fit(*bernoulli_pair(), dynamic(), epochs=1, out=out)
    with pytest.raises(ValueError, match=r"^resume: the run was started with other data"):
        fit(*bernoulli_pair(), dynamic(), epochs=2, out=out, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_two_trainings_are_not_made_in_one_folder(resume, tmp_path):
    """The second is begun while the first is under way, from a new folder or an old one."""
    out = tmp_path / "run"
    if resume:
        fit(*bernoulli_pair(), X, epochs=1, out=out)
    else:
        Run.create(out)
    told = rf"^out: another training is under way in {re.escape(str(out))}; wait until"
    with Run(out).claimed(), pytest.raises(OSError, match=told):
        fit(*bernoulli_pair(), X, epochs=2, out=out, resume=resume)
    history = fit(*bernoulli_pair(), X, epochs=2, out=out, resume=resume)
    assert len(history.records) == 2


def test_a_folder_on_a_disk_without_locks_is_trained_in(tmp_path, monkeypatch):
    def refuse(*args: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert len(fit(*bernoulli_pair(), X, epochs=1, out=tmp_path / "run").records) == 1
    monkeypatch.setattr("pyro_vae.runs.directory.fcntl", None)
    assert len(fit(*bernoulli_pair(), X, epochs=1, out=tmp_path / "other").records) == 1


def test_one_who_is_killed_leaves_the_folder_to_others(tmp_path):
    out = tmp_path / "run"
    Run.create(out)
    child = os.fork()
    if child == 0:
        with Run(out).claimed():
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with Run(out).claimed():
        pass


def test_a_process_that_was_forked_meanwhile_does_not_keep_the_folder(tmp_path):
    out = tmp_path / "run"
    Run.create(out)
    read, write = os.pipe()
    with Run(out).claimed():
        child = os.fork()
        if child == 0:
            os.read(read, 1)
            os._exit(0)
    try:
        with Run(out).claimed():
            pass
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)
