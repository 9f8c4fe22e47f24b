"""Is the importance-weighted figure of a trained pair to be believed? Annealing says.

A pair is trained, or gone on with. Then, on some of its test data: importance weighting, annealing
from the guide and from the prior, bounds from both sides on data that the model simulates, and the
two gaps of the bound. Each line has its budget, its time and its error.

    python experiments/annealing.py --out runs/annealing
    python experiments/annealing.py --data binarized_mnist --root ../shared/data --epochs 60
"""

import argparse
import json
import time
from collections.abc import Callable
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


class Rows:
    """The lines of the results, measured one after another."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def measure(self, what: str, budget: str, make: Callable[[], Any]) -> Any:
        """Make something, and note how long it took."""
        print(f"{what}: {budget}...", flush=True)
        started = time.perf_counter()
        result = make()
        seconds = time.perf_counter() - started
        self.rows.append({"what": what, "budget": budget, "seconds": seconds})
        return result

    def note(self, value: float, error: float, **more: float) -> None:
        """What was measured last, in nats per datum, with its standard error."""
        row = self.rows[-1]
        row |= {"value": value, "error": error, **more}
        print(f"  {value:.3f} +- {error:.3f} nats per datum, {row['seconds']:.0f} s", flush=True)


def judge(run: Path, x: Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every line of the results."""
    model, guide = pv.load(run)
    options: dict[str, Any] = {
        "num_chains": args.num_chains,
        "temperatures": args.temperatures,
        "leapfrog_steps": args.leapfrog_steps,
        "seed": args.seed,
    }
    chains = f"{args.num_chains} chains, {args.temperatures} temperatures, " + (
        f"{args.leapfrog_steps} leapfrog steps"
    )
    rows = Rows()
    weighted = rows.measure(
        "importance weighting",
        f"{args.num_particles} particles",
        lambda: pv.evaluate_run(
            run,
            num_particles=args.num_particles,
            budget=0.0,
            limit=len(x),
            seed=args.seed,
            progress=False,
        ),
    )
    rows.note(weighted.mean, weighted.mean_standard_error, untrusted=weighted.untrusted)
    annealed = rows.measure(
        "annealing from the guide", chains, lambda: pv.ais(model, guide, x, **options)
    )
    rate = annealed.gradients / rows.rows[-1]["seconds"]
    least = floor(model, rows=min(len(x), 100) * min(args.num_chains, 16))
    rows.note(
        annealed.mean,
        annealed.mean_standard_error,
        acceptance=annealed.acceptance.mean().item(),
        gradients_per_second=rate,
        share_of_floor=rate / least,
    )
    difference = pv.compare(annealed, weighted, different_kinds=True)
    rows.rows.append(
        {"what": "  more than importance weighting", "budget": "paired", "seconds": 0.0}
    )
    rows.note(difference.mean, difference.estimator_error)
    from_prior = rows.measure(
        "annealing from the prior",
        chains,
        lambda: pv.ais(model, pv.from_prior(model), x, **options),
    )
    rows.note(from_prior.mean, from_prior.mean_standard_error)
    bounds = rows.measure(
        "gap of the bounds from both sides, simulated data",
        chains,
        lambda: pv.bidirectional(model, guide, x, **options),
    )
    rows.note(bounds.mean_gap, bounds.mean_standard_error, largest=bounds.gap.max().item())
    gaps = rows.measure(
        "approximation gap",
        f"{args.steps} steps of refinement",
        lambda: pv.gaps(model, guide, x, log_evidence=annealed, steps=args.steps, seed=args.seed),
    )
    for name, part in (("approximation", gaps.approximation), ("amortization", gaps.amortization)):
        if name == "amortization":
            rows.rows.append({"what": "amortization gap", "budget": "the same", "seconds": 0.0})
        rows.note(part.mean, part.mean_standard_error, sampling_error=part.sampling_error)
    return rows.rows


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
    parser.add_argument("--steps", type=int, default=500, help="of the refinement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="seconds: two epochs, tiny networks")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.images, args.num_particles, args.steps = 2, 5, 50, 5
        args.hidden_dims, args.latent_dim = [8], 2
        args.num_chains, args.temperatures, args.leapfrog_steps = 2, 4, 1

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
    # The data that evaluate_run judges, too.
    rows = torch.linspace(0, len(data.test) - 1, min(args.images, len(data.test))).round().long()
    lines = judge(run, data.test[rows], args)
    results = {
        "title": f"Evidence of a pair for {data.name}, {args.latent_dim} latent dimensions",
        "protocol": {
            "data": data.summary(),
            "pair": f"N(0, I) prior in {args.latent_dim} dimensions, softplus layers "
            f"{args.hidden_dims} on each side, Bernoulli likelihood, diagonal normal guide",
            "training": f"Monte Carlo ELBO, one particle, {args.epochs} epochs, batch "
            f"{args.batch_size}, Adam, parameters of the best validation bound",
            "judged": f"{len(rows)} test data, spread evenly",
            "seed": str(args.seed),
        },
        "machine": json.loads((run / "evidence.json").read_text())["machine"],
        "lines": lines,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"figures: {args.out / 'results.json'}")


if __name__ == "__main__":
    main()
