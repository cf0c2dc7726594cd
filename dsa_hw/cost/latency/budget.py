"""Latency as a budget: a calibrated model, a target in ms, and what measuring corrects."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsa_hw.cost.budget import Budget
from dsa_hw.cost.choices import WidthChoices
from dsa_hw.cost.latency.model import LatencyModel
from dsa_hw.cost.latency.profiling import CalibratedModel, latency_model
from dsa_hw.errors import UserError
from dsa_hw.network.branches.branch import Branch
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.runs.budgets import BudgetSetting
from profilers.table import LatencyTable


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


def latency_request(setting: BudgetSetting) -> LatencyBudget:
    """``--budget latency``: so many milliseconds on the device of the table."""
    return LatencyBudget(setting.table, setting.value, latency=setting.latency)
