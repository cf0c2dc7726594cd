"""What a network may cost: budgets over the widths of its groups, differentiable and batched.

A budget is anything with the members of ``Budget``. Two more members are optional: ``terms``
(``HasTerms``) lets the integer program see through a maximum, and ``corrected``
(``MeasuredBudget``) lets the closed loop measure the network and correct the budget's predictions.
Neither asks which class a budget is of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from dsa_hw.branch_gates import BranchGates, bare_layers, spread
from dsa_hw.branches import Branch
from dsa_hw.budget_registry import BudgetSetting
from dsa_hw.choices import WidthChoices, width_choices
from dsa_hw.deployed import DeployedGraph
from dsa_hw.errors import UserError
from dsa_hw.latency_model import LatencyModel
from dsa_hw.memory import PeakMemory
from dsa_hw.profiling import CalibratedModel, latency_model
from profilers.spec import LayerSpec
from profilers.table import LatencyTable


class Budget(Protocol):
    """One resource with a target.

    ``cost`` is differentiable, for gradients; ``charged`` is what is really paid.
    """

    @property
    def name(self) -> str:
        """What is limited."""
        ...

    @property
    def unit(self) -> str:
        """Unit of cost and target."""
        ...

    @property
    def target(self) -> float:
        """The most it may cost."""
        ...

    def cost(self, widths: Tensor) -> Tensor:
        """(..., groups) widths -> (...,) cost, differentiable."""
        ...

    def charged(self, widths: Tensor) -> Tensor:
        """(..., groups) widths -> (...,) cost as the device or the counter charges it."""
        ...

    def to(self, device: torch.device | str) -> Budget:
        """The same budget for widths on another device."""
        ...


@runtime_checkable
class HasTerms(Budget, Protocol):
    """A budget whose charged cost is the largest of several terms.

    Each term is a sum over layers, which the maximum is not: the integer program limits them one by
    one.
    """

    def terms(self, widths: Tensor) -> Tensor:
        """(..., groups) widths -> (..., terms) costs; their maximum is what is charged."""
        ...


@runtime_checkable
class MeasuredBudget(Budget, Protocol):
    """A budget whose cost can be measured on a device, and predictions of it corrected."""

    def corrected(self, by: float) -> Budget:
        """Return the same budget, target included, with all costs multiplied by ``by``."""
        ...


class BudgetRequest(Protocol):
    """A budget before it knows the network."""

    def bind(self, graph: DeployedGraph) -> tuple[Budget, WidthChoices]:
        """Return the budget over this network's widths, and the widths that suit it."""
        ...


@dataclass(frozen=True)
class ModelledLatency:
    """Latency by a calibrated model.

    Args:
        correction: measured over predicted near the allocation, from the closed loop.
    """

    model: LatencyModel
    target: float
    correction: float = 1.0
    name: str = "latency"
    unit: str = "ms"

    def cost(self, widths: Tensor) -> Tensor:
        """Smooth latency in ms."""
        return self.model.predict_ms(widths) * self.correction

    def charged(self, widths: Tensor) -> Tensor:
        """Staircase latency in ms."""
        return self.model.staircase_ms(widths) * self.correction

    def corrected(self, by: float) -> ModelledLatency:
        """Return the same budget with all predictions multiplied by ``by``."""
        return dataclasses.replace(self, correction=self.correction * by)

    def to(self, device: torch.device | str) -> ModelledLatency:
        """The same budget for widths on another device."""
        return dataclasses.replace(self, model=self.model.to(device))


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
        bare = bare_layers(graph)
        self._gates = None
        if any(branch is not None for branch in bare):
            self._gates = BranchGates(graph, choices or uniform_choices(graph, 1), device)
            self._bare = self._gates.members(bare)

    def _per_pair(self, spec: LayerSpec) -> float:
        taps = float(np.prod(spec.kernel))
        if spec.tied:
            taps *= 1 if spec.groups == "depthwise" else int(spec.groups.removeprefix("width"))
        if self.name == "params":
            return taps
        return 2.0 * taps * float(np.prod(spec.output_size)) * spec.batch

    def cost(self, widths: Tensor) -> Tensor:
        """(..., groups) -> (...,)"""
        if self._gates is None:
            return self._per_layer(widths).sum(-1)
        gates = spread(self._gates.smooth(widths), self._bare)
        return (self._per_layer(widths) * gates).sum(-1)

    def charged(self, widths: Tensor) -> Tensor:
        """(..., groups) -> (...,)"""
        if self._gates is None:
            return self._per_layer(widths).sum(-1)
        gates = spread(self._gates.hard(widths), self._bare)
        return (self._per_layer(widths) * gates).sum(-1)

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
class LatencyBudget:
    """So many milliseconds, by a table that the network has been profiled into.

    Args:
        table: with this network's layers and whole networks (``python -m dsa_hw.profile``).
        target_ms: the latency to reach.
        name: tells several devices apart, each with a table and a target of its own.
        latency: a model of the network that was calibrated with the table before; None fits the
            table when the budget is bound for the first time.
    """

    table: LatencyTable
    target_ms: float
    name: str = "latency"
    latency: CalibratedModel | None = None
    _fitted: dict[tuple[str, tuple[Branch, ...]], CalibratedModel] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def bind(self, graph: DeployedGraph) -> tuple[Budget, WidthChoices]:
        """The calibrated budget over a network's widths, on the table's steps.

        The table is fitted once for a network: what is appended to it later does not change the
        budget.

        Raises:
            MissingMeasurement: the network has not been profiled into the table.
            UserError: ``latency`` is of another network.
        """
        latency = self._fit(graph) if self.latency is None else self.latency
        theirs, ours = latency.model.graph, graph.at_precision(latency.model.graph.precision)
        if (theirs.digest, theirs.branches) != (ours.digest, ours.branches):
            raise UserError(
                f"the latency model given to the budget {self.name!r} is of another network or of "
                f"other removable branches (digest {theirs.digest}, and this network's is "
                f"{ours.digest}); leave latency out to have the table fitted for this one"
            )
        budget = ModelledLatency(latency.model, self.target_ms, name=self.name)
        return budget, latency.choices

    def _fit(self, graph: DeployedGraph) -> CalibratedModel:
        graph = graph.at_precision(str(self.table.provenance["precision"]))
        identity = graph.digest, graph.branches
        if identity not in self._fitted:
            self._fitted[identity] = latency_model(graph, self.table)
        return self._fitted[identity]


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


def latency_request(setting: BudgetSetting) -> LatencyBudget:
    """``--budget latency``: so many milliseconds on the device of the table."""
    return LatencyBudget(setting.table, setting.value, latency=setting.latency)


def flops_request(setting: BudgetSetting) -> FlopsBudget:
    """``--budget flops``: a part of the dense FLOPs, on the device's steps."""
    return FlopsBudget(setting.value, choices=setting.choices)


def params_request(setting: BudgetSetting) -> ParamsBudget:
    """``--budget params``: a part of the dense weights, on the device's steps."""
    return ParamsBudget(setting.value, choices=setting.choices)


def memory_request(setting: BudgetSetting) -> MemoryBudget:
    """``--budget memory``: a part of the dense peak memory, on the device's steps."""
    return MemoryBudget(setting.value, choices=setting.choices)


def check_names(budgets: Sequence[Budget]) -> None:
    """See that budgets can be told apart in logs and results.

    Raises:
        UserError: two have the same name.
    """
    names = [budget.name for budget in budgets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{names.count(name)} budgets are called {name!r}; give them names, as in "
                "LatencyBudget(table, target_ms, name='phone')"
            )


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
