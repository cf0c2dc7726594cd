"""What measured rounds say about a latency target: how to correct predictions, and when to stop.

Each round's measurement is noisy by some per cent for as long as the machine's state lasts, and the
networks of the rounds are neighbours. So predictions are corrected by all rounds together, and a
network's use of the target is believed mostly by the corrected prediction, and less by its own
measurements.

A latency target is an upper limit. The loop aims a small margin below it, which depends on how far
measured networks scatter around their predictions, and ends where the last measurement would not
change the rounding any more: no network is rejected for being faster than it had to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dsa_hw.allocation.verdict import Judgement, judge
from dsa_hw.errors import InfeasibleBudget

LEAST_ROUNDS = 4
"""Rounds of a loop that nothing else confirms. One round sees the machine in one state, which lasts
longer than the round: a verdict takes several, spread over the time that they need
(docs/decisions.md)."""
ROUNDS = 5
DISTURBED = 0.08
"""A round in which the dense network is slower by this part than in the second fastest counts half.
Other guests of a host only ever make it slower, and do not slow down all networks alike."""
UNSETTLED = 0.2
"""Weight of a round that rests on disturbed passes, beside one that does not."""
OWN_WEIGHT = 0.25
"""How far a network's own measurements are believed, beside the corrected prediction."""
MARGINS = (0.01, 0.02)
"""Least and most of the target that the aim leaves unused. The most is for shared machines, whose
state moves a finished network by 2% either way between the loop and the last measurement; the least
is twice the half width at which measurements stop (docs/decisions/0085)."""
SCATTERS_LEFT = 2.5
"""Margin, in standard deviations of measured over predicted."""
AIM = 1.0 - MARGINS[1]
"""Of the target, as long as nothing is known of the scatter."""
CONVERGED = 0.01
"""A change of what the model's predictions may use of the target, below which rounding again is not
worth a measurement: a step of one group is seldom less than that of the latency."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A network's measured latency beside the target that holds for it, ms.

    Args:
        dense_ms: of the dense network in the same rounds, where it was timed.
        settled: whether it rests on rounds of an undisturbed machine.
        rounds: that it rests on.
        disturbed: rounds that were set aside.
        taken: rounds in all.
        lost: what others took of the processor meanwhile, as a part of the time; None where it is
            not known.
        seconds: that measuring took.
    """

    measured_ms: float
    ci95_ms: tuple[float, float]
    target_ms: float
    dense_ms: float | None = None
    settled: bool = True
    rounds: int = 0
    disturbed: int = 0
    taken: int = 0
    lost: float | None = None
    seconds: float | None = None

    @property
    def use(self) -> float:
        """Measured over target."""
        return self.measured_ms / self.target_ms

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of measured over target."""
        low, high = self.ci95_ms
        return low / self.target_ms, high / self.target_ms

    @property
    def judged(self) -> Judgement:
        """Whether the target is met."""
        return judge(self.use, self.interval, seconds=self.seconds, settled=self.settled)


def verdict_sentence(timed: Timed) -> str:
    """Return the verdict in words, with the numbers behind it and what would decide an open one."""
    judged = timed.judged
    low, high = (100 * end for end in judged.interval)
    interval = f"95% interval {low:.1f} to {high:.1f}% of the target"
    if not timed.settled:
        took = f", and they took {100 * timed.lost:.0f}% of its time" if timed.lost else ""
        return (
            f"undecided: in {timed.disturbed} of {timed.taken} rounds other programs had the "
            f"processor{took}, or the machine was slower than it can be ({interval}); measure "
            "again when it is quiet"
        )
    if judged.verdict != "undecided":
        return f"{judged.verdict} ({interval})"
    if judged.more_seconds is None:
        return f"undecided ({interval}); measure for longer"
    return f"undecided ({interval}); some {judged.more_seconds:.0f} s more would decide it"


@dataclass(frozen=True, slots=True)
class LoopRound:
    """One turn of the loop.

    Args:
        correction: measured over predicted, as known *before* this round.
        model_target_ms: the target at the speed that the model predicts for.
        weight: of its measurement, where a round's is 1.
        aim: part of the target that its prediction was allowed to use.
        budget: which of several measured budgets it is of.
    """

    widths: tuple[int, ...]
    predicted_ms: float
    correction: float
    model_target_ms: float
    timed: Timed
    weight: float = 1.0
    aim: float = AIM
    budget: str = "latency"

    @property
    def use(self) -> float:
        """Measured over target."""
        return self.timed.use

    @property
    def log_error(self) -> float:
        """Logarithm of measured over predicted without any correction.

        Both relative to their targets: one that is a part of the dense network's latency moves
        with the machine, and its model's form does not.
        """
        return math.log(self.use * self.correction * self.model_target_ms / self.predicted_ms)


class TargetLoop:
    """The rounds of one budget so far. A round counts less the slower the machine was (``trust``).

    Args:
        scatter: standard deviation of the logarithm of measured over predicted, among networks
            near the allocation that the model was not fitted to; None where it is not known.
    """

    def __init__(self, least_rounds: int = LEAST_ROUNDS, scatter: float | None = None) -> None:
        self.rounds: list[LoopRound] = []
        self.scatter = scatter
        self.least_rounds = least_rounds

    @property
    def correction(self) -> float:
        """Measured over predicted: the geometric mean over the rounds; 1 before the first."""
        return math.exp(self._mean_log_error(self.rounds)) if self.rounds else 1.0

    @property
    def _fast_dense_ms(self) -> float | None:
        """The dense network's second fastest time (of one or two rounds, the fastest): one round
        that was wrongly fast must not make all others look disturbed."""
        times = sorted(d for r in self.rounds if (d := r.timed.dense_ms))
        return times[1 if len(times) > 2 else 0] if times else None

    def trust(self, turn: LoopRound) -> float:
        """In (0, 1]: less where the machine was slower than in other rounds, or disturbed."""
        settled = 1.0 if turn.timed.settled else UNSETTLED
        fast_ms = self._fast_dense_ms
        if fast_ms is None or turn.timed.dense_ms is None:
            return settled
        slower = max(0.0, turn.timed.dense_ms / fast_ms - 1.0)
        return settled / (1.0 + (slower / DISTURBED) ** 2)

    def _mean_log_error(self, rounds: Sequence[LoopRound]) -> float:
        weights = [r.weight * self.trust(r) for r in rounds]
        return sum(w * r.log_error for w, r in zip(weights, rounds, strict=True)) / sum(weights)

    @property
    def margin(self) -> float:
        """What the aim leaves unused of the target: more where networks scatter more."""
        least, most = MARGINS
        if len(self.rounds) >= LEAST_ROUNDS:
            scatter = float(np.std([r.log_error for r in self.rounds], ddof=1))
        elif self.scatter is not None:
            scatter = self.scatter
        else:
            return most
        return min(most, max(least, SCATTERS_LEFT * scatter))

    @property
    def aim(self) -> float:
        """Of the target."""
        return 1.0 - self.margin

    @property
    def most(self) -> float:
        """The use of the target up to which a network is believed to be under it."""
        return 1.0 - self.margin / 3.0

    def add(self, turn: LoopRound) -> bool:
        """Take in a round; returns whether it was the last one."""
        self.rounds.append(turn)
        enough = len(self.rounds) >= self.least_rounds and self.accepts(turn)
        return enough or len(self.rounds) >= ROUNDS

    def accepts(self, turn: LoopRound) -> bool:
        """Whether it is believed to be under the target, and rounding again would not change it."""
        return self.use(turn) <= self.most and self.is_converged(turn)

    def is_converged(self, turn: LoopRound) -> bool:
        """Whether predictions may use as much of the target now as when the turn was rounded."""
        room = math.log(self.aim / self.correction) - math.log(turn.aim / turn.correction)
        return abs(room) <= CONVERGED

    def proves(self, turn: LoopRound) -> bool:
        """Whether its own measurement says that the target is met."""
        return turn.timed.judged.verdict == "met"

    def of(self, widths: tuple[int, ...]) -> LoopRound | None:
        """The last round of a network of these widths."""
        return next((r for r in reversed(self.rounds) if r.widths == widths), None)

    def use(self, turn: LoopRound) -> float:
        """Measured over target, as far as it is believed."""
        same = [r for r in self.rounds if r.widths == turn.widths]
        weight = OWN_WEIGHT * max(self.trust(r) for r in same)
        pooled = math.log(self.correction)
        believed = pooled + weight * (self._mean_log_error(same) - pooled)
        return turn.use * math.exp(believed - turn.log_error)

    @property
    def best(self) -> LoopRound:
        """The round nearest to the aim."""
        return min(self.rounds, key=self.miss)

    def miss(self, turn: LoopRound) -> float:
        """Distance from the aim; over the target is worse than as much under it."""
        use = self.use(turn)
        away = use - self.aim
        return 10.0 * away if use > self.most else abs(away)


def widths_within(
    loops: Sequence[TargetLoop], solve: Callable[[Sequence[float]], np.ndarray]
) -> tuple[np.ndarray, tuple[float, ...]] | None:
    """Widths at the loops' aims, or at their targets where the aims leave none; and those aims.

    None where only the corrections leave no widths.

    Args:
        solve: a part of each loop's target -> (groups,) widths within all of them.

    Raises:
        InfeasibleBudget: there are no widths within the targets before any correction.
    """
    full = (1.0,) * len(loops)
    for aims in (tuple(loop.aim for loop in loops), full):
        try:
            return solve(aims), aims
        except InfeasibleBudget:
            if aims == full and not any(loop.rounds for loop in loops):
                raise
    return None
