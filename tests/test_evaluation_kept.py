"""What an evaluation keeps as it goes: blocks that go on, and those that are nobody's."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import LinearGaussian
from test_evaluation import TINY, hard_pair
from torch import Tensor

import pyro_vae as pv


class Dying(dict[str, Tensor]):
    """Keeps so many blocks, and then the process is killed."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.left = blocks

    def __setitem__(self, key: str, value: Tensor) -> None:
        if self.left == 0 and not key.endswith("probe"):
            raise KeyboardInterrupt
        self.left -= not key.endswith("probe")
        super().__setitem__(key, value)


@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_evaluation_goes_on_where_it_stopped(after):
    """250 data: three blocks are weighed, and then some are annealed."""
    pair, guide, x = hard_pair(250)
    options: dict[str, Any] = {"num_particles": 50, "budget": 1e6, **TINY}
    never_stopped = pv.evaluate(pair.model, guide, x, **options)
    assert len(never_stopped.rows) > 100
    killed = Dying(after)
    with pytest.raises(KeyboardInterrupt):
        pv.evaluate(pair.model, guide, x, **options, kept=killed)
    kept, told = dict(killed), []
    resumed = pv.evaluate(
        pair.model, guide, x, **options, kept=kept, progress=lambda *said: told.append(said)
    )
    assert told[0] == ("weighing", min(50 * 100 * after, 50 * 250), 50 * 250)
    assert told[-1][0] == "annealing"
    assert told[-1][1] == told[-1][2] == len(resumed.rows) * 4 * (5 + 4 * 5)
    for name in ("value", "standard_error", "pareto_k", "rows"):
        assert getattr(resumed, name).equal(getattr(never_stopped, name))
    assert resumed.to_dict() == never_stopped.to_dict()
    # Nothing is computed again, and more of the budget adds to what is there.
    told.clear()
    again = pv.evaluate(
        pair.model, guide, x, **options, kept=kept, progress=lambda *said: told.append(said)
    )
    assert again.value.equal(resumed.value)
    assert len(told) == 2


def test_what_another_pair_has_left_is_not_taken_for_this_ones():
    pair, guide, x = hard_pair(30)
    other = LinearGaussian(pair.weight * 1.01, pair.bias, pair.scale)
    kept: dict[str, Tensor] = {}
    options: dict[str, Any] = {"num_particles": 50, "budget": 1e6, **TINY}
    pv.evaluate(other.model, guide, x, **options, kept=kept)
    found = pv.evaluate(pair.model, guide, x, **options, kept=kept)
    assert found.value.equal(pv.evaluate(pair.model, guide, x, **options).value)
    before = len(kept)
    pv.evaluate(pair.model, guide, x + 1, **options, kept=kept)
    assert len(kept) > before  # other data have blocks of their own


def test_a_larger_budget_adds_to_a_smaller_one():
    pair, guide, x = hard_pair(250)
    options: dict[str, Any] = {"num_particles": 50, **TINY}
    kept: dict[str, Tensor] = {}
    fewer = pv.evaluate(pair.model, guide, x, budget=3.0, **options, kept=kept)
    assert 100 < len(fewer.rows) < 200
    told = []
    more = pv.evaluate(
        pair.model, guide, x, budget=1e6, **options, kept=kept, progress=lambda *s: told.append(s)
    )
    first = next(said for said in told if said[0] == "annealing")
    assert first[1] == 100 * 4 * (5 + 4 * 5)  # the block that is whole in both
    assert more.value.equal(pv.evaluate(pair.model, guide, x, budget=1e6, **options).value)


def test_blocks_without_the_probe_of_their_pair_are_nobodys():
    pair, guide, x = hard_pair(30)
    other = LinearGaussian(pair.weight * 1.01, pair.bias, pair.scale)
    kept: dict[str, Tensor] = {}
    pv.log_evidence(other.model, guide, x, num_particles=50, kept=kept)
    for key in [key for key in kept if key.endswith("probe")]:
        del kept[key]
    found = pv.log_evidence(pair.model, guide, x, num_particles=50, kept=kept)
    assert found.value.equal(pv.log_evidence(pair.model, guide, x, num_particles=50).value)


def test_a_small_change_of_large_densities_is_another_pair():
    """Half a nat in each datum's log p(x) of some -1e4 is what two models are compared by."""

    def model_with(constant: float) -> Any:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0 * x, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
                pyro.factor("constant", 0 * x + constant)

        return model

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    kept: dict[str, Tensor] = {}
    x = torch.zeros(5).double()
    before, after = (
        pv.log_evidence(model_with(constant), guide, x, num_particles=10, kept=kept)
        for constant in (-1e4, -1e4 + 0.5)
    )
    assert (after.mean - before.mean) == pytest.approx(0.5)
