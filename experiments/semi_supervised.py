r"""A hundred labels: the label is a latent that is now and then known (M2 of Kingma et al.).

    model    p(y) p(z) p(x|y, z)       y one of ten digits, z ~ N(0, I), levels given both
    guide    q(y|x) q(z|x, y)          a classifier, and what is left to say when the digit is known

With L(x, y) = E_q(z|x,y)[log p(x|y, z) + log p(y) + log p(z) - log q(z|x, y)] there are two bounds:

    label unknown    log p(x)     >= sum_y q(y|x) [L(x, y) - log q(y|x)]
    label y*         log p(x, y*) >= L(x, y*)

The second is the first with all of q(y|x) at y*. So one pair of programs serves both kinds of data:
where a label is known, the guide knows it. The sum over y is exact, by Pyro's enumeration of the
site that is marked for it. Labelled data would then teach the classifier nothing, so the model
observes their label a second time, through the classifier and with the weight alpha:

    maximised    sum over unknown [bound] + sum over known [L(x, y*) + alpha log q(y*|x)]

A mask keeps that term from the data without a label; their log p(x) is that of the model alone.
alpha is 50, as in the paper for MNIST with a hundred labels (0.1 * images / labels). Too small, and
q(y|x) sorts the images by what helps the bound most, which need not be the digit: try --alpha 1.

    python experiments/semi_supervised.py --out runs/semi_supervised
    python experiments/semi_supervised.py --num-labels 50 --out runs/fifty_labels

Reference: Kingma, Rezende, Mohamed and Welling, "Semi-supervised learning with deep generative
models" (2014).
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_vae as pv

NUM_CLASSES = 10
CERTAIN = 1000.0  # a logit so far above the others' zeros that their probability, e^-1000, is zero


class Model(PyroModule):
    """p(y) p(z) p(x|y, z), times q(y|x)^alpha where the label is known."""

    def __init__(
        self, prior: nn.Module, likelihood: nn.Module, classifier: nn.Module, alpha: float
    ) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood
        self.classifier = classifier
        self.alpha = alpha

    def forward(self, x: Tensor, y: Tensor, known: torch.BoolTensor) -> None:
        """Score data ``(B, D)`` with one-hot labels ``(B, C)``, of which those known count."""
        with pyro.plate("data", len(x), dim=-1):
            digit = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros_like(y[0])))
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z, digit), obs=x)
            with poutine.mask(mask=known), poutine.scale(scale=self.alpha):
                pyro.sample("label", self.classifier(x), obs=y)


class Guide(PyroModule):
    """q(y|x) q(z|x, y), all of q(y|x) at the label where that is known."""

    def __init__(self, classifier: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.encoder = encoder

    def forward(self, x: Tensor, y: Tensor, known: torch.BoolTensor) -> None:
        """Draw the digit, or take all ten in turn, and z for each."""
        with pyro.plate("data", len(x), dim=-1):
            logits = torch.where(known.unsqueeze(-1), CERTAIN * y, self.classifier(x).logits)
            q = dist.OneHotCategorical(logits=logits)
            digit = pyro.sample("y", q, infer={"enumerate": "parallel"})
            pyro.sample("z", self.encoder(x, digit))


def make_classifier(hidden_dims: Sequence[int]) -> pv.Conditional:
    """q(y|x)."""
    network = pv.networks.mlp(64, (1, NUM_CLASSES), hidden_dims=hidden_dims)
    return pv.Conditional(pv.networks.rescaled(network, scale=16.0), pv.families.one_hot)


def build(latent_dim: int, hidden_dims: Sequence[int], alpha: float) -> tuple[Model, Guide]:
    """The pair; both hold the classifier."""
    inward = pv.networks.mlp(64 + NUM_CLASSES, (2, latent_dim), hidden_dims=hidden_dims)
    encoder = pv.Conditional(pv.networks.rescaled(inward, scale=16.0), pv.families.normal)
    likelihood = pv.Conditional(
        pv.networks.mlp(latent_dim + NUM_CLASSES, (1, 64), hidden_dims=hidden_dims),
        partial(pv.families.binomial, total_count=16),
    )
    classifier = make_classifier(hidden_dims)
    prior = pv.priors.StandardNormal(latent_dim)
    return Model(prior, likelihood, classifier, alpha), Guide(classifier, encoder)


def few(labels: Tensor, num_labels: int, seed: int) -> Tensor:
    """Which labels stay known, ``(N,)``: equally many of each class, the same under one seed."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    known = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(NUM_CLASSES):
        known[order[labels[order] == digit][: num_labels // NUM_CLASSES]] = True
    return known


def arguments(x: Tensor, labels: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the pair takes; the labels that are not known are wiped out, not only masked."""
    return x, nn.functional.one_hot(labels * known, NUM_CLASSES).to(x.dtype), known


def unlabelled(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the pair takes of data whose labels nobody knows."""
    none = torch.zeros(len(x), dtype=torch.bool)
    return arguments(x, none.long(), none)


def train_alone(classifier: pv.Conditional, x: Tensor, y: Tensor, num_steps: int) -> None:
    """Train a classifier on labelled data and nothing else."""
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    for _ in range(num_steps):
        optimizer.zero_grad()
        (-classifier(x).log_prob(y).mean()).backward()
        optimizer.step()


def picture(model: Model, guide: Guide, x: Tensor, path: Path) -> None:
    """Each image, and beside it the ten digits in its hand: z of the image, y of the column."""
    z = pv.encode(guide, *unlabelled(x))["z"].mean.repeat_interleave(NUM_CLASSES, 0)
    digits = torch.eye(NUM_CLASSES).repeat(len(x), 1)
    repeated = unlabelled(x.repeat_interleave(NUM_CLASSES, 0))
    means = pv.decode(model, {"z": z, "y": digits}, *repeated)["x"].mean.cpu()
    rows = torch.cat([x.unsqueeze(1), means.view(len(x), NUM_CLASSES, 64)], 1)
    tiles = nn.functional.pad(rows.view(*rows.shape[:2], 8, 8), (0, 1, 0, 1), value=16)
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot()
    canvas = tiles.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
    axes.imshow(canvas.numpy(), cmap="gray", vmin=0, vmax=16)
    axes.spines[:].set_visible(False)
    axes.set_xticks([9 * i + 4 for i in range(11)], labels=["data", *map(str, range(10))])
    axes.set_yticks([])
    axes.set_title("test images, and their z with each y", loc="left", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train on all images and a few labels, and beside it on the labelled images alone."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/semi_supervised"))
    parser.add_argument("--num-labels", type=int, default=100, help="a multiple of ten")
    parser.add_argument("--alpha", type=float, default=50.0, help="weight of log q(y*|x)")
    parser.add_argument("--epochs", type=int, default=70)
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[128])
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="seconds: two epochs, few particles")
    args = parser.parse_args()
    if args.num_labels < NUM_CLASSES or args.num_labels % NUM_CLASSES:
        parser.error(f"--num-labels: expected a multiple of {NUM_CLASSES}, got {args.num_labels}")
    if args.smoke:
        args.epochs, args.num_particles = 2, 20

    data = pv.load_data("digits")
    print(data.summary())
    labels = data.labels
    assert labels is not None  # these data have them
    known = few(labels.train, args.num_labels, args.seed)
    train = arguments(data.train, labels.train, known)
    torch.manual_seed(args.seed)
    model, guide = build(args.latent_dim, args.hidden_dims, args.alpha)
    history = pv.fit(
        model,
        guide,
        train,
        valid=unlabelled(data.valid),
        loss=TraceEnum_ELBO(max_plate_nesting=1),
        optimizer=lambda params: torch.optim.Adam(params, lr=2e-3, fused=True),
        epochs=args.epochs,
        batch_size=100,
        seed=args.seed,
        out=args.out,
    )
    estimate = pv.evaluate_run(
        args.out,
        data=unlabelled(data.test),
        model=model,
        guide=guide,
        num_particles=args.num_particles,
        budget=0.0,
    )
    picture(model, guide, data.test[:10], args.out / "styles.png")

    torch.manual_seed(args.seed)
    alone = make_classifier(args.hidden_dims)
    train_alone(alone, train[0][known], train[1][known], 10 * args.epochs)
    hidden = ~known
    parts = {
        "test": (data.test, labels.test),
        "hidden": (data.train[hidden], labels.train[hidden]),
    }
    accuracy = {}
    for part, (x, truth) in parts.items():
        q = pv.encode(guide, *unlabelled(x))["y"]
        right = (q.logits.argmax(-1).cpu() == truth).double()
        right_alone = (alone(x).logits.argmax(-1) == truth).double()
        gain = right - right_alone
        accuracy[part] = {
            "images": len(x),
            "M2": right.mean().item(),
            "alone": right_alone.mean().item(),
            "gain": gain.mean().item(),
            "gain_standard_error": gain.std().item() / len(x) ** 0.5,
        }

    evidence = json.loads((args.out / "evidence.json").read_text())
    results = {
        "title": f"Digits, {int(known.sum())} labels",
        "protocol": {
            "data": data.summary(),
            "model": f"uniform p(y), N(0, I) prior in {args.latent_dim} dimensions, layers of "
            f"{args.hidden_dims} softplus units in every network, binomial likelihood of 16 "
            f"trials, diagonal normal q(z|x, y), alpha {args.alpha:g}",
            "training": f"exact sum over y, one particle of z, {int(known.sum())} labels of "
            f"{len(known)}, batch 100, Adam, learning rate 2e-3, parameters of the best "
            "bound on validation images without labels",
            "classifier alone": f"the same network on the labelled images, {10 * args.epochs} "
            "steps of Adam on all of them",
            "evaluation": f"importance weighting without labels, {args.num_particles} particles "
            "per datum; accuracy by the largest q(y|x)",
        },
        "num_train": len(data.train),
        "num_labels": int(known.sum()),
        "num_test": evidence["num_data"],
        "epochs": len(history.records),
        "best_epoch": history.best_epoch,
        "best_valid_elbo": max(history["valid_elbo"]),
        "train_seconds": history["seconds"][-1],
        "accuracy": accuracy,
        **evidence,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{int(known.sum())} labels, accuracy{'alone':>12}{'M2':>9}{'gain, paired':>18}")
    for part, row in accuracy.items():
        print(
            f"{row['images']:5} {part + ' images':16}{row['alone']:10.1%}{row['M2']:9.1%}"
            f"{row['gain']:+9.1%} +- {row['gain_standard_error']:.1%}"
        )
    print(f"test images without labels: ELBO {estimate.elbo.mean():.3f}, log p(x) {estimate}")
    print(f"figures: {args.out / 'results.json'}; styles.png beside it")
    print(f"report: {args.out / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, pv.DivergedError) as error:
        raise SystemExit(f"semi_supervised.py: {error}") from None
