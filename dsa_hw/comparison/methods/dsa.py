"""DSA under a latency budget, and under a FLOPs budget brought to the same latency.

Ning et al., ECCV 2020, arXiv:2004.02164 (see ``dsa_hw.pipeline.pruner``). The FLOPs form is what a
user without a latency model does: search at some FLOPs, measure, adjust the FLOPs until the latency
fits. The search gets the FLOPs of the uniform network that has the target latency (by the model);
its keep ratios are then rounded to less or more FLOPs until the measured latency fits. Rounding
sees FLOPs only. It chooses widths on the device's steps, as an informed user would, or multiples of
eight, as one does who has only FLOPs to go by.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dsa_hw.allocation.allocate import allocate
from dsa_hw.comparison.methods.method import Made, Workbench
from dsa_hw.comparison.methods.to_target import reach_target
from dsa_hw.comparison.methods.uniform import uniform_keep_ratio, uniform_widths
from dsa_hw.cost.choices import WidthChoices
from dsa_hw.cost.counted import CountedBudget, FlopsBudget, count, flops_budget, uniform_choices
from dsa_hw.errors import InfeasibleBudget
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.runs.config import PruneConfig

Values = Callable[[WidthChoices, np.ndarray], list[np.ndarray]]
"""Choices and the widths to be near -> per group, one number a choice."""

LEVELS = 192
"""FLOPs levels between the least and the dense network, even in their logarithm."""
LOWEST = 0.01
"""Of the dense FLOPs: where the levels begin if the least network has fewer. Small steps reach far
below what is ever asked for, and the levels above would lie further apart."""
EIGHT = 8
"""Channels: what frameworks round widths to for any device."""
LOOK = 12
"""Levels above the last that fits which are looked at too."""


class DsaFlops:
    """The search under a FLOPs budget, then FLOPs until the latency fits."""

    title = "DSA on FLOPs"

    def epochs_before(self, config: PruneConfig) -> int:
        """The search's."""
        return config.search_epochs

    def make(self, bench: Workbench) -> Made:
        """Search at the uniform network's FLOPs, then follow the FLOPs down to the target."""
        pruner = bench.search([self._budget(bench)])
        learned = pruner.learned_widths()
        path = _FlopsPath(bench.graph, self._choices(bench), learned, pruner.rounding_values)
        allocation = reach_target(
            lambda limit_ms: path.within(bench, limit_ms), bench.budget, bench.measure
        )
        found = pruner.finish_at(allocation)
        source = pruner.model
        return Made(found.model, found.keep, allocation, found.keep_ratios, source)

    def _choices(self, bench: Workbench) -> WidthChoices:
        return bench.choices

    def _step(self, bench: Workbench) -> int:
        return bench.widest_step

    def _budget(self, bench: Workbench) -> FlopsBudget:
        """At the uniform network's FLOPs, or the least that the widest step leaves."""
        step, ratio = self._step(bench), flops_ratio_at(bench)
        budget, choices = FlopsBudget(ratio, step).bind(bench.graph)
        least = budget.charged(torch.as_tensor(choices.least, dtype=torch.float32)[None])
        return FlopsBudget(max(ratio, 1.001 * ratio * float(least[0]) / budget.target), step)


class DsaFlopsByEight(DsaFlops):
    """The same without knowledge of the device's steps: multiples of eight channels."""

    title = "DSA on FLOPs, multiples of 8"

    def _choices(self, bench: Workbench) -> WidthChoices:
        return uniform_choices(bench.graph, EIGHT)

    def _step(self, bench: Workbench) -> int:
        return EIGHT


def flops_ratio_at(bench: Workbench) -> float:
    """Part of the dense FLOPs that the uniform network at the latency target has."""
    keep_ratio = uniform_keep_ratio(bench.choices, bench.budget)
    flops = flops_budget(bench.graph, 1.0)
    widths = torch.as_tensor(uniform_widths(bench.choices, keep_ratio)).float()
    return float(flops.cost(widths)) / count(flops, bench.graph.dense_widths)


class _FlopsPath:
    """Allocations near the learned widths at one FLOPs level after the other."""

    def __init__(
        self, graph: DeployedGraph, choices: WidthChoices, learned: np.ndarray, values: Values
    ) -> None:
        self._graph, self._choices, self._learned = graph, choices, learned
        self._values = values
        flops = flops_budget(graph, 1.0)
        least, most = (count(flops, w.tolist()) for w in (choices.least, choices.dense))
        self._levels = np.geomspace(max(1.001 * least, LOWEST * most), most, LEVELS)
        self._found: dict[int, np.ndarray] = {}

    def within(self, bench: Workbench, limit_ms: float) -> np.ndarray:
        """The widths of the highest level whose modelled latency is within the limit.

        Latency is nearly monotone along the levels: bisection, then a look upwards.
        """
        low, high = -1, LEVELS
        while high - low > 1:
            middle = (low + high) // 2
            fits = bench.modelled_ms(self._at(middle)[None])[0] <= limit_ms
            low, high = (middle, high) if fits else (low, middle)
        looked_at = range(low + 1, min(low + LOOK, LEVELS))
        above = [i for i in looked_at if self._ms(bench, i) <= limit_ms]
        best = max([low, *above])
        if best < 0:
            raise InfeasibleBudget(
                f"no allocation along the FLOPs levels is within {limit_ms:.4g} ms; "
                f"the lowest has {self._ms(bench, 0):.4g} ms"
            )
        return self._at(best)

    def _ms(self, bench: Workbench, level: int) -> float:
        return float(bench.modelled_ms(self._at(level)[None])[0])

    def _at(self, level: int) -> np.ndarray:
        if level not in self._found:
            budget = flops_budget(self._graph, float(self._levels[level]))
            values = self._values(self._choices, self._scaled(budget))
            self._found[level] = allocate(self._choices, values, [budget]).widths
        return self._found[level]

    def _scaled(self, budget: CountedBudget) -> np.ndarray:
        """The learned widths times one factor, at the budget's FLOPs."""
        low, high = 1e-3, 1e3
        for _ in range(60):
            middle = float(np.sqrt(low * high))
            widths = self._clipped(middle)
            fits = float(budget.cost(torch.as_tensor(widths).float())) <= budget.target
            low, high = (middle, high) if fits else (low, middle)
        return self._clipped(low)

    def _clipped(self, factor: float) -> np.ndarray:
        return np.clip(factor * self._learned, self._choices.least, self._choices.dense)
