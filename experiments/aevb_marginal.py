"""The marginal likelihood by three methods: figure 3 of "Auto-Encoding Variational Bayes".

Kingma and Welling (2014) train MNIST with 3 latents and 100 hidden units on 1,000 and on 50,000
data, by AEVB, by wake-sleep and, on the 1,000 alone, by Monte Carlo EM, and draw the marginal
likelihood of training and test data by the estimator of their appendix D. Here
pv.reciprocal_evidence is that estimator. Annealing stands beside it as a check, and below it where
temperatures are few: most of all for EM, which has no guide to begin at. Monte Carlo EM has no
encoder: each minibatch takes one Hamiltonian move of 10 leapfrog steps from where its latents were,
with a step size tuned to an acceptance of 0.9, and then 5 updates of the weights, each of which
counts as so many samples.

Their protocol otherwise: tanh units, Adagrad, minibatches of 100, one draw a datum, a prior N(0, I)
of the decoder's weights, initial weights N(0, 0.01) (taken as a variance), the first 1,000 training
and test data judged. MNIST is binarized, each pixel drawn once in proportion to its level.

    python experiments/aevb_marginal.py --root ../shared/data --device cuda
    python experiments/aevb_marginal.py --root ../shared/data --sizes 1000 --epochs 200 --images 100
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
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
    log_density: Callable[[Tensor], Tensor],
    z: Tensor,
    step: float,
    leapfrogs: int,
    generator: torch.Generator,
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
    uniform = torch.rand(len(z), generator=generator).to(z.device)
    moved = torch.where((uniform < probability).unsqueeze(-1), proposal, z)
    return moved, probability.mean().item()


class MonteCarloEM:
    """The decoder's weights by gradients at draws of the posterior, which go on with each pass."""

    def __init__(self, model: Any, x: Tensor, step: float, seed: int, path: Path) -> None:
        self.model, self.x, self.path = model, x, path
        self.optimizer = adagrad(model, None, step, len(x))
        self.generator = torch.Generator().manual_seed(seed)
        latent_dim = model.prior().event_shape[0]
        self.z = torch.randn(len(x), latent_dim, generator=self.generator).to(x.device)
        self.passes, self.seconds, self.step, self.acceptance = 0, 0.0, 0.1, 0.0
        if path.exists():
            kept = torch.load(path, map_location=x.device, weights_only=True)
            model.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.generator.set_state(kept["generator"].cpu())
            self.z = kept["z"]
            self.passes, self.seconds, self.step, self.acceptance = kept["numbers"]

    def save(self) -> None:
        """Keep everything that decides how it goes on."""
        kept = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "z": self.z,
            "numbers": [self.passes, self.seconds, self.step, self.acceptance],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(kept, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    def run_pass(self) -> None:
        """Move all latents once, minibatch by minibatch, with the updates of each."""
        started = time.perf_counter()
        order = torch.randperm(len(self.x), generator=self.generator).to(self.x.device)
        for rows in order.split(BATCH):
            x = self.x[rows]
            density = partial(log_joint, self.model, x)
            z, accepted = hmc_move(density, self.z[rows], self.step, 10, self.generator)
            self.step *= math.exp(0.1 * (accepted - 0.9))
            self.acceptance = accepted
            self.z[rows] = z
            for _ in range(UPDATES):
                self.optimizer.zero_grad()
                (-log_joint(self.model, x, z).sum()).backward()
                self.optimizer.step()
        self.passes += 1
        self.seconds += time.perf_counter() - started


def judged(model: Any, start: Any, x: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Log p(x) in both ways, nats per datum, with the estimators' errors."""
    options: dict[str, Any] = {"num_chains": args.num_chains, "leapfrog_steps": args.leapfrog_steps}
    found = {
        "": pv.reciprocal_evidence(
            model, start, x, num_draws=args.num_draws, acceptance=0.9, **options
        ),
        " annealed": pv.ais(model, start, x, temperatures=args.temperatures, **options),
    }
    return {n: {"value": e.mean, "standard_error": e.mean_standard_error} for n, e in found.items()}


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

    def __call__(self, model: Any, start: Any, epoch: int, seconds: float) -> None:
        """Judge the model if it is time and was not done before."""
        grid = UPDATES if self.method == EM else 1  # so many epochs are made at once
        shares = (1 - i / self.args.points for i in range(self.args.points))
        times = {grid * math.ceil(round(self.wanted**share) / grid) for share in shares}
        size, done = len(self.train), min(epoch, self.wanted)
        name = row_name(size, self.method, self.seed, done)
        if epoch not in times or name in self.results:
            return
        figures: dict[str, Any] = {"num_train": size, "method": self.method, "seed": self.seed}
        figures |= {"samples": epoch * size, "epochs": done, "of_epochs": self.wanted}
        for part, data in (("train", self.train), ("test", self.test)):
            x = data[: self.args.images].to(next(model.parameters()).device)
            found = judged(model, start, x, self.args)
            figures |= {f"{part}{way}": figure for way, figure in found.items()}
        self.results.put(name, **figures, seconds=seconds)
        train, test = figures["train"]["value"], figures["test"]["value"]
        print(f"{name}: {train:.2f} training, {test:.2f} test, nats per datum")


def row_name(size: int, method: str, seed: int, epoch: int) -> str:
    """What a row is called."""
    return f"{size} training data, {method}, seed {seed}, {epoch} epochs"


def train_em(model: Any, judge: Judge, path: Path, left: float) -> None:
    """Monte Carlo EM, for so many seconds at most."""
    device = judge.args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    x = judge.train.to(device)
    em = MonteCarloEM(model.to(device), x, judge.args.step, judge.seed, path)
    start, until = pv.from_prior(model), time.monotonic() + left
    while em.passes * UPDATES < judge.wanted:
        em.run_pass()
        judge(model, start, em.passes * UPDATES, em.seconds)
        em.save()
        if time.monotonic() > until:
            break
    judge(model, start, em.passes * UPDATES, em.seconds)


def train_pair(model: Any, guide: Any, judge: Judge, path: Path, left: float) -> None:
    """AEVB or wake-sleep, for so many seconds at most."""

    def after_epoch(record: dict[str, Any]) -> None:
        judge(model, guide, record["epoch"], record["seconds"])

    history = pv.fit(
        model,
        guide,
        judge.train,
        loss=LOSSES[judge.method](),
        optimizer=partial(adagrad, model, guide, judge.args.step, len(judge.train)),
        epochs=judge.wanted,
        batch_size=BATCH,
        seed=judge.seed,
        max_seconds=left,
        out=path,
        resume=(path / "config.json").is_file(),
        device=judge.args.device,
        callbacks=[after_epoch],
        pictures=False,
    )
    after_epoch(history.records[-1])


def picture(results: pv.Results, path: Path) -> None:
    """A panel for each number of training data."""
    rows = results.rows
    sizes = sorted({row["num_train"] for row in rows})
    figure = Figure(figsize=(4.2 * max(len(sizes), 1), 3.4), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        mine = [row for row in rows if row["num_train"] == size]
        for method, seed in dict.fromkeys((row["method"], row["seed"]) for row in mine):
            line = [row for row in mine if (row["method"], row["seed"]) == (method, seed)]
            line.sort(key=lambda row: row["samples"])
            samples = [row["samples"] for row in line]
            label = method if seed == mine[0]["seed"] else None
            for key, style in STYLES.items():
                values = [row[key]["value"] for row in line]
                axes.plot(samples, values, style, color=COLOURS[method], label=label)
                label = None
        axes.set(xscale="log", xlabel="training samples evaluated")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(ylabel="log p(x), nats per datum", title=f"{size:,} training data")
        axes.legend(fontsize=6, title="train (dashed: test; crosses: annealed)", title_fontsize=6)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train by every method on every number of data, as far as the budget goes, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="mnist", help="mnist, digits...: levels, drawn as bits")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--out", type=Path, default=Path("runs/aevb_marginal"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 50_000])
    parser.add_argument("--epochs", type=int, help="by default so many as make 5 10^7 samples")
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes, with judging")
    parser.add_argument("--methods", nargs="+", default=[*COLOURS], choices=[*COLOURS])
    parser.add_argument("--most-em", type=int, default=1000, help="training data of EM, at most")
    parser.add_argument("--latent-dim", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=100)
    parser.add_argument("--step", type=float, default=0.02, help="of Adagrad")
    parser.add_argument("--points", type=int, default=8, help="of each curve")
    parser.add_argument("--images", type=int, default=1000, help="judged, of each part")
    parser.add_argument("--num-chains", type=int, default=8)
    parser.add_argument("--num-draws", type=int, default=50, help="of a chain, twice")
    parser.add_argument("--temperatures", type=int, default=200)
    parser.add_argument("--leapfrog-steps", type=int, default=4, help="of the judging chains")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="seconds: digits, tiny networks")
    args = parser.parse_args()
    if args.smoke:
        args.data, args.sizes, args.epochs, args.points, args.hidden = "digits", [200], 5, 1, 8
        args.images, args.num_chains, args.num_draws = 10, 2, 5
        args.temperatures, args.leapfrog_steps = 2, 1

    data = pv.load_data(args.data, root=args.root)
    data = data if data.num_levels is None else data.binarize_static()
    print(data.summary())
    if max(args.sizes) > len(data.train) or min(args.sizes) < BATCH:
        raise ValueError(f"--sizes: expected {BATCH} to {len(data.train)}, got {args.sizes}.")
    wanted = {n: args.epochs or math.ceil(SAMPLES / n) for n in args.sizes}
    results = pv.Results(
        args.out / "results.json",
        title="The marginal likelihood by AEVB, wake-sleep and Monte Carlo EM",
        protocol={
            "data": data.summary(),
            "epochs": str(wanted),
            "model": f"N(0, I) prior in {args.latent_dim} dimensions, {args.hidden} tanh units on "
            "each side, diagonal normal guide, Bernoulli decoder; initial weights N(0, 0.01)",
            "training": f"Adagrad, step {args.step}, batch {BATCH}, prior N(0, I) of the decoder's "
            "weights; EM: a move of 10 leapfrog steps at acceptance 0.9, then 5 updates",
            "evaluation": f"the first {args.images} training and test data, {args.num_chains} "
            f"chains of {args.leapfrog_steps} leapfrog steps, {args.num_draws} draws each for the "
            f"fit and for the estimate; annealing in {args.temperatures} temperatures; chains "
            "begin at the guide, for EM at the prior",
        },
        device=args.device,
    )
    results.note(as_reported=REPORTED)
    jobs = [
        (n, method, seed)
        for seed in args.seeds
        for n in args.sizes
        for method in args.methods
        if method != EM or n <= args.most_em
    ]
    jobs = [job for job in jobs if row_name(*job, wanted[job[0]]) not in results]
    left = 60 * args.budget
    for number, (n, method, seed) in enumerate(jobs):
        x, run = data.train[:n], args.out / f"{n}-{[*COLOURS].index(method)}-seed{seed}"
        judge = Judge(results, x, data.test, wanted[n], method, seed, args)
        model, guide = build(data.dim, args.latent_dim, args.hidden, seed)
        began, share = time.perf_counter(), max(left, 0.001) / (len(jobs) - number)
        if method == EM:
            train_em(model, judge, run / "em.pt", share)
        else:
            train_pair(model, guide, judge, run, share)
        left -= time.perf_counter() - began
    if results.rows:
        picture(results, args.out / "aevb_marginal.png")
    print(f"figures: {results.path}; picture: {args.out / 'aevb_marginal.png'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"aevb_marginal: {error}") from None
