"""What is compiled is what was captured: also when the compiler finds something like it cached."""

import os
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from pyro_vae.graph.capture import Captured, capture
from pyro_vae.graph.logarithms import share_logarithms
from pyro_vae.graph.lower import lower


@pytest.fixture
def _cached_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache on disk of its own; a graph in it is known by what it computes."""
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters.clear()


def compiled(values: list[float], x: Tensor) -> Tensor:
    captured = capture(lambda x: [x * torch.tensor(values).exp()], [x], others=[x + 1])
    (result,) = lower(captured, [], [x])([x])
    return result


@pytest.mark.usefixtures("_cached_here")
@pytest.mark.parametrize("size", [3, 50])
def test_literals_are_part_of_what_is_cached(size):
    x = torch.randn(4, size)
    for start in (0.0, 0.0, 1.0):
        values = [start + i / size for i in range(size)]
        torch.testing.assert_close(compiled(values, x), x * torch.tensor(values).exp())
    # The second was found, the third was not, or it was with its own values.
    assert counters["aot_autograd"]["autograd_cache_hit"] >= 1


LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.T.contiguous().T,
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "the same row": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("made_for", ["rows", "columns"])
def test_a_kernel_takes_data_of_any_layout(made_for):
    """Compiled code for one layout refuses, or misreads, data of another."""
    x, w = torch.randn(4, 6), torch.randn(6, 3)
    made = LAYOUTS[made_for](x)
    kernel = lower(capture(lambda x: [x.exp() @ w], [made], others=[made + 1]), [], [made])
    for layout in LAYOUTS.values():
        given = layout(torch.randn(4, 6))
        torch.testing.assert_close(kernel([given])[0], given.exp() @ w)


# --- fewer logarithms


def bernoulli(dim: int, dtype: torch.dtype = torch.float64) -> tuple[Captured, list[Tensor]]:
    def score(u: Tensor, x: Tensor) -> list[Tensor]:
        return [dist.Bernoulli(logits=u, validate_args=False).to_event(1).log_prob(x)]

    given = [30 * torch.randn(6, 5, dim, dtype=dtype), torch.rand(5, dim, dtype=dtype).round()]
    return capture(score, given, others=[t + 1 for t in given]), given


def count(captured: Captured, name: str) -> int:
    return sum(name in str(node.target) for node in captured.module.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("dim", "found"), [(4, True), (784, True), (6, False)])
def test_sums_of_cross_entropies_share_their_logarithms(dim, found, dtype):
    captured, given = bernoulli(dim, dtype)
    (expected,) = captured.module(*given)
    share_logarithms(captured.module)
    assert (count(captured, "binary_cross_entropy") == 0) is found
    assert count(captured, "aten.log.") == found
    (result,) = captured.module(*given)
    rtol = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(result, expected, rtol=rtol, atol=dim * rtol)


def test_far_out_the_probabilities_are_what_they_were():
    captured, _ = bernoulli(4)
    u = (
        torch.tensor([[0.0, 1e-30, 40.0, -40.0], [800.0, -800.0, 1e5, -1e5]])
        .double()
        .expand(6, -1, -1)
    )
    given = [u.repeat(1, 3, 1)[:, :5], torch.tensor([1.0, 0.0, 0.0, 1.0]).double().expand(5, -1)]
    (expected,) = captured.module(*given)
    share_logarithms(captured.module)
    torch.testing.assert_close(captured.module(*given)[0], expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "score",
    [
        lambda u, x: [bce(u, x).neg().sum(-1), bce(u, x)],
        lambda u, x: [bce(u, x, weight=x).neg().sum(-1)],
        lambda u, x: [bce(u, x).neg().sum(0)],
        lambda u, x: [(2 * bce(u, x).neg()).sum(-1)],
    ],
    ids=["read elsewhere", "weighted", "another dimension", "scaled"],
)
def test_what_is_no_such_sum_stays_what_it_is(score):
    given = [torch.randn(5, 8), torch.rand(5, 8)]
    captured = capture(score, given, others=[t + 1 for t in given])
    expected = captured.module(*given)
    share_logarithms(captured.module)
    for result, other in zip(captured.module(*given), expected, strict=True):
        torch.testing.assert_close(result, other)


def bce(u: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(
        u, x, weight=weight, reduction="none"
    )
