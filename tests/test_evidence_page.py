"""The code on the page about evidence runs as it stands there, with less to do."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import library_pair

import pyro_vae as pv

PAGE = (Path(__file__).parents[1] / "docs" / "evidence.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
LESS: dict[str, dict[str, Any]] = {
    "ais": {"num_chains": 2, "temperatures": 4, "leapfrog_steps": 1},
    "bidirectional": {"num_chains": 2, "temperatures": 4, "leapfrog_steps": 1},
    "evaluate": {"num_particles": 30, "temperatures": 4},
    "gaps": {"steps": 5, "num_particles": 20},
}


def test_the_page_has_code():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:60])
def test_a_block_runs(block, capsys):
    model, guide, (x,) = library_pair()
    names = {name: getattr(pv, name) for name in pv.__all__}
    names |= {name: partial(names[name], **less) for name, less in LESS.items()}
    exec(
        compile(block, "evidence.md", "exec"),
        {"pv": SimpleNamespace(**names), "model": model, "guide": guide, "x": x},
    )
    printed = capsys.readouterr().out
    assert ("nats" in printed) == ("print(" in block)
