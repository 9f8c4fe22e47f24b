r"""The same VAE three times: by hand in PyTorch, by hand in JAX, and as a pair of Pyro programs.

The VAE that deep-learning libraries show as their example: 500 hidden ReLU units on each side, 20
latents, an encoder that ends in a mean and a log-variance, z = mean + exp(log-variance / 2) eps,
Bernoulli pixels, and the closed-form KL -1/2 sum(1 + log s^2 - m^2 - s^2) of appendix B of Kingma
and Welling, "Auto-encoding variational Bayes" (2014). From the same weights, data and noise all
have to say the same: loss, gradients and, in 64 bits, the whole course of a training (where JAX
says loss and gradients, torch's Adam steps). Steps are timed in 32 bits. JAX joins in on a CPU that
has it (pip install --editable '.[jax]'). Called again, the script goes on where it stopped.

    python experiments/neural_nets.py
    python experiments/neural_nets.py --data binarized_mnist --root FOLDER --out runs/nets_of_bits
"""

import importlib.util
import math
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv

Weights = dict[str, Tensor]
BATCH, RATE, BETAS, EPS = 128, 1e-3, (0.9, 0.999), 1e-8
ADAM = partial(torch.optim.Adam, lr=RATE, fused=True)
HAND, JAX, OURS = "PyTorch by hand", "JAX by hand", "Pyro programs"
flat = nn.utils.parameters_to_vector
THERE = [HAND, *([JAX] if importlib.util.find_spec("jax") is not None else []), OURS]


class ByHand(nn.Module):
    """The VAE as a module that returns its loss."""

    def __init__(self, dim: int, hidden: int, latent_dim: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(dim, hidden)
        self.mean = nn.Linear(hidden, latent_dim)
        self.log_variance = nn.Linear(hidden, latent_dim)
        self.decoder = nn.Linear(latent_dim, hidden)
        self.pixels = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Minus the bound, summed over the minibatch, in nats."""
        h = self.encoder(x).relu()
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        logits = self.pixels(self.decoder(z).relu())
        distortion = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        return distortion - 0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()


class InJax:
    """Pure functions, compiled as a whole, with Adam written out."""

    def __init__(self, weights: Weights) -> None:
        self.jax: Any = importlib.import_module("jax")
        self.jax.config.update("jax_enable_x64", val=True)  # else it has no float64
        self.array: Any = lambda x: self.jax.numpy.asarray(x.detach().cpu().numpy())
        self.weights = {name: self.array(w) for name, w in weights.items()}
        zeros = self.jax.tree.map(lambda w: 0 * w, self.weights)
        self.moments, self.steps = (zeros, zeros), 0
        self.gradient = self.jax.jit(self.jax.value_and_grad(self.loss))
        self.adam = self.jax.jit(self.update)

    def loss(self, w: Any, x: Any, eps: Any) -> Any:
        """Minus the bound, summed over the minibatch, in nats."""
        exp, relu = self.jax.numpy.exp, self.jax.nn.relu
        h = relu(x @ w["encoder.weight"].T + w["encoder.bias"])
        mean = h @ w["mean.weight"].T + w["mean.bias"]
        log_variance = h @ w["log_variance.weight"].T + w["log_variance.bias"]
        z = mean + exp(0.5 * log_variance) * eps
        h = relu(z @ w["decoder.weight"].T + w["decoder.bias"])
        logits = h @ w["pixels.weight"].T + w["pixels.bias"]
        distortion = (self.jax.nn.softplus(logits) - logits * x).sum()
        return distortion - 0.5 * (1 + log_variance - mean**2 - exp(log_variance)).sum()

    def said(self, w: Weights, x: Tensor, eps: Tensor) -> tuple[float, Weights]:
        """The loss and its gradient, in torch's terms."""
        arrays = {name: self.array(p) for name, p in w.items()}
        loss, gradient = self.gradient(arrays, self.array(x), self.array(eps))
        return float(loss), {name: torch.tensor(np.array(g)) for name, g in gradient.items()}

    def update(self, w: Any, moments: Any, t: Any, x: Any) -> Any:
        """The loss, and weights and moments after a step."""
        key = self.jax.random.fold_in(self.jax.random.key(0), t)
        eps = self.jax.random.normal(key, (len(x), len(w["mean.bias"])), x.dtype)
        loss, gradient = self.gradient(w, x, eps)
        each, (a, b) = self.jax.tree.map, BETAS
        first = each(lambda m, g: a * m + (1 - a) * g, moments[0], gradient)
        second = each(lambda v, g: b * v + (1 - b) * g**2, moments[1], gradient)
        rate, scale = RATE / (1 - a**t), (1 - b**t) ** -0.5
        moved = each(lambda m, v: rate * m / (scale * v**0.5 + EPS), first, second)
        return loss, each(lambda p, d: (p - d).astype(p.dtype), w, moved), (first, second)

    def step(self, x: Any) -> Any:
        """Take a step with noise of its own; the loss before it."""
        self.steps += 1
        loss, self.weights, self.moments = self.adam(self.weights, self.moments, self.steps, x)
        return loss


def through_jax(there: InJax, module: Any, _: Any, x: Tensor) -> Tensor:
    """Of a module's weights and torch's noise; JAX says the loss and its gradient."""
    w = dict(module.named_parameters())
    eps = torch.randn(len(x), *module.mean.bias.shape, dtype=module.mean.bias.dtype)
    minus, gradient = there.said(w, x, eps)
    linear = torch.stack([(p * gradient[name]).sum() for name, p in w.items()]).sum()
    return linear - linear.detach() + minus


def of_log_variance(params: Tensor) -> Any:
    """A family of one's own: params (*batch, 2, D), a mean and a log-variance."""
    # partial(pv.families.normal, to_scale=pv.families.exp_half, min_scale=0.0) is the same.
    mean, log_variance = params.unbind(-2)
    return dist.Normal(mean, (0.5 * log_variance).exp()).to_event(1)


def pair(w: Weights) -> tuple[pv.Model, pv.Guide, list[Tensor]]:
    """p(z) p(x|z) and q(z|x) with these weights, and their parameters as ``packed`` has them."""
    hidden, dim = w["encoder.weight"].shape
    latent_dim = len(w["mean.bias"])
    network = partial(pv.networks.mlp, hidden_dims=(hidden,), activation=nn.ReLU)
    encoder = pv.Conditional(network(dim, (2, latent_dim)), of_log_variance)
    likelihood = pv.Conditional(network(latent_dim, (1, dim)), pv.families.bernoulli)
    model, guide = pv.Model(pv.priors.StandardNormal(latent_dim), likelihood), pv.Guide(encoder)
    for program in (model, guide):
        program.to(w["encoder.weight"])
    parameters: list[Tensor] = [*encoder.parameters(), *likelihood.parameters()]
    for parameter, weight in zip(parameters, packed(w), strict=True):
        parameter.data.copy_(weight)
    return model, guide, parameters


def packed(w: Weights) -> list[Tensor]:
    """In the order of a pair's parameters: the two heads are the rows of one matrix."""
    kinds = ("weight", "bias")
    heads = [torch.cat([w[f"mean.{kind}"], w[f"log_variance.{kind}"]]) for kind in kinds]
    first, *last = ([w[f"{n}.{kind}"] for kind in kinds] for n in ("encoder", "decoder", "pixels"))
    return [*first, *heads, *last[0], *last[1]]


def agreement(by_hand: ByHand, x: Tensor) -> dict[str, dict[str, float]]:
    """How far loss and gradients of the others are from those by hand in PyTorch, relatively."""
    w = {name: weight.detach() for name, weight in by_hand.state_dict().items()}
    torch.manual_seed(0)
    loss = by_hand(x)
    gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
    expected = flat(packed(dict(zip(w, gradients, strict=True))))
    model, guide, parameters = pair(w)
    sgd = partial(torch.optim.SGD, lr=1.0)  # a step of length one is the gradient
    svi = pv.SVI(model, guide, sgd, loss=TraceMeanField_ELBO(), compile=False)
    torch.manual_seed(0)
    found = {OURS: (svi.step(x).item(), flat(packed(w)) - flat(parameters))}
    if JAX in THERE:
        torch.manual_seed(0)
        minus, g = InJax(w).said(w, x, torch.randn(len(x), len(w["mean.bias"]), dtype=x.dtype))
        found[JAX] = minus, flat(packed(g))
    kinds = [f"{k} difference, {torch.finfo(x.dtype).bits} bits" for k in ("loss", "gradient")]
    rows: dict[str, dict[str, float]] = {}
    for name, (minus, g) in found.items():
        apart = abs(minus / loss.item() - 1), ((g - expected).norm() / expected.norm()).item()
        rows[name] = dict(zip(kinds, apart, strict=True))
    return rows


def steppers(by_hand: ByHand, x: Tensor, *, compiled: bool) -> dict[str, Callable[[], Any]]:
    """A step of each, with Adam."""
    w = {name: weight.detach() for name, weight in by_hand.state_dict().items()}
    optimizer = ADAM(by_hand.parameters())

    def step(module: Callable[[Tensor], Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss = module(x)
        loss.backward()
        optimizer.step()
        return loss.detach()

    found: dict[str, Callable[[], Any]] = {}
    for compile, suffix in ((False, ""), (True, ", compiled"))[: 1 + compiled]:
        svi = pv.SVI(*pair(w)[:2], ADAM, loss=TraceMeanField_ELBO(), compile=compile)
        found[HAND + suffix] = partial(step, torch.compile(by_hand) if compile else by_hand)
        found[OURS + suffix] = partial(svi.step, x)
    if JAX in THERE and x.device.type == "cpu":
        in_jax = InJax(w)
        found[JAX] = partial(in_jax.step, in_jax.array(x))
    return found


def milliseconds(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The time of a step, the best of rounds in which all take turns."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):  # in the first one compilers work
        for name, step in steps.items():
            started = time.perf_counter()
            for _ in range(19):
                step()
            float(step())  # waits for the device
            best[name] = min(best[name], 1000 * (time.perf_counter() - started) / 20)
    return best


def trained(data: pv.Split, seed: int, args: Namespace) -> dict[str, dict[str, Any]]:
    """All that are there, by one order of the data and one noise: a row each."""
    rows, judged = {}, {}
    for name in args.names:
        torch.manual_seed(seed)
        by_hand = ByHand(data.dim, args.hidden, args.latent_dim).double()
        model, guide, _ = pair(by_hand.state_dict())
        for program in (by_hand, model, guide):  # pv.fit hands over data in 32 bits
            program.register_forward_pre_hook(lambda _, given: given[0].double())
        programs: tuple[Any, Any] = (model, guide) if name == OURS else (by_hand, nn.Identity())
        loss: Any = TraceMeanField_ELBO() if name == OURS else lambda module, _, x: module(x)
        loss = partial(through_jax, InJax({})) if name == JAX else loss
        label, out = f"{name}, seed {seed}", args.out / f"{name.lower().replace(' ', '_')}-{seed}"
        reached = {"epoch": args.known.get(label, {"epochs": 0})["epochs"]}
        share = max(args.end - time.monotonic(), 1e-3) / max(len(args.left), 1)
        args.left -= {label}
        options: Any = {"epochs": args.epochs, "batch_size": BATCH, "seed": seed, "out": out}
        options |= {"resume": (out / "config.json").is_file(), "max_seconds": share}
        options |= {"callbacks": [reached.update], "pictures": False, "progress": False}
        options |= {"device": args.device, "compile": False if name == JAX else "auto"}
        try:
            history = pv.fit(*programs, data, loss=loss, optimizer=ADAM, **options)
        except pv.DivergedError as error:  # the others go on
            print(f"{label}: {error}")
            rows[name] = {"epochs": reached["epoch"], "diverged": True, "finished": True}
            continue
        if name != OURS:  # its weights are judged as a pair's
            model, guide, _ = pair(by_hand.state_dict())
        test, count = data.test[args.rows].double(), args.num_particles
        judged[name] = found = pv.log_evidence(model, guide, test, num_particles=count)
        evidence = {"value": found.mean, "standard_error": found.mean_standard_error}
        rows[name] = {"elbo": found.elbo.mean().item(), "log_evidence": evidence}
        rows[name] |= {"epochs": len(history.records), "of_epochs": args.epochs}
        rows[name] |= {"train_seconds": history["seconds"][-1], "losses": history["loss"]}
        if name != HAND and HAND in judged and rows[HAND]["epochs"] == rows[name]["epochs"]:
            losses = zip(rows[name]["losses"], rows[HAND]["losses"], strict=True)
            rows[name]["log p(x) more than by hand"] = pv.compare(found, judged[HAND]).mean
            rows[name]["largest difference of an epoch's loss"] = max(abs(a - b) for a, b in losses)
    return rows


def main() -> None:
    """Compare the numbers, take the times, train, draw."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, mnist, binarized_mnist...")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--out", type=Path, default=Path("runs/neural_nets"))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes of this call")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="seconds: tiny, two epochs")
    args = parser.parse_args()
    if not args.budget > 0:
        raise ValueError(f"--budget: expected minutes > 0, got {args.budget}.")
    args.end = time.monotonic() + 60 * args.budget
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.names = THERE if args.device == "cpu" else [HAND, OURS]  # of one noise
    args.hidden, args.latent_dim, args.num_particles = 500, 20, 500
    if args.smoke:
        args.epochs, args.hidden, args.latent_dim, args.num_particles = 2, 16, 3, 20
    pyro.settings.set(module_local_params=True)  # each pair keeps its own parameters
    data = pv.load_data(args.data, root=args.root)
    data = data if data.num_levels is None else data.binarize()
    args.rows = torch.linspace(0, len(data.test) - 1, 30 if args.smoke else 1000).long().unique()
    results = pv.Results(
        args.out / "results.json",
        title=f"By hand and as Pyro programs: {data.name}",
        protocol={
            "data": data.summary(),
            "model": f"N(0, I) prior in {args.latent_dim} dimensions, {args.hidden} ReLU units on "
            "each side, Bernoulli likelihood, diagonal normal guide of a mean and a log-variance",
            "differences": f"to {HAND}, of {BATCH} data, relative, on the CPU; gradients by norm",
            "milliseconds": f"a step with Adam on {BATCH} data, the best of rounds of 20 in turns",
            "training": f"64 bits, closed-form KL, {args.epochs} epochs, batch {BATCH}, torch's "
            f"Adam, rate {RATE}, parameters of the best validation bound; one order, one noise",
            "evaluation": f"{args.num_particles} weights, {len(args.rows)} evenly spread test data",
        },
        device=args.device,
    )
    if any(name not in results for name in THERE):
        for name, row in untrained(data, args).items():
            results.put(name, **row)
    if JAX not in THERE:
        print("JAX is not installed (pip install --editable '.[jax]'): its rows are missing.")
    args.known = {row["name"]: row for row in results.rows if "epochs" in row}
    over = {n for n, r in args.known.items() if "diverged" in r or r["epochs"] >= args.epochs}
    args.left = {f"{name}, seed {s}" for s in args.seeds for name in args.names} - over
    for seed in sorted({int(label.split()[-1]) for label in args.left}):
        for name, row in trained(data, seed, args).items():
            results.put(f"{name}, seed {seed}", **row)
    for row in results.rows:
        cells = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        print(", ".join(f"{k} {v}" for k, v in cells.items() if not isinstance(v, list)))
    draw(results.rows, args.out / "neural_nets.png")
    print(f"figures: {results.path}; picture: {args.out / 'neural_nets.png'}")


def untrained(data: pv.Split, args: Namespace) -> dict[str, dict[str, Any]]:
    """Rows of what one step says and costs."""
    torch.manual_seed(0)
    by_hand, x = ByHand(data.dim, args.hidden, args.latent_dim), data.train[:BATCH]
    rows: dict[str, dict[str, Any]] = {}
    for dtype in (torch.float64, torch.float32):
        for name, row in agreement(by_hand.to(dtype), x.to(dtype)).items():
            rows[name] = rows.get(name, {}) | row
    times = steppers(by_hand.to(args.device), x.to(args.device), compiled=not args.smoke)
    for name, of in milliseconds(times, rounds=2 if args.smoke else 10).items():
        rows[name] = rows.get(name, {}) | {"milliseconds": of}
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The course of the trainings, how far they are apart, and what a step costs."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    courses, apart, times = figure.subplots(1, 3)
    losses = {row["name"]: row["losses"] for row in rows if "losses" in row}
    for i, (name, course) in enumerate(losses.items()):
        epochs, style = range(1, len(course) + 1), "." if name.startswith(HAND) else "-"
        courses.plot(epochs, [-loss for loss in course], style, color=f"C{i}", label=name)
        hand = losses.get(f"{HAND},{name.split(',')[1]}", [])
        both = [] if style == "." else [abs(a - b) for a, b in zip(course, hand, strict=False)]
        apart.plot(range(1, len(both) + 1), both, ".-", color=f"C{i}")
    courses.set(xlabel="epoch", ylabel="bound on training data, nats per image")
    apart.set(xlabel="epoch", ylabel="difference of the bounds, nats per image", ylim=(0.0, None))
    courses.legend()
    costs = {row["name"]: row["milliseconds"] for row in rows if "milliseconds" in row}
    times.barh(list(costs)[::-1], list(costs.values())[::-1])
    times.set(xlabel=f"milliseconds a step of {BATCH} data")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"neural_nets.py: {error}") from None
