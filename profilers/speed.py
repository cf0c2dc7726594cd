"""How fast the machine is at the moment, by two reference kernels: and waiting for its fast state.

A virtual machine's processors are half of a core each where the host runs other guests on the
other half: a core at work on both is slower by 1.6 to 1.9 times, for tenths of a second or for
minutes, and nothing inside the machine counts it (seen on a 2-processor guest; steal time stayed at
0). Memory and the shared caches have states too. Disturbance only ever slows down, so what counts
is the fast state.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from profilers.timing import Runner

FAST_QUANTILE = 0.1
"""Of the readings: the machine's fast state, if it was seen as often as that."""
COMPUTE_SLOW = 1.3
"""Times its time in the fast state, from which the computing kernel says: another state. In four
profiles on such a guest (7,600 rounds), rounds with readings up to 1.15 took 1.00 to 1.06 times
their fastest (medians, by layers and networks), from 1.15 to 1.3 1.01 to 1.07, and above 1.6 1.6 to
1.8; what lay between was one or the other."""
MEMORY_SLOW = 2.0
"""The same of the kernel that is bound by memory. It tells how much of the shared cache the host's
other guests leave, which layers and networks hardly feel: in two profiles on a 2-processor EPYC
guest (3,100 rounds) those with readings of 1.4 to 2.0 took 0.98 to 1.04 times as long as the others
(medians), those above 2.0 1.06."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Times of the reference kernels, ms: bound by computing, and by memory."""

    compute_ms: float
    memory_ms: float

    def is_fast(self, fast: Speed | None) -> bool:
        """Whether this is the machine's fast state, as far as is known."""
        return fast is None or (
            self.compute_ms <= COMPUTE_SLOW * fast.compute_ms
            and self.memory_ms <= MEMORY_SLOW * fast.memory_ms
        )

    def slowest(self, other: Speed) -> Speed:
        """The larger of each."""
        return Speed(max(self.compute_ms, other.compute_ms), max(self.memory_ms, other.memory_ms))


class SpeedsSeen:
    """Readings of the references, and what they say of the fast state.

    Args:
        known: the fast state as it was seen before.
    """

    def __init__(self, known: Speed | None = None) -> None:
        self._known = known
        self._compute: list[float] = []
        self._memory: list[float] = []

    def add(self, speed: Speed | None) -> None:
        """One more reading; None is none."""
        if speed is not None:
            bisect.insort(self._compute, speed.compute_ms)
            bisect.insort(self._memory, speed.memory_ms)

    @property
    def fast(self) -> Speed | None:
        """The fast state; None without readings."""
        if not self._compute:
            return self._known
        at = int(FAST_QUANTILE * len(self._compute))
        seen = Speed(self._compute[at], self._memory[at])
        if self._known is None:
            return seen
        known = self._known
        return Speed(min(known.compute_ms, seen.compute_ms), min(known.memory_ms, seen.memory_ms))

    @property
    def nominal_compute_ms(self) -> float | None:
        """The median of the computing kernel's readings in the fast state."""
        if not self._compute:
            return None if self._known is None else self._known.compute_ms
        limit = COMPUTE_SLOW * self._compute[int(FAST_QUANTILE * len(self._compute))]
        return self._compute[bisect.bisect_right(self._compute, limit) // 2]


class FastWait:
    """Waits, before a round, until the machine is in its fast state; not for ever.

    Where it does not come back within ``limit_s``, waiting is given up for three times as long:
    rounds are taken as the machine is, and are told for what they are by their own readings.

    Args:
        fast: asked for the fast state, as far as it is known.
        limit_s: longest wait.
        on_notice: told when waiting is given up.
        clock, sleep: tests give others.
    """

    PAUSE_S = 0.01

    def __init__(
        self,
        fast: Callable[[], Speed | None],
        limit_s: float = 5.0,
        on_notice: Callable[[str], None] | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._fast, self._limit_s, self._on_notice = fast, limit_s, on_notice
        self._clock, self._sleep = clock, sleep
        self._resumes_at = float("-inf")

    def wait(self, runner: Runner) -> bool:
        """Wait; returns whether the machine is in its fast state, as far as is known."""
        fast, started = self._fast(), self._clock()
        if fast is None or started < self._resumes_at:
            return fast is None
        while not self.is_fast(speed := runner.speed()):
            assert speed is not None
            if self._clock() - started > self._limit_s:
                self._give_up(speed, fast)
                return False
            self._sleep(self.PAUSE_S)
        return True

    def is_fast(self, speed: Speed | None) -> bool:
        """Whether a reading is of the fast state, as far as is known; None is no reading."""
        return speed is None or speed.is_fast(self._fast())

    def _give_up(self, speed: Speed, fast: Speed) -> None:
        self._resumes_at = self._clock() + 3.0 * self._limit_s
        if self._on_notice:
            slower = max(speed.compute_ms / fast.compute_ms, speed.memory_ms / fast.memory_ms)
            self._on_notice(
                f"the machine has been {slower:.1f} times slower than it can be for "
                f"{self._limit_s:.0f} s now: other programs keep it busy, or other guests of its "
                "host do; measuring goes on, and such rounds do not count where there are others: "
                "stop programs (top shows which), or measure later if it stays so"
            )
