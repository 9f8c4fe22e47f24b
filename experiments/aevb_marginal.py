"""The marginal likelihood by three methods: figure 3 of "Auto-Encoding Variational Bayes".

Kingma and Welling (2014) train MNIST with 3 latents and 100 hidden units on 1,000 and on 50,000
data, by AEVB, by wake-sleep and, on the 1,000 alone, by Monte Carlo EM, and draw the marginal
likelihood of training and test data by the estimator of their appendix D. Here
pv.reciprocal_evidence is that estimator, with 8 chains of 50 draws, and 50 before for the fit; the
paper draws 50 in all. Annealing stands beside it as a check: where it finds more, chains had not
come to the posterior. Both begin at the guide, and for EM, which has none, at a normal fitted to
each datum: chains that began at its prior ended up to 10 nats short. In EM each minibatch takes one
Hamiltonian move of 10 leapfrog steps from where its latents were, with a step size tuned to an
acceptance of 0.9, and then 5 updates of the weights, each of which counts as so many samples.

The step of Adagrad is 0.02 for all methods; the paper chooses among 0.01, 0.02 and 0.1 by the first
iterations. Initial weights are N(0, 0.01), taken as a variance. The first --images training and
test data are judged. MNIST is binarized, each pixel drawn once in proportion to its level.

    python experiments/aevb_marginal.py --root FOLDER --device cuda
    python experiments/aevb_marginal.py --root FOLDER --sizes 1000 --epochs 200 --out runs/reduced
"""

import argparse
import hashlib
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv

SAMPLES = 5e7  # about where the paper's curves end
BATCH, UPDATES = 100, 5
EM = "Monte Carlo EM"
LOSSES: dict[str, Callable[[], Any]] = {"AEVB": TraceMeanField_ELBO, "wake-sleep": pv.WakeSleep}
COLOURS = {"AEVB": "tab:blue", "wake-sleep": "tab:red", EM: "tab:green"}
STYLES = {"train": ".-", "test": ".--", "train annealed": "x", "test annealed": "+"}
REPORTED = {
    "figure 3, 1000 training data": "-160 to -100 nats on the axis",
    "figure 3, 50000 training data": "-160 to -125 nats on the axis; no Monte Carlo EM: too slow",
}


def build(dim: int, latent_dim: int, hidden: int, seed: int) -> tuple[Any, Any]:
    """The paper's pair, with weights N(0, 0.01)."""
    layers: dict[str, Any] = {"hidden_dims": (hidden,), "activation": nn.Tanh}
    to_normal = partial(pv.families.normal, to_scale=pv.families.exp_half, min_scale=0.0)
    encoder = pv.Conditional(pv.networks.mlp(dim, (2, latent_dim), **layers), to_normal)
    outward = pv.networks.mlp(latent_dim, (1, dim), **layers)
    likelihood = pv.Conditional(outward, pv.families.bernoulli)
    model, guide = pv.Model(pv.priors.StandardNormal(latent_dim), likelihood), pv.Guide(encoder)
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*model.parameters(), *guide.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model, guide


def adagrad(model: nn.Module, guide: nn.Module | None, step: float, size: int, *_: Any) -> Any:
    """The optimizer: N(0, I) over the decoder's weights counts once in an epoch."""
    groups = [{"params": [*model.parameters()], "weight_decay": BATCH / size}]
    groups += [] if guide is None else [{"params": [*guide.parameters()]}]
    return torch.optim.Adagrad(groups, lr=step)


def log_joint(model: Any, x: Tensor, z: Tensor) -> Tensor:
    """Log p(x, z) of each datum, (N,), in nats."""
    return model.prior().log_prob(z) + model.likelihood(z).log_prob(x)


def hmc_move(
    log_density: Any, z: Tensor, step: float, leapfrogs: int, generator: torch.Generator
) -> tuple[Tensor, float]:
    """One Hamiltonian move of each row of z, (N, Z); the new rows, and their mean acceptance."""

    def look(at: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at = at.detach().requires_grad_()
            value = log_density(at)
            (slope,) = torch.autograd.grad(value.sum(), at)
        return value.detach(), slope

    start = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
    before, slope = look(z)
    proposal, momentum, after = z, start + 0.5 * step * slope, before
    for i in range(leapfrogs):
        proposal = proposal + step * momentum
        after, slope = look(proposal)
        momentum = momentum + (0.5 if i == leapfrogs - 1 else 1.0) * step * slope
    gain = after - before + 0.5 * (start.square() - momentum.square()).sum(-1)
    probability = gain.nan_to_num(-math.inf).clamp(max=0.0).exp()
    accepted = torch.rand(len(z), generator=generator).to(z.device) < probability
    return torch.where(accepted.unsqueeze(-1), proposal, z), probability.mean().item()


class MonteCarloEM:
    """The decoder's weights by gradients at draws of the posterior, which go on with each pass."""

    def __init__(self, model: Any, x: Tensor, step: float, seed: int, path: Path) -> None:
        self.model, self.x, self.path = model, x, path
        self.optimizer = adagrad(model, None, step, len(x))
        self.generator = torch.Generator().manual_seed(seed)
        z = torch.randn(len(x), *model.prior().event_shape, generator=self.generator)
        self.z, self.passes, self.seconds, self.step = z.to(x.device), 0, 0.0, 0.1
        self.protocol = f"step {step}, seed {seed}, {[(*p.shape,) for p in model.parameters()]}, "
        self.protocol += f"data {hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest()[:12]}"
        if path.exists():
            anew = "delete the file to begin EM anew, or give another --out."
            try:
                kept = torch.load(path, map_location=x.device, weights_only=True)
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise ValueError(f"{path} is damaged; {anew}") from error
            if kept.get("protocol") != self.protocol:
                raise ValueError(f"{path} is not of {self.protocol}; {anew}")
            model.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.generator.set_state(kept["generator"].cpu())
            self.z = kept["z"]
            self.passes, self.seconds, self.step = kept["numbers"]

    def save(self) -> None:
        """Keep everything that decides how it goes on."""
        kept = {"protocol": self.protocol, "z": self.z, "generator": self.generator.get_state()}
        kept |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        kept["numbers"] = [self.passes, self.seconds, self.step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(kept, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    def run_pass(self) -> None:
        """Move all latents once, minibatch by minibatch, with the updates of each."""
        started = time.perf_counter()
        order = torch.randperm(len(self.x), generator=self.generator).to(self.x.device)
        with pyro.validation_enabled(is_validate=False):  # what is NaN is looked for below
            for rows in order.split(BATCH):
                x, z = self.x[rows], self.z[rows]
                density = partial(log_joint, self.model, x)
                self.z[rows], rate = hmc_move(density, z, self.step, 10, self.generator)
                self.step *= math.exp(0.1 * (rate - 0.9))
                for _ in range(UPDATES):
                    self.optimizer.zero_grad()
                    (-density(self.z[rows]).sum()).backward()
                    self.optimizer.step()
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise pv.DivergedError(f"a parameter is NaN or infinite after pass {self.passes}.")
        self.passes += 1
        self.seconds += time.perf_counter() - started


def judged(model: Any, guide: Any, x: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Log p(x) in both ways, nats per datum, with the estimators' errors."""
    options: dict[str, Any] = {"num_chains": args.num_chains, "leapfrog_steps": args.leapfrog_steps}
    pair: Any = (model, guide, x) if guide else pv.refine(model, pv.from_prior(model), x)
    found = {
        "": pv.reciprocal_evidence(*pair, num_draws=args.num_draws, acceptance=0.9, **options),
        " annealed": pv.ais(*pair, temperatures=args.temperatures, **options),
    }
    kept = {k: {"value": e.mean, "standard_error": e.mean_standard_error} for k, e in found.items()}
    return {k: of | {"sampling_error": found[k].sampling_error} for k, of in kept.items()}


@dataclass
class Judge:
    """Judges a model after some of its epochs, evenly on a logarithmic axis, and keeps the rows."""

    results: pv.Results
    train: Tensor
    test: Tensor
    wanted: int
    method: str
    seed: int
    args: argparse.Namespace
    seen: int = 0  # epochs that were finished

    def times(self) -> set[int]:
        """Epochs after which the model is judged."""
        grid = UPDATES if self.method == EM else 1  # so many epochs are made at once
        shares = (1 - i / self.args.points for i in range(self.args.points))
        return {grid * math.ceil(round(self.wanted**share) / grid) for share in shares}

    def name(self, epochs: str) -> str:
        """What a row is called."""
        return f"{len(self.train)} training data, {self.method}, seed {self.seed}, {epochs}"

    def ended(self) -> bool:
        """Whether nothing is left; points that were passed by can't be asked for."""
        mine = [row for row in self.results.rows if row["name"].startswith(self.name(""))]
        there = {row["epochs"] for row in mine if "diverged" not in row}
        if {t for t in self.times() if t < max(there, default=0)} - there:
            raise ValueError(f"--points: {self.results.path} has fewer; give another --out.")
        return self.wanted in there or self.name("diverged") in self.results

    def __call__(self, model: Any, guide: Any, epoch: int, seconds: float) -> None:
        """Judge the model if it is time and was not done before."""
        self.seen = done = min(epoch, self.wanted)
        name = self.name(f"{done} epochs")
        if epoch not in self.times() or name in self.results:
            return
        size, key = len(self.train), "test annealed"
        row: dict[str, Any] = {"num_train": size, "method": self.method, "seed": self.seed}
        row |= {"samples": epoch * size, "epochs": done, "of_epochs": self.wanted}
        for part, data in (("train", self.train), ("test", self.test)):
            x = data[: self.args.images].to(next(model.parameters()).device)
            row |= {f"{part}{k}": v for k, v in judged(model, guide, x, self.args).items()}
        mine = [r for r in self.results.rows if r["name"].startswith(self.name("")) and key in r]
        row["highest_test"] = max(r[key]["value"] for r in (*mine, row))
        self.results.put(name, **row, seconds=seconds)
        said = [f"{key} {row[key]['value']:.2f}" for key in STYLES]
        print(f"{name}: {', '.join(said)}, nats per datum")


def train_em(model: Any, _: Any, judge: Judge, path: Path, left: float) -> None:
    """Monte Carlo EM, for so many seconds at most."""
    device = judge.args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    x, until = judge.train.to(device), time.monotonic() + left
    em = MonteCarloEM(model.to(device), x, judge.args.step, judge.seed, path / "em.pt")
    while True:
        judge(model, None, em.passes * UPDATES, em.seconds)
        if em.passes * UPDATES >= judge.wanted or time.monotonic() > until:
            return
        em.run_pass()
        em.save()


def train_pair(model: Any, guide: Any, judge: Judge, path: Path, left: float) -> None:
    """AEVB or wake-sleep, for so many seconds at most."""
    if (kept := path / "metrics.jsonl").is_file():
        judge.seen = len(kept.read_text().splitlines())
    options: dict[str, Any] = {"epochs": judge.wanted, "batch_size": BATCH, "seed": judge.seed}
    options |= {"resume": (path / "config.json").is_file(), "device": judge.args.device}
    options |= {"optimizer": partial(adagrad, model, guide, judge.args.step, len(judge.train))}
    options |= {"max_seconds": left, "out": path, "pictures": False}
    options["callbacks"] = [lambda r: judge(model, guide, r["epoch"], r["seconds"])]
    history = pv.fit(model, guide, judge.train, loss=LOSSES[judge.method](), **options)
    judge(model, guide, history["epoch"][-1], history["seconds"][-1])


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each number of training data."""
    sizes = sorted({row["num_train"] for row in rows})
    figure = Figure(figsize=(4.2 * len(sizes), 3.4), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        mine = [row for row in rows if row["num_train"] == size]
        for method, seed in dict.fromkeys((row["method"], row["seed"]) for row in mine):
            line = [row for row in mine if (row["method"], row["seed"]) == (method, seed)]
            line.sort(key=lambda row: row["samples"])
            for key, style in STYLES.items():
                label = method if seed == mine[0]["seed"] and key == "train" else None
                points = [row["samples"] for row in line], [row[key]["value"] for row in line]
                axes.plot(*points, style, color=COLOURS[method], label=label)
        axes.set(xscale="log", xlabel="training samples evaluated")
        axes.set(ylabel="log p(x), nats per datum", title=f"{size:,} training data")
        axes.xaxis.set_minor_formatter("")  # minor ticks, without labels
        axes.legend(fontsize=6, title="train (dashed: test; crosses: annealed)", title_fontsize=6)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train by every method on every number of data, as far as the budget goes, and draw."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--data", default="mnist", help="mnist, digits...: levels, drawn as bits")
    add("--root", help="folder of the data set")
    add("--out", type=Path, default=Path("runs/aevb_marginal"))
    add("--sizes", type=int, nargs="+", default=[1000, 50_000])
    add("--epochs", type=int, help="by default so many as make 5 10^7 samples")
    add("--budget", type=float, default=math.inf, help="minutes, with judging")
    add("--methods", nargs="+", default=[*COLOURS], choices=[*COLOURS])
    add("--most-em", type=int, default=1000, help="training data of EM, at most")
    add("--latent-dim", type=int, default=3)
    add("--hidden", type=int, default=100)
    add("--step", type=float, default=0.02, help="of Adagrad")
    add("--points", type=int, default=8, help="of each curve")
    add("--images", type=int, default=1000, help="judged, of each part")
    add("--num-chains", type=int, default=8)
    add("--num-draws", type=int, default=50, help="of a chain, twice")
    add("--temperatures", type=int, default=200)
    add("--leapfrog-steps", type=int, default=4, help="of the judging chains")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--device", default="auto")
    add("--smoke", action="store_true", help="seconds: digits, tiny networks")
    args = parser.parse_args()
    if args.smoke:
        args.data, args.sizes, args.epochs, args.points, args.hidden = "digits", [200], 5, 1, 8
        args.images, args.num_chains, args.num_draws = 10, 2, 5
        args.temperatures, args.leapfrog_steps = 2, 1
    for name in ("epochs", "points", "images", "budget", "step"):
        if (given := getattr(args, name)) is not None and not given > 0:
            raise ValueError(f"--{name}: expected more than 0, got {given}.")
    data = pv.load_data(args.data, root=args.root)
    data = data if data.num_levels is None else data.binarize_static()
    print(data.summary())
    if max(args.sizes) > len(data.train) or min(args.sizes) < BATCH:
        raise ValueError(f"--sizes: expected {BATCH} to {len(data.train)}, got {args.sizes}.")
    wanted = {n: args.epochs or math.ceil(SAMPLES / n) for n in args.sizes}
    protocol = {
        "data": data.summary(),
        "epochs": ", ".join(f"{epochs:,} ({n:,} training data)" for n, epochs in wanted.items()),
        "model": f"N(0, I) prior in {args.latent_dim} dimensions, {args.hidden} tanh units on "
        "each side, diagonal normal guide, Bernoulli decoder; initial weights N(0, 0.01)",
        "training": f"Adagrad, step {args.step}, batch {BATCH}, prior N(0, I) of the decoder's "
        "weights; EM: a move of 10 leapfrog steps at acceptance 0.9, then 5 updates",
        "evaluation": f"the first {args.images} training and test data, {args.num_chains} "
        f"chains of {args.leapfrog_steps} leapfrog steps, {args.num_draws} draws each for the "
        f"fit and for the estimate; annealing in {args.temperatures} temperatures; chains "
        "begin at the guide, for EM at a normal fitted to each datum",
    }
    title = "The marginal likelihood by AEVB, wake-sleep and Monte Carlo EM"
    out = args.out / "results.json"
    results = pv.Results(out, title=title, protocol=protocol, device=args.device)
    jobs = [
        Judge(results, data.train[:n], data.test, wanted[n], method, seed, args)
        for seed in args.seeds
        for n in args.sizes
        for method in args.methods
        if method != EM or n <= args.most_em
    ]
    pending, until = [job for job in jobs if not job.ended()], time.monotonic() + 60 * args.budget
    for number, job in enumerate(pending):
        if (left := until - time.monotonic()) <= 0:
            print(f"{job.name('no time left')}; call again")
            continue
        n, share = len(job.train), left / (len(pending) - number)
        run = args.out / f"{n}-{[*COLOURS].index(job.method)}-seed{job.seed}"
        model, guide = build(data.dim, args.latent_dim, args.hidden, job.seed)
        try:
            (train_em if job.method == EM else train_pair)(model, guide, job, run, share)
        except pv.DivergedError as error:  # the others go on
            print(f"{job.name('diverged')}: {error}")
            row = {"num_train": n, "method": job.method, "seed": job.seed, "epochs": job.seen}
            results.put(job.name("diverged"), **row, of_epochs=job.wanted, diverged=True)
    results.note(finished=all(job.ended() for job in jobs), as_reported=REPORTED)
    if rows := [row for row in results.rows if "diverged" not in row]:
        picture(rows, args.out / "aevb_marginal.png")
    print(f"figures: {results.path}; picture: {args.out / 'aevb_marginal.png'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"aevb_marginal.py: {error}") from None
