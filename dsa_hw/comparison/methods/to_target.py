"""The closed loop for methods that choose widths by a solver of their own.

The same aim, acceptance and number of rounds as ``closed_loop.allocate``: a method is asked for
widths within a limit, they are timed, and the limit is corrected by the miss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from dsa_hw.allocation.allocate import Allocation, Measure
from dsa_hw.allocation.target_loop import LoopRound, TargetLoop, widths_within
from dsa_hw.cost.latency.budget import ModelledLatency

Solve = Callable[[float], np.ndarray]
"""Limit on the modelled latency, ms -> (groups,) widths within it."""


def reach_target(solve: Solve, budget: ModelledLatency, measure: Measure) -> Allocation:
    """The widths by ``solve`` whose measured latency is nearest to the target, at or under it.

    Raises:
        InfeasibleBudget: ``solve`` finds no widths within the target by the model.
    """
    loop = TargetLoop()

    def within(aims: Sequence[float]) -> np.ndarray:
        return solve(aims[0] * budget.target / loop.correction)

    while (found := widths_within([loop], within)) is not None:
        widths, (aim,) = found
        correction = loop.correction
        predicted_ms = correction * _modelled_ms(budget, widths)
        own = tuple(int(w) for w in widths)
        timed = measure(widths)
        turn = LoopRound(
            own, predicted_ms, correction, budget.target, timed, aim=aim, budget=budget.name
        )
        if loop.add(turn):
            break
    best = loop.best
    costs = {budget.name: best.predicted_ms}
    return Allocation(np.array(best.widths), costs, tuple(loop.rounds))


def _modelled_ms(budget: ModelledLatency, widths: np.ndarray) -> float:
    with torch.no_grad():
        rows = torch.as_tensor(widths[None], dtype=torch.float32)
        return float(budget.model.staircase_ms(rows)[0])
