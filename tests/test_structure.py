"""What an inspection of a pair finds, and what it refuses."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import PAIRS, bernoulli_pair, bits, double_bits, masked_pair, store_pair
from torch import Tensor

import pyro_vae as pv
from pyro_vae.inference.structure import inspect


@pytest.mark.parametrize("make", PAIRS)
def test_every_pair_is_read(make):
    model, guide, args = make()
    structure = inspect(model, guide, args, {}, analytic_kl=True)
    auxiliary = {"a"} & set(structure.latents)
    assert structure.analytic == set(structure.latents) - auxiliary
    assert structure.reparameterized
    assert len(structure.observed) == 1
    assert structure.max_plate_nesting == (2 if make is masked_pair else 1)


def test_latents_come_in_the_guides_order_and_nesting_without_plates_is_zero():
    def model():
        b = pyro.sample("b", dist.Bernoulli(0.5))
        a = pyro.sample("a", dist.Normal(b, 1.0))
        pyro.sample("x", dist.Normal(a, 1.0), obs=torch.tensor(0.0))

    def guide():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Bernoulli(0.5))

    structure = inspect(model, guide, (), {})
    assert structure.latents == ("a", "b")
    assert structure.max_plate_nesting == 0
    assert not structure.reparameterized
    assert structure.analytic == frozenset()


def test_an_inspection_leaves_the_random_state_and_gradients_alone():
    model, guide, args = store_pair()
    before = torch.get_rng_state()
    structure = inspect(model, guide, args, {}, analytic_kl=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert not structure.guide_trace.nodes["z"]["value"].requires_grad
    assert torch.is_grad_enabled()


def test_values_that_parameters_start_from_follow_the_users_seed():
    def model(x: Tensor) -> None:
        weight = pyro.param("weight", lambda: torch.randn(9))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            logits = z.unsqueeze(-1) * weight
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ pyro.param("slope", lambda: torch.randn(9)), 1.0))

    x = bits()
    found = []
    for seed in (1, 2, 1):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        inspect(model, guide, (x,), {})
        found.append(torch.stack([pyro.param("weight"), pyro.param("slope")]).detach())
    assert torch.equal(found[0], found[2])
    assert (found[0] != found[1]).all()


# --- where the analytic KL is unbiased

ZERO = torch.zeros(())


def model_of(**parents: str) -> Any:
    """A model of normal latents a, b, ... whose locations are sums of their parents."""

    def model(x: Tensor) -> None:
        values: dict[str, Tensor] = {}
        for name, above in parents.items():
            loc = sum((values[parent] for parent in above), ZERO)
            values[name] = pyro.sample(name, dist.Normal(loc, 1.0))
        total = sum(values.values(), ZERO)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(total, 1.0), obs=x)

    return model


def guide_of(**parents: str) -> Any:
    def guide(x: Tensor) -> None:
        values: dict[str, Tensor] = {}
        for name, above in parents.items():
            loc = sum((values[parent] for parent in above), x.mean())
            values[name] = pyro.sample(name, dist.Normal(loc, 1.0))

    return guide


@pytest.mark.parametrize(
    ("model", "guide", "biased"),
    [
        ({"b": "", "a": "b"}, {"b": "", "a": "b"}, ""),
        ({"b": "", "a": "b"}, {"a": "", "b": "a"}, "a"),
        ({"b": "", "a": "b"}, {"a": "", "b": ""}, ""),  # another order, but independent
        ({"b": "", "a": ""}, {"a": "", "b": "a"}, ""),  # dependent in the guide alone
        ({"c": "", "b": "c", "a": "b"}, {"a": "", "b": "a", "c": "b"}, "ab"),
        ({"c": "", "b": "", "a": "c"}, {"a": "", "b": "a", "c": "b"}, "a"),  # by way of b
        ({"c": "", "b": "c", "a": "b"}, {"a": "", "c": "", "b": "ac"}, "a"),
        ({"a": "", "b": "a", "c": "b"}, {"a": "", "b": "a", "c": "b"}, ""),
    ],
)
def test_sites_whose_parents_descend_from_them_are_left_to_monte_carlo(model, guide, biased):
    pair, x = (model_of(**model), guide_of(**guide)), torch.zeros(3)
    if not biased:
        structure = inspect(*pair, (x,), {}, analytic_kl=True)
    else:
        with pytest.warns(UserWarning, match="would be biased") as caught:
            structure = inspect(*pair, (x,), {}, analytic_kl=True)
        assert {str(w.message).split("'")[1] for w in caught} == set(biased)
    assert structure.analytic == set(guide) - set(biased)


def test_a_dependence_by_way_of_a_deterministic_site_counts():
    def guide(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(x.mean(), 1.0))
        h = pyro.deterministic("h", a.sin())
        pyro.sample("b", dist.Normal(h, 1.0))

    with pytest.warns(UserWarning, match=r"site 'a'.*\['b'\] depends on it"):
        structure = inspect(model_of(b="", a="b"), guide, (torch.zeros(3),), {}, analytic_kl=True)
    assert structure.analytic == {"b"}


def test_a_latent_that_the_guide_fixes_counts():
    """b is a function of a in the guide: the KL at a, given b, must not be integrated."""

    def guide(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(x.mean(), 1.0))
        pyro.sample("b", dist.Delta(a.sin()))

    with pytest.warns(UserWarning, match=r"site 'a'.*\['b'\] depends on it"):
        structure = inspect(model_of(b="", a="b"), guide, (torch.zeros(3),), {}, analytic_kl=True)
    assert "a" not in structure.analytic


def test_networks_pass_dependence_on():
    lower = pv.Conditional(pv.networks.mlp(3, (2, 2)), pv.families.normal)
    upper = pv.Conditional(pv.networks.mlp(2, (2, 3)), pv.families.normal)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            z1 = pyro.sample("z1", lower(z2))
            pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x, 1.0).to_event(1))
            pyro.sample("z2", upper(z1))

    with pytest.warns(UserWarning, match="site 'z1'"):
        structure = inspect(model, guide, (torch.zeros(4, 2),), {}, analytic_kl=True)
    assert structure.analytic == {"z2"}


def flow() -> Any:
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    return dist.TransformedDistribution(base, [dist.transforms.Planar(2)])


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: dist.StudentT(5.0, torch.zeros(2), 1.0).to_event(1), "StudentT"),
        (lambda: dist.LogNormal(torch.zeros(2), 1.0).to_event(1), "LogNormal"),
        (flow, "TransformedDistribution"),
    ],
)
def test_a_pair_of_distributions_without_a_closed_form_is_named(make, kind):
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", make())

    message = f"site 'z': no analytic KL of {kind} against Normal .* Monte Carlo"
    with pytest.warns(UserWarning, match=message) as caught:
        structure = inspect(model, guide, (torch.zeros(3),), {}, analytic_kl=True)
    assert len(caught) == 1
    assert structure.analytic == frozenset()


def test_without_the_analytic_form_nothing_is_said():
    structure = inspect(model_of(b="", a="b"), guide_of(a="", b="a"), (torch.zeros(3),), {})
    assert structure.analytic == frozenset()


# --- what does not fit


def test_a_latent_that_the_guide_lacks_is_named():
    with pytest.raises(ValueError, match=r"no latent site 'b', .* the guide draws \['a'\]"):
        inspect(model_of(a="", b=""), guide_of(a=""), (torch.zeros(3),), {})


def test_a_guide_that_draws_nothing_is_told_so():
    with pytest.raises(ValueError, match=r"no latent site 'a', .* the guide draws nothing"):
        inspect(model_of(a=""), lambda x: None, (torch.zeros(3),), {})


def test_a_latent_that_the_model_lacks_is_named():
    with pytest.raises(ValueError, match=r"latent site 'b', which the model does not .*auxiliary"):
        inspect(model_of(a=""), guide_of(a="", b=""), (torch.zeros(3),), {})


def test_another_latent_size_is_named_with_both_shapes():
    model, _ = bernoulli_pair(latent_dim=2)
    guide = pv.Guide(pv.Conditional(pv.networks.mlp(9, (2, 3)), pv.families.normal))
    message = r"site 'z': .* \(20, 3\), but the model expects \(20, 2\)"
    with pytest.raises(ValueError, match=message):
        inspect(model, guide, (bits(),), {})


def test_data_of_another_size_are_named_by_the_network_that_met_them():
    model, guide = bernoulli_pair()
    message = r"expected input of shape \(\*batch, 9\), got \(20, 8\)"
    with pytest.raises(ValueError, match=message) as caught:
        inspect(model, guide, (bits(dim=8),), {})
    assert any("shapes (20, 8)" in note for note in caught.value.__notes__)


def test_a_likelihood_of_another_size_is_named_by_its_site():
    model, _ = bernoulli_pair(dim=8)
    _, guide = bernoulli_pair(dim=9)
    with pytest.raises(ValueError, match=r"site 'x': .* shape \(20, 9\), .* over \(20, 8\)"):
        inspect(model, guide, (bits(),), {})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            0.5,
            r"site 'x': 1 of 20 observed data have values outside .* Bernoulli; .* 0 to 1",
        ),
        (2.0, r"site 'x': 1 of 20 .* range from 0 to 2"),
        (math.nan, r"site 'x': the observed value has NaN"),
        (math.inf, r"site 'x': the observed value has NaN or infinite"),
    ],
)
def test_values_outside_the_support_are_counted(value, message):
    model, guide = bernoulli_pair()
    x = bits()
    x[3, 4] = value

    def seeing_zeros(batch: Tensor) -> None:  # the encoder would be the first to stumble over NaN
        guide(batch.nan_to_num(0.0, 0.0))

    with pytest.raises(ValueError, match=message):
        inspect(model, seeing_zeros, (x,), {})


def test_supports_are_not_checked_where_the_user_has_switched_validation_off():
    model, guide = bernoulli_pair()
    with pyro.validation_enabled(is_validate=False):
        assert inspect(model, guide, (torch.full((3, 9), 0.5),), {}).observed == ("x",)


def test_a_likelihood_that_names_no_support_is_scored_as_it_is():
    class Own(dist.TorchDistribution):
        arg_constraints: Any = {}  # noqa: RUF012 - none

        def __init__(self, loc: Tensor) -> None:
            self.loc = loc
            super().__init__(loc.shape[:-1], loc.shape[-1:])

        def log_prob(self, value: Tensor) -> Tensor:
            return -(value - self.loc).abs().sum(-1)

    likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), lambda p: Own(p[..., 0, :]))
    model = pv.Model(pv.priors.StandardNormal(2), likelihood)
    assert inspect(model, bernoulli_pair()[1], (torch.full((3, 9), 0.5),), {}).observed == ("x",)


def test_values_under_a_mask_may_be_anything():
    model, guide, (x, seen) = masked_pair()
    x = torch.where(seen, x, torch.full_like(x, 7.0))
    assert inspect(model, guide, (x, seen), {}).observed == ("x",)


def test_a_users_own_error_says_on_what_arguments_it_happened():
    def model(x: Tensor) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        inspect(model, lambda x: None, (double_bits(),), {})
    (note,) = caught.value.__notes__
    assert note == "(while running guide and model on arguments of shapes (7, 9))"
