r"""Why one reparameterizes: gradients of one bound, estimated in many ways.

All that is wanted is the gradient of E_q[log p(x, z) - log q(z|x)], with z drawn from q, whose
parameters are among those to be trained. On one pair:

    score function        Pyro's Trace_ELBO of a normal that has no pathwise gradient: E_q[f grad
                          log q], unbiased for any q, and noisy (Williams 1992)
    detached              z drawn, and held for a constant: wrong. The encoder's gradient is that of
                          -log q(z|x), which is zero on average: noise, and no signal
    detached, exact KL    beside the KL in closed form: the encoder learns to forget the data
    Monte Carlo           Trace_ELBO: z = mu(x) + sigma(x) e (Kingma and Welling 2014)
    exact KL              TraceMeanField_ELBO: the same, with the KL in closed form
    sticking the landing  the draws' path alone, without the score of q, whose mean is zero: it has
                          no noise where q is the posterior (Roeder et al. 2017)
    importance weighted   another bound, of K weights (Burda et al. 2016): the encoder's signal is
                          lost in noise as K grows (Rainforth et al. 2018), but not if it is
    doubly reparameterized                                                  (Tucker et al. 2019)

Measured are the variance of the gradient per datum, summed over the parameters of encoder or
decoder, its signal to noise ratio |mean| / sqrt(variance) and its relative bias: on one minibatch,
for K draws and at several stages of training, and for minibatches drawn anew. Then bound, log p(x)
of test data and time of training by each estimator, several K, sizes of minibatch and optimizers.

    python experiments/estimator_study.py --out runs/estimator_study
    python experiments/estimator_study.py --data binarized_mnist --root ../shared/data --epochs 20
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.distributions import TorchDistribution
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

import pyro_vae as pv


class Drawn(dist.Normal):
    """A normal without a pathwise gradient, as a discrete distribution has none."""

    has_rsample = False


class Detached(dist.Normal):
    """A normal that claims a pathwise gradient and lacks it: the mistake that is studied."""

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws that are constants to autograd."""
        return self.sample(sample_shape)


def normal(params: Tensor, *, kind: Any) -> TorchDistribution:
    """``families.normal`` by a distribution of one's own, params (*batch, 2, D)."""
    base: Any = pv.families.normal(params)
    return kind(base.base_dist.loc, base.base_dist.scale).to_event(1)


def pyros(loss: Any, num_particles: int) -> Any:
    """One of Pyro's losses, with all draws at once."""
    return loss(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)


DIVERGED = "diverged"
SCORE, EXACT, WEIGHTED = "score function", "exact KL", "importance weighted"
monte_carlo, exact_kl = partial(pyros, Trace_ELBO), partial(pyros, TraceMeanField_ELBO)
drawn, detached = partial(normal, kind=Drawn), partial(normal, kind=Detached)
# What makes the loss of K draws, and the guide's family.
ESTIMATORS: dict[str, tuple[Callable[[int], Any], Any]] = {
    SCORE: (monte_carlo, drawn),
    "detached": (monte_carlo, detached),
    "detached, exact KL": (exact_kl, detached),
    "Monte Carlo": (monte_carlo, pv.families.normal),
    EXACT: (exact_kl, pv.families.normal),
    "sticking the landing": (pv.StickingTheLanding, pv.families.normal),
    WEIGHTED: (pv.ImportanceWeighted, pv.families.normal),
    "doubly reparameterized": (pv.DReG, pv.families.normal),
}
SIZES, KEYS = (10, 100, 1000), ("encoder_snr", "encoder_bias")
OPTIMIZERS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "SGD": (torch.optim.SGD, (1e-5, 1e-4, 3e-4)),
    "Adagrad": (torch.optim.Adagrad, (0.01, 0.03, 0.1)),
    "Adam": (torch.optim.Adam, (3e-4, 1e-3, 3e-3)),
}


@dataclass(frozen=True)
class Training:
    """One training."""

    estimator: str = EXACT
    particles: int = 1
    batch: int = 100
    optimizer: str = "Adam"
    rate: float = 1e-3
    seed: int = 0

    @property
    def name(self) -> str:
        """All of it."""
        size = f"K = {self.particles}, minibatch {self.batch}"
        return f"{self.estimator}, {size}, {self.optimizer} {self.rate:g}, seed {self.seed}"


# What is compared, by what varies.
PANELS: dict[str, dict[str, Training]] = {
    "estimator": {name: Training(name) for name in ESTIMATORS},
    "draws": {f"{e}, K = {k}": Training(e, k) for e in (EXACT, WEIGHTED) for k in (1, 5, 25)},
    "minibatch": {f"minibatch of {size}": Training(batch=size) for size in SIZES},
    "optimizer": {
        f"{name}, rate {rate:g}": Training(optimizer=name, rate=rate)
        for name, (_, rates) in OPTIMIZERS.items()
        for rate in rates
    },
}


class Keep(torch.optim.Optimizer):
    """Takes no step, and keeps the gradients."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})
        self.kept: list[Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep what the loss has left, as one row (P,)."""
        self.kept.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))


def gradients(pair: tuple[Any, Any], loss: Any, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Estimates of the gradient of the bound, nats per datum: rows (R, P), one per minibatch."""
    svi = pv.SVI(*pair, Keep, loss, compile=False)
    for x in batches:
        svi.step(x)
    rows = -torch.stack(svi.optimizer.kept).double() / len(batches[0])  # type: ignore
    parts = rows.split([p.numel() for p in svi.parameters.named.values()], dim=1)
    of = {"guide": [], "model": []}
    for name, part in zip(svi.parameters.named, parts, strict=True):
        of[name.split(".")[0]].append(part)
    return {"encoder": torch.cat(of["guide"], 1), "decoder": torch.cat(of["model"], 1)}


def noise_of(rows: Tensor, truth: Tensor) -> dict[str, Any]:
    """Of estimates (R, P): variance summed over P, signal to noise ratio, bias relative to a truth.

    Squared lengths of means have the variance of the mean in them, which is taken off.
    """
    variance, length = rows.var(0).sum().item(), truth.norm().item()
    mean, off = (
        max(m.square().sum().item() - variance / len(rows), 0.0) ** 0.5
        for m in (rows.mean(0), rows.mean(0) - truth)
    )
    bias = {"value": off / length, "standard_error": (variance / len(rows)) ** 0.5 / length}
    snr = mean / variance**0.5 if variance else math.inf
    return {"variance": variance, "snr": snr, "bias": bias}


def measured(pair: Any, data: pv.Split, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The noise of every estimator's gradient at the pair's parameters."""
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    train = data.train.to(next(pair[0].parameters()).device)
    pair[1].encoder.family = pv.families.normal
    many = gradients(pair, exact_kl(max(args.particles)), [train[:100]] * args.draws)

    def note(name: str, particles: int, batches: list[Tensor], *, anew: bool) -> None:
        loss, pair[1].encoder.family = ESTIMATORS[name]
        started = time.perf_counter()
        rows = gradients(pair, loss(particles), batches)
        ms = 1000 * (time.perf_counter() - started) / len(batches)
        of = "" if anew else Training(name, particles, seed=args.seeds[0]).name
        facts = {"estimator": name, "particles": particles, "batch": len(batches[0]), "ms": ms}
        for group, of_group in rows.items():
            noise = noise_of(of_group, (of_group if anew else many[group]).mean(0)).items()
            facts |= {f"{group}_{key}": value for key, value in noise}
        found.append({**facts, "anew": anew, "of": of})

    for name in ESTIMATORS:
        for particles in args.particles:
            note(name, particles, [train[:100]] * args.draws, anew=False)
    for size in SIZES:
        drawn_anew = [train[torch.randint(len(train), (size,))] for _ in range(args.draws)]
        for name in (SCORE, EXACT):
            note(name, 1, drawn_anew, anew=True)
    return found


def trained(
    job: Training, data: pv.Split, epochs: int, seconds: float, args: argparse.Namespace
) -> tuple[Any, list[dict[str, Any]]]:
    """The pair after so many epochs, or what the seconds allowed, and its records; None if lost."""
    torch.manual_seed(job.seed)
    layers = partial(pv.networks.mlp, hidden_dims=args.hidden_dims)
    inward, outward = layers(data.dim, (2, args.latent_dim)), layers(args.latent_dim, (1, data.dim))
    prior = pv.priors.StandardNormal(args.latent_dim)
    model = pv.Model(prior, pv.Conditional(outward, pv.families.bernoulli))
    loss, family = ESTIMATORS[job.estimator]
    guide = pv.Guide(pv.Conditional(inward, family))
    if not epochs:
        return (model, guide), []
    run = args.out / job.name
    try:
        history = pv.fit(
            model,
            guide,
            data,
            loss=loss(job.particles),
            optimizer=lambda params: OPTIMIZERS[job.optimizer][0](params, lr=job.rate),
            epochs=epochs,
            batch_size=job.batch,
            seed=job.seed,
            max_seconds=seconds,
            out=run,
            resume=(run / "config.json").exists(),
            device=args.device,
            pictures=False,
        )
    except pv.DivergedError:
        return None, []
    return (model, guide), history.records


def main() -> None:
    """Measure, train, judge and draw what is not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="digits, binarized_mnist, mnist...")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--out", type=Path, default=Path("runs/estimator_study"))
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes of training")
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[200])
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--draws", type=int, default=100, help="of each gradient")
    parser.add_argument("--num-particles", type=int, default=500, help="of log p(x)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="noise: of the first")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="seconds: two epochs, few trainings")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.draws, args.num_particles = 2, 2, 10
        args.hidden_dims, args.latent_dim, args.particles = [8], 2, [1]
    warnings.filterwarnings("ignore", message=r"(?s).*REINFORCE")  # its noise is measured here

    try:
        data = pv.load_data(args.data, root=args.root)
        data = data if data.num_levels is None else data.binarize()
        results = pv.Results(
            args.out / "results.json",
            title=f"Estimators of the gradient: {data.name}",
            protocol={
                "data": data.summary(),
                "pair": f"{args.latent_dim} latents, softplus layers {args.hidden_dims}, Bernoulli",
                "training": f"{args.epochs} epochs, parameters of the best validation bound",
                "noise": f"{args.draws} estimates: of the first 100 training data, K = "
                f"{args.particles}; of minibatches drawn anew, sizes {SIZES}",
                "evaluation": f"test data, {args.num_particles} particles",
                "seeds": args.seeds,
            },
            device=args.device,
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    noise = json.loads(results.path.read_text()).get("noise", {})
    stages = [e for e in (0, max(1, args.epochs // 20)) if str(e) not in noise] + [args.epochs]
    over = {row["name"] for row in results.rows if row["epochs"] in (args.epochs, DIVERGED)}
    every = dict.fromkeys([Training(), *(t for of in PANELS.values() for t in of.values())])
    some = Training(), Training(SCORE), Training(batch=1000)
    jobs = [replace(t, seed=s) for s in args.seeds for t in (some if args.smoke else every)]
    jobs = [job for job in jobs if job.name not in over]
    reference, left = Training(seed=args.seeds[0]), 60 * args.budget
    pair, records = None, []
    for done, job in enumerate(jobs):
        for epochs in stages if job == reference else [args.epochs]:
            began = time.perf_counter()
            pair, records = trained(job, data, epochs, max(left, 0.001) / (len(jobs) - done), args)
            left -= time.perf_counter() - began
            if job == reference and len(records) == epochs:
                noise[str(epochs)] = measured(pair, data, args)
                results.note(noise=noise)
        if pair is None:
            results.put(job.name, epochs=DIVERGED)
            continue
        found = pv.log_evidence(*pair, data.test, num_particles=args.num_particles)
        here = {e: [m for m in of if m["of"] == job.name] for e, of in noise.items()}
        steps = len(records) * -(-len(data.train) // job.batch)
        results.put(
            job.name,
            elbo=found.elbo.mean().item(),
            log_evidence=found.mean,
            mean_standard_error=found.mean_standard_error,
            epochs=len(records),
            of=args.epochs,
            seconds=records[-1]["seconds"],
            ms_per_step=1000 * records[-1]["seconds"] / steps,
            **{f"{k}_{e}": m[k] for k in KEYS for e, of in here.items() for m in of},
        )
        print(f"{job.name}: {found}")
    draw(noise, args.seeds[0], args.out)
    print(f"figures: {results.path}; picture: {args.out / 'estimator_study.png'}")


def draw(noise: dict[str, Any], seed: int, out: Path) -> None:
    """The noise against draws, stages and minibatches; the bound against the time of training."""
    figure = Figure(figsize=(18, 9), layout="constrained")
    axes = figure.subplots(2, 4)
    for name in ESTIMATORS if noise else ():
        here = [[m for m in noise[s] if m["estimator"] == name] for s in noise]
        one, anew = ([m for m in here[-1] if m["anew"] is new] for new in (False, True))
        for place, key in zip(axes[0, :2], ("encoder_variance", "encoder_snr"), strict=True):
            place.plot([m["particles"] for m in one], [m[key] for m in one], "o-", label=name)
        axes[0, 2].plot([int(s) for s in noise], [m[0]["encoder_snr"] for m in here], "o-")
        axes[0, 3].plot([m["batch"] for m in anew], [m["encoder_variance"] for m in anew], "o-")
    said = ("variance of the encoder's gradient, nats²", "signal to noise ratio of the encoder")
    across = (*["draws K, at the end"] * 2, "epochs of training, K = 1", "size of minibatch")
    for place, below, left in zip(axes[0], across, (*said, *said[::-1]), strict=True):
        place.set(xlabel=below, ylabel=left, xscale="log", yscale="log")
    axes[0, 0].legend(fontsize="x-small")
    axes[0, 2].set_xscale("symlog")
    best = -math.inf
    for place, (what, panel) in zip(axes[1], PANELS.items(), strict=True):
        for label, job in panel.items():
            file = out / replace(job, seed=seed).name / "metrics.jsonl"
            records = map(json.loads, file.read_text().splitlines() if file.exists() else [])
            curve = [(r["seconds"], r["valid_elbo"]) for r in records]
            place.plot(*zip(*curve, strict=True) if curve else ([], []), label=label)
            best = max([best, *(bound for _, bound in curve)])
        place.set(xlabel="seconds of training", xscale="log", title=f"by {what}")
        place.legend(fontsize="x-small")
    for place in axes[1]:
        place.tick_params(which="minor", labelbottom=False)
        place.set(ylim=(best - 15, best + 1), ylabel="ELBO of validation data, nats")
    figure.savefig(out / "estimator_study.png", dpi=150)


if __name__ == "__main__":
    main()
