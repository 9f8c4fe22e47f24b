"""One free q per datum is found in its row, reaches the best mean field, and is a swap."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_runs import assert_alike
from helpers import LinearGaussian, double_bits
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.program.recipe import build, describe

N = 5
X = torch.zeros(N, 4)


def filled(num_data: int = N, **options: Any) -> Any:
    """A table with other params in each row."""
    network: Any = pv.networks.per_datum(num_data, (2, 3), **options)
    nn.init.normal_(network.table)
    return network


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64], ids=str)
def test_params_are_the_rows_of_the_index(dtype):
    network, index = filled(), torch.tensor([[3], [0], [3], [4]])
    assert torch.equal(network(X[:4], index.to(dtype)), network.table[[3, 0, 3, 4]])


@pytest.mark.parametrize("batch", [(), (7,), (3, 7), (2, 3, 7)], ids=str)
def test_any_number_of_batch_dimensions_is_kept(batch):
    network, index = filled(), torch.randint(N, (*batch, 1))
    params = network(torch.zeros(*batch, 4), index)
    assert torch.equal(params, network.table[index[..., 0]])
    assert params.shape == network(torch.zeros(*batch, 4), index.float()).shape == (*batch, 2, 3)


def test_index_and_inputs_broadcast():
    network, index = filled(), torch.arange(N)[:, None]
    params = network(torch.zeros(3, N, 4), index)
    assert torch.equal(params, network.table.expand(3, N, 2, 3))
    assert network(torch.zeros(4), index).shape == (N, 2, 3)


def test_gradients_reach_the_rows_of_the_index_alone():
    network = filled()
    network(X[:3], torch.tensor([[3], [0], [3]])).sum().backward()
    assert network.table.grad[:, 0, 0].tolist() == [1.0, 0.0, 0.0, 2.0, 0.0]


def test_around_a_network_it_starts_as_that_network():
    inner = pv.networks.mlp(6, (2, 3))
    network = pv.networks.per_datum(N, (2, 3), around=inner)
    x, y, index = torch.randn(N, 4), torch.randn(N, 2), torch.arange(N)[:, None]
    assert torch.equal(network(x, y, index), inner(x, y))
    table: Any = network.table
    nn.init.normal_(table)
    assert torch.equal(network(x, y, index), inner(x, y) + table)
    network(x, y, index).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def best_mean_field(truth: LinearGaussian, x: Tensor) -> Tensor:
    """The bound of each datum under the best independent normals, (N,).

    They have the posterior's means and the inverse of the diagonal of its precision as variances.
    """
    posterior = truth.posterior(x)
    scale = posterior.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
    return bound_of(truth, x, posterior.mean, scale)


def bound_of(truth: LinearGaussian, x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Exact ELBO of independent normals as q, log p(x) - KL(q, p(z|x)), (N,)."""
    q = dist.MultivariateNormal(loc, scale_tril=torch.diag_embed(scale))
    kl = torch.distributions.kl_divergence(q, truth.posterior(x).expand(q.batch_shape))
    return truth.log_evidence(x) - kl


def test_it_reaches_the_best_mean_field_of_each_datum():
    truth = LinearGaussian.random()
    truth.weight[:, 1] = truth.weight[:, 0] + 0.5 * truth.weight[:, 1]  # a posterior that leans
    x, index = truth.sample(N), torch.arange(N)[:, None]

    def model(x: Tensor, index: Tensor) -> None:
        truth.model(x)

    network = pv.networks.per_datum(N, (2, 2))
    guide = pv.Guide(pv.Conditional(network, pv.families.normal)).double()
    best = best_mean_field(truth, x)
    assert (best < truth.log_evidence(x) - 0.1).all()  # a gap that no mean field closes
    svi: Any = pv.SVI(
        model,
        guide,
        lambda params: torch.optim.Adam(params, lr=0.1),
        TraceMeanField_ELBO(num_particles=30, vectorize_particles=True),
        compile=False,
    )
    for step in range(400):
        if step in (150, 250, 320):
            svi.optimizer.param_groups[0]["lr"] /= 5
        order = torch.randperm(N)
        svi.step(x[order], index[order])
    q: Any = pv.encode(guide, x, index)
    found = bound_of(truth, x, q.base_dist.loc, q.base_dist.scale)
    assert (found <= best + 1e-9).all()
    torch.testing.assert_close(found, best, rtol=0, atol=5e-3)
    log_w = pv.log_weights(model, guide, x, index, num_particles=2000, compile=False)
    error = log_w.std(0) / 2000**0.5
    assert ((log_w.mean(0) - found).abs() < 5 * error).all()


def pair() -> Any:
    torch.manual_seed(0)
    small: Any = {"hidden_dims": (8,)}
    network = pv.networks.per_datum(9, (2, 2), around=pv.networks.mlp(9, (2, 2), **small))
    likelihood = pv.Conditional(
        pv.networks.first(pv.networks.mlp(2, (1, 9), **small)), pv.families.bernoulli
    )
    model = pv.Model(pv.priors.StandardNormal(2), likelihood)
    guide = pv.Guide(pv.Conditional(network, pv.families.normal))
    index = torch.tensor([[8], [1], [0], [5], [3], [2], [7]])
    return model.double(), guide.double(), (double_bits(), index)


def test_compiled_steps_lead_where_eager_steps_lead(interpreted):
    assert_alike(interpreted, pair, loss=Trace_ELBO)


def test_the_likelihood_ignores_what_comes_with_its_first_input():
    inner = pv.networks.mlp(2, (1, 9))
    z = torch.randn(3, 7, 2)
    assert torch.equal(pv.networks.first(inner)(z, torch.randn(7, 1)), inner(z))
    model, guide, (x, index) = pair()
    assert pv.generate(model, 3).shape == (3, 9)
    assert pv.reconstruct(model, guide, x, index).shape == (7, 9)


def test_it_goes_with_missing_entries():
    """The index is the last input, so that the mask stays the second."""
    seen = pv.networks.without_missing(pv.networks.mlp(18, (2, 2)))
    encoder = pv.Conditional(pv.networks.per_datum(7, (2, 2), around=seen), pv.families.normal)
    decoder = pv.networks.first(pv.networks.mlp(2, (1, 9)))
    likelihood = pv.Masked(pv.Conditional(decoder, pv.families.bernoulli))
    model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
    mask = torch.rand(7, 9) < 0.7
    args = (torch.where(mask, 1.0, torch.nan), mask, torch.arange(7)[:, None])
    svi = pv.SVI(model, guide, lambda p: torch.optim.Adam(p, lr=1e-2), compile=False)
    assert all(svi.step(*args).isfinite() for _ in range(3))


def test_fit_takes_the_index_in_minibatches_and_load_gives_the_pair_back(tmp_path):
    model, guide, _ = pair()
    model, guide = model.float(), guide.float()
    x, index = (torch.rand(9, 1) < 0.5).float().expand(9, 9), torch.arange(9.0)[:, None]
    history = pv.fit(
        model,
        guide,
        (x, index),
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-2),
        epochs=40,
        batch_size=4,
        out=tmp_path / "run",
        progress=False,
        compile=False,
    )
    assert history["elbo"][-1] > history["elbo"][0] + 0.5
    again, other = pv.load(tmp_path / "run")
    options: Any = {"num_particles": 20, "compile": False}
    expected = pv.log_evidence(model, guide, x, index, **options)
    found = pv.log_evidence(again, other, x, index, **options)
    assert torch.equal(found.value, expected.value)


@pytest.mark.parametrize("around", [None, "mlp"])
def test_it_is_made_again_from_its_recipe(around):
    network = filled(around=None if around is None else pv.networks.mlp(4, (2, 3)))
    (again,) = build(describe(network))
    again.load_state_dict(network.state_dict())
    index = torch.arange(N)[:, None]
    assert torch.equal(again(X, index), network(X, index))


MISTAKES: dict[str, tuple[Any, str]] = {
    "no index": ((X,), r"numbers of the data as the last .* got torch.float32 of shape \(5, 4\)"),
    "index alone": ((torch.zeros(5, 1),), "as the last of several inputs"),
    "no last dimension": ((X, torch.arange(5)), r"got torch.int64 of shape \(5,\)"),
    "bool": ((X, torch.ones(5, 1).bool()), "got torch.bool"),
    "half a datum": ((X, torch.full((5, 1), 0.5)), "no integers"),
    "NaN": ((X, torch.full((5, 1), torch.nan)), "no integers"),
    "too large": ((X, torch.full((5, 1), N)), "from 0 to 4, got 5; give num_data for all data"),
    "negative": ((X, torch.full((5, 1), -1)), "from 0 to 4, got -1"),
}


@pytest.mark.parametrize(("inputs", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_index_is_refused(inputs, expected):
    with pytest.raises((ValueError, IndexError), match=rf"networks\.per_datum: .*{expected}"):
        filled()(*inputs)


def test_an_index_that_is_too_coarse_is_refused():
    with pytest.raises(ValueError, match=r"float16 can't tell all of 3000 data apart"):
        filled(3000)(X, torch.zeros(5, 1, dtype=torch.float16))


def test_without_validation_torch_finds_what_is_out_of_range():
    with pyro.validation_enabled(False), pytest.raises(IndexError, match="out of"):
        filled()(X, torch.full((5, 1), N))


def test_other_mistakes_are_refused():
    with pytest.raises(ValueError, match=r"per_datum: expected num_data >= 1, got 0"):
        pv.networks.per_datum(0, (2, 3))
    with pytest.raises(ValueError, match=r"per_datum: expected out=\(P, D\)"):
        pv.networks.per_datum(5, (2, 0))
    network = pv.networks.per_datum(N, (2, 3), around=pv.networks.mlp(4, (2, 1)))
    with pytest.raises(ValueError, match=r"\(\*batch, 2, 3\), got \(5, 2, 1\); build both"):
        network(X, torch.arange(N)[:, None])
