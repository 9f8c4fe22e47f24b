"""A pair is written as JSON and made again; a recipe can name this package's pieces only."""

import json
from functools import partial
from typing import Any

import pytest
import torch
from helpers import bernoulli_pair
from torch import nn

import pyro_vae as pv
from pyro_vae.program.recipe import NotDescribedError, build, describe

NETWORKS = {
    "mlp": lambda: pv.networks.mlp(6, (2, 3)),
    "mlp, options": lambda: pv.networks.mlp(
        in_dim=6, out=(2, 3), hidden_dims=[5, 4], activation=nn.ReLU
    ),
    "mlp, affine": lambda: pv.networks.mlp(6, (2, 3), hidden_dims=()),
    "mlp, bound activation": lambda: pv.networks.mlp(
        6, (2, 3), activation=partial(nn.LeakyReLU, negative_slope=0.3)
    ),
    "gated_mlp": lambda: pv.networks.gated_mlp(6, (2, 3), hidden_dims=(5,)),
    "conv_encoder": lambda: pv.networks.conv_encoder((7, 5), (2, 3), channels=(4, 3)),
    "conv_decoder": lambda: pv.networks.conv_decoder(
        6, (2, 35), image_shape=(7, 5), channels=(4, 3), activation=nn.SiLU
    ),
    "rescaled": lambda: pv.networks.rescaled(pv.networks.mlp(6, (2, 3)), loc=0.5, scale=16),
}
FAMILIES = {
    "normal": pv.families.normal,
    "normal, exp_half": partial(pv.families.normal, to_scale=pv.families.exp_half, min_scale=0.0),
    "fixed_normal": partial(pv.families.fixed_normal, scale=0.3),
    "laplace": partial(pv.families.laplace, min_scale=1e-3),
    "fixed_laplace": pv.families.fixed_laplace,
    "bernoulli": pv.families.bernoulli,
    "binomial": partial(pv.families.binomial, total_count=16),
    "categorical": pv.families.categorical,
}


def through_json(*objects: Any) -> list[Any]:
    return build(json.loads(json.dumps(describe(*objects))))


def architecture(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_a_network_is_made_again(make):
    network = make()
    (again,) = through_json(network)
    assert again is not network
    assert architecture(again) == architecture(network)
    again.load_state_dict(network.state_dict())
    x = torch.randn(7, 35 if network._recipe[0] == "networks.conv_encoder" else 6)
    assert torch.equal(again(x), network(x))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_family_is_made_again(family):
    conditional = pv.Conditional(pv.networks.mlp(6, (2, 3)), family)
    (again,) = through_json(conditional)
    if isinstance(family, partial):
        assert again.family.func is family.func
        assert again.family.keywords == family.keywords
    else:
        assert again.family is family
    assert through_json(family)[0] == family or isinstance(family, partial)


def test_a_pair_is_made_again():
    pair = bernoulli_pair()
    model, guide = through_json(*pair)
    assert (type(model), type(guide)) == (pv.Model, pv.Guide)
    x = torch.ones(7, 9)
    for again, program in ((model, pair[0]), (guide, pair[1])):
        assert architecture(again) == architecture(program)
        again.load_state_dict(program.state_dict())
    assert torch.equal(pv.reconstruct(model, guide, x), pv.reconstruct(*pair, x))
    assert model.prior.dim == 2


def test_a_recipe_of_what_was_built_is_the_recipe():
    pairs = [
        bernoulli_pair(),
        tuple(
            pv.Conditional(make(), f)
            for make, f in zip(NETWORKS.values(), FAMILIES.values(), strict=True)
        ),
    ]
    for objects in pairs:
        recipe = json.loads(json.dumps(describe(*objects)))
        assert json.loads(json.dumps(describe(*build(recipe)))) == recipe


def test_shared_parts_stay_shared_and_others_do_not():
    network = pv.networks.mlp(6, (2, 6))
    shared = pv.Conditional(network, pv.families.normal)
    other = pv.Conditional(pv.networks.mlp(6, (2, 6)), pv.families.normal)
    model = pv.Model(pv.priors.StandardNormal(6), shared)
    objects = model, pv.Guide(shared), pv.Guide(other), pv.Conditional(network, pv.families.laplace)
    again, guide, apart, sharing_network = through_json(*objects)
    assert again.likelihood is guide.encoder
    assert sharing_network.network is guide.encoder.network
    assert apart.encoder is not guide.encoder
    assert apart.encoder.network is not guide.encoder.network


class Own(nn.Module):
    def forward(self, x):
        return x[..., None, :]


class OwnModel(pv.Model):
    def __init__(self, dim: int) -> None:
        likelihood = pv.Conditional(pv.networks.mlp(dim, (1, 9)), pv.families.bernoulli)
        super().__init__(pv.priors.StandardNormal(dim), likelihood)


class OwnPrior(pv.priors.StandardNormal):
    pass


def normal(params):
    """Bears the name of a family, but is none."""
    return pv.families.normal(params)


normal.__module__ = "somewhere.families"


def homeless(params):
    """As made by ``exec`` in a namespace without a name."""
    return pv.families.normal(params)


homeless.__module__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: pv.Guide(pv.Conditional(Own(), normal)), r"Guide\.encoder\.network is a Own"),
        (
            lambda: pv.networks.rescaled(nn.Linear(6, 6)),
            r"_Rescaled\.network is a Linear, which pyro_vae did not make",
        ),
        (
            lambda: pv.Conditional(pv.networks.mlp(6, (2, 3)), lambda p: pv.families.normal(p)),
            r"Conditional\.family is the function '<lambda>'",
        ),
        (
            lambda: pv.Conditional(pv.networks.mlp(6, (2, 3)), normal),
            r"Conditional\.family is the function 'normal'",
        ),
        (
            lambda: pv.Conditional(pv.networks.mlp(6, (2, 3)), homeless),
            r"Conditional\.family is the function 'homeless'",
        ),
        (
            lambda: pv.Conditional(
                pv.networks.mlp(6, (2, 3)), partial(pv.families.normal, to_scale=torch.exp)
            ),
            r"Conditional\.family\.to_scale is the function 'exp'",
        ),
        (
            lambda: pv.networks.mlp(6, (2, 3), activation=lambda: nn.ReLU()),
            r"\.activation is the function '<lambda>'",
        ),
        (
            lambda: pv.networks.mlp(6, (2, 3), activation=partial(nn.LeakyReLU, 0.3)),
            r"\.activation is ",
        ),
        (lambda: OwnModel(2), r"OwnModel is a OwnModel"),
        (
            lambda: pv.Model(OwnPrior(2), bernoulli_pair()[0].likelihood),
            r"Model\.prior is a OwnPrior",
        ),
    ],
    ids=[
        "module",
        "torch's module",
        "lambda",
        "namesake",
        "homeless",
        "foreign scale",
        "lambda activation",
        "bound by position",
        "subclass of Model",
        "subclass of a prior",
    ],
)
def test_a_part_of_the_users_own_is_named(make, where):
    with pytest.raises(NotDescribedError, match=where):
        describe(make())


def test_a_subclass_of_model_works_without_a_recipe():
    model = OwnModel(2)
    assert pv.generate(model, 5).shape == (5, 9)
    assert not hasattr(model, "_recipe")


HOSTILE = [
    "os.system",
    "posix.system",
    "subprocess.check_output",
    "builtins.exec",
    "exec",
    "",
    ".",
    "families.__builtins__",
    "families.__loader__",
    "families.F",
    "families._unpack",
    "networks._Flat",
    "networks.torch",
    "vae.pyro",
    "recipe.importlib",
    "recipe.build",
    "context.seeded",
    "distributions.Levels",
    "pyro_vae.program.networks.mlp",
    "pyro_vae.program.recipe.importlib",
    "torch.load",
    "torch.hub.load",
    "torch.nn.functional",
    "torch.nn.functional.relu",
    "torch.nn.init",
    "torch.nn.Parameter",
    "torch.nn.parameter.Parameter",
    "torch.nn.Module.__init__",
    "torch.nn.__builtins__",
    "torch.nn..Linear",
    "torch.nn.modules.module.torch",
    "pyro.distributions.enable_validation",
    "pyro.distributions.validation_enabled",
    "pyro.distributions.torch",
    "pyro.distributions.transforms.torch",
    "pyro.distributions.transforms.__builtins__",
    "pyro.clear_param_store",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_from_elsewhere_is_refused_and_not_called(name, tmp_path):
    witness = tmp_path / "witness"
    command = {"command": f"touch {witness}"}
    bad = {"function": name, "with": command}
    hidden = {"make": "networks.mlp", "with": {"in_dim": 6, "out": [2, 3], "activation": bad}}
    recipes = [
        {"nodes": [{"make": name, "with": command}], "objects": [{"node": 0}]},
        {"nodes": [{"make": name, "with": {}}], "objects": [{"node": 0}]},
        {"nodes": [], "objects": [{"function": name}]},
        {"nodes": [], "objects": [{"function": name, "with": command}]},
        {"nodes": [hidden], "objects": [{"node": 0}]},
    ]
    for recipe in recipes:
        with pytest.raises(ValueError, match="the recipe of the pair can't be followed"):
            build(recipe)
    assert not witness.exists()


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        [],
        None,
        {"nodes": []},
        {"nodes": [{}], "objects": []},
        {"nodes": [{"make": "networks.mlp"}], "objects": []},
        {"nodes": [{"make": 3, "with": {}}], "objects": []},
        {"nodes": [{"make": "networks.mlp", "with": {"in_dim": 6}}], "objects": []},
        {"nodes": [{"make": "networks.mlp", "with": {"depth": 6}}], "objects": []},
        {"nodes": [{"make": "networks.gone", "with": {}}], "objects": []},
        {"nodes": [{"make": "priors.StandardNormal", "with": {"dim": -1}}], "objects": []},
        {"nodes": [], "objects": [{"node": 0}]},
        {"nodes": [], "objects": [{"node": "x"}]},
        {"nodes": [], "objects": [{"neither": 0}]},
        {"nodes": [], "objects": [{"shape": [2], "dtype": "load", "fill": 0}]},
        {"nodes": [], "objects": [{"shape": [-2], "dtype": "float32", "fill": 0}]},
    ],
    ids=repr,
)
def test_a_recipe_that_makes_no_sense_is_refused(recipe):
    with pytest.raises(ValueError, match=r"the recipe of the pair can't be followed .*model="):
        build(recipe)


def test_a_node_can_only_refer_to_earlier_ones():
    prior = {"make": "priors.StandardNormal", "with": {"dim": 2}}
    for number in (1, 2):
        rescaled = {
            "make": "networks.rescaled",
            "with": {"network": {"node": number}, "loc": 0.0, "scale": 1.0},
        }
        with pytest.raises(ValueError, match="can't be followed"):
            build({"nodes": [prior, rescaled], "objects": [{"node": 1}]})


def test_loading_a_description_draws_nothing_but_initial_values():
    recipe = describe(*bernoulli_pair())
    torch.manual_seed(3)
    one = build(recipe)[0].state_dict()
    torch.manual_seed(3)
    other = build(recipe)[0].state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_part_that_was_replaced_has_no_recipe():
    """The old part would be saved under the new one's parameters: a silent swap of the family."""
    model, _ = bernoulli_pair()
    likelihood: Any = model.likelihood
    likelihood.family = pv.families.fixed_normal
    with pytest.raises(NotDescribedError, match=r"likelihood\.family was replaced"):
        describe(model)
