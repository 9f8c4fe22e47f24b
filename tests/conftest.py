"""Fixtures of more than one file."""

from typing import Any

import pytest
import torch

from pyro_vae.graph.capture import Captured


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """Graphs are interpreted instead of compiled; gives the graphs so far."""
    graphs: list[Captured] = []

    def interpret(captured: Captured, static: Any, data: Any) -> Any:
        graphs.append(captured)
        module, reached = captured.module, captured.reached
        return torch.no_grad()(lambda arguments: module(*static, *arguments, *reached))

    monkeypatch.setattr("pyro_vae.inference.step_graph.lower", interpret)
    return graphs
