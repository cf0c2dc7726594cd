"""The closed loop for methods that choose widths by a solver of their own.

The same aim, acceptance and number of rounds as ``closed_loop.allocate``: a method is asked for
widths within a limit, they are timed, and the limit is corrected by the miss.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dsa_hw.budgets import ModelledLatency
from dsa_hw.closed_loop import ACCEPTED, AIM, ROUNDS, Allocation, LoopRound, Measure

Solve = Callable[[float], np.ndarray]
"""Limit on the modelled latency, ms -> (groups,) widths within it."""


def reach_target(solve: Solve, budget: ModelledLatency, measure: Measure) -> Allocation:
    """The widths by ``solve`` whose measured latency is nearest to the target, at or under it.

    Raises:
        InfeasibleBudget: ``solve`` finds no widths within a limit.
    """
    rounds: list[LoopRound] = []
    correction = 1.0
    while len(rounds) < ROUNDS:
        widths = solve(AIM * budget.target / correction)
        if any(r.widths == tuple(widths.tolist()) for r in rounds) and len(rounds) > 2:
            break
        predicted_ms = correction * _modelled_ms(budget, widths)
        turn = LoopRound(tuple(widths.tolist()), predicted_ms, correction, measure(widths))
        rounds.append(turn)
        if ACCEPTED[0] <= turn.use <= ACCEPTED[1]:
            break
        correction *= turn.use / (predicted_ms / budget.target)
    best = min(rounds, key=_miss)
    return Allocation(
        np.array(best.widths), {budget.name: best.predicted_ms}, tuple(rounds)
    )  # fmt: skip


def _miss(turn: LoopRound) -> float:
    """How bad a measurement is: over the target is worse than as much under it."""
    if turn.use > ACCEPTED[1]:
        return 10.0 * (turn.use - AIM)
    return abs(turn.use - AIM)


def _modelled_ms(budget: ModelledLatency, widths: np.ndarray) -> float:
    with torch.no_grad():
        rows = torch.as_tensor(widths[None], dtype=torch.float32)
        return float(budget.model.staircase_ms(rows)[0])
