"""Every swap on the page trains, is judged, and is saved and loaded, as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_vae as pv
from pyro_vae.context import bare
from pyro_vae.program.recipe import build, describe

PAGE = (Path(__file__).parents[1] / "docs" / "swapping.md").read_text()
BEGINNING, *SWAPS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


# What a pair is called with beside x, by the words that say so.
EXTRA = {
    "p(z|y)": torch.eye(10)[torch.arange(40) % 10],
    "model(x, mask)": torch.arange(40 * 64).view(40, 64) % 3 > 0,
    "guide(x, index)": torch.arange(40)[:, None],
}


def first_line(swap: str) -> str:
    return swap.splitlines()[0][:60]


@pytest.mark.parametrize("swap", SWAPS, ids=first_line)
def test_a_swap_is_at_most_three_lines_and_the_rest_stays(swap):
    assert len(re.findall(r"^\S", swap.replace("\n)", ""), re.MULTILINE)) <= 3
    names: dict[str, Any] = {}
    exec(compile(BEGINNING, "swapping.md", "exec"), names)
    exec(compile(swap, "swapping.md", "exec"), names)
    model = pv.Model(names["prior"], names["likelihood"])
    guide = names["guide"] if "guide, loss =" in swap else pv.Guide(names["encoder"])
    x = names["data"].train[:40]
    args = (x, *(extra for said, extra in EXTRA.items() if said in swap))
    svi = pv.SVI(model, guide, lambda params: torch.optim.Adam(params, lr=1e-3), names.get("loss"))
    # A parameter without a gradient is warned of, and warnings are errors.
    assert all(svi.step(*args).isfinite() for _ in range(3))
    estimate = pv.log_evidence(model, guide, *args, num_particles=10, compile=False)
    assert estimate.value.isfinite().all()
    guide: Any = bare(guide)  # Pyro's handlers stand in no recipe
    again, other = build(describe(model, guide))
    again.load_state_dict(model.state_dict())
    other.load_state_dict(guide.state_dict())
    repeated = pv.log_evidence(again, other, *args, num_particles=10, compile=False)
    assert torch.equal(repeated.value, estimate.value)
