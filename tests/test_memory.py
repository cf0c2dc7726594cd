"""Peak activation memory: by hand on a small graph, differentiable, and as a budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Residual
from torch import Tensor, nn

import dsa_hw
from dsa_hw.allocation.allocate import allocate
from dsa_hw.allocation.rounding import Constraint, round_widths
from dsa_hw.comparison.methods import allocate_uniform
from dsa_hw.cost.counted import MemoryBudget, count
from dsa_hw.cost.memory import PeakMemory
from dsa_hw.network.coupling import find_coupling
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.worth.values import closeness


class Block(nn.Module):
    """8x8: input 3, stem 16, branch 64, back to 16, added to the stem's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.up = nn.Conv2d(16, 64, 1)
        self.down = nn.Conv2d(64, 16, 1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(x + self.down(torch.relu(self.up(x))))


def graph_of(model: nn.Module, size: int) -> DeployedGraph:
    x = torch.zeros(1, 3, size, size)
    return DeployedGraph(export_onnx(model, x), find_coupling(model, x))


def test_the_peak_by_hand() -> None:
    budget = PeakMemory(graph_of(Block(), 8), 1.0)
    # While down runs: the stem's output (kept for the addition), the branch, down's output. Relus
    # and the addition write in place. 64 pixels of 4 bytes.
    assert count(budget, [16, 64, 4]) == (16 + 64 + 16) * 64 * 4
    assert count(budget, [16, 8, 4]) == (16 + 8 + 16) * 64 * 4
    # a narrow branch and stem: then the input beside the stem's output, or the end, is the peak
    assert count(budget, [4, 1, 4]) == (4 + 1 + 4) * 64 * 4


def test_the_gradient_is_that_of_the_peak() -> None:
    budget = PeakMemory(graph_of(Residual(), 16), 1.0)
    widths = torch.tensor([20.0, 40.0, 50.0, 10.0], dtype=torch.float32, requires_grad=True)
    cost = budget.cost(widths)
    (gradient,) = torch.autograd.grad(cost, widths)
    for group in range(4):
        shifted = widths.detach().clone()
        shifted[group] += 0.5
        difference = (budget.cost(shifted) - cost.detach()) / 0.5
        # linear around here; float32 of 1e5 bytes
        assert float(difference) == pytest.approx(float(gradient[group]), abs=0.5)


def test_a_memory_budget_is_met_by_a_proven_allocation() -> None:
    """The maximum goes to the integer program term by term."""
    graph = graph_of(Residual(), 16)
    budget, choices = MemoryBudget(0.6, step=4).bind(graph)
    assert isinstance(budget, PeakMemory)
    values = closeness(choices, 0.9 * choices.dense)
    found = allocate(choices, values, [budget])
    assert found.costs["memory"] <= budget.target

    @torch.no_grad()
    def terms(widths: np.ndarray) -> np.ndarray:
        return budget.terms(torch.as_tensor(widths, dtype=torch.float32)).numpy()

    limit = Constraint("memory", "bytes", lambda w: terms(w).max(-1), budget.target, terms=terms)
    rounded = round_widths(choices, values, [limit])
    assert rounded.bound == pytest.approx(rounded.score, abs=1e-3)
    assert rounded.widths.tolist() == found.widths.tolist()
    uniform = allocate_uniform(choices, [budget])
    assert uniform.costs["memory"] <= budget.target


def test_memory_and_flops_in_a_search() -> None:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(4, 3, 16, 16)
    budgets = [dsa_hw.MemoryBudget(0.7), dsa_hw.FlopsBudget(0.6)]
    pruner = dsa_hw.DSAPruner(model, x, budgets, total_steps=16)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(16):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(validation_loss=lambda: model(x).square().mean())
    found = pruner.finish_with_report()
    for budget in pruner.budgets:
        assert found.allocation.costs[budget.name] <= budget.target
