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

from profilers.host import HostWatch
from profilers.speed import FastWait, Speed, SpeedsSeen

Clock = Callable[[], float]
"""Seconds, monotonic."""

LEAST_ROUNDS = 3
WIDE_PCT = 5.0
"""Half width of an interval, in % of the median, from which a measurement is called noisy."""
LOST = 0.05
"""Part of a round's time that others may take from it unnoticed."""
FASTEST_REACH = 3.0
"""Standard errors below the fastest round, in which the undisturbed time lies in 95% of cases: the
lowest of n values above a floor is above it by less than 3/n of their mean excess."""
CORRELATION = 1.55
"""How much less a round says because neighbours are alike: the variance of the median of many
rounds whose neighbours correlate by 0.3, over that of independent ones (the sum over distances k of
2/pi arcsin 0.3^k)."""
RANKED = 11
"""Values from which the interval lies between two of them and leaves the slowest out."""
FEW_ROUNDS_FACTOR = {2: 23.0, 3: 7.0} | {n: 3.05 * (1.0 + 3.6 / (n - 2)) for n in range(4, RANKED)}
"""Half of the interval in standard errors of the mean, by the number of rounds. Fitted to
simulations of normal and log-normal rounds whose neighbours correlate by 0.3; for two and three
rounds only for independent normal ones: Student's t at 1.25 times the mean's standard error."""
TURNS = 3
"""Rounds of a subject in a row, while the machine is not in its fast state."""
WAITS = 4
"""Part of the time for measuring that one wait for the machine's fast state may take."""
MEDIAN_OVER_MEAN = 1.25
"""Standard error of the median of normal values over that of their mean."""
SETTLED_ROUNDS = 5
"""Rounds in the fast state, without disturbance, on which a measurement may rest."""


class Runner:
    """A compiled model, ready to run on inputs that it holds.

    A backend on a device with a clock of its own overrides ``elapsed_ms``.

    Args:
        watch: sees what others take from this process during a round; None where nobody looks.
    """

    _host: HostWatch | None = None

    def __init__(
        self,
        run: Callable[[], object],
        clock: Clock = time.perf_counter,
        watch: HostWatch | None = None,
    ) -> None:
        self._run = run
        self._clock = clock
        self._host = watch

    def elapsed_ms(self, loops: int) -> float:
        """Milliseconds that ``loops`` runs took, one after the other."""
        run = self._run
        start = self._clock()
        for _ in range(loops):
            run()
        return (self._clock() - start) * 1e3

    def speed(self) -> Speed | None:
        """How fast the machine is now; None where nobody reads it."""
        return None

    def take_round(self, plan: SamplePlan) -> Round:
        """Warm up, choose the loop count, and take one round."""
        before = self._host.read() if self._host else None
        once = [self.elapsed_ms(1) for _ in range(2)]
        per_run = max(once[-1], 1e-4)
        left_ms = plan.warmup_ms - sum(once)
        if left_ms > 0:  # the runs of a large network have warmed it up already
            warm = max(1, min(1000, round(left_ms / per_run)))
            per_run = max(self.elapsed_ms(warm) / warm, 1e-4)
        loops = max(1, min(100_000, int(np.ceil(plan.sample_ms / per_run))))
        samples = [self.elapsed_ms(loops) / loops for _ in range(plan.samples)]
        lost = self._host.since(before).lost if self._host and before else None
        low, middle, high = np.percentile(samples, [10, 50, 90])
        return Round(float(middle), float(low), float(high), plan.samples, loops, lost)


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
    """One round of one subject: statistics of its samples, in ms a run.

    Args:
        lost: what others took of the processor meanwhile, as a part of the round's time; None
            where the system does not tell.
        speed: of the machine, the slower of before and after; None where nobody reads it.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    samples: int
    loops: int
    lost: float | None = None
    speed: Speed | None = None

    @property
    def disturbed(self) -> bool:
        """Whether others took more than ``LOST`` of the round's time, as far as is known."""
        return self.lost is not None and self.lost > LOST

    def counts(self, fast: Speed | None) -> bool:
        """Whether it was undisturbed, and in the machine's fast state, as far as is known."""
        return not self.disturbed and (self.speed is None or self.speed.is_fast(fast))


@dataclass(frozen=True, slots=True)
class Measurement:
    """What several rounds say together.

    ``median_ms`` is the median of the rounds' (drift-corrected) medians, ``ci95_ms`` its 95%
    interval from the variation between rounds.

    Args:
        disturbed: rounds that were set aside, because others had the processor or the machine
            was slower than it can be.
        taken: rounds in all; 0 where it is not known.
        fastest_ms: of the rounds' 10th percentiles the lowest: disturbance only ever slows down,
            and short bursts that no reading sees do so in one round or two of ten.
        fastest_error_ms: its standard error, if what slows rounds down is distributed
            exponentially: the distance to the next round's. ``FASTEST_REACH`` of them below it
            begins its 95% interval. 0 for a single round.
        settled: whether it rests on enough rounds that were not; True where nothing is known.
        lost: what others took of the processor, as a part of the time of all rounds, those that
            were set aside too; None where the system does not tell.
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
    lost: float | None = None
    taken: int = 0
    fastest_ms: float = 0.0
    fastest_error_ms: float = 0.0

    @property
    def half_width_pct(self) -> float:
        """Half the interval in per cent of the median."""
        low, high = self.ci95_ms
        return 50.0 * (high - low) / self.median_ms

    @property
    def warning(self) -> str | None:
        """What is wrong with it, with the numbers and the next step; None when nothing is."""
        if not self.settled:
            return (
                f"disturbed: in {self.disturbed} of {self.taken} rounds other programs had the "
                "processor, or the machine was slower than it can be; stop other "
                "programs, allow more time, or measure again later"
            )
        if self.rounds < LEAST_ROUNDS or self.half_width_pct <= WIDE_PCT:
            return None
        return (
            f"noisy: {self.median_ms:.4g} ms has a 95% interval of "
            f"{self.ci95_ms[0]:.4g} to {self.ci95_ms[1]:.4g} ms (more than ±{WIDE_PCT:g}%) after "
            f"{self.rounds} rounds; stop other programs or allow more time"
        )


def summarize(
    rounds: Sequence[Round],
    drifts: Sequence[float] | None = None,
    *,
    disturbed: int = 0,
    settled: bool = True,
    taken: int | None = None,
) -> Measurement:
    """Combine rounds of one subject.

    Args:
        rounds: at least one.
        drifts: how much slower than nominal the machine was at each (1 = nominal).
        disturbed, settled, taken: see ``Measurement``.
    """
    drifts = drifts or [1.0] * len(rounds)
    pairs = list(zip(rounds, drifts, strict=True))
    values = [r.median_ms / d for r, d in pairs]
    lows = sorted(r.p10_ms / d for r, d in pairs)
    center = statistics.median(values)
    return Measurement(
        median_ms=center,
        p10_ms=float(np.percentile([r.p10_ms / d for r, d in pairs], 10)),
        p90_ms=float(np.percentile([r.p90_ms / d for r, d in pairs], 90)),
        ci95_ms=median_interval(values),
        rounds=len(rounds),
        drift=statistics.median(drifts),
        round_ms=tuple(values),
        disturbed=disturbed,
        settled=settled,
        taken=len(rounds) if taken is None else taken,
        fastest_ms=lows[0],
        fastest_error_ms=(lows[1] - lows[0]) * (1 - 1 / len(lows)) if len(lows) > 1 else 0.0,
    )


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the median of round values, in the order in which they were taken or not.

    From ``RANKED`` values on between two of the sorted values (order statistics): free of any
    assumption on their distribution, and several disturbed rounds do not move it. Fewer values give
    no such interval that leaves out the slowest; there it is the median and some standard errors,
    by the standard deviation of all but the slowest. Both are wider than independent rounds need,
    by ``CORRELATION``. A single value gives no interval: (0, inf).
    """
    count = len(values)
    if count < 2:
        return 0.0, float("inf")
    ordered = sorted(values)
    center = statistics.median(ordered)
    if count >= RANKED:
        reach = 0.5 * 1.96 * (count * CORRELATION) ** 0.5
        middle = (count - 1) / 2
        low, high = np.interp([middle - reach, middle + reach], range(count), ordered)
        return float(low), float(high)
    calm = ordered[:-1] if count > 3 else ordered
    half = FEW_ROUNDS_FACTOR[count] * float(np.std(calm, ddof=1)) / count**0.5
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
    fast: Speed | None = None,
    wait: Callable[[], object] | None = None,
) -> dict[str, Measurement]:
    """Measure several subjects against each other: shuffled rounds until the intervals are narrow.

    A pass is a round of each, begun when the machine is in its fast state (``FastWait``). Passes
    during which others had the processor, or the machine was slower, are taken again as far as the
    time allows, and do not count where there are enough others.

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
        fast: the machine's fast state, where it was seen before.
        wait: called after a pass that others disturbed (``Patience.wait``).
    """
    plan = plan or SamplePlan()
    order = list(subjects)
    shuffler = random.Random(seed)
    passes: list[Pass] = []
    seen = SpeedsSeen(fast)
    ready = FastWait(lambda: seen.fast, time_limit_s / WAITS)
    start = clock()
    for number in range(1, 2 * max_rounds + 1):
        shuffler.shuffle(order)
        if before_round:
            before_round()
        taken, slower = {}, 0
        for name in order:
            with subjects[name]() as runner:
                rounds = rounds_in_turn(runner, plan, ready)
            for one in rounds:
                seen.add(one.speed)
            taken[name] = rounds[-1]
            slower += len(rounds) - 1
        passes.append(Pass(taken, slower))
        if on_round:
            on_round(number)
        if wait and passes[-1].disturbed:
            wait()
        if number < LEAST_ROUNDS:
            continue
        count = len(undisturbed(passes, fast))
        if count >= min_rounds:
            so_far = _combined(list(subjects), passes, fast, min_rounds)
            widest = max(m.half_width_pct for m in so_far.values())
            if is_enough(so_far) if is_enough else widest <= half_width_pct:
                break
        if clock() - start > time_limit_s or count >= max_rounds:
            break
    return _combined(list(subjects), passes, fast, min_rounds)


def rounds_in_turn(runner: Runner, plan: SamplePlan, ready: FastWait) -> list[Round]:
    """Rounds of a subject that is open, up to the first in the machine's fast state.

    At most ``TURNS``: opening a subject takes as long as a round.

    Args:
        ready: waits before each, and says which is of the fast state.
    """
    rounds: list[Round] = []
    while len(rounds) < TURNS:
        ready.wait(runner)
        rounds.append(runner.take_round(plan))
        if ready.is_fast(rounds[-1].speed):
            break
    return rounds


@dataclass(frozen=True, slots=True)
class Pass:
    """A round of each subject.

    Args:
        slower: rounds before these that were not of the machine's fast state.
    """

    rounds: dict[str, Round]
    slower: int = 0

    @property
    def disturbed(self) -> bool:
        """Whether others took the processor from any of its rounds."""
        return any(r.disturbed for r in self.rounds.values())


def undisturbed(passes: Sequence[Pass], fast: Speed | None = None) -> list[Pass]:
    """The passes in which nobody took the processor, and the machine was in its fast state.

    Args:
        fast: that state, where it was seen before.
    """
    seen = SpeedsSeen(fast)
    for one in passes:
        for taken in one.rounds.values():
            seen.add(taken.speed)
    return [p for p in passes if all(r.counts(seen.fast) for r in p.rounds.values())]


def _combined(
    names: Sequence[str], passes: Sequence[Pass], fast: Speed | None, min_rounds: int
) -> dict[str, Measurement]:
    kept = undisturbed(passes, fast)
    settled = len(kept) >= min(min_rounds, SETTLED_ROUNDS, len(passes))
    used = kept if len(kept) > 1 else passes
    lost = [r.lost for p in passes for r in p.rounds.values() if r.lost is not None]
    slower = sum(p.slower for p in passes)
    found = {}
    for name in names:
        measured = summarize(
            [p.rounds[name] for p in used],
            disturbed=len(passes) - len(kept) + slower,
            settled=settled,
            taken=len(passes) + slower,
        )
        found[name] = dataclasses.replace(measured, lost=statistics.fmean(lost) if lost else None)
    return found


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
