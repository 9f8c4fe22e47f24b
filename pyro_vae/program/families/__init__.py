r"""Families: plain functions from a parameter tensor to a distribution.

A family takes ``params`` of shape ``(*batch, P, D)`` and returns a Pyro distribution with
``batch_shape (*batch,)`` and ``event_shape (D,)``. The same family serves as q(z|x), as p(x|z)
and as p(z1|z2). Options are bound with ``functools.partial``::

    seeds_normal = partial(families.normal, to_scale=families.exp_half)
    pixels = partial(families.binomial, total_count=16)

===================================  =====  ==================================  ================
family                               P      parameters                          values
===================================  =====  ==================================  ================
``normal``                           2      loc, unconstrained scale            reals
``fixed_normal``                     1      loc (squared error)                 reals
``laplace``                          2      loc, unconstrained scale            reals
``fixed_laplace``                    1      loc (absolute error)                reals
``student_t``                        2, 3   loc, unconstrained scale (and df)   reals
``low_rank_normal``                  2 + R  loc, scale, R columns               reals
``full_normal``                      1 + D  loc, rows of a matrix               reals
``projected_normal``                 1      concentration                       unit vectors
``continuous_bernoulli``             1      logits                              0 to 1
``beta``                             2      unconstrained a, b                  0 to 1
``bernoulli``                        1      logits                              0, 1
``binomial``                         1      logits                              0 .. total_count
``categorical``                      L      logits of the levels                0 .. L - 1
``discretized``                      2      loc, unconstrained scale            0 .. L - 1
``discretized_mixture``              3 M    logits, locs, unconstrained scales  0 .. L - 1
``poisson``                          1      unconstrained rate                  counts
``negative_binomial``                2      log mean, unconstrained r           counts
``zero_inflated_negative_binomial``  3      log mean, r, gate logits            counts
``multinomial``                      1      logits                              counts of total
``one_hot``                          1      logits of the choices               zeros and a one
``relaxed_one_hot``                  1      logits                              the simplex
``relaxed_bernoulli``                1      logits                              0 to 1
``mixture``                          M+M P  logits, members of a family         the family's
``mixture_of_normals``               3 M    logits, locs, unconstrained scales  reals
===================================  =====  ==================================  ================
"""

from pyro_vae.program.families.counts import (
    multinomial,
    negative_binomial,
    poisson,
    zero_inflated_negative_binomial,
)
from pyro_vae.program.families.discrete import one_hot, relaxed_bernoulli, relaxed_one_hot
from pyro_vae.program.families.levels import (
    bernoulli,
    binomial,
    categorical,
    discretized,
    discretized_mixture,
)
from pyro_vae.program.families.mixtures import mixture, mixture_of_normals
from pyro_vae.program.families.parameters import exp, exp_half, inverse_softplus, softplus
from pyro_vae.program.families.reals import (
    fixed_laplace,
    fixed_normal,
    full_normal,
    laplace,
    low_rank_normal,
    normal,
    projected_normal,
    student_t,
)
from pyro_vae.program.families.units import beta, continuous_bernoulli

__all__ = [
    "bernoulli",
    "beta",
    "binomial",
    "categorical",
    "continuous_bernoulli",
    "discretized",
    "discretized_mixture",
    "exp",
    "exp_half",
    "fixed_laplace",
    "fixed_normal",
    "full_normal",
    "inverse_softplus",
    "laplace",
    "low_rank_normal",
    "mixture",
    "mixture_of_normals",
    "multinomial",
    "negative_binomial",
    "normal",
    "one_hot",
    "poisson",
    "projected_normal",
    "relaxed_bernoulli",
    "relaxed_one_hot",
    "softplus",
    "student_t",
    "zero_inflated_negative_binomial",
]
