"""Every prior is a density, is drawn from as it is scored, and can be learned."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from compiled_runs import assert_alike
from helpers import bernoulli_pair, bits
from pyro.distributions import transforms
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyro_vae as pv
from pyro_vae.program.recipe import build, describe

UNIT = pv.families.inverse_softplus(1.0)


def encoder() -> pv.Conditional:
    return pv.Conditional(pv.networks.mlp(9, (2, 2), hidden_dims=(8,)), pv.families.normal)


def flow_encoder() -> pv.ConditionalFlow:
    make = transforms.conditional_affine_autoregressive
    return pv.ConditionalFlow(encoder(), pv.networks.mlp(9, (1, 3)), make, (2, 3))


PRIORS: dict[str, Callable[[], Any]] = {
    "standard normal": lambda: pv.priors.StandardNormal(2),
    "learned normal": lambda: pv.priors.Learned(pv.families.normal, (2, 2), start=(0.5, UNIT)),
    "laplace": lambda: pv.priors.Learned(pv.families.laplace, (2, 2)),
    "student_t": lambda: pv.priors.Learned(partial(pv.families.student_t, df=4.0), (2, 2)),
    "full normal": lambda: pv.priors.Learned(pv.families.full_normal, (3, 2)),
    "mixture": lambda: pv.priors.Mixture(pv.families.normal, 5, (2, 2)),
    "mixture of laplace": lambda: pv.priors.Mixture(pv.families.laplace, 3, (2, 2)),
    "vamp": lambda: pv.priors.VampPrior(encoder(), bits(7), low=0.0, high=1.0),
    "vamp, weighted": lambda: pv.priors.VampPrior(encoder(), bits(7), learned_weights=True),
    "vamp of a flow": lambda: pv.priors.VampPrior(flow_encoder(), bits(7)),
    "autoregressive flow": lambda: pv.priors.FlowPrior(2, transforms.affine_autoregressive),
    "spline flow": lambda: pv.priors.FlowPrior(
        2, partial(transforms.spline_autoregressive, hidden_dims=[8]), num_transforms=1
    ),
}
every_prior = pytest.mark.parametrize("make", PRIORS.values(), ids=PRIORS.keys())


def grid(make: Callable[[], Any], limit: float, size: int) -> tuple[Tensor, float]:
    """The midpoints of a square's cells, and a cell's area; Student's t has tails to be reached."""
    if make is PRIORS["student_t"]:
        limit, size = 2 * limit, 2 * size
    side = (torch.arange(size, dtype=torch.float64) + 0.5) * (2 * limit / size) - limit
    return torch.cartesian_prod(side, side), (2 * limit / size) ** 2


@every_prior
def test_it_is_a_density_of_vectors(make):
    p = make().double()()
    assert p.batch_shape == ()
    assert p.event_shape == (2,)
    points, area = grid(make, 15.0, 450)
    with torch.no_grad():
        total = (p.log_prob(points).exp() * area).sum().item()
    # What lies beyond the square: the Student-t alone has more than a millionth there.
    assert total == pytest.approx(1.0, abs=2e-3)


@every_prior
def test_it_is_drawn_from_as_it_is_scored(make):
    with torch.no_grad():
        p = make()()
        draws = p.sample((20_000,))
        points, area = grid(make, 10.0, 300)
        density = p.log_prob(points.float()).exp() * area
    assert draws.shape == (20_000, 2)
    for inside in (lambda z: z[:, 0] > 0.3, lambda z: z.square().sum(-1) < 1.0):
        expected = density[inside(points)].sum().item()
        share = inside(draws).double().mean().item()
        assert abs(share - expected) < 5 * (0.25 / 20_000) ** 0.5 + 5e-3


@every_prior
def test_it_takes_the_place_of_another(make):
    prior = make()
    likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
    model, guide = pv.Model(prior, likelihood), pv.Guide(getattr(prior, "encoder", encoder()))
    svi = pv.SVI(model, guide, lambda params: torch.optim.Adam(params, lr=1e-2))
    before = {name: p.detach().clone() for name, p in prior.named_parameters()}
    for _ in range(2):
        assert svi.step(bits()).isfinite()
    for name, parameter in prior.named_parameters():
        if parameter.requires_grad:
            assert not parameter.equal(before[name]), name
    assert pv.generate(model, 4).shape == (4, 9)
    estimate = pv.log_evidence(model, guide, bits(), num_particles=20)
    assert estimate.value.isfinite().all()


@every_prior
def test_its_evidence_is_the_integral(make):
    torch.manual_seed(1)
    prior = make().double()
    likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9), hidden_dims=(8,)), pv.families.bernoulli)
    model = pv.Model(prior, likelihood.double())
    wide = pv.Conditional(pv.networks.mlp(9, (2, 2)), partial(pv.families.normal, min_scale=2.0))
    guide = pv.Guide(wide.double())
    x = bits(4).double()
    estimate = pv.log_evidence(model, guide, x, num_particles=20_000, compile=False)
    points, area = grid(make, 10.0, 200)
    with torch.no_grad():
        log_prior = prior().log_prob(points)[:, None]
        joint = log_prior + likelihood(points[:, None]).log_prob(x)
    exact = joint.logsumexp(0) + torch.tensor(area).log()
    error = (estimate.value - exact).abs()
    assert (error < 5 * estimate.standard_error + 2e-3).all()


# Splines, and Pyro's inverses of flows, read values on the host.
UNCOMPILED = ("spline flow", "vamp of a flow")


@pytest.mark.parametrize("name", [name for name in PRIORS if name not in UNCOMPILED])
def test_compiled_steps_lead_where_eager_steps_lead(name, interpreted):
    make = PRIORS[name]

    def pair() -> tuple[Any, Any, tuple[Tensor]]:
        torch.manual_seed(0)
        prior = make()
        likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
        guide = pv.Guide(getattr(prior, "encoder", encoder()))
        return pv.Model(prior, likelihood).double(), guide.double(), (bits().double(),)

    assert_alike(interpreted, pair, loss=Trace_ELBO)


def test_splines_choose_their_bins_by_values_and_run_uncompiled():
    model, guide = bernoulli_pair()
    model = pv.Model(PRIORS["spline flow"](), model.likelihood)
    svi = pv.SVI(model, guide, lambda params: torch.optim.SGD(params, lr=1e-3), compile=True)
    svi.step(bits())
    with pytest.warns(UserWarning, match="at or after site 'x': the shape of a result depends"):
        assert svi.step(bits()).isfinite()


@every_prior
def test_it_is_made_again_from_its_recipe(make):
    prior = make()
    (again,) = build(describe(prior))
    again.load_state_dict(prior.state_dict())
    z = torch.randn(6, 2)
    assert torch.equal(again().log_prob(z), prior().log_prob(z))


@every_prior
def test_it_goes_under_plates_and_particles(make):
    p = make()()
    with pyro.plate("num_particles", 3, dim=-2), pyro.plate("data", 5, dim=-1):
        z = pyro.sample("z", p)
    assert z.shape == (3, 5, 2)
    assert p.expand((3, 5)).log_prob(z).shape == (3, 5)


# --- one by one


def test_a_mixture_is_the_sum_of_its_members():
    prior = pv.priors.Mixture(pv.families.normal, 4, (2, 3)).double()
    torch.nn.init.normal_(prior.logits)
    z = torch.randn(7, 3, dtype=torch.float64)
    weights = torch.softmax(prior.logits, -1)
    each = [pv.families.normal(prior.params[k]).log_prob(z).exp() * weights[k] for k in range(4)]
    torch.testing.assert_close(prior().log_prob(z), torch.stack(each).sum(0).log())


def test_a_vamp_prior_is_the_average_posterior_and_shares_the_encoder():
    shared = encoder().double()
    inputs = bits(6).double()
    prior = pv.priors.VampPrior(shared, inputs)
    z = torch.randn(7, 2, dtype=torch.float64)
    q = shared(inputs)
    expected = q.log_prob(z[:, None]).logsumexp(-1) - torch.tensor(6.0).log()
    torch.testing.assert_close(prior().log_prob(z), expected)
    prior().log_prob(z).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in shared.parameters())
    assert prior.places.grad is not None


def test_pseudo_inputs_stay_within_their_bounds():
    prior = pv.priors.VampPrior(encoder(), bits(6), low=0.0, high=1.0)
    z = torch.randn(7, 2)
    with torch.no_grad():
        inside = prior().log_prob(z)
        prior.places.sub_((prior.places == 0).float())
        assert prior.places.min() == -1
        assert prior.pseudo_inputs.min() == 0
        torch.testing.assert_close(prior().log_prob(z), inside)


@pytest.mark.parametrize("high", [1.0, 255.0])
def test_pseudo_inputs_of_any_range_move_alike(high):
    """Pixels of 0..255 that an encoder rescales learn what pixels of 0..1 do."""

    def after_steps(high: float) -> torch.Tensor:
        torch.manual_seed(0)
        seeing = pv.networks.rescaled(pv.networks.mlp(9, (2, 2), hidden_dims=(8,)), scale=high)
        shared = pv.Conditional(seeing.double(), pv.families.normal)
        prior = pv.priors.VampPrior(shared, high * bits(6).double(), low=0.0, high=high)
        optimizer = torch.optim.Adam([prior.places], lr=0.01)
        z = torch.randn(7, 2, dtype=torch.float64)
        for _ in range(20):
            optimizer.zero_grad()
            (-prior().log_prob(z).sum()).backward()
            optimizer.step()
        return prior.pseudo_inputs.detach() / high

    moved = (after_steps(high) - after_steps(1.0)).abs().max()
    assert moved < 1e-6
    torch.manual_seed(0)
    assert (after_steps(high) - bits(6)).abs().max() > 0.05


def test_a_shared_encoder_stays_shared_in_a_recipe():
    shared = encoder()
    likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
    model = pv.Model(pv.priors.VampPrior(shared, bits(6)), likelihood)
    other, guide = build(describe(model, pv.Guide(shared)))
    assert other.prior.encoder is guide.encoder


def test_labels_choose_the_prior():
    prior = pv.Conditional(pv.networks.mlp(3, (2, 2)), pv.families.normal)
    decoder = pv.Conditional(pv.networks.mlp(5, (1, 9)), pv.families.bernoulli)
    model = pv.Model(prior, decoder)
    guide = pv.Guide(pv.Conditional(pv.networks.mlp(12, (2, 2)), pv.families.normal))
    labels = torch.eye(3)[torch.arange(10) % 3]
    trace: Any = pyro.poutine.trace(model).get_trace(bits(10), labels)
    torch.testing.assert_close(trace.nodes["z"]["fn"].mean, prior(labels).mean)
    svi = pv.SVI(model, guide, lambda params: torch.optim.Adam(params, lr=1e-2))
    assert svi.step(bits(10), labels).isfinite()
    assert pv.log_evidence(model, guide, bits(10), labels, num_particles=10).value.isfinite().all()


@pytest.mark.parametrize("dim", [2, 3])
def test_directions_have_a_uniform_prior_and_a_guide(dim):
    area = {2: 2 * torch.pi, 3: 4 * torch.pi}[dim]
    prior = pv.priors.UniformSphere(dim)
    z = prior().sample((7,))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(7))
    torch.testing.assert_close(prior().log_prob(z).exp(), torch.full((7,), 1 / area))
    model = pv.Model(prior, pv.Conditional(pv.networks.mlp(dim, (1, 9)), pv.families.bernoulli))
    q = pv.Conditional(pv.networks.mlp(9, (1, dim)), pv.families.projected_normal)
    svi = pv.SVI(model, pv.Guide(q), lambda params: torch.optim.Adam(params, lr=1e-2))
    assert svi.step(bits()).isfinite()


def test_a_sphere_and_a_plane_do_not_go_together():
    likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
    model = pv.Model(pv.priors.UniformSphere(2), likelihood)
    svi = pv.SVI(model, pv.Guide(encoder()), lambda params: torch.optim.Adam(params, lr=1e-2))
    with pytest.raises(ValueError, match=r"site 'z': 20 of 20 values .*\(Normal\) lie outside the"):
        svi.step(bits())


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no dimension": (lambda: pv.priors.StandardNormal(0), "at least one latent dimension"),
    "out": (lambda: pv.priors.Learned(pv.families.normal, (2, 0)), r"expected out=\(P, Z\)"),
    "P": (lambda: pv.priors.Learned(pv.families.normal, (1, 3)), r"build the network with out=\(2"),
    "start": (
        lambda: pv.priors.Mixture(pv.families.normal, 2, (2, 3), start=(0.0,)),
        "expected start to hold 2 values, one for each parameter, got 1",
    ),
    "components": (lambda: pv.priors.Mixture(pv.families.normal, 0, (2, 3)), "num_components >= 1"),
    "shape": (
        lambda: pv.priors.VampPrior(encoder(), torch.zeros(9)),
        r"pseudo_inputs of shape \(K, D\), one a row, got \(9,\)",
    ),
    "other data": (
        lambda: pv.priors.VampPrior(encoder(), torch.zeros(5, 8)),
        r"networks.mlp: expected input of shape \(\*batch, 9\), got \(5, 8\)",
    ),
    "bounds": (
        lambda: pv.priors.VampPrior(encoder(), 255 * bits(5), low=0.0, high=1.0),
        "between 0.0 and 1.0, got values from 0 to 255",
    ),
    "no range": (
        lambda: pv.priors.VampPrior(encoder(), torch.ones(5, 9), low=1.0, high=1.0),
        "low < high, got 1.0 and 1.0",
    ),
    "no transforms": (
        lambda: pv.priors.FlowPrior(2, transforms.affine_autoregressive, num_transforms=0),
        "num_transforms >= 1",
    ),
    "sphere": (lambda: pv.priors.UniformSphere(4), "expected dim 2 or 3"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_prior_is_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


SPACES: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "directions for a plane": (
        lambda: pv.priors.StandardNormal(2),
        pv.families.projected_normal,
        "ProjectedNormal is over Sphere, the model's Normal over",
    ),
    "bits for a plane": (
        lambda: pv.priors.StandardNormal(2),
        pv.families.bernoulli,
        "Bernoulli is over .*Boolean",
    ),
    "one bit for bits": (
        lambda: pv.priors.Learned(pv.families.bernoulli, (1, 2)),
        pv.families.one_hot,
        r"OneHotCategorical is over OneHot\(\), the model's Bernoulli over",
    ),
}


@pytest.mark.parametrize(("make", "family", "reason"), SPACES.values(), ids=SPACES)
def test_a_guide_whose_values_only_look_like_the_priors_is_refused(make, family, reason):
    """They lie in the prior's support, but probabilities and densities make no weights."""
    likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
    model = pv.Model(make(), likelihood)
    guide = pv.Guide(pv.Conditional(pv.networks.mlp(9, (1, 2)), family))
    with pytest.raises(ValueError, match=f"site 'z': the guide's {reason}.*on the same space"):
        pv.log_evidence(model, guide, bits(), num_particles=2)
