"""Compiled log-weights are the uncompiled ones, from the same noise."""

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import (
    LinearGaussian,
    double_bits,
    hierarchical_pair,
    library_pair,
    masked_pair,
    module_pair,
    store_pair,
    tutorial_pair,
    vampprior_pair,
)

import pyro_vae as pv
from pyro_vae.evidence import blocks, compiled
from pyro_vae.evidence.particles import Pair
from pyro_vae.graph.constant import folded
from pyro_vae.graph.refusal import CannotCompileError
from pyro_vae.graph.work import Work


@pytest.fixture
def interpreted(monkeypatch):
    """Graphs are interpreted; lists the shapes of the data that they were captured on."""
    shapes = []

    def lower(captured, static, data):
        shapes.append([tuple(t.shape) for t in data])

        def kernel(arguments):
            with torch.no_grad():
                return captured.module(*static, *arguments, *captured.reached)

        return kernel

    monkeypatch.setattr(compiled, "lower", lower)
    return shapes


PAIRS = {
    "library": library_pair,
    "tutorial": tutorial_pair,
    "store": store_pair,
    "modules": module_pair,
    "hierarchical": hierarchical_pair,
    "masked": masked_pair,
}


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("chunk_size", [None, 7, 4])
def test_the_weights_are_the_uncompiled_ones(make, chunk_size, interpreted):
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide, args = make()
    options: Any = {"num_particles": 21, "seed": 3, "chunk_size": chunk_size}
    options["data_plate"] = "data" if make is masked_pair else None
    expected = pv.log_weights(model, guide, *args, **options, compile=False)
    assert not interpreted
    state = torch.get_rng_state()
    found = pv.log_weights(model, guide, *args, **options, compile=True)
    assert len(interpreted) == 2
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(torch.get_rng_state(), state)


def test_remainders_are_weighed_too(interpreted):
    torch.manual_seed(0)
    model, guide, _ = library_pair()
    x = double_bits(230)
    options: Any = {"num_particles": 120, "seed": 1}
    expected = pv.log_evidence(model, guide, x, **options, compile=False)
    found = pv.log_evidence(model, guide, x, **options, compile=True)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(found.standard_error, expected.standard_error, rtol=1e-6, atol=1e-9)
    assert [shapes[-1] for shapes in interpreted] == [(100, 9), (100, 9)]


def test_exact_posterior(interpreted):
    torch.manual_seed(0)
    oracle = LinearGaussian.random()
    x = oracle.sample(110)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", oracle.posterior(x))

    weights = pv.log_weights(oracle.model, guide, x, num_particles=60, compile=True)
    expected = oracle.log_evidence(x).expand(60, -1)
    torch.testing.assert_close(weights, expected, rtol=0.0, atol=1e-10)


def test_auto_compiles_where_the_work_is_worth_it(interpreted, monkeypatch):
    model, guide, args = library_pair()
    pv.log_weights(model, guide, *args, num_particles=120)
    assert not interpreted
    monkeypatch.setattr(blocks, "WORTH_COMPILING", 1e-6)
    pv.log_weights(model, guide, *args, num_particles=120)
    assert len(interpreted) == 4  # for a hundred particles, and for the twenty left


def test_the_chunk_follows_from_the_memory(interpreted, monkeypatch):
    model, guide, args = library_pair()
    whole = pv.log_weights(model, guide, *args, num_particles=40, compile=True)
    # The largest tensor of one particle: logits, 7 data of 9 pixels.
    monkeypatch.setitem(blocks.MEMORY_BUDGET, "cpu", 12 * 7 * 9 * 8)
    parts = pv.log_weights(model, guide, *args, num_particles=40, compile=True)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    (_, first, _, second) = (shapes[0] for shapes in interpreted)
    assert (first[0], second[0]) == (40, 10)  # the largest divisor of 40 up to 12


@pytest.fixture
def graphs(monkeypatch):
    """How many constants each graph was given, and the graph as it comes to be lowered."""
    made = []

    def fold(captured):
        before = len(captured.reached)
        after = folded(captured)
        made.append((len(after.reached) - before, after))
        return after

    monkeypatch.setattr(compiled, "folded", fold)
    return made


def products_in(captured):
    names = [str(node.target) for node in captured.module.graph.nodes]
    return sum("mm" in name for name in names)


def test_what_a_prior_makes_of_its_parameters_is_computed_once(interpreted, graphs):
    model, guide, args = vampprior_pair()
    expected = pv.log_weights(model, guide, *args, num_particles=20, compile=False)
    found = pv.log_weights(model, guide, *args, num_particles=20, compile=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    (in_draw, _), (in_score, score) = graphs
    assert (in_draw, in_score) == (0, 2)  # the matrix and the constants of a mixture of normals
    layers = sum(isinstance(m, torch.nn.Linear) for m in model.likelihood.modules())
    assert products_in(score) == layers + 1  # of the decoder, and with the matrix
    with torch.no_grad():  # the next call computes it anew
        model.prior.places.mul_(0.5)
    moved = pv.log_weights(model, guide, *args, num_particles=20, compile=True)
    expected = pv.log_weights(model, guide, *args, num_particles=20, compile=False)
    torch.testing.assert_close(moved, expected, rtol=1e-10, atol=1e-10)
    assert (moved - found).abs().max() > 1e-3


def test_a_prior_that_all_data_share_is_computed_once(interpreted, graphs):
    _, guide, args = vampprior_pair()
    at, decoder = torch.nn.Parameter(torch.ones(4).double()), pv.networks.mlp(3, (1, 9)).double()
    prior = pv.Conditional(pv.networks.mlp(4, (2, 3)).double(), pv.families.normal)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior(at))
            pyro.sample("x", pv.families.bernoulli(decoder(z)), obs=x)

    expected = pv.log_weights(model, guide, *args, num_particles=20, compile=False)
    found = pv.log_weights(model, guide, *args, num_particles=20, compile=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    _, (count, score) = graphs
    assert count > 0
    with torch.no_grad():
        for tensor in score.reached:  # no view of it all, which can't be written to
            tensor.copy_(tensor.clone())


def test_auto_counts_once_a_chunk_what_particles_do_not_add_to(interpreted, monkeypatch):
    model, guide, args = vampprior_pair()
    pair = Pair(model, guide, args, None)
    with torch.no_grad(), Work() as work:
        pair.log_weights(1, 1)
    half = work.seconds(50, 1)  # of what it were if every particle had pseudo-inputs of its own
    monkeypatch.setattr(blocks, "WORTH_COMPILING", half)
    pv.log_weights(model, guide, *args, num_particles=100)
    assert not interpreted
    monkeypatch.setattr(blocks, "WORTH_COMPILING", work.seconds(0, 1))
    pv.log_weights(model, guide, *args, num_particles=100)
    assert interpreted


def test_a_tensor_that_does_not_grow_adds_nothing_for_a_particle():
    lists = {"alike": ([10, 80], [20, 80]), "of other lengths": ([10, 80], [20, 80, 5])}
    assert [blocks._added(*both) for both in lists.values()] == [10, 80]
    assert blocks._added([], []) == 1


def test_the_chunk_leaves_out_what_does_not_grow_with_it(interpreted, monkeypatch):
    model, guide, args = vampprior_pair()
    # The largest tensor of a particle: 7 data by 200 members; the pseudo-inputs alone are larger.
    monkeypatch.setitem(blocks.MEMORY_BUDGET, "cpu", 12 * 7 * 200 * 8)
    pv.log_weights(model, guide, *args, num_particles=40, compile=True)
    assert interpreted[1][0][0] == 10


def guide_of_three(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True).expand(-1, 3), 1.0).to_event(1))


def model_that_reads(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        logits = z.sum(-1, keepdim=True) * x.mean().item()
        wide = logits.expand(*logits.shape[:-1], 9)
        pyro.sample("x", dist.Bernoulli(logits=wide).to_event(1), obs=x)


def test_what_cannot_be_compiled_is_said_once(interpreted):
    pair: Any = (model_that_reads, guide_of_three, double_bits())
    options: Any = {"num_particles": 60}
    said_of = r"log-weights.*site 'z' \(test_importance_compiled\.py, line \d+\).*Tensor\.item"
    with pytest.warns(UserWarning, match=said_of) as said:
        found = pv.log_weights(*pair, **options, compile=True)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert torch.equal(found, pv.log_weights(*pair, **options, compile=False))


def test_without_a_compiler_the_weights_are_computed_all_the_same(monkeypatch):
    def lower(captured, static, data):
        raise CannotCompileError("no C++ compiler")

    monkeypatch.setattr(compiled, "lower", lower)
    model, guide, args = library_pair()
    with pytest.warns(UserWarning, match="log-weights.*no C\\+\\+ compiler"):
        found = pv.log_weights(model, guide, *args, num_particles=9, compile=True)
    assert torch.equal(found, pv.log_weights(model, guide, *args, num_particles=9, compile=False))


@pytest.mark.parametrize("compile", ["yes", None, 2])
def test_other_words_are_refused(compile):
    model, guide, args = library_pair()
    with pytest.raises(ValueError, match='compile: expected True, False or "auto", got'):
        pv.log_weights(model, guide, *args, num_particles=2, compile=compile)


def test_a_lower_precision_is_near():
    torch.manual_seed(0)
    encoder = pv.Conditional(pv.networks.mlp(9, (2, 3)), pv.families.normal)
    likelihood = pv.Conditional(pv.networks.mlp(3, (1, 9)), pv.families.bernoulli)
    model, guide = pv.Model(pv.priors.StandardNormal(3), likelihood), pv.Guide(encoder)
    x = torch.rand(20, 9).round()
    exact = pv.log_weights(model, guide, x, num_particles=50)
    lower = pv.log_weights(model, guide, x, num_particles=50, autocast=torch.bfloat16)
    assert lower.dtype == torch.float32
    assert not torch.equal(lower, exact)
    torch.testing.assert_close(lower, exact, rtol=0.0, atol=0.1)


def test_the_compiler_itself():
    """Large enough for oneDNN; remainders of data and of particles."""
    torch.manual_seed(0)
    encoder = pv.Conditional(pv.networks.mlp(784, (2, 3), hidden_dims=(64,)), pv.families.normal)
    decoder = pv.networks.mlp(3, (1, 784), hidden_dims=(64,))
    likelihood = pv.Conditional(decoder, pv.families.bernoulli)
    model, guide = pv.Model(pv.priors.StandardNormal(3), likelihood), pv.Guide(encoder)
    x = torch.rand(104, 784).round()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pv.log_weights(model, guide, x, num_particles=55, compile=True)
    expected = pv.log_weights(model, guide, x, num_particles=55, compile=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
