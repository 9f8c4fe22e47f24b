"""Everything goes with everything: prior x likelihood x guide x network, each held to an oracle.

Every pair of choices occurs in ``make test``; ``make test-slow`` takes the rest of the product.
"""

import inspect
import io
import json
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from combinations import (
    ACCEPTED,
    DISCRETE,
    EVERY,
    FACTORS,
    GUIDES,
    LIKELIHOODS,
    NETWORKS,
    PRIORS,
    REFUSED,
    Choice,
    D,
    Z,
    covering,
    fits,
    make,
    pairs,
    quadrature,
    space_of,
)
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyro_vae as pv
from pyro_vae.program.recipe import NotDescribedError, build, describe

QUICK = [*ACCEPTED, *REFUSED]
SLOW = sorted(set(EVERY) - set(QUICK))
SPREAD = 5  # standard errors
ROUGH, KINKED = 2e-3, 1e-2  # what a grid misses, and where it misses the knots of a spline


def as_parameters(choices: list[Choice], *marks: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(choice, id=str(choice), marks=marks) for choice in choices]


@pytest.mark.parametrize("choice", [*as_parameters(QUICK), *as_parameters(SLOW, pytest.mark.slow)])
def test_a_combination(choice):
    model, guide, args = make(choice)
    if not fits(choice):
        check_refused(model, guide, args)
        return
    check_shapes(model, guide, args)
    check_step(choice, model, guide, args)
    with torch.no_grad():
        check_evidence(choice, model, guide, args)
        check_draws(choice, model, args)
    check_copy(choice, model, guide, args)


# --- what is checked


def check_refused(model: Any, guide: Any, args: tuple[Tensor, ...]) -> None:
    svi = pv.SVI(model, guide, lambda params: torch.optim.Adam(params), compile=False)
    for use in (svi.step, lambda *args: pv.log_evidence(model, guide, *args, num_particles=2)):
        with pytest.raises(ValueError, match=r"^site 'z': .*prior and a guide on the same space"):
            use(*args)


def check_shapes(model: Any, guide: Any, args: tuple[Tensor, ...]) -> None:
    for batch in ((), (4,), (3, 4)):
        x, *context = (a[:4].expand(*batch, -1) if batch else a[0] for a in args)
        q = guide.encoder(x, *context)
        z = q.sample((2,))  # particles, left of the batch
        p, prior = model.likelihood(z, *context), prior_of(model, context)
        for distribution, value, event in ((q, z, Z), (prior, z, Z), (p, x, D)):
            assert distribution.event_shape == (event,)
            assert distribution.log_prob(value).shape == (2, *batch)
            assert distribution.log_prob(value).isfinite().all()
        assert q.batch_shape == batch
        assert z.shape == (2, *batch, Z)
        assert p.batch_shape == (2, *batch)
        assert p.sample().shape == (2, *batch, D)


def prior_of(model: Any, context: list[Tensor]) -> Any:
    return model.prior(*context) if isinstance(model.prior, pv.Conditional) else model.prior()


def check_step(choice: Choice, model: Any, guide: Any, args: tuple[Tensor, ...]) -> None:
    gradients: list[Tensor | None] = []

    def optimizer(params: list[Tensor]) -> torch.optim.Optimizer:
        made = torch.optim.Adam(params, lr=1e-3)
        made.register_step_pre_hook(lambda *_: gradients.extend(p.grad for p in params))
        return made

    loss = pv.ReweightedWakeSleep(5) if space_of(choice) in DISCRETE else Trace_ELBO()
    svi = pv.SVI(model, guide, optimizer, loss, compile=False)
    assert svi.step(*args).isfinite()
    named = svi.parameters.named
    own = {id(p) for program in (model, guide) for p in program.parameters()}
    assert {id(p) for p in named.values()} == own
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        assert parameter.isfinite().all(), name
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.any() or (choice, name) in SHIFTS, name


# One bias for all pixels shifts all logits of their softmax alike.
SHIFTS = {
    (choice, "model.likelihood.network.layers.3.bias")
    for choice in EVERY
    if choice.network == "conv" and choice.likelihood in ("onehot", "multinomial")
}


def check_evidence(choice: Choice, model: Any, guide: Any, args: tuple[Tensor, ...]) -> None:
    """Importance weighting against a sum over a grid of z, under which p(z) sums to one."""
    rough = KINKED if choice.prior == "spline" else ROUGH
    x, *context = (a[:2] for a in args)
    points, log_area = (t.to(x.dtype) for t in quadrature(space_of(choice)))
    log_prior = prior_of(model, context).log_prob(points[:, None]) + log_area[:, None]
    assert log_prior.logsumexp(0).abs().max() < rough
    log_joint = log_prior + model.likelihood(points[:, None], *context).log_prob(x)
    estimate = pv.log_evidence(model, guide, x, *context, num_particles=800, compile=False)
    assert estimate.standard_error.max() < 0.1
    error = (estimate.value - log_joint.logsumexp(0)).abs()
    assert (error < SPREAD * estimate.standard_error + rough).all()


def check_draws(choice: Choice, model: Any, args: tuple[Tensor, ...]) -> None:
    """The mean of generated data against that of p(x|z), integrated over the prior."""
    size, context = 2000, [a[0] for a in args[1:]]
    points, log_area = (t.to(args[0].dtype) for t in quadrature(space_of(choice)))
    weight = (prior_of(model, context).log_prob(points) + log_area).exp()
    expected = weight @ mean_of(model.likelihood(points, *context), weight.dtype)
    rows = [a.expand(size, -1) for a in context]
    draws = pv.generate(model, size, *rows, draw=True).to(weight)  # levels may be integers
    assert draws.shape == (size, D)
    error = (draws.mean(0) - expected).abs()
    assert (error < SPREAD * draws.std(0) / size**0.5 + KINKED).all()


def mean_of(p: Any, dtype: torch.dtype) -> Tensor:
    """E[x|z], (M, D): the likelihood's own, or of a decoder that has none a sum over all bits."""
    try:
        return p.mean
    except NotImplementedError:
        every = torch.tensor(list(product([0.0, 1.0], repeat=D)), dtype=dtype)
        return p.expand((len(every), *p.batch_shape)).log_prob(every[:, None]).exp().T @ every


def check_copy(choice: Choice, model: Any, guide: Any, args: tuple[Tensor, ...]) -> None:
    """Described, built again and given the saved parameters, it is the same to the last bit."""
    if choice.network == "own":
        with pytest.raises(NotDescribedError, match="is a Own, which pyro_vae did not make"):
            describe(model, guide)
        again, other, _ = make(choice)
    else:
        again, other = build(json.loads(json.dumps(describe(model, guide))))
    for copy, program in ((again, model), (other, guide)):
        file = io.BytesIO()
        torch.save(program.state_dict(), file)
        file.seek(0)
        copy.to(args[0].dtype).load_state_dict(torch.load(file, weights_only=True))
    one, two = (
        pv.log_weights(*pair, *args, num_particles=5, compile=False)
        for pair in ((model, guide), (again, other))
    )
    assert torch.equal(one, two)


# --- the combinations themselves


def test_every_pair_of_choices_is_tested():
    tested = {pair for choice in ACCEPTED for pair in pairs(choice)}
    assert all(fits(choice) for choice in ACCEPTED)
    for (i, one), (j, other) in product(enumerate(FACTORS), enumerate(FACTORS)):
        for a, b in product(one, other):
            apart = (i, j) == (0, 2) and not fits(Choice(a, "normal", b, "mlp"))
            if i < j and not apart:
                assert ((i, a), (j, b)) in tested, (a, b)


def test_every_pair_of_spaces_that_differ_is_refused():
    refused = {(choice.prior, choice.guide) for choice in REFUSED}
    apart = {c for c in product(PRIORS, GUIDES) if not fits(Choice(c[0], "normal", c[1], "mlp"))}
    assert refused == apart
    assert len(REFUSED) == len(apart)


def test_every_family_is_a_likelihood_or_says_why_not():
    used = {family_of(make(NETWORKS["mlp"][1], Z)) for make, _ in LIKELIHOODS.values()}
    there = {
        name
        for name in pv.families.__all__
        if "params" in inspect.signature(getattr(pv.families, name)).parameters
    }
    # The first has no density in D = 4; the others are of latents, with tests of their own.
    assert there - used == {
        "projected_normal",
        "mixture",
        "mixture_of_normals",
        "relaxed_bernoulli",
        "relaxed_one_hot",
    }


def family_of(likelihood: Any) -> str:
    family = likelihood.family
    return (family.func if isinstance(family, partial) else family).__name__


def test_a_covering_holds_every_pair_of_what_is_allowed():
    factors = ["ab", "cde", "fghi", "kl"]
    for allowed in (lambda c: True, lambda c: c.prior == "a" or c.guide != "g"):
        chosen = covering(factors, allowed)
        every = [c for c in map(Choice._make, product(*factors)) if allowed(c)]
        assert {p for c in chosen for p in pairs(c)} == {p for c in every for p in pairs(c)}
        assert all(allowed(c) for c in chosen)
        assert len(chosen) == len(set(chosen)) < len(every)
        assert chosen == covering(factors, allowed)


def test_the_number_of_combinations(record_property):
    accepted, refused = sum(map(fits, EVERY)), sum(not fits(c) for c in EVERY)
    record_property("combinations in make test", f"{len(ACCEPTED)} + {len(REFUSED)} refused")
    record_property("combinations in all", f"{accepted} + {refused} refused")
    assert len(EVERY) == len(PRIORS) * len(LIKELIHOODS) * len(GUIDES) * len(NETWORKS)
    assert len(QUICK) == len(set(QUICK))
    assert set(SLOW).isdisjoint(QUICK)
    assert len(QUICK) + len(SLOW) == len(EVERY)
    # No fewer could hold every prior with every likelihood.
    assert len(PRIORS) * len(LIKELIHOODS) <= len(ACCEPTED) < 300
    assert (accepted, refused) == (3528, 3528)
