"""The committed results page is what the committed figures say."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
EVIDENCE = ROOT / "docs" / "evidence"


def test_no_figure_is_typed_by_hand():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "experiments" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert (ROOT / "docs" / "results.md").read_text() == tables.page(RESULTS)
    written = tables.evidence_page(EVIDENCE)
    assert (ROOT / "docs" / "evidence-results.md").read_text() == written


def test_every_result_states_its_protocol():
    files = list(RESULTS.glob("*.json"))
    assert {"static_binarized_mnist", "digits"} <= {file.stem for file in files}
    keys = {"log_evidence", "mean_standard_error", "sampling_error", "num_particles", "num_test"}
    keys |= {"train_seconds", "epochs", "seed", "protocol", "machine", "versions"}
    of_rows = {"name", "elbo", "log_evidence", "difference", "difference_error", "train_seconds"}
    for file in files:
        figures = json.loads(file.read_text())
        if "rows" in figures:
            assert {"title", "protocol", "machine", "baseline"} <= set(figures), file
            assert all(of_rows <= set(row) for row in figures["rows"]), file
            assert file.with_suffix(".png").is_file(), file
        else:
            assert keys <= set(figures), file
