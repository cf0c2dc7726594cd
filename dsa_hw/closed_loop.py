"""Round, measure the deployed network, correct the model, round again: before any fine-tuning.

Latency does not depend on the weights, so the loop needs none. A measured miss scales the latency
budget's prediction near the allocation, and rounding runs again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsa_hw.budgets import Budget, ModelledLatency
from dsa_hw.choices import WidthChoices
from dsa_hw.memory import PeakMemory
from dsa_hw.rounding import Constraint, Rounded, round_widths

LEAST_ROUNDS = 4
"""One round sees the machine in one state, which lasts longer than the round: a verdict takes
several, spread over the time that they need (docs/decisions.md)."""
ROUNDS = 5
OWN_WEIGHT = 0.25
"""How far a network's own measurements are believed, beside the corrected prediction."""
AIM = 0.979
"""Of the target: the state of a shared machine moves a finished network by 2% either way between
the loop and the last measurement (docs/decisions.md)."""
ACCEPTED = (0.963, 0.993)
"""Uses of the target that end the loop: about the aim, by less than a width's step often is."""


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
        model_target_ms: the target at the speed that the model predicts for.
    """

    widths: tuple[int, ...]
    predicted_ms: float
    correction: float
    model_target_ms: float
    timed: Timed

    @property
    def use(self) -> float:
        """Measured over target."""
        return self.timed.measured_ms / self.timed.target_ms

    @property
    def log_error(self) -> float:
        """Logarithm of measured over predicted without any correction.

        Both relative to their targets: one that is a part of the dense network's latency moves
        with the machine, and its model's form does not.
        """
        return math.log(self.use * self.correction * self.model_target_ms / self.predicted_ms)


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
    names = [b.name for b in budgets]
    loop = TargetLoop()
    while True:
        correction = loop.correction
        rounded = _round(choices, values, budgets, correction, aim)
        if measure is None:
            return Allocation(rounded.widths, dict(zip(names, rounded.costs, strict=True)))
        if loop.add(_turn(rounded, budgets, correction, measure)):
            widths = np.array(loop.best.widths)
            costs = dict(zip(names, _charged(budgets, widths), strict=True))
            return Allocation(widths, costs, tuple(loop.rounds))


class TargetLoop:
    """What the rounds so far say: how to correct predictions, when to stop, which is best.

    Each round's measurement is noisy by some per cent for as long as the machine's state lasts, and
    the networks of the rounds are neighbours. So predictions are corrected by all rounds together,
    and a network's use of the target is believed mostly by the corrected prediction, and less by
    its own measurements.
    """

    def __init__(self) -> None:
        self.rounds: list[LoopRound] = []

    @property
    def correction(self) -> float:
        """Measured over predicted: the geometric mean over the rounds; 1 before the first."""
        return math.exp(sum(r.log_error for r in self.rounds) / max(1, len(self.rounds)))

    def add(self, turn: LoopRound) -> bool:
        """Take in a round; returns whether it was the last one."""
        self.rounds.append(turn)
        accepted = ACCEPTED[0] <= self.use(turn) <= ACCEPTED[1]
        return len(self.rounds) == ROUNDS or (accepted and len(self.rounds) >= LEAST_ROUNDS)

    def use(self, turn: LoopRound) -> float:
        """Measured over target, as far as it is believed."""
        own = [r.log_error for r in self.rounds if r.widths == turn.widths]
        pooled = math.log(self.correction)
        believed = pooled + OWN_WEIGHT * (sum(own) / len(own) - pooled)
        return turn.use * math.exp(believed - turn.log_error)

    @property
    def best(self) -> LoopRound:
        """The round nearest to the aim; over the target is worse than as much under it."""

        def miss(turn: LoopRound) -> float:
            use = self.use(turn)
            return 10.0 * (use - AIM) if use > ACCEPTED[1] else abs(use - AIM)

        return min(self.rounds, key=miss)


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
        model_target_ms=_latency(budgets).target,
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
