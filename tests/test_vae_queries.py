"""A pair can be encoded, decoded, reconstructed and generated from."""

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import TutorialPair, bernoulli_pair, bits, logits, same_normal
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.context import seeded


class HierarchicalPair:
    """Two latent layers: p(z2) p(z1|z2) p(x|z1) with guide q(z1|x) q(z2|z1)."""

    def __init__(self, dim: int = 9) -> None:
        mlp, normal = pv.networks.mlp, pv.families.normal
        self.top = pv.priors.StandardNormal(2)
        self.down = pv.Conditional(mlp(2, (2, 3), hidden_dims=(8,)), normal)
        self.out = pv.Conditional(mlp(3, (1, dim), hidden_dims=(8,)), pv.families.bernoulli)
        self.up = pv.Conditional(mlp(dim, (2, 3), hidden_dims=(8,)), normal)
        self.top_up = pv.Conditional(mlp(3, (2, 2), hidden_dims=(8,)), normal)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", self.top())
            z1 = pyro.sample("z1", self.down(z2))
            pyro.sample("x", self.out(z1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", self.up(x))
            pyro.sample("z2", self.top_up(z1))


class TwoViews:
    """One latent, two observed sites."""

    def __init__(self) -> None:
        self.first, self.second = nn.Linear(2, 4), nn.Linear(2, 3)

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.first(z), 1.0).to_event(1), obs=x)
            pyro.sample("y", dist.Normal(self.second(z), 1.0).to_event(1), obs=y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, :2] + y[:, :2], 1.0).to_event(1))


def a_pair(name: str) -> tuple[Any, Any, int]:
    """A model, its guide, and the size of the latent site that the decoder sees."""
    if name == "ours":
        return *bernoulli_pair(), 2
    pair = TutorialPair() if name == "tutorial" else HierarchicalPair()
    return pair.model, pair.guide, 2


every_pair = pytest.mark.parametrize("name", ["ours", "tutorial", "hierarchical"])


def test_likelihood_and_encoder_see_the_context():
    encoder = pv.Conditional(pv.networks.mlp(12, (2, 2)), pv.families.normal)
    likelihood = pv.Conditional(pv.networks.mlp(5, (1, 9)), pv.families.bernoulli)
    model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
    x, y = bits(7), torch.eye(3)[torch.arange(7) % 3]
    q = pv.encode(guide, x, y)
    assert same_normal(q, encoder(x, y))
    z = q.sample()
    assert torch.equal(logits(pv.decode(model, z, x, y)), logits(likelihood(z, y)))
    assert pv.reconstruct(model, guide, x, y).shape == (7, 9)
    assert pv.generate(model, 7, y).shape == (7, 9)


def test_encode_is_the_encoder():
    _, guide = bernoulli_pair()
    x = bits(7)
    q = pv.encode(guide, x)
    assert same_normal(q, guide.encoder(x))
    assert not q.mean.requires_grad
    pair = TutorialPair()
    loc, log_scale = pair.encoder(x).chunk(2, dim=-1)
    assert same_normal(pv.encode(pair.guide, x), dist.Normal(loc, log_scale.exp()).to_event(1))


def test_encode_gives_the_latents_of_a_hierarchy_by_name():
    pair = HierarchicalPair()
    x = bits(7)
    q = pv.encode(pair.guide, x, seed=3)
    assert list(q) == ["z1", "z2"]
    assert same_normal(q["z1"], pair.up(x))
    with seeded(3), torch.no_grad():
        z1 = pair.up(x).sample()
    assert same_normal(q["z2"], pair.top_up(z1))
    assert not same_normal(pv.encode(pair.guide, x, seed=4)["z2"], q["z2"])


def test_decode_is_the_likelihood():
    model, _ = bernoulli_pair()
    z = torch.randn(5, 2)
    expected = logits(model.likelihood(z))
    assert torch.equal(logits(pv.decode(model, z)), expected)
    assert torch.equal(logits(pv.decode(model, {"z": z})), expected)
    # Observed values count for their shape alone.
    assert torch.equal(logits(pv.decode(model, z, torch.zeros(5, 9))), expected)
    pair = TutorialPair()
    for latents in (z, {"latent": z}):
        p = pv.decode(pair.model, latents, torch.zeros(5, 9))
        assert torch.equal(logits(p), pair.decoder(z))
        assert not p.mean.requires_grad


def test_decode_takes_the_latents_of_a_hierarchy_by_name():
    pair = HierarchicalPair()
    z1, z2, x = torch.randn(5, 3), torch.randn(5, 2), torch.zeros(5, 9)
    p = pv.decode(pair.model, {"z1": z1, "z2": z2}, x)
    assert torch.equal(logits(p), logits(pair.out(z1)))
    # A latent that is left out is drawn given the others.
    with seeded(0), torch.no_grad():
        drawn = pair.down(z2).sample()
    p = pv.decode(pair.model, {"z2": z2}, x)
    torch.testing.assert_close(logits(p), logits(pair.out(drawn)))


def test_decode_refuses_one_tensor_for_several_latents():
    with pytest.raises(ValueError, match=r"latent sites \['z2', 'z1'\]; give a dict"):
        pv.decode(HierarchicalPair().model, torch.randn(5, 3), torch.zeros(5, 9))


def test_decode_refuses_latents_that_the_model_lacks():
    with pytest.raises(ValueError, match=r"z names \['latent'\].*latent sites \['z'\]"):
        pv.decode(bernoulli_pair()[0], {"latent": torch.randn(5, 2)})


def test_several_observed_sites_come_by_name():
    pair = TwoViews()
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    z = torch.randn(5, 2)
    p = pv.decode(pair.model, z, x, y)
    assert list(p) == ["x", "y"]
    assert torch.equal(p["y"].mean, pair.second(z))
    reconstructions = pv.reconstruct(pair.model, pair.guide, x, y)
    assert {k: v.shape for k, v in reconstructions.items()} == {"x": (5, 4), "y": (5, 3)}
    assert list(pv.generate(pair.model, x, y)) == ["x", "y"]


def test_a_program_without_the_site_in_question_is_refused():
    with pytest.raises(ValueError, match="the guide has no site to read"):
        pv.encode(lambda x: None, bits(5))
    with pytest.raises(ValueError, match="the model has no site to read"):
        pv.generate(lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)), bits(5))


def reconstructed_by_hand(pair: Any, x: Tensor, *, draw: bool) -> Tensor:
    """Ancestral sampling without Pyro; to be called under a seed."""
    if isinstance(pair, TutorialPair):
        loc, log_scale = pair.encoder(x).chunk(2, dim=-1)
        likelihood = dist.Bernoulli(logits=pair.decoder(dist.Normal(loc, log_scale.exp()).sample()))
    elif isinstance(pair, HierarchicalPair):
        z1 = pair.up(x).sample()
        pair.top_up(z1).sample()
        likelihood = pair.out(z1)
    else:
        model, guide = pair
        likelihood = model.likelihood(guide.encoder(x).sample())
    return likelihood.sample() if draw else likelihood.mean


def generated_by_hand(pair: Any, size: int, *, draw: bool) -> Tensor:
    """Ancestral sampling without Pyro; to be called under a seed."""
    if isinstance(pair, TutorialPair):
        likelihood = dist.Bernoulli(logits=pair.decoder(torch.randn(size, 2)))
    elif isinstance(pair, HierarchicalPair):
        likelihood = pair.out(pair.down(torch.randn(size, 2)).sample())
    else:
        likelihood = pair[0].likelihood(torch.randn(size, 2))
    return likelihood.sample() if draw else likelihood.mean


@pytest.mark.parametrize("make", [bernoulli_pair, TutorialPair, HierarchicalPair])
@pytest.mark.parametrize("draw", [False, True], ids=["mean", "draw"])
@torch.no_grad()
def test_reconstruct_and_generate_are_ancestral_sampling(make, draw):
    pair, x = make(), bits(7)
    ours = isinstance(pair, tuple)
    model, guide = pair if ours else (pair.model, pair.guide)
    with seeded(3):
        by_hand = reconstructed_by_hand(pair, x, draw=draw)
    result = pv.reconstruct(model, guide, x, draw=draw, seed=3)
    torch.testing.assert_close(result, by_hand)
    with seeded(3):
        by_hand = generated_by_hand(pair, 7, draw=draw)
    torch.testing.assert_close(pv.generate(model, 7 if ours else x, draw=draw, seed=3), by_hand)


@every_pair
def test_draws_lie_in_the_support_and_means_between(name):
    model, guide, _ = a_pair(name)
    x = bits(50)
    for call in (partial(pv.reconstruct, model, guide, x), partial(pv.generate, model, x)):
        mean, draw = call(), call(draw=True)
        assert mean.shape == draw.shape == (50, 9)
        assert set(draw.unique().tolist()) == {0.0, 1.0}
        assert ((mean > 0) & (mean < 1)).all()
        assert not mean.requires_grad


@every_pair
def test_generate_does_not_look_at_the_observed_values(name):
    model, _, _ = a_pair(name)
    for draw in (False, True):
        one = pv.generate(model, torch.zeros(50, 9), draw=draw)
        assert torch.equal(pv.generate(model, torch.ones(50, 9), draw=draw), one)


@every_pair
def test_a_seed_reproduces_and_another_does_not(name):
    model, guide, _ = a_pair(name)
    x = bits(7)
    calls = [
        lambda seed: pv.reconstruct(model, guide, x, seed=seed),
        lambda seed: pv.reconstruct(model, guide, x, draw=True, seed=seed),
        lambda seed: pv.generate(model, x, seed=seed),
        lambda seed: pv.generate(model, x, draw=True, seed=seed),
    ]
    for call in calls:
        first = call(1)
        torch.rand(3)
        assert torch.equal(call(1), first)
        assert not torch.equal(call(2), first)


@every_pair
def test_the_callers_random_state_is_left_alone(name):
    model, guide, latent_dim = a_pair(name)
    x, z = bits(7), torch.randn(7, latent_dim)
    latents = {"z1": torch.randn(7, 3), "z2": z} if name == "hierarchical" else z
    before = torch.get_rng_state()
    pv.encode(guide, x)
    pv.decode(model, latents, x)
    pv.reconstruct(model, guide, x, draw=True)
    pv.generate(model, x, draw=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_a_pair_is_used_in_evaluation_mode_and_given_back_as_it_was():
    def noisy(in_dim: int, out: tuple[int, int]) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), pv.networks.mlp(in_dim, out, hidden_dims=(8,)))

    encoder = pv.Conditional(noisy(9, (2, 2)), pv.families.normal)
    likelihood = pv.Conditional(noisy(2, (1, 9)), pv.families.bernoulli)
    model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
    likelihood.eval()
    flags = [m.training for program in (model, guide) for m in program.modules()]
    assert len(set(flags)) == 2
    x, z = torch.ones(7, 9), torch.ones(7, 2)
    q, p = pv.encode(guide, x).mean, pv.decode(model, z).mean
    # Equal rows have equal results: no dropout.
    torch.testing.assert_close(q, q[:1].expand(7, 2))
    torch.testing.assert_close(p, p[:1].expand(7, 9))
    noise = guide.encoder(x).mean
    assert not torch.allclose(noise, noise[:1].expand(7, 2))
    pv.reconstruct(model, guide, x)
    pv.generate(model, 7)
    assert [m.training for program in (model, guide) for m in program.modules()] == flags
