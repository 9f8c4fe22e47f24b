"""Is the importance-weighted figure of a trained pair to be believed? Annealing says.

A pair is trained, or gone on with. Then, on some of its test data: importance weighting, annealing
from the guide and from the prior, bounds from both sides on data that the model simulates, and the
two gaps of the bound. Each line has its budget, its time and its error.

    python experiments/annealing.py
    python experiments/annealing.py --data binarized_mnist --root FOLDER --epochs 60 --out runs/ais
"""

import argparse
import json
import math
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyro_vae as pv


def pair(data: pv.Split, latent_dim: int, hidden_dims: tuple[int, ...]) -> tuple[Any, Any]:
    """A plain pair for bits."""
    inward = pv.networks.mlp(data.dim, (2, latent_dim), hidden_dims=hidden_dims)
    outward = pv.networks.mlp(latent_dim, (1, data.dim), hidden_dims=hidden_dims[::-1])
    likelihood = pv.Conditional(outward, pv.families.bernoulli)
    encoder = pv.Conditional(inward, pv.families.normal)
    return pv.Model(pv.priors.StandardNormal(latent_dim), likelihood), pv.Guide(encoder)


def floor(model: nn.Module, rows: int) -> float:
    """Gradients a second if the decoder's matrix products were all, at so many rows."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    there = [
        (torch.rand(rows, m.in_features), torch.rand(m.in_features, m.out_features)) for m in layers
    ]
    back = [(torch.rand(rows, m.out_features), m.weight.detach()) for m in layers]
    times = []
    for _ in range(30):
        started = time.perf_counter()
        for a, b in (*there, *back):
            torch.mm(a, b)
        times.append(time.perf_counter() - started)
    return rows / sorted(times)[len(times) // 2]


def judge(run: Path, data: pv.Split, results: pv.Results, args: argparse.Namespace) -> None:
    """Every row that is not there yet."""
    model, guide = pv.load(run)
    # The data that evaluate_run judges, too.
    rows = torch.linspace(0, len(data.test) - 1, min(args.images, len(data.test))).round().long()
    x = data.test[rows]
    options: dict[str, Any] = {
        "num_chains": args.num_chains,
        "temperatures": args.temperatures,
        "leapfrog_steps": args.leapfrog_steps,
        "seed": args.seed,
    }
    chains = f"{args.num_chains} chains, {args.temperatures} temperatures, "
    walk = f"{chains}{args.leapfrog_steps} leapfrog steps"

    def put(name: str, value: float, error: float, budget: str, **more: Any) -> None:
        figures = {"nats per datum": {"value": value, "standard_error": error}, "budget": budget}
        results.put(name, **figures, **more)
        print(f"{name}: {value:.3f} +- {error:.3f} nats per datum", flush=True)

    def annealed(name: str, start: Any) -> tuple[pv.ChainEstimate, float]:
        """An estimate by chains, whose blocks are kept for the next call of this script."""
        file = run / f"{name.replace(' ', '-')}.pt"
        kept = torch.load(file) if file.exists() else {}
        started = time.perf_counter()
        found = pv.ais(model, start, x, **options, kept=kept)
        seconds = time.perf_counter() - started
        torch.save(kept, file)
        return found, seconds

    weighted = pv.log_evidence(model, guide, x, num_particles=args.num_particles, seed=args.seed)
    by_chains, seconds = annealed("annealing from the guide", guide)
    if "importance weighting" not in results:
        started = time.perf_counter()
        pv.log_evidence(model, guide, x, num_particles=args.num_particles, seed=args.seed)
        put(
            "importance weighting",
            weighted.mean,
            weighted.mean_standard_error,
            f"{args.num_particles} particles",
            seconds=time.perf_counter() - started,
            untrusted=weighted.untrusted,
            elbo=weighted.elbo.mean().item(),
        )
    if "annealing from the guide" not in results:
        put(
            "annealing from the guide",
            by_chains.mean,
            by_chains.mean_standard_error,
            walk,
            seconds=seconds,
            acceptance=by_chains.acceptance.mean().item(),
        )
        more = pv.compare(by_chains, weighted, different_kinds=True)
        put("more than importance weighting", more.mean, more.estimator_error, "paired")
    if "annealing from the prior" not in results:
        found, seconds = annealed("annealing from the prior", pv.from_prior(model))
        put(
            "annealing from the prior",
            found.mean,
            found.mean_standard_error,
            walk,
            seconds=seconds,
        )
    if "gap of the bounds from both sides" not in results:
        started = time.perf_counter()
        bounds = pv.bidirectional(model, guide, x, **options)
        put(
            "gap of the bounds from both sides",
            bounds.mean_gap,
            bounds.mean_standard_error,
            f"{walk}; simulated data",
            seconds=time.perf_counter() - started,
            largest=bounds.gap.max().item(),
        )
    if "amortization gap" not in results:
        started = time.perf_counter()
        gaps = pv.gaps(model, guide, x, log_evidence=by_chains, steps=args.steps, seed=args.seed)
        seconds = time.perf_counter() - started
        for name, part in (
            ("approximation gap", gaps.approximation),
            ("amortization gap", gaps.amortization),
        ):
            put(
                name,
                part.mean,
                part.mean_standard_error,
                f"{args.steps} steps of refinement, for both gaps",
                seconds=seconds,
                test_set_error=part.sampling_error,
            )
    if args.evaluate and "evaluation" not in results:
        found = pv.evaluate_run(
            run,
            data=data,
            num_particles=args.num_particles,
            budget=math.inf,
            limit=args.evaluate,
            num_chains=args.num_chains,
            temperatures=args.temperatures,
            leapfrog_steps=args.evaluate_leapfrog_steps,
            seed=args.seed,
        )
        seconds = json.loads((run / "evidence.json").read_text())["seconds"]
        shutil.copy(run / "trust.png", args.out / "annealing.png")
        put(
            "evaluation",
            found.mean,
            found.mean_standard_error,
            f"{len(found.value):,} images, {args.num_particles} particles; {len(found.rows):,} of "
            f"them by {chains}{args.evaluate_leapfrog_steps} leapfrog steps",
            seconds=seconds,
            test_set_error=found.sampling_error,
            gain={"value": found.missing, "standard_error": found.to_dict()["missing_error"]},
        )
    if "gradients" not in results:
        speed(model, guide, x, results, args)


def speed(model: Any, guide: Any, x: Tensor, results: pv.Results, args: argparse.Namespace) -> None:
    """Gradients a second, in turns with the matrix products that are the least they take."""
    x = x[:50]
    options: dict[str, Any] = {"num_chains": args.num_chains, "leapfrog_steps": args.leapfrog_steps}

    def timed(temperatures: int) -> tuple[int, float]:
        started = time.perf_counter()
        found = pv.ais(
            model, guide, x, temperatures=temperatures, compile=not args.smoke, **options
        )
        return found.gradients, time.perf_counter() - started

    rates, shares = [], []
    for _ in range(1 if args.smoke else 7):
        least = floor(model, rows=len(x) * min(args.num_chains, 16))
        # What is loaded and set up by each call is in both, and not in their difference.
        (fewer, short), (more, long) = timed(2), timed(50)
        rates.append((more - fewer) / (long - short))
        shares.append(rates[-1] / least)
    results.put(
        "gradients",
        budget=f"{len(x)} images, {args.num_chains} chains, {torch.get_num_threads()} threads; "
        f"median of {len(rates)} rounds in turns with the products alone",
        gradients_per_second=statistics.median(rates),
        share_of_the_products_alone=statistics.median(shares),
    )


def main() -> None:
    """Train, and judge in every way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="digits, binarized_mnist, mnist...")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--out", type=Path, default=Path("runs/annealing"), help="goes on if there")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--latent-dim", type=int, default=50)
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[400])
    parser.add_argument("--images", type=int, default=100, help="test data that are judged")
    parser.add_argument("--num-particles", type=int, default=5000)
    parser.add_argument("--num-chains", type=int, default=16)
    parser.add_argument("--temperatures", type=int, default=1000)
    parser.add_argument("--leapfrog-steps", type=int, default=10)
    parser.add_argument("--evaluate", type=int, help="so many images by pv.evaluate, too")
    parser.add_argument("--evaluate-leapfrog-steps", type=int, default=10)
    parser.add_argument("--steps", type=int, default=500, help="of the refinement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="seconds: two epochs, tiny networks")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.images, args.num_particles, args.steps = 2, 5, 50, 5
        args.hidden_dims, args.latent_dim = [8], 2
        args.num_chains, args.temperatures, args.leapfrog_steps = 2, 4, 1
        args.evaluate, args.evaluate_leapfrog_steps = 10, 1

    data = pv.load_data(args.data, root=args.root)
    data = data if data.num_levels is None else data.binarize()
    print(data.summary())
    torch.manual_seed(args.seed)
    model, guide = pair(data, args.latent_dim, tuple(args.hidden_dims))
    run = args.out / "run"
    pv.fit(
        model,
        guide,
        data,
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        out=run,
        resume=(run / "config.json").exists(),
    )
    results = pv.Results(
        args.out / "results.json",
        title=f"Evidence of a pair for {data.name}, {args.latent_dim} latent dimensions",
        protocol={
            "data": data.summary(),
            "pair": f"N(0, I) prior in {args.latent_dim} dimensions, softplus layers "
            f"{args.hidden_dims} on each side, Bernoulli likelihood, diagonal normal guide",
            "training": f"Monte Carlo ELBO, one particle, {args.epochs} epochs, batch "
            f"{args.batch_size}, Adam, parameters of the best validation bound",
            "judged": f"{args.images} test data, spread evenly, where nothing else is said",
            "chains": f"{args.num_chains} with {args.temperatures} temperatures and "
            f"{args.leapfrog_steps} leapfrog steps; {args.num_particles} particles",
            "seed": args.seed,
        },
    )
    judge(run, data, results, args)
    print(f"figures: {args.out / 'results.json'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, pv.DivergedError) as error:
        raise SystemExit(f"annealing.py: {error}") from None
