"""One model, five guides: how much of the bound does the guide cost?

The same model, networks and budget each time; only q(z|x) changes. log p(x) judges the model that a
guide has led to, and the gap between log p(x) and the ELBO judges the guide. Refining the baseline
for each test datum (`pv.refine`) says how much of its gap is amortization: what one network for all
data costs against a diagonal normal of each datum's own.

    python experiments/guides.py
    python experiments/guides.py --data binarized_mnist --root FOLDER --epochs 60 --out runs/guide60
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.distributions import transforms
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_vae as pv

BY = "(altosaar: 128 latents, two layers of 256 ReLU units, 128 particles)"
REPORTED = {"binarized_mnist": {f"diagonal {BY}": -97.10, f"IAF {BY}": -95.33}}  # nats


def swaps(
    data: pv.Split, latent_dim: int, hidden_dims: tuple[int, ...], num_components: int
) -> dict[str, Callable[[], tuple[pv.Model, pv.Guide]]]:
    """The pairs: they differ in the encoder."""

    def network(rows: int) -> nn.Module:
        return pv.networks.gated_mlp(data.dim, (rows, latent_dim), hidden_dims=hidden_dims)

    def normal() -> nn.Module:
        return pv.Conditional(network(2), pv.families.normal)

    def flow() -> nn.Module:
        seen = pv.networks.gated_mlp(data.dim, (1, latent_dim), hidden_dims=hidden_dims)
        iaf = partial(
            transforms.conditional_affine_autoregressive, hidden_dims=[4 * latent_dim] * 2
        )
        return pv.ConditionalFlow(normal(), seen, iaf, (latent_dim, latent_dim))

    def pair(encoder: nn.Module) -> tuple[pv.Model, pv.Guide]:
        outward = pv.networks.gated_mlp(latent_dim, (1, data.dim), hidden_dims=hidden_dims[::-1])
        likelihood = pv.Conditional(outward, pv.families.bernoulli)
        return pv.Model(pv.priors.StandardNormal(latent_dim), likelihood), pv.Guide(encoder)

    mixture = partial(pv.families.mixture, num_components=num_components)
    return {
        "diagonal": lambda: pair(normal()),
        "low rank": lambda: pair(pv.Conditional(network(2 + 5), pv.families.low_rank_normal)),
        "full covariance": lambda: pair(
            pv.Conditional(network(1 + latent_dim), pv.families.full_normal)
        ),
        "mixture": lambda: pair(pv.Conditional(network(3 * num_components), mixture)),
        "IAF": lambda: pair(flow()),
    }


def main() -> None:
    """Train, judge, refine and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="digits, binarized_mnist, mnist...")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--out", type=Path, default=Path("runs/guides"), help="goes on if there")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes, shared")
    parser.add_argument("--warmup", type=int, help="epochs of it; a fifth by default")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--latent-dim", type=int, default=40)
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[300, 300])
    parser.add_argument("--num-components", type=int, default=3, help="of the mixture")
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--refined", type=int, default=500, help="test data that are refined")
    parser.add_argument("--steps", type=int, default=300, help="of the refinement")
    parser.add_argument("--only", nargs="+", help="some of the guides, the baseline first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="seconds: two epochs, tiny networks")
    args = parser.parse_args()
    if min(args.num_particles, args.refined) < 2 or not args.budget > 0:
        parser.error("expected --num-particles and --refined from 2, --budget above 0")
    if args.only and len(set(args.only)) < 2:
        parser.error(f"--only: expected two guides or more, got {args.only}")
    if args.smoke:
        args.epochs, args.num_particles, args.refined, args.steps = 2, 20, 10, 5
        args.hidden_dims, args.latent_dim = [16], 4
    args.warmup = max(1, args.epochs // 5) if args.warmup is None else args.warmup

    data = pv.load_data(args.data, root=args.root)
    data = data if data.num_levels is None else data.binarize()
    print(data.summary())
    pairs = swaps(data, args.latent_dim, tuple(args.hidden_dims), args.num_components)
    if args.only:
        if unknown := [name for name in args.only if name not in pairs]:
            parser.error(f"--only: there is no {unknown[0]!r}; choose from {', '.join(pairs)}")
        pairs = {name: pairs[name] for name in args.only}
    results = pv.Results(
        args.out / "results.json",
        title=f"Guides: {data.name}",
        protocol={
            "data": data.summary(),
            "model": f"N(0, I) prior in {args.latent_dim} dimensions, gated layers "
            f"{args.hidden_dims} on each side, Bernoulli likelihood; five columns of low rank, "
            f"{args.num_components} normals in the mixture, two transforms in the IAF",
            "training": f"Monte Carlo ELBO of one particle (one a component for the mixture), "
            f"{args.epochs} epochs, batch {args.batch_size}, Adam, learning rate "
            f"{args.learning_rate} with cosine schedule, KL weight warmed up over {args.warmup} "
            f"epochs, parameters of the best validation bound, seed {args.seed}",
            "evaluation": f"importance weighting with each guide, {args.num_particles} particles, "
            f"all {len(data.test)} test data",
            "baseline": next(iter(pairs)),
        },
        device=args.device,
    )
    found = pv.compare_swaps(
        pairs,
        data,
        out=args.out,
        num_particles=args.num_particles,
        losses={"mixture": pv.Stratified()},
        optimizer=lambda params: torch.optim.Adam(params, lr=args.learning_rate, fused=True),
        lr_schedule=partial(CosineAnnealingLR, T_max=args.epochs),
        kl_weight=pv.warmup(args.warmup),
        epochs=args.epochs,
        batch_size=args.batch_size,
        total_seconds=60 * args.budget,
        seed=args.seed,
        device=args.device,
    )
    quantity = json.loads((args.out / "comparison.json").read_text())["quantity"]
    results.note(quantity=quantity, baseline=found.rows[0]["name"], diverged=found.diverged)
    for row in found.rows:
        results.put(row["name"], **{key: of for key, of in row.items() if key != "name"})
    (args.out / "comparison.png").replace(args.out / "guides.png")
    results.note(as_reported=REPORTED.get(args.data, {}))
    print(found)
    if found.rows[0]["name"] == "diagonal":
        cost = amortization(args, data, args.out / "diagonal")
        results.note(amortization=cost)
        print(
            f"{cost['name']}, {cost['num_data']} test data: gap {cost['gap']:.2f} nats, of which "
            f"{cost['amortization']:.2f} +- {cost['amortization_error']:.2f} amortization"
        )
    print(f"figures: {args.out / 'results.json'}; picture: {args.out / 'guides.png'}")


def amortization(args: argparse.Namespace, data: pv.Split, run: Path) -> dict[str, Any]:
    """How much of the baseline's gap a diagonal normal of each datum's own closes."""
    pair = pv.load(run)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    for program in pair:
        program.to(best if args.device == "auto" else args.device)
    rows = torch.linspace(0, len(data.test) - 1, min(args.refined, len(data.test))).long()
    found = refinement(*pair, data.test[rows], args)
    return {"name": run.name, "num_data": len(rows), "steps": args.steps, **found}


def refinement(model: Any, guide: Any, x: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """The guide's gap log p(x) - ELBO, and by how much refining each datum's closes it, in nats."""
    shared: Any = {"num_particles": args.num_particles, "seed": args.seed}
    before = pv.log_evidence(model, guide, x, **shared)
    refined = pv.refine(model, guide, x, steps=args.steps, seed=args.seed)
    after = pv.log_evidence(*refined, **shared)
    gain = after.elbo - before.elbo
    return {
        "gap": after.mean - before.elbo.mean().item(),
        "amortization": gain.mean().item(),
        "amortization_error": gain.std().item() / len(gain) ** 0.5,
    }


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, pv.DivergedError) as error:
        raise SystemExit(f"guides.py: {error}") from None
