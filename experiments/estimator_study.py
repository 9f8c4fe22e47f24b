r"""Why one reparameterizes: gradients of one bound, estimated in many ways.

All that is wanted is the gradient of E_q[log p(x, z) - log q(z|x)], with z drawn from q, whose
parameters are among those to be trained. On one pair:

    score function        E_q[f grad log q], Trace_ELBO's: unbiased for any q, noisy (Williams 1992)
    detached              z held for a constant, wrongly: E_q[grad log q] is left, noise, no signal
    detached, exact KL    the same beside the KL in closed form: it learns to forget the data
    Monte Carlo           Trace_ELBO: z = mu(x) + sigma(x) e (Kingma and Welling 2014)
    exact KL              TraceMeanField_ELBO: the same, with the KL in closed form
    sticking the landing  no score of q, whose mean is zero: exact at the posterior (Roeder 2017)
    importance weighted   another bound, of K weights (Burda et al. 2016): as K grows noise drowns
                          the encoder's signal (Rainforth et al. 2018), but not if it is
    doubly reparameterized                                                  (Tucker et al. 2019)

Measured are the gradient's variance per datum, summed over the parameters of encoder or decoder,
its signal to noise ratio |mean| / sqrt(variance) and its bias, relative to the exact KL with most
draws (none where another bound is meant): on one minibatch, for K draws and at stages of training,
and for minibatches drawn anew. Then bound, log p(x) of test data and time of training by each.

    python experiments/estimator_study.py --data mnist --root FOLDER --epochs 20 --out runs/mnist
"""

import json
import math
import time
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.distributions import TorchDistribution
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

import pyro_vae as pv

# One without a pathwise gradient, as a discrete distribution is; one that claims it and lacks it.
Drawn = type("Drawn", (dist.Normal,), {"has_rsample": False})
Detached = type("Detached", (dist.Normal,), {"rsample": dist.Normal.sample})


def normal(params: Tensor, *, kind: Any) -> TorchDistribution:
    """``families.normal`` by a distribution of one's own, params (*batch, 2, D)."""
    base: Any = pv.families.normal(params)
    return kind(base.base_dist.loc, base.base_dist.scale).to_event(1)


SCORE, EXACT, WEIGHTED = "score function", "exact KL", "importance weighted"
at_once = {"vectorize_particles": True, "max_plate_nesting": 1}
monte_carlo, exact_kl = (partial(of, **at_once) for of in (Trace_ELBO, TraceMeanField_ELBO))
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
RATES = {"SGD": (1e-5, 1e-4, 3e-4), "Adagrad": (0.01, 0.03, 0.1), "Adam": (3e-4, 1e-3, 3e-3)}


class Training(NamedTuple):
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


def panels(draws: list[int]) -> dict[str, dict[str, Training]]:
    """What is compared, by what varies; of the draws of the noise, the three fewest."""
    rates = [(name, rate) for name, of in RATES.items() for rate in of]
    return {
        "estimator": {name: Training(name) for name in ESTIMATORS},
        "draws": {f"{e}, K = {k}": Training(e, k) for e in (EXACT, WEIGHTED) for k in draws[:3]},
        "minibatch": {f"minibatch of {size}": Training(batch=size) for size in SIZES},
        "optimizer": {f"{o}, rate {r:g}": Training(optimizer=o, rate=r) for o, r in rates},
    }


class Keep(torch.optim.Optimizer):
    """Takes no step, and keeps the gradients."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})
        self.kept: list[Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep what the loss has left, as one row (P,)."""
        self.kept.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))


def gradients(pair: tuple[Any, Any], loss: Any, batches: list[Tensor]) -> tuple[Any, float]:
    """Estimates of the gradient of the bound, nats per datum: rows (R, P), one per minibatch.

    Beside them the milliseconds a step; a first one, which sets up what all share, is not counted.
    """
    svi = pv.SVI(*pair, Keep, loss, compile=False)
    svi.step(batches[0]).item()  # a number is there when the device has done all before it
    began = time.perf_counter()
    [svi.step(x) for x in batches][-1].item()
    ms = 1000 * (time.perf_counter() - began) / len(batches)
    rows = -torch.stack(svi.optimizer.kept[1:]).double() / len(batches[0])  # type: ignore
    named = svi.parameters.named
    parts = dict(zip(named, rows.split([p.numel() for p in named.values()], dim=1), strict=True))
    of = {"encoder": "guide.", "decoder": "model."}
    of = {k: torch.cat([parts[n] for n in parts if n.startswith(v)], 1) for k, v in of.items()}
    return of, ms


def noise_of(rows: Tensor, truth: Tensor | None = None) -> dict[str, Any]:
    """Of estimates (R, P): variance summed over P, signal to noise ratio, bias relative to a truth.

    The truth is estimated too, by the mean of rows of its own. Squared lengths of means have the
    variance of the mean in them, which is taken off; the length of a mean's noise is its error.
    """
    variance, of_mean = rows.var(0).sum().item(), rows.mean(0)
    given = rows if truth is None else truth
    noise, of_truth = (r.var(0).sum().item() / len(r) for r in (rows, given))
    means = (of_mean, noise), (given.mean(0), of_truth), (of_mean - given.mean(0), noise + of_truth)
    mean, whole, off = (max(m.square().sum().item() - n, 0.0) ** 0.5 for m, n in means)
    found: dict[str, Any] = {"variance": variance, "snr": mean / (variance**0.5 or math.nan)}
    if truth is not None:
        whole = whole or math.nan
        error = (noise + of_truth) ** 0.5 / whole
        found["bias"] = {"value": off / whole, "standard_error": error}
    return found


def measured(pair: Any, data: pv.Split, args: Namespace) -> list[dict[str, Any]]:
    """The noise of every estimator's gradient at the pair's parameters."""
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    train = data.train.to(next(pair[0].parameters()).device)
    pair[1].encoder.family = pv.families.normal
    truth, _ = gradients(pair, exact_kl(max(args.particles)), [train[:100]] * args.draws)

    one = [train[:100]] * args.draws
    anew = [[train[torch.randint(len(train), (n,))] for _ in range(args.draws)] for n in SIZES]
    todo = [(name, particles, one) for name in ESTIMATORS for particles in args.particles]
    todo += [(name, 1, batches) for batches in anew for name in (SCORE, EXACT)]
    for name, particles, batches in todo:
        loss, pair[1].encoder.family = ESTIMATORS[name]
        rows, ms = gradients(pair, loss(particles), batches)
        of = Training(name, particles, seed=args.noise_seed).name if batches is one else ""
        facts = {"estimator": name, "particles": particles, "batch": len(batches[0]), "ms": ms}
        same = batches is one and (particles == 1 or loss not in (pv.ImportanceWeighted, pv.DReG))
        for group, of_group in rows.items():
            noise = noise_of(of_group, truth[group] if same else None).items()
            facts |= {f"{group}_{key}": value for key, value in noise}
        found.append({**facts, "anew": batches is not one, "of": of})
    return found


def records_of(run: Path) -> list[dict[str, Any]]:
    """Of a training, epoch by epoch, as far as it came."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def trained(
    job: Training, data: pv.Split, epochs: int, seconds: float, args: Namespace
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
        device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
        return (model.to(device), guide.to(device)), []
    run = args.out / job.name
    try:
        history = pv.fit(
            model,
            guide,
            data,
            loss=loss(job.particles),
            optimizer=lambda params: getattr(torch.optim, job.optimizer)(params, lr=job.rate),
            epochs=epochs,
            batch_size=job.batch,
            seed=job.seed,
            max_seconds=max(seconds, 1e-3),
            out=run,
            resume=(run / "config.json").exists(),
            device=args.device,
            compile=False,  # in all trainings alike, and in none of their seconds
            pictures=False,
        )
    except pv.DivergedError:
        return None, records_of(run)
    return (model, guide), history.records


def check(args: Namespace, data: pv.Split) -> None:
    """Refuse what would fail later."""
    least = {"epochs": 1, "latent_dim": 1, "hidden_dims": 1, "particles": 1}
    for name, lowest in {**least, "draws": 2, "num_particles": 2}.items():
        given = getattr(args, name)
        if (min(given) if isinstance(given, list) else given) < lowest:
            raise ValueError(
                f"--{name.replace('_', '-')}: expected at least {lowest}, got {given}."
            )
    if not args.budget > 0:
        raise ValueError(f"--budget: expected more than 0 minutes, got {args.budget}.")
    if (many := len(data.train)) < SIZES[-1]:
        raise ValueError(f"--data: {data.name} has {many} training data, a minibatch {SIZES[-1]}.")


def main() -> None:
    """Measure, train, judge and draw what is not there yet."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, binarized_mnist, mnist...")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--out", type=Path, default=Path("runs/estimator_study"))
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes, with judging")
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[200])
    parser.add_argument("--particles", type=int, nargs="+", default=[4, 16, 64], help="K besides 1")
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
    data = pv.load_data(args.data, root=args.root)
    data = data if data.num_levels is None else data.binarize()
    check(args, data)
    args.particles = sorted({1, *args.particles})
    results = pv.Results(
        args.out / "results.json",
        title=f"Estimators of the gradient: {data.name}",
        protocol={
            "data": data.summary(),
            "pair": f"{args.latent_dim} latents, softplus layers {args.hidden_dims}, Bernoulli",
            "training": f"{args.epochs} epochs, parameters of the best validation bound",
            "noise": f"{args.draws} estimates: of the first 100 training data, K = "
            f"{args.particles}; of minibatches drawn anew, sizes {SIZES}; ms a step, warmed up",
            "evaluation": f"test data, {args.num_particles} particles",
        },
        device=args.device,
    )
    kept = json.loads(results.path.read_text())
    noise, args.noise_seed = kept.get("noise", {}), kept.get("noise_seed", args.seeds[0])
    every = [Training(), *(t for of in panels(args.particles).values() for t in of.values())]
    some = Training(), Training(SCORE), Training(batch=1000)
    jobs = [t._replace(seed=s) for s in args.seeds for t in (some if args.smoke else every)]
    over = {row["name"] for row in results.rows if row["finished"]}
    jobs = [job for job in dict.fromkeys(jobs) if job.name not in over]
    end = time.monotonic() + 60 * args.budget
    for done, job in enumerate(jobs):
        until = (began := time.monotonic()) + (end - began) / (len(jobs) - done)
        pair, records, of_noise = None, [], job == Training(seed=args.noise_seed)
        came, early = len(records_of(args.out / job.name)), (0, max(1, args.epochs // 20))
        early = (e for e in early if of_noise and str(e) not in noise and not 0 < e < came)
        for epochs in sorted({*early, args.epochs}):
            pair, records = trained(job, data, epochs, until - time.monotonic(), args)
            if of_noise and pair is not None and len(records) == epochs:
                noise[str(epochs)] = measured(pair, data, args)
                results.note(noise=noise, noise_seed=args.noise_seed)
            if len(records) < epochs or (records and time.monotonic() >= until):
                break  # no stage is passed before it is measured
        over = pair is None or len(records) >= args.epochs
        row: dict[str, Any] = {"epochs": len(records), "of_epochs": args.epochs, "finished": over}
        row |= {"diverged": True} if pair is None else {}
        found = "diverged"
        if pair is not None:
            found = pv.log_evidence(*pair, data.test, num_particles=args.num_particles)
            seconds, steps = records[-1]["seconds"], -(-len(data.train) // job.batch)
            row["elbo"], row["log_evidence"] = found.elbo.mean().item(), found.mean
            row["mean_standard_error"], row["seconds"] = found.mean_standard_error, seconds
            row["ms_per_step"] = 1000 * seconds / (steps * len(records))
        results.put(job.name, **row)
        print(f"{job.name}: {found}", flush=True)
    for row in results.rows:
        here = {e: m for e, of in noise.items() for m in of if m["of"] == row["name"]}
        more = {f"{k}_{e}": m[k] for e, m in here.items() for k in KEYS if k in m}
        if not set(more) <= set(row):
            results.put(row.pop("name"), **{**row, **more})
    draw(noise, args)
    print(f"figures: {results.path}; picture: {args.out / 'estimator_study.png'}")


def draw(noise: dict[str, Any], args: Namespace) -> None:
    """The noise against draws, stages and minibatches; the bound against the time of training."""
    figure = Figure(figsize=(18, 9), layout="constrained")
    axes, last = figure.subplots(2, 4), max(noise, key=int, default="0")
    for name in ESTIMATORS if noise else ():
        here = {e: [m for m in of if m["estimator"] == name] for e, of in noise.items()}
        one, anew = ([m for m in here[last] if m["anew"] is new] for new in (False, True))
        for place, key in zip(axes[0, :2], ("encoder_variance", "encoder_snr"), strict=True):
            place.plot([m["particles"] for m in one], [m[key] for m in one], "o-", label=name)
        first = [of[0]["encoder_snr"] for of in here.values()]
        axes[0, 2].plot([int(e) for e in here], first, "o-")
        axes[0, 3].plot([m["batch"] for m in anew], [m["encoder_variance"] for m in anew], "o-")
    said = ("variance of the encoder's gradient, nats²", "signal to noise ratio of the encoder")
    after = f"after {last} of {args.epochs} epochs"
    across = f"draws K, {after}", f"draws K, {after}", "epochs, K = 1", f"minibatch, {after}"
    for place, below, left in zip(axes[0], across, (*said, *said[::-1]), strict=True):
        scale = "symlog" if below.startswith("epochs") else "log"  # with none, too
        place.set(xlabel=below, ylabel=left, xscale=scale, yscale="log")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=8)
    best = -math.inf
    for place, (what, panel) in zip(axes[1], panels(args.particles).items(), strict=True):
        for label, job in panel.items():
            records = records_of(args.out / job._replace(seed=args.noise_seed).name)
            found = [r["valid_elbo"] for r in records]
            place.plot([r["seconds"] for r in records], found, label=label)
            best = max([best, *found])
        place.set(xlabel="seconds of training", xscale="log", title=f"by {what}")
        place.legend(fontsize="x-small")
        place.tick_params(which="minor", labelbottom=False)
    for place in axes[1] if best > -math.inf else ():
        place.set(ylim=(best - 15, best + 1), ylabel="ELBO of validation data, nats")
    figure.savefig(args.out / "estimator_study.png", dpi=150)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, pv.DivergedError) as error:
        raise SystemExit(f"estimator_study.py: {error}") from None
