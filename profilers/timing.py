"""Timing that survives a noisy machine.

A *sample* is a loop of runs long enough for the clock. A *round* opens the subject afresh, warms
it up and takes a few samples; its median is the round's value. Rounds of all subjects are taken
in shuffled order and spread over the session, and each is divided by what a reference kernel,
timed around it, says about the machine at that moment. Intervals come from the variation
*between* rounds: samples within a round are not independent. (The habit is pyperf's.)
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

Clock = Callable[[], float]
"""Seconds, monotonic."""

LEAST_ROUNDS = 3


class Runner:
    """A compiled model, ready to run on inputs that it holds.

    A backend on a device with a clock of its own overrides ``elapsed_ms``.
    """

    def __init__(self, run: Callable[[], object], clock: Clock = time.perf_counter) -> None:
        self._run = run
        self._clock = clock

    def elapsed_ms(self, loops: int) -> float:
        """Milliseconds that ``loops`` runs took, one after the other."""
        run = self._run
        start = self._clock()
        for _ in range(loops):
            run()
        return (self._clock() - start) * 1e3

    def take_round(self, plan: SamplePlan) -> Round:
        """Warm up, choose the loop count, and take one round."""
        once = [self.elapsed_ms(1) for _ in range(2)]
        per_run = max(once[-1], 1e-4)
        warm = max(1, min(1000, round(plan.warmup_ms / per_run)))
        per_run = max(self.elapsed_ms(warm) / warm, 1e-4)
        loops = max(1, min(100_000, int(np.ceil(plan.sample_ms / per_run))))
        samples = [self.elapsed_ms(loops) / loops for _ in range(plan.samples)]
        low, middle, high = np.percentile(samples, [10, 50, 90])
        return Round(float(middle), float(low), float(high), plan.samples, loops)


Subject = Callable[[], AbstractContextManager[Runner]]
"""Opens a fresh runner; closing it frees the device and its threads."""


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """How one round is taken.

    Args:
        sample_ms: least length of a sample; runs are looped until it is reached.
        samples: samples a round.
        warmup_ms: discarded runs at the start of a round, at least two of them.
    """

    sample_ms: float = 4.0
    samples: int = 5
    warmup_ms: float = 10.0


@dataclass(frozen=True, slots=True)
class Round:
    """One round of one subject: statistics of its samples, in ms a run."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    samples: int
    loops: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """What several rounds say together.

    ``median_ms`` is the median of the rounds' (drift-corrected) medians, ``ci95_ms`` its 95%
    interval from the variation between rounds.

    Args:
        disturbed: rounds that were set aside, because other programs ran during them.
        settled: whether it rests on rounds of an undisturbed machine, as far as is known.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    ci95_ms: tuple[float, float]
    rounds: int
    drift: float
    round_ms: tuple[float, ...] = field(repr=False, default=())
    disturbed: int = 0
    settled: bool = True

    @property
    def half_width_pct(self) -> float:
        """Half the interval in per cent of the median."""
        low, high = self.ci95_ms
        return 50.0 * (high - low) / self.median_ms

    @property
    def warning(self) -> str | None:
        """What is wrong with it, with the numbers and the next step; None when nothing is."""
        if self.rounds < 3:
            return None
        if self.half_width_pct > 5.0:
            return (
                f"noisy: {self.median_ms:.4g} ms has a 95% interval of "
                f"{self.ci95_ms[0]:.4g} to {self.ci95_ms[1]:.4g} ms (more than ±5%) after "
                f"{self.rounds} rounds; stop other programs or allow more time"
            )
        return None


def summarize(rounds: Sequence[Round], drifts: Sequence[float] | None = None) -> Measurement:
    """Combine rounds of one subject.

    Args:
        rounds: at least one.
        drifts: how much slower than nominal the machine was at each (1 = nominal).
    """
    drifts = drifts or [1.0] * len(rounds)
    pairs = list(zip(rounds, drifts, strict=True))
    values = [r.median_ms / d for r, d in pairs]
    center = statistics.median(values)
    return Measurement(
        median_ms=center,
        p10_ms=float(np.percentile([r.p10_ms / d for r, d in pairs], 10)),
        p90_ms=float(np.percentile([r.p90_ms / d for r, d in pairs], 90)),
        ci95_ms=median_interval(values),
        rounds=len(rounds),
        drift=statistics.median(drifts),
        round_ms=tuple(values),
    )


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the median of independent round values.

    Student's t on the median's asymptotic standard error (1.2533 times the mean's), with a
    spread estimated from the interquartile range for 5 values and more, so that one disturbed
    round does not widen it. A single value gives no interval: (0, inf).
    """
    count = len(values)
    center = statistics.median(values)
    if count < 2:
        return 0.0, float("inf")
    spread = float(np.std(values, ddof=1))
    if count >= 5:
        low, high = np.percentile(values, [25, 75])
        spread = min(spread, float(high - low) / 1.349)
    from scipy.special import stdtrit  # here: a worker process starts faster without it

    half = float(stdtrit(count - 1, 0.975)) * 1.2533 * spread / count**0.5
    return max(0.0, center - half), center + half


def measure_interleaved(
    subjects: Mapping[str, Subject],
    *,
    plan: SamplePlan | None = None,
    min_rounds: int = 5,
    max_rounds: int = 100,
    half_width_pct: float = 1.0,
    time_limit_s: float = 60.0,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    before_round: Callable[[], None] | None = None,
    on_round: Callable[[int], None] | None = None,
    is_enough: Callable[[Mapping[str, Measurement]], bool] | None = None,
) -> dict[str, Measurement]:
    """Measure several subjects against each other: shuffled rounds until the intervals are narrow.

    Args:
        subjects: what to time, by name.
        min_rounds, max_rounds: bounds on the rounds of each.
        half_width_pct: stop once every interval's half width is at most this (% of the median).
        time_limit_s: stop after this time all the same, also before ``min_rounds`` (but never
            before ``LEAST_ROUNDS``, without which there is no interval).
        before_round: makes rounds independent of each other (``Backend.renew``).
        on_round: called with the number of finished rounds.
        is_enough: asked from ``min_rounds`` on about the measurements so far; its word counts in
            place of ``half_width_pct``.
    """
    plan = plan or SamplePlan()
    order = list(subjects)
    shuffler = random.Random(seed)
    rounds: dict[str, list[Round]] = {name: [] for name in order}
    start = clock()
    for number in range(1, max_rounds + 1):
        shuffler.shuffle(order)
        if before_round:
            before_round()
        for name in order:
            with subjects[name]() as runner:
                rounds[name].append(runner.take_round(plan))
        if on_round:
            on_round(number)
        if number < LEAST_ROUNDS:
            continue
        so_far = {name: summarize(taken) for name, taken in rounds.items()}
        if number >= min_rounds:
            widest = max(m.half_width_pct for m in so_far.values())
            if is_enough(so_far) if is_enough else widest <= half_width_pct:
                break
        if clock() - start > time_limit_s:
            break
    return {name: summarize(taken) for name, taken in rounds.items()}


def ratio(numerator: Measurement, denominator: Measurement) -> tuple[float, tuple[float, float]]:
    """Median of the round-by-round ratios and its 95% interval: drift cancels within a round."""
    pairs = zip(numerator.round_ms, denominator.round_ms, strict=True)
    ratios = [a / b for a, b in pairs]
    return statistics.median(ratios), median_interval(ratios)


def paired(subject: Measurement, base: Measurement) -> Measurement:
    """``subject`` at the speed at which ``base`` took its median time.

    Both were timed in the same rounds; the ratio of a round is free of what slowed both of them,
    which the median of either alone is not.
    """
    value, (low, high) = ratio(subject, base)
    return dataclasses.replace(
        subject,
        median_ms=value * base.median_ms,
        ci95_ms=(low * base.median_ms, high * base.median_ms),
    )
