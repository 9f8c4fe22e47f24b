"""Static binarized MNIST, one stochastic layer, standard normal prior.

The model of the first row of table 1 in Tomczak and Welling, "VAE with a VampPrior" (2018), as
a Pyro model and guide: p(z) = N(0, I) in 40 dimensions, two gated layers of 300 units on each
side, the KL weight warmed up; here with a cosine learning-rate schedule in place of thousands of
epochs. Judged on the whole test set by importance weighting.

    python experiments/binarized_mnist.py --root FOLDER
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from pyro.infer import TraceMeanField_ELBO

import pyro_vae as pv


def build(latent_dim: int, hidden_dims: tuple[int, ...]) -> tuple[pv.Model, pv.Guide]:
    """The pair: swap a prior, a likelihood or an encoder here."""
    encoder = pv.Conditional(
        pv.networks.gated_mlp(784, (2, latent_dim), hidden_dims=hidden_dims), pv.families.normal
    )
    likelihood = pv.Conditional(
        pv.networks.gated_mlp(latent_dim, (1, 784), hidden_dims=hidden_dims[::-1]),
        pv.families.bernoulli,
    )
    return pv.Model(pv.priors.StandardNormal(latent_dim), likelihood), pv.Guide(encoder)


def main() -> None:
    """Train, judge, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--out", type=Path, default=Path("runs/binarized_mnist"))
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--epochs", type=int, default=220)
    parser.add_argument("--warmup", type=int, default=50, help="epochs until the KL weight is 1")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--latent-dim", type=int, default=40)
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[300, 300])
    parser.add_argument("--num-particles", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="seconds: few data, two epochs")
    args = parser.parse_args()

    data = pv.load_data("binarized_mnist", root=args.root)
    if args.smoke:
        parts = {part: getattr(data, part)[::100] for part in ("train", "valid", "test")}
        data = dataclasses.replace(data, source=None, **parts)
        args.epochs, args.num_particles = 2, 20
    torch.manual_seed(args.seed)
    model, guide = build(args.latent_dim, tuple(args.hidden_dims))
    history = pv.fit(
        model,
        guide,
        data,
        loss=TraceMeanField_ELBO(),
        optimizer=lambda params: torch.optim.Adam(params, lr=args.learning_rate, fused=True),
        lr_schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=args.epochs
        ),
        kl_weight=pv.warmup(args.warmup),
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        out=args.out,
        resume=args.resume,
        device=args.device,
    )
    estimate = pv.evaluate_run(
        args.out,
        data=data,
        num_particles=args.num_particles,
        budget=0.0,  # as the published figures are
        seed=args.seed,
        device=args.device,
    )
    evidence = json.loads((args.out / "evidence.json").read_text())
    results = {
        "title": "Static binarized MNIST, one stochastic layer, N(0, I) prior",
        "protocol": {
            "data": data.summary(),
            "model": f"N(0, I) prior in {args.latent_dim} dimensions, gated layers "
            f"{args.hidden_dims} on each side, Bernoulli likelihood, diagonal normal guide",
            "training": f"analytic KL, one particle, batch {args.batch_size}, Adam, learning rate "
            f"{args.learning_rate} with cosine schedule over {args.epochs} epochs, KL weight "
            f"warmed up over {args.warmup} epochs, parameters of the best validation bound",
            "evaluation": f"importance weighting with the guide, {args.num_particles} particles "
            f"per datum, whole test set of {len(data.test)} images",
        },
        "as_reported": {
            "VampPrior paper (Tomczak and Welling 2018), up to 2,000 epochs": -88.56,
            "pythae (Chadebec et al. 2022), 200 particles": -89.78,
        },
        "num_train": len(data.train),
        "num_test": evidence["num_data"],
        "epochs": len(history.records),
        "best_epoch": history.best_epoch,
        "best_valid_elbo": max(history["valid_elbo"]),
        "train_seconds": history["seconds"][-1],
        **evidence,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"log p(x): {estimate}")
    print(f"figures: {args.out / 'results.json'}; pictures: {args.out / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, pv.DivergedError) as error:
        raise SystemExit(f"binarized_mnist.py: {error}") from None
