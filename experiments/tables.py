"""Write docs/results.md and docs/evidence-results.md from JSON: no figure is typed by hand.

The figures lie in docs/results and docs/evidence, as the experiments left them.

    python experiments/tables.py
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEAD = """# Results

Measured figures with their protocols. This page is written by `experiments/tables.py` from the
files in `docs/results/`, which the experiments leave as `results.json` in their run directories.

"Estimator" is the Monte Carlo standard error of the mean over these test data, "test set" the
standard error of the mean as an estimate for new data. Figures of others are as they reported them.
Where swaps are compared, "paired" is the standard error of the mean difference, data and estimators
together; "bias" is about how far log p(x) is too low.
"""


EVIDENCE = """# What the estimators of evidence say

Measured figures for [evidence.md](evidence.md), with seed, budget and time. This page is written by
`experiments/tables.py` from the files in `docs/evidence/`.
"""


def section(name: str, figures: dict[str, Any]) -> str:
    """One experiment: its figure beside those of others, then its protocol."""
    rows = [
        f"| **pyro_vae** | **{figures['log_evidence']:.2f}** | "
        f"{figures['mean_standard_error']:.4f} | {figures['sampling_error']:.2f} |"
    ]
    rows += [
        f"| {who} | {value:.2f} | | |" for who, value in figures.get("as_reported", {}).items()
    ]
    machine, versions = figures["machine"], figures["versions"]
    facts = {
        "ELBO of the test data": f"{figures['elbo']:.2f} nats",
        "best validation ELBO": f"{figures['best_valid_elbo']:.2f} nats, epoch "
        f"{figures['best_epoch']} of {figures['epochs']}",
        "effective sample size": f"median {figures['ess_median']:.1f}, lowest "
        f"{figures['ess_min']:.2f}, of {figures['num_particles']:,} particles",
        "training": f"{figures['train_seconds']:,.0f} s on {figures['num_train']:,} data",
        "evaluation": f"{figures['seconds']:,.0f} s on {figures['num_test']:,} data",
        "seed": str(figures["seed"]),
        "machine": f"{machine['processor']}, {machine['cores']} cores, {machine['device']}",
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
        **{f"protocol: {key}": text for key, text in figures["protocol"].items()},
    }
    if "bias" in figures:
        facts["bias of the estimator"] = f"about {figures['bias']:.3f} nats (to second order)"
    if "bits_per_dim" in figures:
        facts["bits per dimension"] = f"{figures['bits_per_dim']:.4f}"
    return "\n".join(
        [
            f"## {figures['title']}",
            "",
            "| | log p(x), nats per datum | +- estimator | +- test set |",
            "|---|---|---|---|",
            *rows,
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {text} |" for key, text in facts.items()),
            "",
            f"Figures: [results/{name}.json](results/{name}.json)",
            "",
        ]
    )


def comparison(name: str, figures: dict[str, Any]) -> str:
    """Swaps that were trained on the same data: paired differences to the first."""
    rows = figures["rows"]
    with_bits = any(row["bits_per_dim"] is not None for row in rows)
    lines = []
    for row in rows:
        cells = [row["name"], f"{row['elbo']:.2f}", f"{row['log_evidence']:.2f}"]
        cells += [f"{row['mean_standard_error']:.3f}", f"{row['bias']:.3f}"]
        paired = ["", "", ""]
        if row["difference"] is not None:
            paired = [f"**{row['difference']:+.2f}**", f"{row['difference_error']:.3f}"]
            paired.append(f"{row['share']:.0%}")
        bits = [f"{row['bits_per_dim']:.4f}"] if with_bits else []
        lines.append([*cells, *paired, *bits, f"{row['epochs']}"])
    head = ["", "ELBO", "log p(x)", "+- estimator", "bias", f"to {rows[0]['name']}", "+- paired"]
    head += ["better on", *(["bits per dimension"] if with_bits else []), "epochs"]
    facts = {f"protocol: {key}": text for key, text in figures["protocol"].items()}
    if "machine" in figures:
        machine = figures["machine"]
        facts["machine"] = f"{machine['processor']}, {machine['cores']} cores, {machine['device']}"
    if "annealed" in figures:
        more = figures["annealed"]
        facts[f"{more['name']} by annealing, {more['num_data']} test data"] = (
            f"**{more['log_evidence']:.2f}** +- {more['mean_standard_error']:.2f} (estimator) +- "
            f"{more['sampling_error']:.2f} (test set) nats, **{more['bits_per_dim']:.4f}** bits "
            f"per dimension: {more['gain']:+.2f} +- {more['gain_error']:.2f} nats to importance "
            f"weighting; {more['num_chains']} chains, {more['temperatures']} temperatures, "
            f"{more['leapfrog_steps']} leapfrog steps, median ESS {more['ess_median']:.1f}, "
            f"{more['seconds']:,.0f} s"
        )
    if "amortization" in figures:
        cost = figures["amortization"]
        facts[f"gap of {cost['name']}, {cost['num_data']} test data"] = (
            f"{cost['gap']:.2f} nats, of which {cost['amortization']:.2f} +- "
            f"{cost['amortization_error']:.2f} amortization: what a diagonal normal of each "
            "datum's own gains"
        )
    return "\n".join(
        [
            f"## {figures['title']}",
            "",
            "| " + " | ".join(head) + " |",
            "|---" * len(head) + "|",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
            f"![{figures['title']}](results/{name}.png)",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {text} |" for key, text in facts.items()),
            "",
            f"Figures: [results/{name}.json](results/{name}.json)",
            "",
        ]
    )


def estimators(name: str, figures: dict[str, Any]) -> str:
    """What several estimators say of one pair."""
    known = {"what", "budget", "seconds", "value", "error"}
    lines = []
    for line in figures["lines"]:
        more = ", ".join(
            f"{k.replace('_', ' ')} {v:.3g}" for k, v in line.items() if k not in known
        )
        seconds = f"{line['seconds']:,.0f}" if line["seconds"] else ""
        lines.append(
            f"| {line['what'].strip()} | **{line['value']:.3f}** | {line['error']:.3f} | "
            f"{line['budget']} | {seconds} | {more} |"
        )
    head = "| | nats per datum | +- estimator | budget | seconds | besides |"
    return _with_protocol(name, figures, [head, "|---" * 6 + "|", *lines])


def foreign(name: str, figures: dict[str, Any]) -> str:
    """How well scores tell foreign images from a model's own."""
    own, *others = figures["sets"]
    scores = list(others[0]["auroc"])
    lines = [
        f"| {own['name']} | {own['log_evidence']:.1f} | {own['code_bits']:.0f} | "
        f"{own['ess_median']:.1f} |" + " |" * len(scores)
    ]
    for found in others:
        cells = [
            f"{found['auroc'][score]['value']:.3f} +- {found['auroc'][score]['standard_error']:.3f}"
            for score in scores
        ]
        lines.append(
            f"| {found['name']} | {found['log_evidence']:.1f} | {found['code_bits']:.0f} | "
            f"{found['ess_median']:.1f} | " + " | ".join(cells) + " |"
        )
    head = "| images | log p(x) | bits of a code | median ESS | " + " | ".join(scores) + " |"
    figures["protocol"] |= {
        "scores": "area under the ROC curve, 0.5 is chance",
        "seed": str(figures["seed"]),
        "time": f"{figures['seconds']:,.0f} s",
    }
    return _with_protocol(name, figures, [head, "|---" * (4 + len(scores)) + "|", *lines])


def _with_protocol(name: str, figures: dict[str, Any], table: list[str]) -> str:
    facts = {f"protocol: {key}": text for key, text in figures["protocol"].items()}
    if "machine" in figures:
        machine = figures["machine"]
        facts["machine"] = f"{machine['processor']}, {machine['cores']} cores, {machine['device']}"
    return "\n".join(
        [
            f"## {figures['title']}",
            "",
            *table,
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {text} |" for key, text in facts.items()),
            "",
            f"Figures: [evidence/{name}.json](evidence/{name}.json)",
            "",
        ]
    )


def page(folder: Path) -> str:
    """The page of results from the figures in a folder."""
    return _page(HEAD, folder, lambda figures: comparison if "rows" in figures else section)


def evidence_page(folder: Path) -> str:
    """The page of the estimators from the figures in a folder."""
    return _page(EVIDENCE, folder, lambda figures: estimators if "lines" in figures else foreign)


def _page(head: str, folder: Path, writer_of: Callable[[dict[str, Any]], Any]) -> str:
    sections = [head]
    for file in sorted(folder.glob("*.json")):
        figures = json.loads(file.read_text())
        sections.append(writer_of(figures)(file.stem, figures))
    return "\n".join(sections)


def main() -> None:
    """Write the pages."""
    docs = Path(__file__).parents[1] / "docs"
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for name, text in (
        ("results.md", page(docs / "results")),
        ("evidence-results.md", evidence_page(docs / "evidence")),
    ):
        (docs / name).write_text(text)
        print(docs / name)


if __name__ == "__main__":
    main()
