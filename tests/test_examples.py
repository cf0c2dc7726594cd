"""The code in the README and in the documentation runs as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import Residual
from fake_device import FakeDevice
from torch import nn

import profilers
from dsa_hw.cost.choices import width_choices
from dsa_hw.cost.latency.profiling import profile_network
from dsa_hw.network.coupling import find_coupling
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.runs.budgets import BUDGETS, BudgetSetting
from profilers.collect import nominal_reference_ms
from profilers.table import LatencyTable

ROOT = Path(__file__).parent.parent
TARGET_MS = 0.045
"""About half of what the network takes on the fake device; the pages say 4 ms."""


def code_of(page: str) -> list[str]:
    """The Python of a page, block by block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^( *)```python[^\n]*\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in blocks]


@pytest.fixture(scope="module")
def graph() -> DeployedGraph:
    model, x = Residual(), torch.zeros(1, 3, 16, 16)
    return DeployedGraph(export_onnx(model, x), find_coupling(model, x))


@pytest.fixture(scope="module")
def table(graph: DeployedGraph) -> LatencyTable:
    device = FakeDevice()
    header = dict(device.provenance()) | {"reference_ms": nominal_reference_ms(device)}
    table = LatencyTable(header)
    profile_network(graph, device, table, networks=8, rounds=2)
    return table


@pytest.mark.parametrize("page", ["README.md", "docs/guide/own-loop.md"])
def test_one_s_own_loop(page: str, table: LatencyTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatencyTable, "load", lambda path: table)
    monkeypatch.setattr(profilers, "open_backend", lambda device: FakeDevice(), raising=False)
    torch.manual_seed(0)
    model = Residual()
    names = {
        "model": model,
        "example_inputs": torch.zeros(1, 3, 16, 16),
        "loader": [(torch.randn(8, 3, 16, 16), torch.randint(10, (8,))) for _ in range(6)],
        "xv": torch.randn(8, 3, 16, 16),
        "yv": torch.randint(10, (8,)),
        "epochs": 2,
        "criterion": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
    }
    ran = [code for code in code_of(page) if "pruner" in code and "retarget" not in code]
    assert ran
    for code in ran:
        exec(re.sub(r"(?<=target_ms=)[\d.]+", str(TARGET_MS), code), names)
    small = cast(nn.Module, names["small"])
    assert small(torch.zeros(1, 3, 16, 16)).shape == (1, 10)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_the_budget_of_the_recipe(
    graph: DeployedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = (code for code in code_of("docs/extending.md") if "class Channels" in code)
    (tmp_path / "my_budget.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_budget", raising=False)
    choices = width_choices(graph, {layer.spec.kind: 8 for layer in graph.layers})
    factory = BUDGETS.find("my_budget:channels")
    setting = BudgetSetting("channels", 0.5, cast(Any, None), choices)
    budget, offered = factory(setting).bind(graph)
    dense = torch.tensor(graph.dense_widths, dtype=torch.float32)
    assert offered == choices
    assert budget.target == pytest.approx(0.5 * float(budget.cost(dense)))
