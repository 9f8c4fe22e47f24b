"""The page's program runs from top to bottom, prints what it says, and holds against integrals."""

import math
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import pyro_vae as pv

PAGE = (Path(__file__).parents[1] / "docs" / "write_your_own.md").read_text()
BLOCKS = re.findall(r"^```(python|text)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The names that the page's program leaves, and what it printed beside what the page says."""
    names: dict[str, Any] = {}
    messages: list[tuple[str, str]] = []
    printed = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        patch.setattr("pyro_vae.runs.fit.draw_run", lambda *run: None)
        for kind, block in BLOCKS:
            if kind == "text":
                messages.append((" ".join(printed.split()), " ".join(block.split())))
                continue
            out = StringIO()
            with redirect_stdout(out):
                exec(compile(block, "write_your_own.md", "exec"), names)
            printed = out.getvalue()
    return SimpleNamespace(messages=messages, **names)


def grid(limit: float, size: int) -> tuple[Tensor, float]:
    """The midpoints of a square's cells (M, 2), and the logarithm of a cell's area."""
    side = (torch.arange(size) + 0.5) * (2 * limit / size) - limit
    return torch.cartesian_prod(side, side), 2 * math.log(2 * limit / size)


def test_every_mistake_is_answered_with_what_the_page_prints(page):
    assert len(page.messages) == PAGE.count("refused(lambda")
    for printed, said in page.messages:
        assert printed == said
        assert printed


def test_the_family_is_a_density_of_one_turn_and_its_draws_are_from_it(page):
    p = page.von_mises(torch.randn(2, 3))
    assert (p.batch_shape, p.event_shape) == ((), (3,))
    assert page.von_mises(torch.randn(4, 5, 2, 3)).batch_shape == (4, 5)
    turn = torch.arange(2000) * (2 * math.pi / 2000) - math.pi
    density = p.base_dist.log_prob(turn[:, None]).exp() * (2 * math.pi / 2000)
    torch.testing.assert_close(density.sum(0), torch.ones(3), rtol=0, atol=1e-4)
    draws = p.sample((20_000,))
    assert p.support.check(draws).all()
    for wave in (torch.cos, torch.sin):
        expected = (density * wave(turn)[:, None]).sum(0)
        assert ((wave(draws).mean(0) - expected).abs() < 5 / 20_000**0.5).all()


@pytest.mark.parametrize("batch", [(), (7,), (3, 7)], ids=str)
def test_the_network_and_the_encoder_keep_every_batch_dimension(page, batch):
    x = torch.randn(*batch, 6)
    assert page.OfAngles(6, (4, 2))(x).shape == (*batch, 4, 2)
    q = page.MeanDirection()(x)
    assert (q.batch_shape, q.event_shape) == (batch, (2,))
    assert q.rsample().requires_grad


def test_the_prior_is_a_density_and_is_drawn_from_as_it_is_scored(page):
    with torch.no_grad():
        p = page.RingPrior()()
        points, log_area = grid(9.0, 900)
        log_prob = p.log_prob(points)
        density = (log_prob + log_area).exp()
        scores = p.log_prob(p.rsample((20_000,)))
    assert (p.batch_shape, p.event_shape) == ((), (2,))
    assert density.sum().item() == pytest.approx(1.0, abs=1e-3)
    # The mean log-density of draws is minus the entropy.
    expected = (density * log_prob).sum()
    assert (scores.mean() - expected).abs() < 5 * scores.std() / 20_000**0.5 + 2e-3
    assert p.expand((4, 5)).rsample().shape == (4, 5, 2)
    assert p.expand((4, 5)).log_prob(torch.ones(3, 4, 5, 2)).shape == (3, 4, 5)


def test_the_evidence_of_both_pairs_is_the_integral(page):
    x = page.test[:4]
    points, log_area = grid(9.0, 500)
    for (model, _), estimate in zip((page.ring, page.plain), page.estimates, strict=True):
        with torch.no_grad():
            log_prior = model.prior().log_prob(points)[:, None] + log_area
            exact = (log_prior + model.likelihood(points[:, None]).log_prob(x)).logsumexp(0)
        error = (estimate.value[:4] - exact).abs()
        assert (error < 5 * estimate.standard_error[:4] + 2e-3).all()
        assert estimate.standard_error[:4].max() < 0.3


def test_the_evidence_of_two_latents_is_the_integral(page):
    """Over the wind and the logarithm of how steady it blows."""
    x = page.test[:2]
    points, log_area = grid(4.0, 160)
    log_steady = torch.linspace(-2.5, 2.5, 41)
    step = math.log(5.0 / 40)
    ring = page.Ring(torch.tensor(1.0), torch.tensor(0.3))
    log_prior = ring.log_prob(points)[:, None] + log_area
    log_prior = log_prior + torch.distributions.Normal(0.0, 0.5).log_prob(log_steady) + step
    with torch.no_grad():
        a, b = page.decoder(points).unbind(-2)
        each = log_steady.exp()[:, None] * (0.1 + a.square() + b.square())[:, None]
        vanes = page.Angle(torch.atan2(b, a)[:, None], each).to_event(1)
        exact = [(log_prior + vanes.log_prob(datum)).logsumexp((0, 1)) for datum in x]
    error = (page.steady.value[:2] - torch.stack(exact)).abs()
    assert (error < 5 * page.steady.standard_error[:2] + 5e-3).all()
    assert page.steady.standard_error[:2].max() < 0.3


def test_what_was_loaded_is_what_was_trained(page):
    assert page.ring_again == (page.model_again, page.guide_again)
    assert page.steady_again == (page.model, page.guide)
    for pair, before in ((page.ring_again, page.estimates[0]), (page.steady_again, page.steady)):
        again = pv.log_evidence(*pair, page.test, num_particles=500)
        assert torch.equal(again.value, before.value)


def test_such_pairs_are_generated_from_and_reconstructed(page):
    assert pv.generate(page.ring[0], 5, draw=True).abs().max() <= math.pi
    assert pv.reconstruct(*page.ring, page.test).shape == (100, 6)
    assert set(pv.encode(page.guide, page.test)) == {"wind", "steady"}


@pytest.mark.parametrize("name", ["ring", "plain", "functions"])
def test_such_pairs_become_graphs(page, name, interpreted):
    pair = (page.model, page.guide) if name == "functions" else getattr(page, name)
    model, guide = pair
    svi = pv.SVI(model, guide, lambda params: torch.optim.SGD(params, lr=1e-6), compile=True)
    assert all(svi.step(page.train).isfinite() for _ in range(3))
    assert len(interpreted) == 1
