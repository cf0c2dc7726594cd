"""Budgets by name, and what they can do beside having a cost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import Residual
from torch import Tensor
from whole_way import PLAN, result_of

from dsa_hw import prune
from dsa_hw.cost.budget import Budget, HasTerms, MeasuredBudget
from dsa_hw.cost.choices import WidthChoices, merged_choices, width_choices
from dsa_hw.cost.counted import flops_budget
from dsa_hw.cost.latency.budget import ModelledLatency
from dsa_hw.cost.memory import PeakMemory
from dsa_hw.errors import UserError
from dsa_hw.network.coupling import find_coupling
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.pipeline.device import budget_requests
from dsa_hw.runs.budgets import BUDGETS, BudgetSetting
from dsa_hw.runs.config import PruneConfig

pytestmark = pytest.mark.measures


@dataclass(frozen=True)
class Channels:
    """A toy budget: all channels of all groups together may be so many."""

    target: float
    name: str = "channels"
    unit: str = "channels"

    def cost(self, widths: Tensor) -> Tensor:
        return widths.sum(-1)

    charged = cost

    def to(self, device: torch.device | str) -> Channels:
        return self


@dataclass(frozen=True)
class ChannelsRequest:
    """A part of the dense network's channels."""

    keep_ratio: float
    choices: WidthChoices

    def bind(self, graph: DeployedGraph) -> tuple[Budget, WidthChoices]:
        return Channels(self.keep_ratio * sum(graph.dense_widths)), self.choices


def channels_budget(setting: BudgetSetting) -> ChannelsRequest:
    return ChannelsRequest(setting.value, setting.choices)


@pytest.fixture
def toy() -> Iterator[None]:
    BUDGETS.register("channels", channels_budget)
    yield
    BUDGETS.remove("channels")


def graph_of_residual() -> DeployedGraph:
    model, x = Residual(), torch.zeros(1, 3, 16, 16)
    return DeployedGraph(export_onnx(model, x), find_coupling(model, x))


@pytest.mark.usefixtures("toy")
def test_a_budget_from_outside_goes_the_whole_way(workdir: Path) -> None:
    """Beside latency, at a target so low that it decides: 40% of 224 channels."""
    command = [*PLAN, "--budget", "latency", "channels=0.4", "--out", "runs/toy"]
    assert prune.main(command) == 0
    result = result_of("runs/toy")
    groups = {g["name"]: g for g in result["groups"]}
    kept, dense = (sum(g[key] for g in groups.values()) for key in ("width", "dense_width"))
    assert 0 < kept <= 0.4 * dense
    # what is left of both targets, and the step that this is too little for
    assert set(result["headroom"]) == {"latency", "channels"}
    assert result["headroom"]["channels"] == pytest.approx(1 - kept / (0.4 * dense), abs=1e-6)
    step = result["next_step"]
    assert step["width"] == groups[step["group"]]["width"] < step["next_width"]
    more = (step["next_width"] - step["width"]) / (0.4 * dense)
    assert step["extra"]["channels"] == pytest.approx(more, abs=1e-6)
    assert any(step["extra"][name] > left for name, left in result["headroom"].items())


def test_a_budget_can_be_named_by_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_budget.py").write_text("def half(setting): return ('half', setting.value)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = PruneConfig(budget=("some_budget:half=0.25", "flops=0.5"))
    nothing = cast(Any, None)
    requests = budget_requests(config, None, nothing, WidthChoices(((8, 16),), (8,)))
    assert requests[0] == ("half", 0.25)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"budget": ("flop=0.5",)}, "did you mean flops"),
        ({"budget": ("channels",)}, "channels=NUMBER"),
        ({"budget": ("flops",)}, "--flops-ratio"),
        ({"budget": ("flops=half",)}, "NAME=NUMBER"),
        ({"budget": ("flops=1.5",)}, "between 0 and 1"),
        ({"budget": ("channels=nan",)}, "positive"),
        ({"budget": ("flops=0.5",), "flops_ratio": 0.6}, "one number"),
        ({"budget": ("params=0.5",), "flops_ratio": 0.6}, "flops among the budgets"),
        ({"budget": ("latency=5",), "target_ms": 5.0}, "--target-ms"),
    ],
)
def test_a_wrong_budget_is_refused_with_what_was_expected(given: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        PruneConfig(**given)


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'flops' already"):
        BUDGETS.register("flops", channels_budget)


@pytest.mark.parametrize("name", ["flops", "params", "memory"])
def test_a_counted_budget_leaves_the_devices_steps_alone(name: str) -> None:
    """One kind of layer has steps of 16 and the others of 8: no group's widths become coarser
    because something else is limited too."""
    graph = graph_of_residual()
    steps = {layer.spec.kind: 8 for layer in graph.layers} | {"gemm": 16, "depthwise": 16}
    choices = width_choices(graph, steps)
    assert len({len(widths) for widths in choices.widths}) > 1
    config = PruneConfig(budget=(f"{name}=0.9",))
    (request,) = budget_requests(config, None, cast(Any, None), choices)
    budget, offered = request.bind(graph)
    assert budget.name == name
    assert merged_choices([choices, offered]) == choices


def test_the_configuration_knows_budgets_without_torch() -> None:
    """``--help`` must not pay for it."""
    code = "import sys, dsa_hw.runs.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Linear:
    """A latency model: a millisecond a channel."""

    def predict_ms(self, widths: Tensor) -> Tensor:
        return widths.sum(-1)

    staircase_ms = predict_ms


def test_what_a_budget_can_do_is_seen_by_what_it_has() -> None:
    graph = graph_of_residual()
    latency = ModelledLatency(cast(Any, Linear()), 10.0)
    memory = PeakMemory(graph, 1.0)
    flops = flops_budget(graph, 1.0)
    assert [isinstance(b, MeasuredBudget) for b in (latency, memory, flops)] == [True, False, False]
    assert [isinstance(b, HasTerms) for b in (latency, memory, flops)] == [False, True, False]
    widths = torch.tensor([graph.dense_widths], dtype=torch.float32)
    assert torch.equal(memory.terms(widths).amax(-1), memory.charged(widths))


def test_corrections_multiply() -> None:
    budget = ModelledLatency(cast(Any, Linear()), 10.0)
    twice = budget.corrected(1.25).corrected(0.5)
    widths = torch.tensor([[3.0, 4.0]])
    np.testing.assert_allclose(twice.cost(widths), 0.625 * budget.cost(widths), rtol=1e-6)
    np.testing.assert_allclose(twice.charged(widths), 0.625 * budget.charged(widths), rtol=1e-6)
    assert twice.target == budget.target
