"""The committed results page is what the committed figures say."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
EVIDENCE = ROOT / "docs" / "evidence"
NOTES = ROOT / "experiments" / "notes.md"
TABLES = runpy.run_path(str(ROOT / "experiments" / "tables.py"))


def test_no_figure_is_typed_by_hand():
    page = TABLES["page"]
    assert (ROOT / "docs" / "results.md").read_text() == page(TABLES["notes"](NOTES), RESULTS)
    written = page({"": TABLES["EVIDENCE"]}, EVIDENCE)
    assert (ROOT / "docs" / "evidence-results.md").read_text() == written


def test_every_note_is_of_a_section_and_has_no_figure_of_it():
    """What is measured stands in the tables; a note may name a figure of a paper, or an option."""
    head, overview, *notes = TABLES["notes"](NOTES)
    assert (head, overview) == ("", "overview")
    stems = [file.stem for file in RESULTS.glob("*.json")]
    for name in notes:
        assert any(stem.startswith(name) for stem in stems), name
        assert not re.search(r"\d[.,]\d\d", TABLES["notes"](NOTES)[name].replace("0.9999", "")), (
            name
        )


def test_a_note_stands_above_the_table_that_its_name_fits_best(tmp_path):
    folder, path = tmp_path / "results", tmp_path / "notes.md"
    folder.mkdir()
    for stem in ("d_mnist", "d_mnist_decay", "e"):
        figures = {"title": stem, "protocol": {}, "rows": [{"name": "one", "a": 1}]}
        (folder / f"{stem}.json").write_text(json.dumps(figures))
    path.write_text("# Head\n\nAll.\n\n## d\n\nOf d.\n\n## d_mnist_decay\n\nOf decay.\n")
    told = TABLES["notes"](path)
    assert told == {"": "# Head\n\nAll.\n", "d": "Of d.", "d_mnist_decay": "Of decay."}
    page = TABLES["page"](told, folder)
    assert page.startswith("# Head\n\nAll.\n\n## d_mnist\n\nOf d.\n\n|  | a |\n")
    assert "## d_mnist_decay\n\nOf decay.\n\n|" in page
    assert "## e\n\n|  | a |" in page


def test_every_result_states_its_protocol():
    files = list(RESULTS.glob("*.json"))
    assert {"binarized_mnist", "digits"} <= {file.stem for file in files}
    keys = {"log_evidence", "mean_standard_error", "sampling_error", "num_particles", "num_test"}
    keys |= {"train_seconds", "epochs", "seed", "protocol", "machine", "versions"}
    of_rows = {"name", "elbo", "log_evidence", "difference", "difference_error", "train_seconds"}
    for file in files:
        figures = json.loads(file.read_text())
        if "rows" not in figures:
            assert keys <= set(figures), file
            continue
        assert {"title", "protocol", "machine"} <= set(figures), file
        assert figures["protocol"], file
        assert file.with_suffix(".png").is_file(), file
        if "baseline" in figures:
            assert all(of_rows <= set(row) for row in figures["rows"]), file
        else:
            assert figures["versions"], file
            assert all("name" in row for row in figures["rows"]), file


def free(rows: list[dict[str, Any]], **facts: Any) -> tuple[list[str], dict[str, str]]:
    """The table of some rows, and what stands below it."""
    machine = {"processor": "P", "cores": 2, "device": "cpu"}
    head = {"title": "T", "protocol": {"data": "digits", "epochs": 2000, "seed": 1234}}
    return TABLES["free"]({**head, "machine": machine, "rows": rows, **facts})


def test_columns_are_the_figures_of_all_rows_in_their_order():
    table, facts = free(
        [
            {"name": "one", "units": 1, "log_evidence": -86.758, "curve": [1, 2], "gone": None},
            {"name": "two", "log_evidence": -1200.5, "ess_median": 0.01234, "units": 2},
        ]
    )
    assert table == [
        "|  | units | log p(x) | ess median |",
        "|---|---|---|---|",
        "| one | 1 | -86.76 |  |",
        "| two | 2 | -1,200.50 | 0.0123 |",
    ]
    assert facts == {
        "protocol: data": "digits",
        "protocol: epochs": "2,000",
        "protocol: seed": "1234",
        "machine": "P, 2 cores, cpu",
    }


def test_what_the_name_of_a_row_says_has_no_column():
    row = {"name": "1 layer, VAE, k = 5", "layers": 1, "objective": "VAE", "k": 5, "seed": 0}
    table, _ = free([{**row, "finished": True, "log_evidence": -86.758}])
    assert table == ["|  | log p(x) |", "|---|---|", "| 1 layer, VAE, k = 5 | -86.76 |"]


def test_all_that_has_a_published_figure_stands_in_one_table_first():
    ours = {"log_evidence": -90.0, "mean_standard_error": 0.01, "epochs": 10}
    weighted = {"log_evidence": -80.0, "weighted": -100.0, "bits_per_dim": 4.0}
    weighted["sampling_error"] = 2.0
    rows = [
        {"name": "one", **ours, "as_reported": -88.5, "of_epochs": 2000},
        {"name": "chain", **ours, "as_reported": -88.5, "of_epochs": 20, "before": {"epochs": 300}},
        {"name": "two", **ours},  # nothing to compare it with
        {"name": "none", "log_evidence": None, "as_reported": -88.5, "diverged": True},
        {"name": "of levels", **ours, **weighted, "as_reported": 5.25, "weighted_error": 0.5},
        {"name": "IAF", **ours, "untrusted": 0.965, "sampling_error": 0.225},
    ]
    swaps = {"title": "_ (D)", "rows": rows, "as_reported": {"IAF (x)": -95.33, "IAF 2": -1.0}}
    alone = {"title": "T", **ours, "as_reported": {"paper": -89.0, "code": -91.0}}
    spoken = {"title": "U", "rows": [{"name": "one"}], "as_reported": {"one": "0 to 1 on the axis"}}
    assert TABLES["overview"]([spoken]) == []
    lines = TABLES["overview"]([swaps, spoken, alone])
    its = "| [_ (D)](#_-d) |"
    assert lines[2:] == [
        f"{its} one | -88.50 | **-90.00** | 0.0100 |  |  | -1.50 | 10 of 2,000 |",
        f"{its} chain | -88.50 | **-90.00** | 0.0100 |  |  | -1.50 | 10 of 20 after 300 |",
        f"{its} of levels | 5.25 bits | **5.0000 bits** | 0.0250 | 0.100 |  | +0.25 | 10 |",
        f"{its} IAF | -95.33 | **-90.00** | 0.0100 | 0.225 | 96% | +5.33 | 10 |",
        "| [T](#t) |  | -89.00 | **-90.00** | 0.0100 |  |  | -1.00 | 10 |",
    ]


def test_facts_by_names_of_rows_are_columns():
    rows = [{"name": "one", "epochs": 5}, {"name": "two", "epochs": 5}]
    above = {"two": {"train": {"value": 1.5, "standard_error": 0.25}}}
    table, facts = free(rows, above=above, curves={"one": {"1": [0.5]}}, best={"three": 7})
    assert table[0] == "|  | epochs | above train |"
    assert table[2:] == ["| one | 5 |  |", "| two | 5 | 1.50 +- 0.250 |"]
    assert facts["best three"] == "7"
    assert not any("above" in key or "curves" in key for key in facts)


def test_bits_by_weighting_stand_beside_those_of_annealing():
    row = {"name": "one", "log_evidence": -80.0, "weighted": -100.0, "bits_per_dim": 4.0}
    table, _ = free([row, {"name": "two", "log_evidence": -80.0, "bits_per_dim": 4.0}])
    assert table[0].endswith(" | bits per dimension, weighted |")
    assert table[2].endswith(" | 5.0000 |")
    assert table[3].endswith(" |  |")


def test_experiments_of_one_title_are_told_apart_by_their_files(tmp_path):
    for stem in ("d_mnist", "d_mnist_100_epochs", "e"):
        figures = {"title": "D: mnist", "protocol": {"data": "mnist"}, "rows": []}
        (tmp_path / f"{stem}.json").write_text(json.dumps(figures))
    page = TABLES["page"]({"": "# Results"}, tmp_path)
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings == ["## D: mnist", "## D: mnist, 100 epochs", "## D: mnist, e"]


def test_what_was_published_stands_beside_ours():
    rows = [{"name": "k = 1", "a": 1}, {"name": "k = 5", "a": 2, "as_reported": -87.63}]
    table, _ = free(rows, as_reported={"k = 1": {"paper": -88.71, "again": -88.6}, "NVAE": -78.01})
    assert table[0] == "|  | a | as reported |"
    assert table[2:] == [
        "| k = 1 | 1 | -88.71 (paper), -88.60 (again) |",
        "| k = 5 | 2 | -87.63 |",
        "| NVAE |  | -78.01 |",
    ]


def test_epochs_figures_with_errors_and_parts_are_cells():
    row = {"name": "one", "epochs": 25, "of_epochs": 3280, "bits_per_dim": 4.5}
    row |= {"gain": {"value": 1.5, "standard_error": 0.0123, "sampling_error": 2.0}}
    row |= {"full": {"bound": -3.0, "of": True}}
    table, facts = free([row])
    assert "finished" not in facts
    assert table[0] == "|  | epochs | bits per dimension | gain | full bound | full of |"
    assert table[2] == "| one | 25 of 3,280 | 4.5000 | 1.50 +- 0.0123 +- 2.00 | -3.00 | yes |"
    table, facts = free([{**row, "finished": True}], finished=False)
    assert table[2].startswith("| one | 25 of at most 3,280 |")  # it stopped by itself
    assert facts["finished"].startswith("no: the budget ended")


def test_facts_and_other_machines_stand_below():
    other = {"processor": "Q", "cores": 9, "device": "cuda"}
    rows = [{"name": "one", "train_seconds": 1234.5, "machine": other}]
    table, facts = free(rows, remarks="a | b", best={"k": 5}, versions={"torch": "2.15"})
    assert table == ["|  | train seconds |", "|---|---|", "| one | 1,234 |"]
    assert facts["remarks"] == "a \\| b"
    assert facts["best k"] == "5"
    assert facts["versions"] == "torch 2.15"
    assert facts["machine of one"] == "Q, 9 cores, cuda"
    rows = [{"name": name, "value": 1, "machine": other} for name in ("one", "two", "three")]
    _, facts = free(rows)
    assert facts["machine of each row"] == "Q, 9 cores, cuda"
    assert "machine" not in facts  # of the file, which made none of them
    del rows[0]["machine"]
    _, facts = free(rows)
    assert facts["machine of two; three"] == "Q, 9 cores, cuda"


@pytest.mark.parametrize(
    ("figures", "why"),
    [
        (
            {},
            "1.50 nats worse than reported; the last of 100 epochs was the best, by the bound of",
        ),
        ({"best_epoch": 60}, "epoch 60 of 100 was best, by the bound of the validation data, and "),
        ({"best_epoch": 60}, "what came after overfitted"),
        ({"of_epochs": 300}, "stopped by its budget after 100 of 300 epochs"),
        ({"of_epochs": 300, "finished": True, "best_epoch": 50}, "epoch 50 of 100 was best"),
        ({"weighted": -91.0}, "2.50 nats worse"),
        ({"bits_per_dim": 4.75, "as_reported": 4.5}, "0.25 bits per dimension worse than reported"),
        (
            {"bits_per_dim": 4.5, "weighted": -95.0, "as_reported": 4.5},
            "by weighting 0.25 bits per dimension worse than reported",
        ),
        ({"as_reported": {"paper": -88.5, "code": -87.0}}, "3.00 nats worse"),
        ({"elbo": -94.0, "train_elbo": -86.5}, "; training data stand 7.5 nats above test data"),
        ({"as_reported": -90.5}, None),
        ({"bits_per_dim": 4.25, "as_reported": 4.5}, None),
        ({"as_reported": "-150 to -100 on the axis"}, None),
    ],
)
def test_a_figure_worse_than_the_published_one_says_why(figures, why):
    row = {"name": "one", "log_evidence": -90.0, "epochs": 100, "as_reported": -88.5}
    _, facts = free([{**row, **figures}])
    told = facts.get("shortfall of one")
    assert told is None if why is None else why in told


def test_two_estimators_that_are_apart_are_named():
    row = {"name": "one", "train": {"value": -150.0}, "train annealed": {"value": -142.0}}
    row |= {"test": {"value": -150.0}, "test annealed": {"value": -149.5}}
    _, facts = free([row])
    assert facts["train figure of one"].startswith("annealing finds 8.0 nats more")
    assert "test figure of one" not in facts


@pytest.mark.parametrize("drawn", [True, False])
def test_a_page_has_a_picture_where_there_is_one(drawn, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    figures = {"title": "T", "protocol": {"data": "d"}, "rows": [{"name": "one", "a": 1}]}
    (folder / "it.json").write_text(json.dumps(figures))
    (folder / "digits_again.json").write_text(json.dumps({**figures, "title": "U"}))
    if drawn:
        (folder / "it.png").touch()
    page = TABLES["page"]({"": "# Head\n"}, folder)
    assert page.startswith("# Head\n\n## U\n\n|  | a |\n|---|---|\n| one | 1 |\n\n")
    assert "again.json), by [experiments/digits.py](../experiments/digits.py)\n" in page
    assert ("![T](results/it.png)" in page) == drawn
    assert page.endswith("| protocol: data | d |\n\nFigures: [results/it.json](results/it.json)\n")


def test_swaps_are_compared_to_the_first():
    row = {"elbo": -92.0, "mean_standard_error": 0.0125, "bias": -0.25, "train_seconds": 1234.5}
    row |= {"bits_per_dim": None, "difference": None, "epochs": 100}
    paired = {"difference": 1.5, "difference_error": 0.25, "share": 0.75, "untrusted": 0.5}
    first = {"name": "one", "log_evidence": -90.0, **row}
    second = {**row, "name": "two", "log_evidence": -88.5, **paired, "of_epochs": 300}
    figures = {"title": "T", "protocol": {"data": "d"}, "rows": [first, second]}
    table, facts = TABLES["comparison"]({**figures, "as_reported": {"two (x)": -89.0}})
    assert table[0].split(" | ")[5:8] == ["untrusted", "to one", "+- paired"]
    assert table[2:] == [
        "| one | -92.00 | -90.00 | 0.013 | -0.250 |  |  |  |  | 100 | 1,234 |",
        "| two | -92.00 | -88.50 | 0.013 | -0.250 | 50% | **+1.50** | 0.250 | 75% | 100 of 300 | "
        "1,234 |",
    ]
    assert facts == {"protocol: data": "d", "as reported: two (x)": "-89.00"}
