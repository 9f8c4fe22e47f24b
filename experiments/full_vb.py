"""Full variational Bayes over a decoder's weights, against point estimates, on few data.

Appendix F of Kingma and Welling, "Auto-encoding variational Bayes" (2014), which derives it and
measures nothing: p(theta) is a normal over the weights of the decoder, q(theta) another (Pyro's
AutoNormal), and held-out data are judged by their posterior predictive density. The bound is that
of the whole training set, in which the weights are paid for once. The number of training data
varies, that of gradient steps does not. Called again, the script goes on where it stopped.

    python experiments/full_vb.py
    python experiments/full_vb.py --data mnist --root FOLDER --hidden 500 --out runs/full_vb_mnist

Against it stand two point estimates of the weights: trained to the end, and stopped at the best
bound of the validation data, which the others never see; all start alike. Two things depart from
the paper. Its p(theta) is N(0, I), under which sums over many units are large; here a unit's
weights have N(0, 1 / fan-in). Its point estimate has a prior (MAP), here it is maximum likelihood.
"""

import argparse
import math
import statistics
import time
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_vae as pv

BATCH = 25
STEPS = 40  # of an epoch, about, whatever the number of data
RATE = 2e-3
# Scales start small; at the rate of all else, those that no data bind never came to the prior's.
START, RATE_OF_SCALES = 0.02, 10 * RATE
WAYS = {
    "full": "full variational Bayes",
    "stopped": "point estimate, stopped by validation data",
    "point": "point estimate",
}
NUMBERS = {  # the least, the default, what it is
    "epochs": (1, 750, f"of {STEPS} gradient steps"),
    "latent-dim": (1, 5, "latents"),
    "hidden": (1, 100, "units on each side"),
    "num-test": (2, 1000, "test data that are judged"),
    "num-global": (2, 50, "draws of the weights"),
    "num-particles": (1, 100, "per draw of the weights"),
    "num-joint": (2, 50, "weights of the whole set"),
}
KEYS, DIVERGED = ("log_density", "estimator_error", "sampling_error"), {"diverged": True}


class FullModel(pv.Model):
    """p(theta) p(z) p(x|z, theta): every weight of the likelihood is a latent, N(0, 1 / fan-in).

    The scale makes the sum over the minibatches of an epoch the bound of the whole set: theta
    counts once in all.
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module, num_data: int) -> None:
        to_pyro_module_(likelihood)
        super().__init__(prior, likelihood)
        self.num_data = num_data
        self.sites = [
            (module, name, parameter.shape)
            for module in likelihood.modules()
            for name, parameter in list(module.named_parameters(recurse=False))
        ]
        for module, name, shape in self.sites:
            scale = torch.full(shape, shape[-1] ** -0.5 if name == "weight" else 1.0)
            module.register_buffer(f"{name}_scale", scale)  # goes where the module goes
            of = attrgetter(f"{name}_scale")
            setattr(module, name, PyroSample(lambda m, of=of: dist.Normal(0.0, of(m)).to_event()))

    def forward(self, x: Tensor | int, *context: Tensor) -> Tensor:
        """Score data, or draw them; the weights are drawn here, once for all data."""
        size = x if isinstance(x, int) else len(x)
        with poutine.scale(scale=size / self.num_data):
            for module, name, _ in self.sites:
                getattr(module, name)
        return super().forward(x, *context)


class FullGuide(pv.Guide):
    """q(theta) q(z|x): a guide for the weights beside an encoder."""

    def __init__(self, encoder: nn.Module, weights: nn.Module, num_data: int) -> None:
        super().__init__(encoder)
        self.weights = weights
        self.num_data = num_data

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """Draw the weights, once for all data, and the latents."""
        with poutine.scale(scale=len(x) / self.num_data):
            self.weights(x, *context)
        return super().forward(x, *context)


def pieces(latent_dim: int, hidden: int, dim: int = 64) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Encoder, prior and likelihood, the same for all ways."""
    layers = partial(pv.networks.mlp, hidden_dims=(hidden,))
    encoder = pv.Conditional(layers(dim, (2, latent_dim)), pv.families.normal)
    likelihood = pv.Conditional(layers(latent_dim, (1, dim)), pv.families.bernoulli)
    return encoder, pv.priors.StandardNormal(latent_dim), likelihood


def point_pair(latent_dim: int, hidden: int, dim: int = 64) -> tuple[pv.Model, pv.Guide]:
    """The pair with weights that are parameters."""
    encoder, prior, likelihood = pieces(latent_dim, hidden, dim)
    return pv.Model(prior, likelihood), pv.Guide(encoder)


def full_pair(latent_dim: int, hidden: int, num_data: int, dim: int = 64) -> tuple[Any, Any]:
    """The pair with weights that are latents."""
    encoder, prior, likelihood = pieces(latent_dim, hidden, dim)
    start = {f"likelihood.{n}": p.detach().clone() for n, p in likelihood.named_parameters()}
    model = FullModel(prior, likelihood, num_data)
    begin: Any = {"init_loc_fn": lambda site: start[site["name"]].to(site["fn"].mean)}  # its device
    weights = AutoNormal(poutine.block(model, hide=["z", "x"]), init_scale=START, **begin)
    return model, FullGuide(encoder, weights, num_data)


def adam(guide: nn.Module, params: list[Tensor]) -> torch.optim.Adam:
    """Adam, with a rate of their own for the scales of q(theta)."""
    own = {id(p) for name, p in guide.named_parameters() if name.startswith("weights.scales.")}
    scales, others = ([p for p in params if (id(p) in own) is of] for of in (True, False))
    groups = [{"params": others}, {"params": scales, "lr": RATE_OF_SCALES}]
    return torch.optim.Adam(groups[: 1 + bool(scales)], lr=RATE, fused=True)


def schedule(size: int, args: argparse.Namespace) -> tuple[int, int]:
    """How often an epoch goes through so many data, and how many epochs there are."""
    # An epoch ends with a validation and a copy of the state: let it hold some steps.
    copies = max(1, args.steps * BATCH // size)
    return copies, max(1, round(args.epochs * args.steps * BATCH / (copies * size)))


def epochs_done(run: Path) -> int:
    """Of a training that was begun or not."""
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def left(size: int, seed: int, row: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """The ways that are still to be trained, given what is known of them."""
    runs = {way: args.out / f"{size}-{seed}-{way}" for way in WAYS if row.get(way) != DIVERGED}
    return [way for way, run in runs.items() if epochs_done(run) < schedule(size, args)[1]]


def measured(
    data: pv.Split, size: int, seed: int, row: dict[str, Any], time_left: float, args: Any
) -> dict[str, Any]:
    """One row, from what is known of it: all ways on so many training data, nats per datum."""
    end = time.monotonic() + time_left
    x, test = data.train[:size], data.test[args.rows]
    copies, epochs = schedule(size, args)
    shape, count = (args.latent_dim, args.hidden), (args.num_global, args.num_particles)
    lost = {way: DIVERGED for way in WAYS if row.get(way) == DIVERGED}
    going, estimates, done, seconds = left(size, seed, row, args), {}, [], 0.0
    row = {"num_train": size, "seed": seed, **lost}
    for way in WAYS:
        run = args.out / f"{size}-{seed}-{way}"
        share = (end - time.monotonic()) / max(len(going), 1)
        torch.manual_seed(seed)
        pair = full_pair(*shape, size, data.dim) if way == "full" else point_pair(*shape, data.dim)
        try:
            if way in lost:
                raise pv.DivergedError(f"{run} had diverged before")
            history = pv.fit(
                *pair,
                x.repeat(copies, 1),
                valid=data.valid if way == "stopped" else None,
                batch_size=BATCH,
                optimizer=partial(adam, pair[1]),
                lr_schedule=partial(CosineAnnealingLR, T_max=epochs),
                kl_weight=pv.warmup(max(1, epochs // 10)),
                epochs=epochs,
                seed=seed,
                max_seconds=max(share, 1e-3),
                out=run,
                resume=(run / "config.json").is_file(),
                device=args.device,
                pictures=False,
                progress=False,
            )
        except pv.DivergedError as error:  # the others go on
            print(f"{way}: {error}", flush=True)
            row[way] = DIVERGED
        else:
            seconds += history["seconds"][-1]
            if way == "full":
                row |= bound_of_the_set(pair, x, args.num_joint)
                found = pv.log_predictive(*pair, test, num_global=count[0], num_particles=count[1])
            else:
                found = pv.log_evidence(*pair, test, num_particles=math.prod(count))
            figures = found.mean, found.mean_standard_error, found.sampling_error
            estimates[way], row[way] = found, dict(zip(KEYS, figures, strict=True))
        done.append(epochs_done(run))
        going = [other for other in going if other != way]
    for way in ("stopped", "point"):
        if "full" in estimates and way in estimates:
            gain = pv.compare(estimates["full"], estimates[way])
            row[f"full minus {way}"] = {"gain": gain.mean, "paired_error": gain.mean_standard_error}
    row |= {"epochs": min(done), "of_epochs": epochs, "train_seconds": seconds}
    row["finished"] = not left(size, seed, row, args)
    return row if len(estimates) == len(WAYS) else row | DIVERGED


def bound_of_the_set(pair: tuple[Any, Any], x: Tensor, num_joint: int) -> dict[str, Any]:
    """Bounds on log p(X) / N: of one draw of the weights, without bias, and of all together."""
    log_w = pv.joint_log_weights(*pair, x, num_particles=num_joint) / len(x)
    tighter = ((len(x) * log_w).logsumexp(0).item() - math.log(num_joint)) / len(x)
    bound = {"value": log_w.mean().item(), "standard_error": log_w.std().item() / num_joint**0.5}
    return {"bound of the set": bound, "tighter_bound": tighter}


def main() -> None:
    """Train every way on every number of data, judge all on the same test data, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="digits, mnist, binarized_mnist...")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--out", type=Path, default=Path("runs/full_vb"), help="goes on if there")
    parser.add_argument("--sizes", type=int, nargs="+", default=[25, 50, 100, 400])
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes, with judging")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    for name, (_, default, said) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=said)
    parser.add_argument("--smoke", action="store_true", help="seconds: tiny, two epochs")
    args = parser.parse_args()
    args.steps = STEPS
    if args.smoke:
        tiny = {"hidden": 8, "num_test": 30, "num_particles": 5, "num_global": 3, "num_joint": 3}
        vars(args).update(tiny, sizes=args.sizes[:2], epochs=2, steps=4)
    pyro.settings.set(module_local_params=True)  # each pair keeps its own parameters
    data = pv.load_data(args.data, root=args.root)
    data = data if data.num_levels is None else data.binarize()
    check(args, data)
    args.rows = torch.linspace(0, len(data.test) - 1, args.num_test).long().unique()
    results = pv.Results(
        args.out / "results.json",
        title=f"Full variational Bayes over the decoder's weights: {data.name}",
        protocol={
            "data": data.summary(),
            "model": f"N(0, I) prior in {args.latent_dim} dimensions, one layer of {args.hidden} "
            "softplus units on each side, Bernoulli likelihood, diagonal normal guide",
            "full": "weights N(0, 1 / fan-in), biases N(0, 1) (in the paper N(0, 1) all); diagonal "
            f"normal q(theta), at first around the point estimates' start with scales {START}",
            "training": f"about {args.epochs * args.steps} steps of Adam, batch {BATCH}, learning "
            f"rate {RATE}, of the scales of q(theta) {RATE_OF_SCALES}, with cosine schedule, a "
            "tenth of KL warm-up, ELBO by Monte Carlo, one particle; point estimates of maximum "
            "likelihood (in the paper, of the posterior's maximum), 'stopped' at the best bound of "
            f"the {len(data.valid)} validation data, which the others don't see",
            "evaluation": f"{len(args.rows)} of {len(data.test)} test data, evenly spread; "
            f"{args.num_global} draws of the weights, {args.num_particles} particles each, as many "
            f"in all for point estimates; {args.num_joint} weights of the whole set",
        },
        device=args.device,
    )
    jobs = {f"{n} data, seed {seed}": (n, seed) for seed in args.seeds for n in args.sizes}
    known = {name: {} for name in jobs} | {row["name"]: row for row in results.rows}
    jobs = {name: job for name, job in jobs.items() if not known[name].get("finished", False)}
    end = time.monotonic() + 60 * args.budget
    for done, (name, job) in enumerate(jobs.items()):
        share = (end - time.monotonic()) / (len(jobs) - done)
        results.put(name, **measured(data, *job, known[name], share, args))
        print(line(results[name]), flush=True)
    draw(results.rows, args.out / "full_vb.png")
    print(f"figures: {results.path}; picture: {args.out / 'full_vb.png'}")


def check(args: argparse.Namespace, data: pv.Split) -> None:
    """Refuse what would fail later, or mean something else than it says."""
    if not args.budget > 0:
        raise ValueError(f"--budget: expected more than 0 minutes, got {args.budget}.")
    for name, (least, *_) in NUMBERS.items():
        if (given := getattr(args, name.replace("-", "_"))) < least:
            raise ValueError(f"--{name}: expected at least {least}, got {given}.")
    most = len(data.train)
    for size in args.sizes:
        if not 1 <= size <= most:
            raise ValueError(f"--sizes: expected 1 to {most}, all training data, got {size}.")


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    said = [f"{row['name']}, {row['epochs']} of {row['of_epochs']} epochs"]
    for part, found in row.items():
        if part in WAYS or part.startswith(("bound", "full minus")):
            facts = (f"{key.replace('_', ' ')} {of:.2f}" for key, of in found.items())
            said.append(f"{part}: {'diverged' if found == DIVERGED else ', '.join(facts)}")
    return "; ".join(said)


def over_seeds(found: list[dict[str, float]], key: str, error: str) -> tuple[float, float]:
    """The mean of a figure over seeds, and two standard errors.

    All seeds share the test data, so that errors for new data do not average out, and the spread
    between the trainings comes on top. An estimator's own error is a part of that spread.
    """
    if not found:
        return math.nan, math.nan
    values, one = [of[key] for of in found], statistics.fmean(of[error] ** 2 for of in found) ** 0.5
    if len(found) > 1:
        spread = statistics.stdev(values) / len(found) ** 0.5
        one = spread if error == "estimator_error" else math.hypot(one, spread)
    return statistics.fmean(values), 2 * one


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out log-density against the number of training data, and what the weights gain."""
    values, gains = (figure := Figure(figsize=(10, 4.2), layout="constrained")).subplots(1, 2)
    against = {f"full minus {way}": WAYS[way] for way in ("stopped", "point")}
    panels = (values, WAYS, KEYS[0], KEYS[:0:-1]), (gains, against, "gain", ("paired_error",))
    sizes = sorted({row["num_train"] for row in rows})
    for axes, parts, key, errors in panels:
        for part, label in parts.items():
            there = [row for row in rows if key in row.get(part, {})]
            of = [[row[part] for row in there if row["num_train"] == size] for size in sizes]
            color = f"C{list(WAYS).index(part.removeprefix('full minus '))}"
            for width, error in zip((1, 4), errors, strict=False):  # one over the other
                drawn = zip(*(over_seeds(found, key, error) for found in of), strict=True)
                line = axes.errorbar(sizes, *drawn, fmt="o-", color=color, elinewidth=width)
                line.set_label(label if width == 1 else "")
        axes.set(xscale="log", xlabel="training data", xticks=sizes, xticklabels=sizes)
        axes.minorticks_off()
    figure.legend(*values.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    bars = "nats per image\ntwo standard errors"
    values.set_ylabel(f"held-out log-density, {bars}: test set and (thick) estimator")
    gains.set_ylabel(f"gain of full variational Bayes, {bars}, paired")
    gains.axhline(0.0, color="gray", linewidth=0.8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, pv.DivergedError) as error:
        raise SystemExit(f"full_vb.py: {error}") from None
