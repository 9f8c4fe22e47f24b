"""Training with latents that all data share: scales, logged bounds, compiled steps."""

import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_runs import adam, assert_alike
from fit_pairs import fit
from helpers import LinearGaussian, bits
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_sample, init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

import pyro_vae as pv

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "full_vb.py"))

# --- minibatches of a conjugate model


class Scalar:
    """theta ~ N(0, 1), z_n ~ N(0, 1), x_n ~ N(theta + z_n, 1), with the exact q(z_n|x_n, theta).

    With theta fixed every datum's weight is exact, so losses have no noise.
    """

    def __init__(self, size: int, *, scaled_globals: bool = False) -> None:
        self.size = size
        self.scaled_globals = scaled_globals
        self.x = 2 + torch.randn(size, 1).double()

    def model(self, x: Tensor) -> None:
        with self.global_scale(x):
            theta = pyro.sample("theta", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        with self.plate(x):
            LinearGaussian(torch.ones(1, 1).double(), theta, 1.0).model(x)

    def guide(self, x: Tensor, theta: Any) -> None:
        with self.global_scale(x):
            value = pyro.sample("theta", theta)
        with self.plate(x):
            LinearGaussian(torch.ones(1, 1).double(), value, 1.0).guide(x)

    def at(self, x: Tensor) -> None:
        """A guide of one value."""
        self.guide(x, dist.Delta(torch.full((1,), 0.7).double(), event_dim=1))

    def normal(self, x: Tensor) -> None:
        """A guide that can be the posterior, N(mean(x) N / (N + 2), 2 / (N + 2))."""
        loc = pyro.param("loc", torch.zeros(1).double())
        scale = pyro.param("scale", torch.ones(1).double(), constraint=constraints.positive)
        self.guide(x, dist.Normal(loc, scale).to_event(1))

    def global_scale(self, x: Tensor) -> Any:
        return poutine.scale(scale=len(x) / self.size if self.scaled_globals else 1.0)

    def plate(self, x: Tensor) -> Any:
        """The scale of a plate over all data, for the plate over the minibatch within it."""
        return poutine.scale(scale=1.0 if self.scaled_globals else self.size / len(x))

    def exact_loss(self) -> Tensor:
        """-log p(X, theta) at the value."""
        log_p = dist.Normal(0.7, 2**0.5).log_prob(self.x).sum()
        return -log_p - dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.7).double())


def loss_of(pair: Any, x: Tensor) -> Tensor:
    return pv.SVI(pair.model, pair.at, adam).evaluate_loss(x)


def test_scaled_data_estimate_the_bound_of_the_whole_set_at_every_step():
    pair = Scalar(12)
    whole = loss_of(pair, pair.x)
    torch.testing.assert_close(whole, pair.exact_loss())
    parts = torch.stack([loss_of(pair, x) for x in pair.x.split(4)])
    torch.testing.assert_close(parts.mean(), whole)


def test_scaled_global_latents_add_up_to_it_over_uneven_minibatches():
    pair = Scalar(12, scaled_globals=True)
    parts = [loss_of(pair, x) for x in pair.x.split(5)]  # 5, 5, 2
    torch.testing.assert_close(sum(parts), pair.exact_loss())


def test_a_subsampling_plate_is_such_a_scale():
    """The same model in Pyro's words: a plate over N data, of which x are some."""
    pair = Scalar(12)

    def plated(program: Any, x: Tensor) -> None:
        theta = torch.full((1,), 0.7).double()
        point = dist.Delta(theta, event_dim=1)
        prior = dist.Normal(x.new_zeros(1), 1.0).to_event(1)
        local = LinearGaussian(torch.ones(1, 1).double(), theta, 1.0)
        pyro.sample("theta", prior if program == "model" else point)
        with pyro.plate("all", pair.size, subsample_size=len(x), dim=-1):
            if program == "model":
                z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z + theta, 1.0).to_event(1), obs=x)
            else:
                pyro.sample("z", local.posterior(x))

    svi = pv.SVI(partial(plated, "model"), partial(plated, "guide"), adam)
    for x in pair.x.split(4):
        torch.testing.assert_close(svi.evaluate_loss(x), loss_of(pair, x))


@pytest.mark.parametrize("scaled_globals", [True, False])
def test_minibatches_find_the_posterior_of_the_whole_set(scaled_globals):
    pair = Scalar(40, scaled_globals=scaled_globals)
    svi = pv.SVI(
        pair.model, pair.normal, lambda params: torch.optim.Adam(params, lr=0.08), compile=False
    )
    for step in range(250):
        if step == 170:
            svi.optimizer.param_groups[0]["lr"] = 0.01  # type: ignore[union-attr]
        svi.step(pair.x[torch.randperm(40)[:10]])
    loc, scale = pyro.param("loc").item(), pyro.param("scale").item()
    exact = (2 / 42) ** 0.5
    assert scale == pytest.approx(exact, rel=0.15)  # of ten data it would be 0.41
    assert abs(loc - pair.x.sum().item() / 42) < 0.5 * exact
    log_w = pv.joint_log_weights(pair.model, pair.normal, pair.x, num_particles=20)
    covariance = 2 * torch.eye(40).double() + 1
    exact_evidence = dist.MultivariateNormal(torch.zeros(40).double(), covariance).log_prob(
        pair.x.squeeze(-1)
    )
    assert abs(log_w.logsumexp(0) - torch.tensor(20.0).log() - exact_evidence) < 0.2


# --- the weights of a decoder: the pair of experiments/full_vb.py


def digits(size: int) -> Tensor:
    return bits(size, 64)


def full_pair(size: int) -> tuple[Any, Any]:
    return SCRIPT["full_pair"](2, 8, size)


def test_weights_of_a_decoder_are_drawn_once_for_all_data():
    model, guide = full_pair(30)
    x = digits(7)
    trace = poutine.trace(guide).get_trace(x)
    replayed: Any = poutine.trace(poutine.replay(model, trace=trace)).get_trace(x)
    sites = {name: site for name, site in replayed.nodes.items() if "likelihood" in name}
    assert sorted(sites) == [
        f"likelihood.network.layers.{layer}.{kind}"
        for layer in (0, 2)
        for kind in ("bias", "weight")
    ]
    for site in sites.values():
        assert site["cond_indep_stack"] == ()
        assert site["scale"] == 7 / 30
    assert replayed.nodes["z"]["scale"] == 1.0
    assert pv.log_predictive(model, guide, x, num_global=2, num_particles=3).value.shape == (7,)


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_logged_bounds_are_those_of_the_whole_set_per_datum(loss):
    """Without a step: uneven minibatches, and validation data of another number."""
    x = digits(50)
    model, guide = full_pair(50)
    history = fit(
        model,
        guide,
        x,
        valid=torch.cat([x, x]),
        loss=loss(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        epochs=20,
    )
    joint = pv.joint_log_weights(model, guide, x, num_particles=60) / 50
    error = joint.std().item() / 60**0.5 + torch.tensor(history["elbo"]).std().item() / 20**0.5
    assert torch.tensor(history["elbo"]).mean().item() == pytest.approx(
        joint.mean().item(), abs=4 * error
    )
    # Once N data, then 2 N: the weights count once for each datum, and not half as much.
    assert history["valid_elbo"][-1] == pytest.approx(
        joint.mean().item(), abs=6 * joint.std().item()
    )
    rate = history["rate"][-1]
    assert rate > 2 * 64 / 50  # nats of the weights per datum


def test_fit_trains_the_pair():
    x = torch.rand(1, 64).round().repeat(60, 1)
    model, guide = full_pair(60)
    fit(model, guide, x, optimizer=lambda p: torch.optim.Adam(p, lr=0.02), epochs=60)
    estimate = pv.log_predictive(model, guide, x[:5], num_global=5, num_particles=10)
    assert estimate.mean > -0.7 * 64 * 0.693
    weights = guide.weights.scales.likelihood.network.layers
    assert len({round(s, 3) for s in weights._modules["0"].weight.flatten().tolist()}) > 3


def made() -> Any:
    torch.manual_seed(0)
    x = digits(20).double()
    encoder, prior, likelihood = (piece.double() for piece in SCRIPT["pieces"](2, 8))
    model = SCRIPT["FullModel"](prior, likelihood, 50).double()
    weights = AutoNormal(poutine.block(model, hide=["z", "x"]), init_loc_fn=init_to_sample)
    return model, SCRIPT["FullGuide"](encoder, weights, 50).double(), (x,)


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_a_step_with_an_autoguide_over_weights_compiles(interpreted, loss):
    assert_alike(interpreted, made, loss=loss)


class PlatedModel(PyroModule):
    """Weights as latents, and a plate of which the arguments are a part."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = PyroModule[nn.Linear](2, 9)  # type: ignore[call-arg]
        normal = dist.Normal(torch.zeros(9, 2).double(), 1.0).to_event(2)
        self.decoder.weight = PyroSample(normal)

    def forward(self, x: Tensor) -> None:
        _ = self.decoder.weight
        with pyro.plate("data", 50, subsample_size=len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


class PlatedGuide(PyroModule):
    def __init__(self, model: PlatedModel) -> None:
        super().__init__()
        self.weights = AutoNormal(poutine.block(model, hide=["z", "x"]))
        self.encoder = PyroModule[nn.Linear](9, 2)  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> None:
        self.weights(x)
        with pyro.plate("data", 50, subsample_size=len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))


def test_a_step_of_a_plate_that_holds_more_data_compiles(interpreted):
    def make() -> Any:
        model = PlatedModel().double()
        return model, PlatedGuide(model).double(), (bits(20, 9).double(),)

    assert_alike(interpreted, make)


def test_a_compiled_predictive_density_takes_the_weights_as_arguments(interpreted_weights):
    torch.manual_seed(0)
    model, guide, (x,) = made()
    count: Any = {"num_global": 3, "num_particles": 10}
    plain = pv.log_predictive(model, guide, x, **count, compile=False)
    other = pv.log_predictive(model, guide, x, **count, compile=True)
    assert len(interpreted_weights) == 2  # of guide and of model, for all draws of the weights
    torch.testing.assert_close(other.share, plain.share, rtol=1e-9, atol=1e-12)


def test_the_analytic_kl_keeps_the_jacobian_of_an_autoguide():
    """An AutoNormal that equals its log-normal prior: the rate is zero by either bound."""

    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    start = partial(init_to_value, values={"scale": torch.ones(())})
    unseen = poutine.block(model, hide=["x"])
    guide = AutoNormal(unseen, init_loc_fn=start, init_scale=1.0)
    for loss in (Trace_ELBO(), TraceMeanField_ELBO()):
        svi = pv.SVI(model, guide, adam, loss)
        assert all(abs(svi.evaluate(torch.ones(3)).rate) < 1e-5 for _ in range(5))
