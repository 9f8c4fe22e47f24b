r"""Digits on request: a model of images given labels, and what the label is worth in nats.

    model(x, y)    z ~ p(z|y), x ~ p(x|z, y)        pyro.sample("z", prior(y))
                                                    pyro.sample("x", likelihood(z, y), obs=x)
    guide(x, y)    z ~ q(z|x, y)                    pyro.sample("z", encoder(x, y))

These are ``pv.Model`` and ``pv.Guide`` as they are: what they get besides the data goes to the
likelihood, to the encoder, and to a prior that is a ``Conditional``. The bound is

    log p(x|y) >= E_q(z|x,y)[log p(x|z, y)] - KL(q(z|x, y) || p(z|y))

The same pair with its labels hidden, zeros in place of y in every network, is a model of p(x). It
is handed the labels all the same, so both are judged on the same arguments, and ``pv.compare`` can
pair them datum by datum:

    E[log p(x|y) - log p(x)] = I(x; y) <= H(y), about log 10 = 2.303 nats, if both models were right

What lies above is what the label did for the model: it is a better one with it.

    python experiments/conditional.py --out runs/conditional

Reference: Sohn, Lee and Yan, "Learning structured output representation using deep conditional
generative models" (2015).
"""

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv

NUM_CLASSES = 10


class Hidden(nn.Module):
    """A network that is handed labels and sees zeros: its last input is y."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        """Params ``(*batch, P, D)``, the same for every label."""
        *others, y = inputs
        return self.network(*others, torch.zeros_like(y))


def build(
    latent_dim: int, hidden_dims: Sequence[int], *, hidden: bool = False
) -> tuple[pv.Model, pv.Guide]:
    """The pair of p(x|y), or with hidden labels that of p(x); labels are one-hot ``(B, 10)``."""
    see = Hidden if hidden else lambda network: network
    prior = pv.networks.mlp(NUM_CLASSES, (2, latent_dim), hidden_dims=())
    outward = pv.networks.mlp(latent_dim + NUM_CLASSES, (1, 64), hidden_dims=hidden_dims)
    inward = pv.networks.mlp(64 + NUM_CLASSES, (2, latent_dim), hidden_dims=hidden_dims)
    inward = pv.networks.rescaled(inward, scale=16.0)
    model = pv.Model(
        pv.Conditional(see(prior), pv.families.normal),
        pv.Conditional(see(outward), partial(pv.families.binomial, total_count=16)),
    )
    return model, pv.Guide(pv.Conditional(see(inward), pv.families.normal))


def one_hot(labels: Tensor) -> Tensor:
    """Labels ``(N,)`` as the networks take them, ``(N, 10)``."""
    return nn.functional.one_hot(labels, NUM_CLASSES).float()


def picture(model: pv.Model, path: Path, num_columns: int = 16) -> None:
    """Generated images, one row for each label."""
    y = torch.eye(NUM_CLASSES).repeat_interleave(num_columns, 0)
    images = pv.generate(model, len(y), y).cpu().view(NUM_CLASSES, num_columns, 8, 8)
    tiles = nn.functional.pad(images, (0, 1, 0, 1), value=16)
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    axes = figure.add_subplot()
    canvas = tiles.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
    axes.imshow(canvas.numpy(), cmap="gray", vmin=0, vmax=16)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([9 * i + 4 for i in range(NUM_CLASSES)], labels=list(map(str, range(10))))
    axes.set_title("means of p(x|z, y), z drawn from p(z|y)", loc="left", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train both pairs, compare them, and draw digits on request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/conditional"))
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[256, 256])
    parser.add_argument("--num-particles", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="seconds: two epochs, few particles")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_particles = 2, 20

    data = pv.load_data("digits")
    print(data.summary())
    labels = data.labels
    assert labels is not None  # these data have them
    test = data.test, one_hot(labels.test)

    def train(*, hidden: bool, out: Path | None) -> tuple[pv.Model, pv.Guide, pv.History]:
        torch.manual_seed(args.seed)
        model, guide = build(args.latent_dim, args.hidden_dims, hidden=hidden)
        history = pv.fit(
            model,
            guide,
            (data.train, one_hot(labels.train)),
            valid=(data.valid, one_hot(labels.valid)),
            loss=TraceMeanField_ELBO(),
            optimizer=lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
            kl_weight=pv.warmup(20),
            epochs=args.epochs,
            batch_size=50,
            patience=60,
            seed=args.seed,
            out=out,
        )
        return model, guide, history

    model, _, history = train(hidden=False, out=args.out)
    given = pv.evaluate_run(args.out, data=test, num_particles=args.num_particles, budget=0.0)
    picture(model, args.out / "digits.png")
    blind_model, blind_guide, blind_history = train(hidden=True, out=None)
    blind = pv.log_evidence(blind_model, blind_guide, *test, num_particles=args.num_particles)
    worth = pv.compare(given, blind)

    evidence = json.loads((args.out / "evidence.json").read_text())
    results = {
        "title": "Digits given their labels",
        "protocol": {
            "data": data.summary(),
            "model": f"diagonal normal p(z|y), affine in y, in {args.latent_dim} dimensions, "
            f"layers of {args.hidden_dims} softplus units on each side, binomial likelihood of 16 "
            "trials, diagonal normal q(z|x, y); without labels the same with zeros for y",
            "training": "analytic KL, one particle, batch 50, Adam, learning rate 1e-3, KL weight "
            "warmed up over 20 epochs, stopped after 60 epochs without a better validation bound, "
            "parameters of the best",
            "evaluation": f"importance weighting with the guide, {args.num_particles} particles "
            "per datum",
        },
        "num_train": len(data.train),
        "num_test": evidence["num_data"],
        "epochs": len(history.records),
        "best_epoch": history.best_epoch,
        "best_valid_elbo": max(history["valid_elbo"]),
        "train_seconds": history["seconds"][-1],
        "without_labels": {
            "log_evidence": blind.mean,
            "mean_standard_error": blind.mean_standard_error,
            "sampling_error": blind.sampling_error,
            "elbo": blind.elbo.mean().item(),
            "epochs": len(blind_history.records),
            "train_seconds": blind_history["seconds"][-1],
        },
        "worth_of_the_label": {
            "mean": worth.mean,
            "mean_standard_error": worth.mean_standard_error,
            "estimator_error": worth.estimator_error,
            "share": worth.share,
        },
        **evidence,
        "quantity": "log p(x|y)",
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{'nats per image':16}{'ELBO':>10}{'evidence':>10}{'+-':>7}")
    for name, estimate in (("log p(x|y)", given), ("log p(x)", blind)):
        print(
            f"{name:16}{estimate.elbo.mean():10.3f}{estimate.mean:10.3f}"
            f"{estimate.mean_standard_error:7.3f}"
        )
    print(
        f"the label is worth {worth.mean:.3f} +- {worth.mean_standard_error:.3f} nats (paired); "
        f"right models could not differ by more than log 10 = {math.log(10):.3f}"
    )
    print(f"figures: {args.out / 'results.json'}; digits.png, a row for each label, beside it")
    print(f"pictures and report: {args.out / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, pv.DivergedError) as error:
        raise SystemExit(f"conditional.py: {error}") from None
