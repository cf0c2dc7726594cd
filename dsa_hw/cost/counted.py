"""Budgets that are counted and not measured: FLOPs, parameters, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsa_hw.cost.branch_gates import BranchGates, bare_layers, spread
from dsa_hw.cost.budget import Budget
from dsa_hw.cost.choices import WidthChoices, width_choices
from dsa_hw.cost.memory import PeakMemory
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.runs.budgets import BudgetSetting
from profilers.layers.spec import LayerSpec


class CountedBudget:
    """A count that is a sum over layers of a product of their channels: FLOPs, parameters.

    A removed branch goes by its zero channels; its layers that have no internal group follow its
    gate.

    Args:
        choices: where branches begin to fade; by single channels if None.
    """

    def __init__(
        self,
        graph: DeployedGraph,
        target: float,
        *,
        name: str,
        unit: str,
        device: torch.device | str = "cpu",
        choices: WidthChoices | None = None,
    ) -> None:
        self.name, self.unit, self.target = name, unit, target
        self._graph, self._choices = graph, choices
        layers = graph.layers
        self._cin = _columns([x.cin.coefficients for x in layers], device)
        self._cout = _columns([x.cout.coefficients for x in layers], device)
        self._cin_constant = _row([x.cin.constant for x in layers], device)
        self._cout_constant = _row([x.cout.constant for x in layers], device)
        self._factor = _row([self._per_pair(x.spec) for x in layers], device)
        self._tied = torch.tensor([x.spec.tied for x in layers], device=device)
        flops, weights = graph.fixed_counts()
        self._fixed = weights if name == "params" else flops
        bare = bare_layers(graph)
        self._gates = None
        if any(branch is not None for branch in bare):
            self._gates = BranchGates(graph, choices or uniform_choices(graph, 1), device)
            self._bare = self._gates.members(bare)

    def _per_pair(self, spec: LayerSpec) -> float:
        """What one output channel costs by one input channel; of a tied layer, by itself."""
        width = spec.group_width if spec.tied else 1
        counted = spec.weight_count if self.name == "params" else spec.flops
        return counted(width, width) / width

    def cost(self, widths: Tensor) -> Tensor:
        """(..., groups) -> (...,)"""
        if self._gates is None:
            return self._per_layer(widths).sum(-1) + self._fixed
        gates = spread(self._gates.smooth(widths), self._bare)
        return (self._per_layer(widths) * gates).sum(-1) + self._fixed

    def charged(self, widths: Tensor) -> Tensor:
        """(..., groups) -> (...,)"""
        if self._gates is None:
            return self._per_layer(widths).sum(-1) + self._fixed
        gates = spread(self._gates.hard(widths), self._bare)
        return (self._per_layer(widths) * gates).sum(-1) + self._fixed

    def _per_layer(self, widths: Tensor) -> Tensor:
        cin = widths @ self._cin + self._cin_constant
        cout = widths @ self._cout + self._cout_constant
        return self._factor * cout * torch.where(self._tied, torch.ones_like(cin), cin)

    def to(self, device: torch.device | str) -> CountedBudget:
        """The same budget for widths on another device."""
        return CountedBudget(
            self._graph,
            self.target,
            name=self.name,
            unit=self.unit,
            device=device,
            choices=self._choices,
        )


def flops_budget(
    graph: DeployedGraph, target: float, choices: WidthChoices | None = None
) -> CountedBudget:
    """Two operations a multiply-accumulate, of convolutions and linear layers, whole batch."""
    return CountedBudget(graph, target, name="flops", unit="FLOPs", choices=choices)


def params_budget(
    graph: DeployedGraph, target: float, choices: WidthChoices | None = None
) -> CountedBudget:
    """Weights of convolutions and linear layers (biases and normalization are folded away)."""
    return CountedBudget(graph, target, name="params", unit="weights", choices=choices)


def memory_budget(
    graph: DeployedGraph, target: float, choices: WidthChoices | None = None
) -> PeakMemory:
    """Bytes of activations at the peak; see ``memory``."""
    return PeakMemory(graph, target, choices=choices)


def _columns(values: list[np.ndarray], device: torch.device | str) -> Tensor:
    return torch.as_tensor(np.stack(values, axis=1), dtype=torch.float32, device=device)


def _row(values: list[float], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class FlopsBudget:
    """A part of the dense network's FLOPs.

    Args:
        keep_ratio: in (0, 1].
        step: widths are multiples of it.
        choices: the widths to choose from, in place of multiples of ``step``: those on a device's
            steps, where the network will run on it.
    """

    keep_ratio: float
    step: int = 1
    choices: WidthChoices | None = None

    def bind(self, graph: DeployedGraph) -> tuple[Budget, WidthChoices]:
        """The budget over a network's widths."""
        choices = self.choices or uniform_choices(graph, self.step)
        return _relative(flops_budget, graph, self.keep_ratio, choices)


@dataclass(frozen=True)
class ParamsBudget:
    """A part of the dense network's weights; see ``FlopsBudget``."""

    keep_ratio: float
    step: int = 1
    choices: WidthChoices | None = None

    def bind(self, graph: DeployedGraph) -> tuple[Budget, WidthChoices]:
        """The budget over a network's widths."""
        choices = self.choices or uniform_choices(graph, self.step)
        return _relative(params_budget, graph, self.keep_ratio, choices)


@dataclass(frozen=True)
class MemoryBudget:
    """A part of the dense network's peak activation memory; see ``memory`` and ``FlopsBudget``."""

    keep_ratio: float
    step: int = 1
    choices: WidthChoices | None = None

    def bind(self, graph: DeployedGraph) -> tuple[Budget, WidthChoices]:
        """The budget over a network's widths."""
        choices = self.choices or uniform_choices(graph, self.step)
        return _relative(memory_budget, graph, self.keep_ratio, choices)


def flops_request(setting: BudgetSetting) -> FlopsBudget:
    """``--budget flops``: a part of the dense FLOPs, on the device's steps."""
    return FlopsBudget(setting.value, choices=setting.choices)


def params_request(setting: BudgetSetting) -> ParamsBudget:
    """``--budget params``: a part of the dense weights, on the device's steps."""
    return ParamsBudget(setting.value, choices=setting.choices)


def memory_request(setting: BudgetSetting) -> MemoryBudget:
    """``--budget memory``: a part of the dense peak memory, on the device's steps."""
    return MemoryBudget(setting.value, choices=setting.choices)


def count(budget: Budget, widths: Sequence[int]) -> float:
    """What ``widths`` cost."""
    return float(budget.charged(torch.tensor([list(widths)], dtype=torch.float64).float())[0])


def _relative(
    make: Callable[[DeployedGraph, float, WidthChoices | None], CountedBudget | PeakMemory],
    graph: DeployedGraph,
    keep_ratio: float,
    choices: WidthChoices,
) -> tuple[Budget, WidthChoices]:
    """The budget of a part of the dense network's cost."""
    dense = count(make(graph, 0.0, choices), graph.dense_widths)
    return make(graph, keep_ratio * dense, choices), choices


def uniform_choices(graph: DeployedGraph, step: int) -> WidthChoices:
    """Multiples of ``step`` for all groups."""
    return width_choices(graph, {layer.spec.kind: step for layer in graph.layers})
