"""Round, measure the deployed network, correct the model, round again: before any fine-tuning.

Latency does not depend on the weights, so the loop needs none. A measured miss scales the latency
budget's prediction near the allocation, and rounding runs again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsa_hw.budgets import Budget, ModelledLatency
from dsa_hw.choices import WidthChoices
from dsa_hw.memory import PeakMemory
from dsa_hw.rounding import Constraint, Rounded, round_widths

ROUNDS = 6
AIM = 0.983
ACCEPTED = (0.967, 0.995)


@dataclass(frozen=True, slots=True)
class Timed:
    """A network's measured latency beside the target that holds for it, ms."""

    measured_ms: float
    ci95_ms: tuple[float, float]
    target_ms: float


Measure = Callable[[np.ndarray], Timed]
"""(groups,) widths -> their measurement, on the device, in the runtime."""


@dataclass(frozen=True, slots=True)
class LoopRound:
    """One turn of the loop.

    Args:
        correction: measured over predicted, as known *before* this round.
    """

    widths: tuple[int, ...]
    predicted_ms: float
    correction: float
    timed: Timed

    @property
    def use(self) -> float:
        """Measured over target."""
        return self.timed.measured_ms / self.timed.target_ms


@dataclass(frozen=True, slots=True)
class Allocation:
    """Widths at the budgets.

    Args:
        costs: by budget's name, as charged (corrected where the loop ran).
        rounds: of the closed loop; empty without one.
    """

    widths: np.ndarray
    costs: dict[str, float]
    rounds: tuple[LoopRound, ...] = ()

    @property
    def chosen(self) -> LoopRound | None:
        """The round whose widths these are."""
        own = tuple(self.widths.tolist())
        return next((r for r in reversed(self.rounds) if r.widths == own), None)


def allocate(
    choices: WidthChoices,
    values: Sequence[np.ndarray],
    budgets: Sequence[Budget],
    measure: Measure | None = None,
) -> Allocation:
    """The most valuable widths at the budgets, verified by measuring if ``measure`` is given.

    Args:
        values: per group, one number a choice.
        budgets: on the CPU; a latency budget among them is what ``measure`` verifies.

    Raises:
        InfeasibleBudget: no allowed widths meet the budgets.
    """
    aim = AIM if measure else 1.0
    rounds: list[LoopRound] = []
    correction = 1.0
    while True:
        rounded = _round(choices, values, budgets, correction, aim)
        names = [b.name for b in budgets]
        if measure is None:
            return Allocation(rounded.widths, dict(zip(names, rounded.costs, strict=True)))
        turn = _turn(rounded, budgets, correction, measure)
        repeated = any(r.widths == turn.widths for r in rounds)
        rounds.append(turn)
        accepted = ACCEPTED[0] <= turn.use <= ACCEPTED[1]
        if accepted or len(rounds) == ROUNDS or (repeated and len(rounds) > 2):
            best = min(rounds, key=_miss)
            widths = np.array(best.widths)
            costs = dict(zip(names, _charged(budgets, widths), strict=True))
            return Allocation(widths, costs, tuple(rounds))
        # Relative to the target, which moves with the machine when it is a part of the dense time.
        predicted_use = turn.predicted_ms / _latency(budgets).target
        correction *= turn.use / predicted_use


def _miss(turn: LoopRound) -> float:
    """How bad a round's measurement is: over the target is worse than as much under it."""
    if turn.use > ACCEPTED[1]:
        return 10.0 * (turn.use - AIM)
    return abs(turn.use - AIM)


def _round(
    choices: WidthChoices,
    values: Sequence[np.ndarray],
    budgets: Sequence[Budget],
    correction: float,
    aim: float,
) -> Rounded:
    """Round with the measured budget corrected, and aimed a little under its target."""
    constraints = []
    measured = next((b for b in budgets if isinstance(b, ModelledLatency)), None)
    for budget in budgets:
        target = budget.target
        if measured is not None and budget is measured:
            budget = dataclasses.replace(measured, correction=correction)
            target *= aim
        constraints.append(
            Constraint(
                budget.name, budget.unit, _batched(budget.charged), target,
                terms=_batched(budget.terms) if isinstance(budget, PeakMemory) else None,
            )
        )  # fmt: skip
    return round_widths(choices, values, constraints)


def _turn(
    rounded: Rounded, budgets: Sequence[Budget], correction: float, measure: Measure
) -> LoopRound:
    index = list(budgets).index(_latency(budgets))
    return LoopRound(
        widths=tuple(int(w) for w in rounded.widths),
        predicted_ms=rounded.costs[index],
        correction=correction,
        timed=measure(rounded.widths),
    )


def _latency(budgets: Sequence[Budget]) -> ModelledLatency:
    return next(b for b in budgets if isinstance(b, ModelledLatency))


def _batched(charged: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    @torch.no_grad()
    def cost(widths: np.ndarray) -> np.ndarray:
        return charged(torch.as_tensor(widths, dtype=torch.float32)).double().numpy()

    return cost


def _charged(budgets: Sequence[Budget], widths: np.ndarray) -> list[float]:
    return [float(_batched(budget.charged)(widths[None])[0]) for budget in budgets]
