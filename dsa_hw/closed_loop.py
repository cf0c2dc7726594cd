"""Round, measure the deployed network, correct the model, round again: before any fine-tuning.

Latency does not depend on the weights, so the loop needs none. A measured miss scales the latency
budget's prediction near the allocation, and rounding runs again. Where no training follows, the
last and longest measurement belongs to the loop: a network that it finds off the target is not
the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dsa_hw.budgets import Budget, HasTerms, MeasuredBudget
from dsa_hw.choices import WidthChoices
from dsa_hw.errors import InfeasibleBudget
from dsa_hw.rounding import Constraint, NextStep, Rounded, next_step, round_widths

LEAST_ROUNDS = 4
"""One round sees the machine in one state, which lasts longer than the round: a verdict takes
several, spread over the time that they need (docs/decisions.md)."""
ROUNDS = 5
CONFIRMATIONS = 2
"""At most so many measurements to the end, of a network in place of one found off the target, or of
the same one again where the machine was disturbed."""
CONFIRMED_WEIGHT = 2.0
"""Of a last measurement, which takes about twice a round's time, among the rounds."""
DISTURBED = 0.08
"""A round in which the dense network is slower by this part than in the fastest counts half. Other
guests of a host only ever make it slower, and do not slow down all networks alike."""
OWN_WEIGHT = 0.25
"""How far a network's own measurements are believed, beside the corrected prediction."""
MARGINS = (0.008, 0.021)
"""Least and most of the target that the aim leaves unused. The most is for shared machines, whose
state moves a finished network by 2% either way between the loop and the last measurement; the least
for devices whose rounds agree (docs/decisions.md)."""
SPREADS_LEFT = 3.0
"""Margin, in standard deviations of the rounds' errors."""
MET = (0.98, 1.0)
"""The target is met where the interval of measured over target reaches into this."""
AIM = 1.0 - MARGINS[1]
"""Of the target, as long as nothing is known of the device's noise."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A network's measured latency beside the target that holds for it, ms.

    Args:
        dense_ms: of the dense network in the same rounds, where it was timed.
    """

    measured_ms: float
    ci95_ms: tuple[float, float]
    target_ms: float
    dense_ms: float | None = None


def is_met(use: tuple[float, float]) -> bool:
    """Whether a 95% interval of measured over target says that the target is met."""
    low, high = use
    return low <= MET[1] and high >= MET[0]


Measure = Callable[[np.ndarray], Timed]
"""(groups,) widths -> their measurement, on the device, in the runtime."""


@dataclass(frozen=True, slots=True)
class LoopRound:
    """One turn of the loop.

    Args:
        correction: measured over predicted, as known *before* this round.
        model_target_ms: the target at the speed that the model predicts for.
        weight: of its measurement, where a round's is 1.
    """

    widths: tuple[int, ...]
    predicted_ms: float
    correction: float
    model_target_ms: float
    timed: Timed
    weight: float = 1.0

    @property
    def use(self) -> float:
        """Measured over target."""
        return self.timed.measured_ms / self.timed.target_ms

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of measured over target."""
        low, high = self.timed.ci95_ms
        return low / self.timed.target_ms, high / self.timed.target_ms

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
        headroom: by budget's name, the part of its target that these costs leave.
        next_step: the cheapest single step that would add value, and does not fit; its ``extra`` is
            in the order of ``headroom``.
    """

    widths: np.ndarray
    costs: dict[str, float]
    rounds: tuple[LoopRound, ...] = ()
    headroom: dict[str, float] = field(default_factory=dict)
    next_step: NextStep | None = None

    @property
    def chosen(self) -> LoopRound | None:
        """The round whose widths these are."""
        own = _own(self.widths)
        return next((r for r in reversed(self.rounds) if r.widths == own), None)


def allocate(
    choices: WidthChoices,
    values: Sequence[np.ndarray],
    budgets: Sequence[Budget],
    measure: Measure | None = None,
    confirm: Measure | None = None,
) -> Allocation:
    """The most valuable widths at the budgets, verified by measuring if ``measure`` is given.

    Args:
        values: per group, one number a choice.
        budgets: on the CPU; a latency budget among them is what ``measure`` verifies.
        confirm: a longer measurement, which the widths returned have passed through; where it
            speaks against them, others are tried.

    Raises:
        InfeasibleBudget: no allowed widths meet the budgets.
    """
    if measure is None:
        widths = _round(choices, values, budgets, 1.0, 1.0).widths
        return _described(choices, values, _limits(budgets), widths)
    loop = TargetLoop(LEAST_ROUNDS if confirm is None else LEAST_ROUNDS - 1)
    rounding = _Rounding(choices, values, budgets, loop)
    while not loop.add(rounding.turn(measure)):
        pass
    best = loop.best if confirm is None else _confirmed(loop, rounding, confirm)
    limits = _limits(budgets, loop.correction)
    return _described(choices, values, limits, np.array(best.widths), tuple(loop.rounds))


def _described(
    choices: WidthChoices,
    values: Sequence[np.ndarray],
    limits: Sequence[Constraint],
    widths: np.ndarray,
    rounds: tuple[LoopRound, ...] = (),
) -> Allocation:
    """These widths, with what they leave of the limits."""
    costs = {limit.name: float(limit.cost(widths[None])[0]) for limit in limits}
    return Allocation(
        widths,
        costs,
        rounds,
        headroom={limit.name: 1.0 - costs[limit.name] / limit.target for limit in limits},
        next_step=next_step(choices, values, limits, widths),
    )


def _confirmed(loop: TargetLoop, rounding: _Rounding, confirm: Measure) -> LoopRound:
    """The first network that ``confirm`` proves, beginning with the loop's best.

    Where it proves none, the one that is believed nearest to the aim, of those that may be at or
    under the target.
    """
    widths = np.array(loop.best.widths)
    confirmed: list[LoopRound] = []
    for _ in range(CONFIRMATIONS):
        turn = rounding.measured(widths, confirm, CONFIRMED_WEIGHT)
        loop.add(turn)
        confirmed.append(turn)
        if loop.proves(turn):
            return turn
        widths = rounding.next_widths()
        disturbed = loop.trust(turn) < 0.5  # then the same network may be measured again
        if not disturbed and any(r.widths == _own(widths) for r in confirmed):
            break  # nothing nearer to the target is known
    return min(confirmed, key=lambda turn: (turn.interval[0] > MET[1], loop.miss(turn)))


class _Rounding:
    """Rounds, at what the loop knows so far, and measures."""

    def __init__(
        self,
        choices: WidthChoices,
        values: Sequence[np.ndarray],
        budgets: Sequence[Budget],
        loop: TargetLoop,
    ) -> None:
        self._choices, self._values, self._budgets = choices, values, budgets
        self._loop = loop
        measured = _measured_of(budgets)
        if measured is None:
            raise ValueError("measure was given, and there is no budget that it can verify")
        self._latency = measured

    def turn(self, measure: Measure) -> LoopRound:
        """The next round.

        Raises:
            InfeasibleBudget: no allowed widths meet the budgets as the model knows them.
        """
        return self.measured(self.next_widths(), measure)

    def next_widths(self) -> np.ndarray:
        """The most valuable widths; the least where only the corrections rule all others out."""
        found = self._loop.next_widths(
            lambda correction, aim: (
                _round(self._choices, self._values, self._budgets, correction, aim).widths
            )
        )
        return self._choices.least if found is None else found

    def measured(self, widths: np.ndarray, measure: Measure, weight: float = 1.0) -> LoopRound:
        """A round of these widths."""
        corrected = self._latency.corrected(self._loop.correction)
        return LoopRound(
            widths=_own(widths),
            predicted_ms=float(_batched(corrected.charged)(widths[None])[0]),
            correction=self._loop.correction,
            model_target_ms=self._latency.target,
            timed=measure(widths),
            weight=weight,
        )


class TargetLoop:
    """What the rounds so far say: how to correct predictions, when to stop, which is best.

    A round counts less the slower the machine was (``trust``).

    Each round's measurement is noisy by some per cent for as long as the machine's state lasts, and
    the networks of the rounds are neighbours. So predictions are corrected by all rounds together,
    and a network's use of the target is believed mostly by the corrected prediction, and less by
    its own measurements.
    """

    def __init__(self, least_rounds: int = LEAST_ROUNDS) -> None:
        self.rounds: list[LoopRound] = []
        self._least_rounds = least_rounds

    @property
    def correction(self) -> float:
        """Measured over predicted: the geometric mean over the rounds; 1 before the first."""
        return math.exp(self._mean_log_error(self.rounds)) if self.rounds else 1.0

    def trust(self, turn: LoopRound) -> float:
        """In (0, 1]: less where the machine was slower than in other rounds."""
        fastest = min((d for r in self.rounds if (d := r.timed.dense_ms)), default=None)
        if fastest is None or turn.timed.dense_ms is None:
            return 1.0
        return 1.0 / (1.0 + ((turn.timed.dense_ms / fastest - 1.0) / DISTURBED) ** 2)

    def _mean_log_error(self, rounds: Sequence[LoopRound]) -> float:
        weights = [r.weight * self.trust(r) for r in rounds]
        return sum(w * r.log_error for w, r in zip(weights, rounds, strict=True)) / sum(weights)

    def next_widths(self, solve: Callable[[float, float], np.ndarray]) -> np.ndarray | None:
        """(groups,) widths at what is known so far; None where only corrections leave none.

        Args:
            solve: (correction of predictions, aim as a part of the target) -> widths within both.

        Raises:
            InfeasibleBudget: ``solve`` finds no widths within the target before any correction.
        """
        for aim in (self.aim, 1.0):
            try:
                return solve(self.correction, aim)
            except InfeasibleBudget:
                if aim == 1.0 and not self.rounds:
                    raise
        return None

    @property
    def margin(self) -> float:
        """What the aim leaves unused of the target: more where the rounds differ more."""
        least, most = MARGINS
        if len(self.rounds) < LEAST_ROUNDS:
            return most
        spread = float(np.std([r.log_error for r in self.rounds], ddof=1))
        return min(most, max(least, SPREADS_LEFT * spread))

    @property
    def aim(self) -> float:
        """Of the target."""
        return 1.0 - self.margin

    @property
    def accepted(self) -> tuple[float, float]:
        """Uses of the target that end the loop: about the aim, by less than a width's step often
        is."""
        margin = self.margin
        return self.aim - max(0.011, 0.75 * margin), 1.0 - margin / 3.0

    def add(self, turn: LoopRound) -> bool:
        """Take in a round; returns whether it was the last one."""
        self.rounds.append(turn)
        enough = len(self.rounds) >= self._least_rounds and self.accepts(turn)
        return enough or len(self.rounds) >= ROUNDS

    def accepts(self, turn: LoopRound) -> bool:
        """Whether its use of the target, as far as it is believed, ends the loop."""
        least, most = self.accepted
        return least <= self.use(turn) <= most

    def proves(self, turn: LoopRound) -> bool:
        """Whether, beside that, its own measurement says that the target is met."""
        return self.accepts(turn) and is_met(turn.interval)

    def use(self, turn: LoopRound) -> float:
        """Measured over target, as far as it is believed."""
        own = self._mean_log_error([r for r in self.rounds if r.widths == turn.widths])
        pooled = math.log(self.correction)
        believed = pooled + OWN_WEIGHT * (own - pooled)
        return turn.use * math.exp(believed - turn.log_error)

    @property
    def best(self) -> LoopRound:
        """The round nearest to the aim."""
        return min(self.rounds, key=self.miss)

    def miss(self, turn: LoopRound) -> float:
        """Distance from the aim; over the target is worse than as much under it."""
        use = self.use(turn)
        away = use - self.aim
        return 10.0 * away if use > self.accepted[1] else abs(away)


def _round(
    choices: WidthChoices,
    values: Sequence[np.ndarray],
    budgets: Sequence[Budget],
    correction: float,
    aim: float,
) -> Rounded:
    """Round with the measured budget corrected, and aimed a little under its target."""
    return round_widths(choices, values, _limits(budgets, correction, aim))


def _limits(
    budgets: Sequence[Budget], correction: float = 1.0, aim: float = 1.0
) -> list[Constraint]:
    """What rounding must keep to.

    Args:
        correction: of the measured budget's predictions.
        aim: part of the measured budget's target that may be used.
    """
    limits = []
    measured = _measured_of(budgets)
    for budget in budgets:
        target = budget.target
        if measured is not None and budget is measured:
            budget = measured.corrected(correction)
            target *= aim
        terms = _batched(budget.terms) if isinstance(budget, HasTerms) else None
        charged = _batched(budget.charged)
        limits.append(Constraint(budget.name, budget.unit, charged, target, terms=terms))
    return limits


def _measured_of(budgets: Sequence[Budget]) -> MeasuredBudget | None:
    """The budget that a measurement verifies: the first that can be corrected."""
    return next((b for b in budgets if isinstance(b, MeasuredBudget)), None)


def _own(widths: np.ndarray) -> tuple[int, ...]:
    return tuple(int(w) for w in widths)


def _batched(charged: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    @torch.no_grad()
    def cost(widths: np.ndarray) -> np.ndarray:
        return charged(torch.as_tensor(widths, dtype=torch.float32)).double().numpy()

    return cost
