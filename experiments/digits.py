"""The handwritten digits of scikit-learn: train, judge and look.

1,797 images of 8 x 8 pixels with integer grey levels 0..16, which come with scikit-learn. Grey
levels are counts, so the likelihood is a binomial of 16 trials, and every figure is a log p(x).

    python experiments/digits.py --out runs/digits
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from pyro.infer import TraceMeanField_ELBO

import pyro_vae as pv


def build(latent_dim: int) -> tuple[pv.Model, pv.Guide]:
    """The pair: swap a prior, a likelihood or an encoder here."""
    network = pv.networks.mlp(64, (2, latent_dim), hidden_dims=(256, 256))
    encoder = pv.Conditional(pv.networks.rescaled(network, scale=16.0), pv.families.normal)
    likelihood = pv.Conditional(
        pv.networks.mlp(latent_dim, (1, 64), hidden_dims=(256, 256)),
        partial(pv.families.binomial, total_count=16),
    )
    return pv.Model(pv.priors.StandardNormal(latent_dim), likelihood), pv.Guide(encoder)


def main() -> None:
    """Train, judge, and say where the pictures are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--num-particles", type=int, default=5000)
    parser.add_argument("--budget", type=float, default=8.0, help="of annealing; see pv.evaluate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="seconds: two epochs, few particles")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_particles = 2, 20

    data = pv.load_data("digits")
    print(data.summary())
    torch.manual_seed(args.seed)
    model, guide = build(args.latent_dim)
    history = pv.fit(
        model,
        guide,
        data,
        loss=TraceMeanField_ELBO(),
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
        kl_weight=pv.warmup(20),
        epochs=args.epochs,
        batch_size=50,
        patience=60,
        seed=args.seed,
        out=args.out,
        device=args.device,
    )
    found = pv.evaluate_run(
        args.out, num_particles=args.num_particles, budget=args.budget, device=args.device
    )
    evidence = json.loads((args.out / "evidence.json").read_text())
    results = {
        "title": "The digits of scikit-learn: `make demo`",
        "protocol": {
            "data": data.summary(),
            "model": f"N(0, I) prior in {args.latent_dim} dimensions, two layers of 256 softplus "
            "units on each side, binomial likelihood of 16 trials, diagonal normal guide",
            "training": "analytic KL, one particle, batch 50, Adam, learning rate 1e-3, KL weight "
            "warmed up over 20 epochs, stopped after 60 epochs without a better validation bound, "
            "parameters of the best",
            "evaluation": f"importance weighting with the guide, {args.num_particles} particles "
            f"per datum, and annealing of untrusted data for {args.budget:g} times its cost",
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
    print(f"best validation ELBO: {max(history['valid_elbo']):.3f}, epoch {history.best_epoch}")
    print(found)
    print(f"pictures and report:  {args.out / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, pv.DivergedError) as error:
        raise SystemExit(f"digits.py: {error}") from None
