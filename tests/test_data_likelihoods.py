"""Which likelihoods are densities for which data."""

import pyro.distributions as dist
import pytest
import torch
from splits import levels, split_of

from pyro_vae.data import Kind

BATCHES = [(), (1,), (7,), (5, 7), (3, 1, 7)]
FAMILIES = {
    "bernoulli": lambda shape: dist.Bernoulli(logits=torch.zeros(shape)),
    "binomial": lambda shape: dist.Binomial(total_count=16, logits=torch.zeros(shape)),
    "binomial_tensor": lambda shape: dist.Binomial(torch.full(shape, 16.0), torch.full(shape, 0.5)),
    "categorical": lambda shape: dist.Categorical(logits=torch.zeros(*shape, 17)),
    "normal": lambda shape: dist.Normal(torch.zeros(shape), 1.0),
    "laplace": lambda shape: dist.Laplace(torch.zeros(shape), 1.0),
    "uniform": lambda shape: dist.Uniform(torch.zeros(shape), torch.ones(shape)),
}
DENSITIES = {
    Kind.BINARY: {"bernoulli", "binomial", "binomial_tensor", "categorical"},
    Kind.LEVELS: {"binomial", "binomial_tensor", "categorical"},
    Kind.UNIT_INTERVAL: {"normal", "laplace", "uniform"},
    Kind.REAL: {"normal", "laplace"},
}
EXAMPLES = {
    Kind.BINARY: split_of([[0, 1], [1, 1], [0, 0]] * 9, Kind.BINARY),
    Kind.LEVELS: split_of([[0, 16], [3, 1], [9, 9]] * 9, Kind.LEVELS, 17),
    Kind.UNIT_INTERVAL: split_of([[0.5, 0.25], [0.75, 0.9]] * 9, Kind.UNIT_INTERVAL),
    Kind.REAL: split_of([[-3.0, 0.25], [4.5, 0.9]] * 9, Kind.REAL),
}


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", Kind)
def test_a_likelihood_passes_where_it_is_a_density(kind, family, batch):
    likelihood = FAMILIES[family]((*batch, 2)).to_event(1)
    if family in DENSITIES[kind]:
        EXAMPLES[kind].check_likelihood(likelihood, "x")
    else:
        with pytest.raises(ValueError, match=r"site 'x': \w+ is no density for .* Use families."):
            EXAMPLES[kind].check_likelihood(likelihood, "x")


@pytest.mark.parametrize("family", ["binomial_tensor", "normal"])
def test_a_plate_over_the_dimensions_is_as_good_as_an_event(family):
    kind = Kind.LEVELS if family == "binomial_tensor" else Kind.REAL
    EXAMPLES[kind].check_likelihood(FAMILIES[family]((7, 2)), "x")


def test_the_refusal_names_row_and_choices():
    data = split_of(torch.tensor([[0.0], [1.0], [2.0], [4.0]]), Kind.LEVELS, 5)
    with pytest.raises(ValueError, match=r"levels 0..4: 2 of 4 data in data.train .* row 2"):
        data.check_likelihood(dist.Bernoulli(logits=torch.zeros(3, 1)).to_event(1), "pixels")
    with pytest.raises(ValueError, match=r"'pixels'.* it is continuous") as error:
        data.check_likelihood(dist.Normal(torch.zeros(3, 1), 1.0).to_event(1), "pixels")
    for choice in (
        "families.binomial with total_count=4",
        "families.categorical with 5 params",
        "families.discretized with num_levels=5",
        "data.dequantize()",
        "data.binarize()",
        "data.binarize_dynamic()",
        "data.intensities() is the deliberate override",
    ):
        assert choice in str(error.value)


def test_a_value_in_the_test_part_alone_is_found():
    data = split_of([[0.5]], Kind.REAL, test=torch.tensor([[0.5], [1.5]]))
    with pytest.raises(ValueError, match=r"1 of 2 data in data.test .* row 1"):
        data.check_likelihood(FAMILIES["uniform"]((3, 1)).to_event(1), "x")


def test_refreshed_training_data_are_what_is_checked():
    # Intensities are outside of a Bernoulli's support; the bits drawn from them are inside.
    levels().binarize_dynamic().check_likelihood(FAMILIES["bernoulli"]((7, 3)).to_event(1), "x")


def test_the_wrong_feature_size_is_refused():
    with pytest.raises(ValueError, match=r"site 'x': expected a likelihood of 3 values .* \(5,\)"):
        levels().check_likelihood(FAMILIES["binomial"]((7, 5)).to_event(1), "x")


def test_a_distribution_without_support_is_refused():
    class Silent(dist.TorchDistribution):
        @property
        def arg_constraints(self):
            return {}

    with pytest.raises(ValueError, match="give the distribution a `support`"):
        levels().check_likelihood(Silent(torch.Size([7]), torch.Size([3])), "x")
