"""Write docs/performance.md and its pictures from docs/performance/*.json, nothing by hand.

python -m experiments.benchmarks.report
"""

import json
from pathlib import Path
from typing import Any

__all__ = ["DOCS", "page", "picture", "write"]

DOCS = Path(__file__).parents[2] / "docs"
OURS = "pyro_vae_compiled"
NOT_MEASURED = "not measured"
WHOLE = ("torch_compiled", "torch_whole_step")

NAMES = {
    OURS: "**pyro_vae, compiled**",
    "pyro_vae_bfloat16": "pyro_vae, compiled, decoder in bfloat16",
    "pyro_vae_eager": "pyro_vae, eager",
    "pyro_svi": "pyro.infer.SVI",
    "pyro_svi_jit": "pyro.infer.SVI, Jit loss",
    "torch_eager": "by hand, eager",
    "torch_fused": "by hand, fused Adam",
    "torch_compiled": "by hand, compiled",
    "torch_whole_step": "by hand, whole step compiled",
    "numpyro_svi": "NumPyro, jitted update",
    "pythae_trainer": "pythae's trainer",
    "pyro_importance_at_once": "Pyro's vectorized_importance_weights, one call",
    "pyro_vectorized_importance": "the same in calls that fit the caches",
    "pythae_get_nll": "pythae's get_nll",
    "last_product_torch": "the decoder's last product alone, torch.mm",
    "last_product_onednn": "the decoder's last product alone, oneDNN",
}

OBJECTIVES = {"trace": "Trace_ELBO", "meanfield": "TraceMeanField_ELBO"}


def page(folder: Path) -> str:
    """The whole page from the figures in a folder.

    Args:
        folder: Of one JSON file a machine.
    """
    parts = [Path(__file__).with_name("notes.md").read_text().rstrip(), ""]
    for file in sorted(folder.glob("*.json")):
        parts += _machine(file.stem, json.loads(file.read_text()))
    return "\n".join(parts) + "\n"


def _machine(name: str, figures: dict[str, Any]) -> list[str]:
    machine, versions = figures["machine"], figures["versions"]
    lines = [
        f"## {machine['processor']} ({machine['capability']}), {machine['cores']} cores, "
        f"{machine['device']}",
        "",
        ", ".join(f"{package} {version}" for package, version in versions.items())
        + f"; {figures['date']}. {figures['protocol']}",
        "",
        f"![Time of a step]({'performance'}/{name}.png)",
        "",
        "### Bars",
        "",
        "Ratios of medians.",
        "",
        "| what | to reach | measured |",
        "|---|---|---|",
        *(f"| {what} | {bar} | {value} |" for what, bar, value in _bars(figures)),
        "",
    ]
    for (workload, objective), timing in _steps(figures):
        lines += _step_table(workload, objective, timing, figures["floor"][workload])
    lines += _evidence_table(figures["evidence"])
    lines += _probe_tables(figures["probes"])
    return [*lines, f"Figures: [performance/{name}.json](performance/{name}.json)", ""]


def _steps(figures: dict[str, Any]) -> list[tuple[tuple[str, str], dict[str, Any]]]:
    return [((t["workload"], t["objective"]), t) for t in figures["steps"]]


def _step_table(
    workload: str, objective: str, timing: dict[str, Any], floor: dict[str, Any]
) -> list[str]:
    rows = []
    for name, entry in sorted(
        timing["contestants"].items(), key=lambda item: item[1]["seconds"]["median"]
    ):
        seconds, ratio = entry["seconds"], entry["ratio"]
        rows.append(
            f"| {NAMES[name]} | {1e3 * seconds['median']:.3f} | "
            f"{1e3 * seconds['lower']:.3f} to {1e3 * seconds['upper']:.3f} | "
            f"{ratio['median']:.2f} | {entry['compile_seconds']:.1f} |"
        )
    missing = [f"{NAMES[n]}: {why}." for n, why in timing["unavailable"].items()]
    return [
        f"### A step, ({workload}) {timing['networks']}, {OBJECTIVES[objective]}",
        "",
        "| contestant | ms, median | quartiles | ratio to ours | s to compile |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"Floor: {floor['floor_ms']:.3f} ms, of which {floor['products_ms']:.3f} ms are the matrix "
        f"products by the faster library for each shape ({floor['products_torch_ms']:.3f} ms by "
        f"torch.mm alone) and {floor['adam_ms']:.3f} ms the bytes of the Adam update of "
        f"{floor['parameters']:,} parameters; ours takes "
        f"{1e3 * timing['contestants'][OURS]['seconds']['median'] / floor['floor_ms']:.2f} times "
        "that.",
        "",
        *missing,
        *([""] if missing else []),
    ]


def _evidence_table(evidence: dict[str, Any]) -> list[str]:
    rows = [
        f"| {NAMES[name]} | {entry['rate']['median']:,.0f} | {entry['rate']['lower']:,.0f} to "
        f"{entry['rate']['upper']:,.0f} | {entry['ratio']['median']:.2f} |"
        for name, entry in sorted(
            evidence["contestants"].items(), key=lambda item: -item[1]["rate"]["median"]
        )
    ]
    return [
        f"### Log-evidence, ({evidence['workload']}), {evidence['num_particles']:,} particles",
        "",
        "| contestant | particle-data per second | quartiles | ours to it |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def _probe_tables(probes: dict[str, Any]) -> list[str]:
    few, many = probes["memory_500"], probes["memory_50000"]
    lines = [
        "### Memory, growth, compiling",
        "",
        f"`log_evidence` of 1,000 data raised the peak of memory by {few['growth'] / 2**20:,.0f} "
        f"MiB with 500 particles, and by {many['growth'] / 2**20:,.0f} MiB with 50,000.",
        "",
        "| data | particles | seconds | per million particle-data |",
        "|---|---|---|---|",
    ]
    for row in [*probes["linear"]["data"], *probes["linear"]["particles"]]:
        count = row["size"] * row["num_particles"]
        lines.append(
            f"| {row['size']:,} | {row['num_particles']:,} | {row['seconds']:.2f} | "
            f"{1e6 * row['seconds'] / count:.2f} |"
        )
    lines += [
        "",
        "| workload | s to compile, empty cache | warm cache | epoch of `fit` to its steps |",
        "|---|---|---|---|",
    ]
    for name in "abc":
        cells = (
            _found(probes, f"compiling_{name}_cold", "seconds", 1),
            _found(probes, f"compiling_{name}_warm", "seconds", 1),
            _found(probes, f"epochs_{name}", "ratio", 3),
        )
        lines.append(f"| ({name}) | {' | '.join(cells)} |")
    changes = {name: probes.get(f"changes_{name}", {}) for name in "abc"}
    if variants := next(filter(None, changes.values()), {}):
        lines += [
            "",
            "### What each part gives",
            "",
            "The compiled step with a part left out: how many times as long it takes (Trace_ELBO).",
            "",
            "| left out | (a) | (b) | (c) |",
            "|---|---|---|---|",
        ]
    for variant in variants:
        cells = (
            _r(found[variant]["ratio"]["median"]) if found else NOT_MEASURED
            for found in changes.values()
        )
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    lines += _parts_of_evidence(probes.get("evidence_parts"))
    lower = probes.get("precision")
    if lower is None:
        return [*lines, ""]
    return [
        *lines,
        "",
        f"With `autocast=torch.bfloat16` the mean log-evidence of the {lower['data']} "
        f"({lower['num_particles']:,} particles, the same noise) changed by "
        f"{lower['mean_difference']:+.5f} nats, that of a single datum by at most "
        f"{lower['largest_difference']:.4f}; the estimator's own standard error of the mean is "
        f"{lower['mean_standard_error']:.5f}.",
        "",
    ]


def _parts_of_evidence(parts: dict[str, Any] | None) -> list[str]:
    if parts is None:
        return []
    return [
        "",
        f"To weigh a block of {parts['particle_data']:,} particle-data of `log_evidence` takes "
        f"{parts['block_ms']:.1f} ms; its draws and their densities alone {parts['draw_ms']:.1f} "
        f"ms, its scores {parts['score_ms']:.1f} ms; the decoder's last product "
        f"{parts['last_product_ms']:.1f} ms by torch.mm, its other products "
        f"{parts['other_products_ms']:.1f} ms. Medians, in turns in one process.",
    ]


def _bars(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The bars that this library sets itself, with what was measured."""
    bars: list[tuple[str, str, str]] = []
    for (workload, objective), timing in _steps(figures):
        medians = {n: e["seconds"]["median"] for n, e in timing["contestants"].items()}
        ratios = {n: median / medians[OURS] for n, median in medians.items()}
        by_hand = [ratios[n] for n in WHOLE if n in ratios]
        where = f"({workload}), {OBJECTIVES[objective]}"
        if by_hand:
            bar = "1.30" if workload == "c" else "1.05"
            bars.append((f"step to by hand, compiled, {where}", f"<= {bar}", _r(1 / min(by_hand))))
        if "numpyro_svi" in ratios:
            bars.append((f"step to NumPyro, {where}", "<= 1.00", _r(1 / ratios["numpyro_svi"])))
        if "pyro_svi" in ratios:
            bar = "8" if workload == "c" else "1.9"
            bars.append((f"pyro.infer.SVI to step, {where}", f">= {bar}", _r(ratios["pyro_svi"])))
    contestants = figures["evidence"]["contestants"]
    ours = contestants[OURS]["rate"]["median"]
    for name in ("last_product_torch", "last_product_onednn"):
        if name in contestants:
            bars.append(
                (
                    f"log_evidence to {NAMES[name]}",
                    ">= 0.55, wanted 0.65",
                    _r(ours / contestants[name]["rate"]["median"]),
                )
            )
    for name in ("pyro_importance_at_once", "pyro_vectorized_importance"):
        found = contestants.get(name)
        value = _r(ours / found["rate"]["median"]) if found else NOT_MEASURED
        bars.append((f"log_evidence to {NAMES[name]}", ">= 4, wanted 5", value))
    probes = figures["probes"]
    growth = probes["memory_50000"]["growth"] / max(probes["memory_500"]["growth"], 1)
    bars.append(("memory, 50,000 particles to 500", "<= 1.1", _r(growth)))
    for name in "abc":
        ratio = _found(probes, f"epochs_{name}", "ratio", 3)
        bars.append((f"epoch of fit to its steps, ({name})", "<= 1.05", ratio))
        for state, cache, most in (("cold", "empty", 30), ("warm", "warm", 6)):
            seconds = _found(probes, f"compiling_{name}_{state}", "seconds", 1)
            bars.append((f"seconds to compile, {cache} cache, ({name})", f"<= {most}", seconds))
    return bars


def _found(probes: dict[str, Any], name: str, key: str, digits: int) -> str:
    return _r(probes[name][key], digits) if name in probes else NOT_MEASURED


def _r(ratio: float, digits: int = 2) -> str:
    return f"{ratio:.{digits}f}"


def picture(figures: dict[str, Any], path: Path) -> None:
    """Draw the time of a step, a panel for each workload and objective.

    Args:
        figures: Of one machine.
        path: Where to save the picture.
    """
    from matplotlib.figure import Figure

    steps = _steps(figures)
    columns = 3
    rows = -(-len(steps) // columns)
    figure = Figure(figsize=(13, 3.6 * rows), layout="constrained")
    for i, ((workload, objective), timing) in enumerate(steps):
        axes = figure.add_subplot(rows, columns, i + 1)
        entries = sorted(timing["contestants"].items(), key=lambda e: -e[1]["seconds"]["median"])
        for y, (name, entry) in enumerate(entries):
            seconds = entry["seconds"]
            color = "tab:orange" if name == OURS else "tab:gray"
            axes.barh(y, 1e3 * seconds["median"], color=color)
            axes.plot([1e3 * seconds["lower"], 1e3 * seconds["upper"]], [y, y], color="black")
            axes.text(1e3 * seconds["upper"], y, f" {1e3 * seconds['median']:.3g}", va="center")
        axes.axvline(figures["floor"][workload]["floor_ms"], color="tab:blue", linestyle=":")
        axes.set_yticks(range(len(entries)), [NAMES[n].strip("*") for n, _ in entries], fontsize=8)
        axes.set_xlim(0, 1.3 * max(1e3 * e["seconds"]["upper"] for _, e in entries))
        axes.set_xlabel("ms a step (dotted: floor)")
        axes.set_title(f"({workload}) {OBJECTIVES[objective]}", fontsize=10)
    figure.savefig(path, dpi=110)


def write(docs: Path = DOCS) -> None:
    """Write the page and the pictures."""
    folder = docs / "performance"
    (docs / "performance.md").write_text(page(folder))
    for file in folder.glob("*.json"):
        picture(json.loads(file.read_text()), file.with_suffix(".png"))


if __name__ == "__main__":
    write()
