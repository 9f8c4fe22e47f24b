"""Exact sums over discrete latents: against sums by hand, and against Pyro's TraceEnum_ELBO."""

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_runs import assert_alike, trained
from helpers import double_bits, leaves
from objective_runs import estimate, gradients
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.context import bare

CLASSES, BITS, DIM = 4, 3, 9
ENUM = partial(TraceEnum_ELBO, max_plate_nesting=2)


@pytest.fixture(autouse=True)
def _double():
    pyro.clear_param_store()
    torch.manual_seed(0)


def one_hot_pair() -> Any:
    """One latent of four classes, enumerated in the guide."""
    encoder = pv.Conditional(pv.networks.mlp(DIM, (1, CLASSES)), pv.families.one_hot)
    likelihood = pv.Conditional(pv.networks.mlp(CLASSES, (1, DIM)), pv.families.bernoulli)
    prior = pv.priors.Learned(pv.families.one_hot, (1, CLASSES))
    nn.init.normal_(prior.params)
    model, guide = pv.Model(prior, likelihood).double(), pv.Guide(encoder).double()
    return model, config_enumerate(guide), (double_bits(),)


def bits_pair() -> Any:
    """Three latent bits in one site, all eight patterns of it enumerated."""
    encoder = pv.Conditional(pv.networks.mlp(DIM, (1, BITS)), pv.families.bernoulli)
    likelihood = pv.Conditional(pv.networks.mlp(BITS, (1, DIM)), pv.families.bernoulli)
    prior = pv.priors.Learned(pv.families.bernoulli, (1, BITS))
    model, guide = pv.Model(prior, likelihood).double(), pv.Guide(encoder).double()
    return model, config_enumerate(guide), (double_bits(),)


class Semi(nn.Module):
    """p(y) p(z|y) p(x|z, y) with a class, a normal and pixels in a plate of their own."""

    def __init__(self, *, classes: bool = False) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(CLASSES).double())
        self.loc = nn.Parameter(torch.randn(CLASSES, 2).double())
        self.decoder = nn.Linear(2, DIM).double()
        self.encoder = nn.Linear(DIM, 2).double()
        if classes:
            self.classes = nn.Linear(DIM, CLASSES).double()
            self.by_class = nn.Parameter(torch.randn(CLASSES, 2).double())

    def model(self, x: Tensor) -> None:
        pyro.module("semi", self)
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample(
                "y", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"}
            )
            z = pyro.sample("z", dist.Normal(self.loc[y], 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Both latents; y is summed, z drawn given each y."""
        pyro.module("semi", self)
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample(
                "y", dist.Categorical(logits=self.classes(x)), infer={"enumerate": "parallel"}
            )
            loc = self.encoder(x) + self.by_class[y]
            pyro.sample("z", dist.Normal(loc, 0.7).to_event(1))

    def guide_of_z(self, x: Tensor) -> None:
        """z alone: the model sums y out."""
        pyro.module("semi", self)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.7).to_event(1))


class Pixels(nn.Module):
    """A class for each datum, and a bit for each pixel that the model sums out within a plate."""

    def __init__(self) -> None:
        super().__init__()
        self.by_class = nn.Parameter(torch.randn(CLASSES, DIM).double())
        self.logits = nn.Parameter(torch.randn(CLASSES).double())
        self.shift = nn.Parameter(torch.tensor([-1.0, 2.0]).double())

    def model(self, x: Tensor) -> None:
        pyro.module("pixels", self)
        with pyro.plate("data", len(x), dim=-2):
            y = pyro.sample(
                "y", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"}
            )
            with pyro.plate("pixels", DIM, dim=-1):
                noisy = dist.Bernoulli(torch.tensor(0.3).double())
                c = pyro.sample("c", noisy, infer={"enumerate": "parallel"})
                logits = self.by_class[y.squeeze(-1)] + self.shift[c.long()]
                pyro.sample("x", dist.Bernoulli(logits=logits), obs=x)

    def guide(self, x: Tensor) -> None:
        """Nothing is left to draw."""

    def log_evidence(self, x: Tensor) -> Tensor:
        logits = self.by_class[:, None, :, None] + self.shift  # (classes, 1, pixels, c)
        log_p = dist.Bernoulli(logits=logits).log_prob(x[:, :, None])
        log_c = torch.tensor([0.7, 0.3]).double().log()
        log_x = (log_p + log_c).logsumexp(-1).sum(-1)
        return (log_x + torch.log_softmax(self.logits, 0)[:, None]).logsumexp(0)


def guided() -> Any:
    semi = Semi(classes=True)
    return semi.model, semi.guide, (double_bits(),)


def summed_out() -> Any:
    semi = Semi()
    return semi.model, semi.guide_of_z, (double_bits(),)


def pixels() -> Any:
    pair = Pixels()
    return pair.model, pair.guide, (double_bits(),)


PAIRS = [one_hot_pair, bits_pair, guided, summed_out, pixels]


def by_hand(pair: Any, values: Tensor) -> Tensor:
    """The ELBO of a library pair with the latent summed over these values."""
    model, guide, (x,) = pair
    q = pv.encode(guide, x)
    log_p = model.prior().log_prob(values)[:, None] + torch.stack(
        [model.likelihood(v.expand(len(x), -1)).log_prob(x) for v in values]
    )
    log_q = q.log_prob(values[:, None].expand(-1, len(x), -1))
    return (log_q.exp() * (log_p - log_q)).sum()


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (one_hot_pair, torch.eye(CLASSES).double()),
        (bits_pair, torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * BITS)),
    ],
)
def test_the_bound_is_the_sum_by_hand(make, values):
    pair = make()
    terms = estimate(ENUM(), pair)
    assert terms.loss.item() == pytest.approx(-by_hand(pair, values).item(), rel=1e-12)
    assert terms.loss.item() == pytest.approx((terms.distortion + terms.rate).item(), rel=1e-12)
    other = estimate(ENUM(), pair, seed=2)
    assert terms.loss == other.loss  # nothing is drawn


@pytest.mark.parametrize("make", PAIRS)
@pytest.mark.parametrize("particles", [1, 3])
def test_values_and_gradients_are_those_of_pyro(make, particles):
    pair = make()
    loss = ENUM(num_particles=particles, vectorize_particles=True)
    terms = estimate(loss, pair)
    ours = gradients(loss, pair)
    model, guide, args = pair
    pyro.set_rng_seed(1)
    expected = loss.differentiable_loss(model, guide, *args)
    torch.testing.assert_close(terms.loss, expected, rtol=1e-10, atol=0.0)
    named = leaves(model, guide)
    theirs = torch.autograd.grad(expected, list(named.values()), allow_unused=True)
    for name, gradient in zip(named, theirs, strict=True):
        assert (gradient is None) == (name not in ours)
        if gradient is not None:
            torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", [guided, summed_out])
def test_compiled_and_uncompiled_steps_are_alike(make, interpreted):
    assert_alike(interpreted, make, loss=ENUM)


def test_where_nothing_is_drawn_compiled_and_uncompiled_losses_agree(interpreted):
    compiled, _ = trained(pixels, True, loss=ENUM)
    assert len(interpreted) == 1
    uncompiled, _ = trained(pixels, False, loss=ENUM)
    torch.testing.assert_close(compiled, uncompiled, rtol=1e-9, atol=0.0)


def test_the_evidence_of_a_model_that_is_summed_out_entirely_is_exact():
    torch.manual_seed(3)
    pair = Pixels()
    x = double_bits(130)
    found = pv.log_evidence(pair.model, pair.guide, x, num_particles=2, data_plate="data")
    torch.testing.assert_close(found.value, pair.log_evidence(x), rtol=1e-12, atol=0.0)
    assert (found.standard_error < 1e-7).all()


@pytest.mark.parametrize("compile", [False, True])
def test_weights_sum_the_models_own_latents_out(compile):
    """With y summed, the weights of z are those of the mixture written by hand."""
    semi, x = Semi(), double_bits(20)

    def mixture(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            weights = dist.Categorical(logits=semi.logits)
            components = dist.Normal(semi.loc, 1.0).to_event(1)
            z = pyro.sample("z", dist.MixtureSameFamily(weights, components))
            pyro.sample("x", dist.Bernoulli(logits=semi.decoder(z)).to_event(1), obs=x)

    options: Any = {"num_particles": 30, "compile": compile}
    found = pv.log_weights(semi.model, semi.guide_of_z, x, **options)
    expected = pv.log_weights(mixture, semi.guide_of_z, x, num_particles=30)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_class_that_is_drawn_gives_the_evidence_that_its_sum_gives():
    model, guide, _ = one_hot_pair()
    x = double_bits(5)
    values = torch.eye(CLASSES).double()
    log_p = model.prior().log_prob(values)[:, None] + torch.stack(
        [model.likelihood(v.expand(len(x), -1)).log_prob(x) for v in values]
    )
    found = pv.log_evidence(model, guide, x, num_particles=20_000)
    exact = log_p.logsumexp(0).detach()
    assert ((found.value - exact).abs() < 5 * found.standard_error).all()
    assert (found.standard_error < 0.05).all()


def test_subsampling_scales_multiply_sums():
    semi, x = Semi(), double_bits()
    whole = estimate(ENUM(), (semi.model, semi.guide_of_z, (x,)))
    scaled = estimate(
        ENUM(),
        (pyro.poutine.scale(semi.model, 3.0), pyro.poutine.scale(semi.guide_of_z, 3.0), (x,)),
    )
    torch.testing.assert_close(scaled.loss, 3 * whole.loss)


def test_the_kl_weight_multiplies_what_the_guide_sums():
    pair = one_hot_pair()
    whole = estimate(ENUM(), pair)
    with pv.kl_weight(0.25):
        weighted = estimate(ENUM(), pair)
    torch.testing.assert_close(weighted.loss, whole.distortion + 0.25 * whole.rate)
    torch.testing.assert_close(weighted.rate, whole.rate)


def test_a_marked_site_of_the_model_alone_needs_the_sum():
    with pytest.raises(ValueError, match="site 'y' is marked for enumeration and the guide does"):
        estimate(Trace_ELBO(), summed_out())


def test_too_many_bits_are_refused():
    encoder = pv.Conditional(pv.networks.mlp(DIM, (1, 17)), pv.families.bernoulli)
    with pytest.raises(ValueError, match="at most 16 bits to sum over, got 17"):
        encoder(torch.zeros(DIM)).enumerate_support()


def test_a_class_that_is_not_marked_is_left_to_pyro_and_said_once(interpreted):
    model, guide, args = one_hot_pair()
    svi = pv.SVI(model, bare(guide), sgd, ENUM(strict_enumeration_warning=False), compile=True)
    with pytest.warns(UserWarning, match=r"site 'z'.*OneHotCategorical\); mark it") as caught:
        losses = [svi.step(*args) for _ in range(4)]
    assert len(caught) == 1
    assert not interpreted
    assert all(loss.isfinite() for loss in losses)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3)
