"""The committed results page is what the committed figures say."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


def test_no_figure_is_typed_by_hand():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "experiments" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert (ROOT / "docs" / "results.md").read_text() == tables.page(RESULTS)


def test_every_result_states_its_protocol():
    files = list(RESULTS.glob("*.json"))
    assert {"static_binarized_mnist", "digits"} <= {file.stem for file in files}
    keys = {"log_evidence", "mean_standard_error", "sampling_error", "num_particles", "num_test"}
    keys |= {"train_seconds", "epochs", "seed", "protocol", "machine", "versions"}
    for file in files:
        assert keys <= set(json.loads(file.read_text())), file
