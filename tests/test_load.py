"""A run gives its pair back: from its files alone, or into a pair that the user builds again."""

import json
import shutil
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from helpers import TutorialPair, bernoulli_pair, bits, hierarchical_pair, store_pair
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.program import families, networks

fit: Any = partial(pv.fit, batch_size=20, epochs=2, progress=False)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda *run: None)


def library(likelihood_network: nn.Module, family: Any, encoder: nn.Module) -> Any:
    likelihood = pv.Conditional(likelihood_network, family)
    guide = pv.Guide(pv.Conditional(encoder, partial(families.normal, to_scale=families.exp_half)))
    return pv.Model(pv.priors.StandardNormal(2), likelihood), guide


LIBRARY = {
    "mlp": lambda: library(
        networks.mlp(2, (1, 16), hidden_dims=(5, 6), activation=nn.Tanh),
        families.bernoulli,
        networks.mlp(16, (2, 2), hidden_dims=()),
    ),
    "gated": lambda: library(
        networks.gated_mlp(2, (3, 16), hidden_dims=(5,)),
        families.categorical,
        networks.rescaled(networks.gated_mlp(16, (2, 2), hidden_dims=(6,)), scale=2.0),
    ),
    "convolutional": lambda: library(
        networks.conv_decoder(2, (1, 16), image_shape=(4, 4), channels=(3,)),
        partial(families.binomial, total_count=1),
        networks.conv_encoder((4, 4), (2, 2), channels=(3,)),
    ),
    "scale": lambda: library(
        networks.mlp(2, (2, 16)),
        partial(families.laplace, min_scale=0.1),
        networks.mlp(16, (2, 2)),
    ),
}


def values(program: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in program.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("make", LIBRARY.values(), ids=LIBRARY)
def test_a_pair_of_the_librarys_pieces_is_built_again_from_the_run_alone(make, tmp_path):
    pair, x = make(), bits(60, 16)
    fit(*pair, x, out=tmp_path / "run")
    moved = shutil.move(tmp_path / "run", tmp_path / "moved")
    pyro.clear_param_store()
    before = torch.get_rng_state()
    model, guide = pv.load(moved)
    assert torch.get_rng_state().equal(before)
    assert equal(values(model), values(pair[0]))
    assert equal(values(guide), values(pair[1]))
    assert model.training  # as it was made: whoever goes on training need not know of eval()
    assert guide.training
    for draw in (False, True):
        again = pv.reconstruct(model, guide, x, draw=draw)
        assert again.equal(pv.reconstruct(*pair, x, draw=draw))
    weights = [pv.log_weights(*p, x, num_particles=3) for p in (pair, (model, guide))]
    assert weights[0].equal(weights[1])


def test_the_best_parameters_are_loaded_where_there_is_a_validation_bound(tmp_path):
    seen: list[dict[str, Tensor]] = []
    model, guide = bernoulli_pair(hidden_dims=(32,))
    history = fit(
        model,
        guide,
        bits(20),
        valid=bits(20),
        epochs=200,
        patience=4,
        optimizer=lambda params: torch.optim.Adam(params, lr=0.03),
        callbacks=[lambda record: seen.append(values(guide))],
        out=tmp_path / "run",
    )
    assert history.best_epoch is not None
    loaded = values(pv.load(tmp_path / "run").guide)
    assert equal(loaded, seen[history.best_epoch - 1])
    assert not equal(loaded, seen[-1])
    assert equal(values(pv.load(tmp_path / "run", last=True).guide), seen[-1])


def test_the_last_parameters_are_loaded_where_there_is_none(tmp_path):
    seen: list[dict[str, Tensor]] = []
    model, guide = bernoulli_pair()
    fit(
        model,
        guide,
        bits(60),
        callbacks=[lambda record: seen.append(values(guide))],
        out=tmp_path / "run",
    )
    assert equal(values(pv.load(tmp_path / "run").guide), seen[-1])
    assert not equal(seen[0], seen[1])


def tutorial() -> Any:
    foreign = TutorialPair()
    return foreign.model, foreign.guide


def own_network() -> Any:
    decoder = nn.Sequential(nn.Linear(2, 9), nn.Unflatten(-1, (1, 9)))
    model = pv.Model(pv.priors.StandardNormal(2), pv.Conditional(decoder, families.bernoulli))
    return model, bernoulli_pair()[1]


FOREIGN = {
    "tutorial": tutorial,
    "params": lambda: store_pair()[:2],
    "hierarchical": lambda: hierarchical_pair()[:2],
    "a network of one's own": own_network,
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_pair_with_parts_of_the_users_is_loaded_into_one_built_as_before(make, tmp_path):
    pair = make()
    x = bits(60) if make in (tutorial, own_network) else bits(60).double()
    fit(*pair, x, out=tmp_path / "run")
    expected = pv.log_weights(*pair, x, num_particles=3)
    pyro.clear_param_store()
    torch.manual_seed(99)
    with pytest.raises(ValueError, match=r"build it as before and pass model= and guide="):
        pv.load(tmp_path / "run")
    fresh = make()
    assert not pv.log_weights(*fresh, x, num_particles=3).equal(expected)
    pyro.clear_param_store()
    fresh = make()
    loaded = pv.load(tmp_path / "run", model=fresh[0], guide=fresh[1])
    assert loaded == fresh
    assert pv.log_weights(*loaded, x, num_particles=3).equal(expected)


def test_a_foreign_pair_needs_the_data_that_the_run_kept(tmp_path):
    run = tmp_path / "run"
    fit(*tutorial(), bits(60), out=run)
    (run / "examples.npz").unlink()
    model, guide = tutorial()
    with pytest.raises(ValueError, match=r"examples\.npz is missing"):
        pv.load(run, model=model, guide=guide)


def test_one_half_of_a_pair_is_not_enough(tmp_path):
    model, guide = bernoulli_pair()
    run = tmp_path / "run"
    fit(model, guide, bits(60), out=run)
    with pytest.raises(ValueError, match=r"^load: give both model= and guide=, or neither"):
        pv.load(run, model=model)
    with pytest.raises(ValueError, match=r"^load: give both"):
        pv.load(run, guide=guide)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"latent_dim": 3}, r"model\.likelihood\.network\.layers\.0\.weight has shape \(8, 2\)"),
        ({"hidden_dims": (7,)}, r"has shape \(8, 2\) on disk and \(7, 2\) here"),
        ({"hidden_dims": (8, 8)}, r"of another pair: model has \['.*layers\.4\.bias'"),
    ],
)
def test_a_pair_of_other_shapes_is_named_and_not_touched(other, match, tmp_path):
    run = tmp_path / "run"
    fit(*bernoulli_pair(), bits(60), out=run)
    model, guide = bernoulli_pair(**other)
    before = values(model), values(guide)
    with pytest.raises(ValueError, match=match):
        pv.load(run, model=model, guide=guide)
    assert equal(before[0], values(model))
    assert equal(before[1], values(guide))


def test_a_checkpoint_of_another_run_is_named(tmp_path):
    fit(*bernoulli_pair(), bits(60), out=tmp_path / "one")
    fit(*bernoulli_pair(hidden_dims=(7,)), bits(60), out=tmp_path / "two")
    shutil.copy(tmp_path / "one" / "checkpoint.pt", tmp_path / "two")
    with pytest.raises(ValueError, match=r"the checkpoint is of another pair"):
        pv.load(tmp_path / "two")


@pytest.mark.parametrize(
    "node",
    [
        {"make": "os.system", "with": {"command": "touch executed"}},
        {"make": "builtins.eval", "with": {"source": "open('executed', 'w')"}},
        {"make": "recipe.importlib.import_module", "with": {"name": "os"}},
        {"make": "networks.no_such_network", "with": {}},
        {"make": "networks.mlp", "with": {"width": 3}},
        {"make": "networks.mlp"},
    ],
)
def test_a_recipe_that_was_changed_by_hand_is_refused_and_not_executed(node, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(*bernoulli_pair(), bits(60), out="run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["pair"]["nodes"][0] = node
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the recipe of the pair can't be followed"):
        pv.load("run")
    assert not (tmp_path / "executed").exists()


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no run directory"):
        pv.load(tmp_path / "nowhere")
    fit(*bernoulli_pair(), bits(60), out=tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt does not exist"):
        pv.load(tmp_path / "run")


def test_an_older_network_in_the_store_is_not_loaded_in_place_of_the_pairs_own(tmp_path):
    """A notebook trains, makes its pair again, and loads: the new pair would stay untrained."""
    run = tmp_path / "run"
    first = TutorialPair()
    pv.fit(first.model, first.guide, bits(40), epochs=1, batch_size=20, out=run, progress=False)
    again = TutorialPair()
    with pytest.raises(
        ValueError, match=r"older network under the name '(en|de)coder'.*clear_param"
    ):
        pv.load(run, model=again.model, guide=again.guide)
    pyro.clear_param_store()
    pv.load(run, model=again.model, guide=again.guide)
    for loaded, trained in zip(again.decoder.parameters(), first.decoder.parameters(), strict=True):
        assert torch.equal(loaded, trained)
