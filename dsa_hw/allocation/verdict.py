"""Whether a latency target is met: three answers, from the interval of measured over target.

A latency target is an upper limit. *Met* and *missed* are statements that a measurement proves;
what it does not prove is *undecided*, with an estimate of the time that would decide it. A wider
interval can only turn a statement into *undecided*, never into *met*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Verdict = Literal["met", "missed", "undecided"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

TOLERANCE = 0.005
"""Part of the target by which the interval's upper end may be above it. Half a per cent: the half
width at which the last measurement stops, and what two readings of one file differ by on a quiet
machine (0.3 to 0.6%). It is also what makes every network decidable: one exactly at its target has
an interval that reaches above it after any number of rounds."""
SEQUENTIAL = 1.3
"""Factor on an interval that is looked at again and again while it shrinks. A 95% interval that is
looked at ten times errs in 19% of cases (Pocock 1977); one wider by 2.56/1.96 errs in 5%."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict, and what it rests on.

    Args:
        use: measured over target.
        interval: its 95% interval.
        more_seconds: of measuring that would decide an undecided one, at the noise seen so far;
            None where it is decided, or where nothing can be said (a disturbed machine, no
            interval yet).
    """

    verdict: Verdict
    use: float
    interval: tuple[float, float]
    more_seconds: float | None = None

    @property
    def met(self) -> bool | None:
        """True, false, or None where it is undecided."""
        return flag(self.verdict)


def flag(verdict: Verdict) -> bool | None:
    """Return the verdict as true (met), false (missed) or None (undecided)."""
    return {"met": True, "missed": False, "undecided": None}[verdict]


def verdict_of(interval: tuple[float, float], *, settled: bool = True) -> Verdict:
    """Return what a 95% interval of measured over target proves.

    Args:
        settled: whether the rounds were taken on an undisturbed machine; others prove nothing.
    """
    low, high = interval
    if not settled:
        return "undecided"
    if high <= 1.0 + TOLERANCE:
        return "met"
    return "missed" if low > 1.0 else "undecided"


def judge(
    use: float,
    interval: tuple[float, float],
    *,
    seconds: float | None = None,
    settled: bool = True,
) -> Judgement:
    """Return the verdict of a measurement, and how long it would take to decide an open one.

    Args:
        use: measured over target.
        interval: its 95% interval.
        seconds: that the measurement took so far.
        settled: whether its rounds were taken on an undisturbed machine.
    """
    verdict = verdict_of(interval, settled=settled)
    more = None
    if verdict == "undecided" and settled and seconds is not None:
        more = seconds_to_decide(use, interval, seconds)
    return Judgement(verdict, use, interval, more)


def seconds_to_decide(use: float, interval: tuple[float, float], seconds: float) -> float | None:
    """Return how many more seconds would narrow the interval until it proves something.

    A half width shrinks with the square root of the rounds, that is of the time. The estimate holds
    if the network really is where it was measured; None without a finite interval.

    Args:
        seconds: that the interval took so far.
    """
    low, high = interval
    if not (math.isfinite(low) and math.isfinite(high)) or low <= 0.0:
        return None
    needed = []
    if use < 1.0 + TOLERANCE:
        needed.append((high - use) / (1.0 + TOLERANCE - use))
    if use > 1.0:
        needed.append((use - low) / (use - 1.0))
    return max(0.0, seconds * (min(needed) ** 2 - 1.0))


def is_decided(use: float, interval: tuple[float, float]) -> bool:
    """Return whether a measurement in progress may stop: the verdict would hold for an interval
    that is wider by ``SEQUENTIAL``, which makes up for looking at it again and again."""
    low, high = (use + SEQUENTIAL * (end - use) for end in interval)
    return verdict_of((low, high)) != "undecided"
