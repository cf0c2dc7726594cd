"""What the host gives this process, and what others on it take away meanwhile.

Nothing here is needed to measure: on systems without ``/proc`` every answer is "not known"
(``None``), and a measurement that rests on it says so by saying nothing.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

CPU_FEATURES = ("sse4_2", "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile",
                "asimd", "sve", "bf16", "i8mm")  # fmt: skip
PROC = Path("/proc")
SYS = Path("/sys")


# -- what there is -------------------------------------------------------------------------------


def cpu_identity(proc: Path = PROC) -> tuple[str, str]:
    """Tell the processor's model name, and the features that runtimes' kernels depend on."""
    try:
        text = (proc / "cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor() or platform.machine(), platform.machine()
    lines = dict([part.strip() for part in x.split(":", 1)] for x in text.splitlines() if ":" in x)
    name = lines.get("model name") or platform.machine()
    if "cpu family" in lines:
        name += f" family {lines['cpu family']} model {lines['model']}"
    flags = set((lines.get("flags") or lines.get("Features") or "").split())
    return name, " ".join(f for f in CPU_FEATURES if f in flags)


def available_cpus(
    affinity: Collection[int] | None = None, proc: Path = PROC, sys: Path = SYS
) -> int:
    """Count the physical cores that this process may use: the threads that a runtime should have.

    The cores of its affinity (``taskset``, cpusets), at most as many whole ones as its cgroups'
    quota pays for (``docker run --cpus``), and at least one.

    Args:
        affinity: logical processors; those that the system allows this process if not given.
        proc, sys: where the system tells.
    """
    allowed = _affinity() if affinity is None else set(affinity)
    cores = {_core(cpu, sys) for cpu in allowed} if allowed else set()
    count = len(cores) or _physical_cores()
    quota = cgroup_quota(proc, sys)
    return max(1, count if quota is None else min(count, int(quota)))


def one_cpu_per_core(affinity: Collection[int] | None = None, sys: Path = SYS) -> tuple[int, ...]:
    """A logical processor of each core that this process may use; empty where that is not told."""
    allowed = _affinity() if affinity is None else set(affinity)
    first: dict[tuple[str, ...], int] = {}
    for cpu in sorted(allowed):
        first.setdefault(_core(cpu, sys), cpu)
    return tuple(first.values())


def cgroup_quota(proc: Path = PROC, sys: Path = SYS) -> float | None:
    """Tell how many processors' time this process's cgroups pay for; None without a limit."""
    found = [q for folder in _cgroup_folders(proc, sys) if (q := _quota_of(folder)) is not None]
    return min(found, default=None)


def _affinity() -> set[int]:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set()


def _physical_cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or 1


def _core(cpu: int, sys: Path) -> tuple[str, ...]:
    folder = sys / f"devices/system/cpu/cpu{cpu}/topology"
    try:
        return tuple((folder / n).read_text().strip() for n in ("physical_package_id", "core_id"))
    except OSError:  # a system that does not tell: each logical processor counts
        return (f"cpu {cpu}",)


def _cgroup_folders(proc: Path, sys: Path) -> list[Path]:
    """The folders of this process's CPU cgroups (both versions), each with those around it."""
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots = [sys / "fs/cgroup", sys / "fs/cgroup/unified"]
        elif "cpu" in controllers.split(","):
            roots = [sys / "fs/cgroup" / controllers, sys / "fs/cgroup/cpu"]
        else:
            continue
        for root in roots:
            place = root / path.lstrip("/")  # inside a container, it need not exist
            while place != root and root in place.parents:
                folders.append(place)
                place = place.parent
            folders.append(root)
    return folders


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = (
                (folder / n).read_text() for n in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            )
        return int(quota) / int(period) if quota.strip() != "max" and int(quota) > 0 else None
    except (OSError, ValueError):
        return None


# -- what others take ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HostReading:
    """The system's counters at a moment, in seconds; None where it does not tell.

    Args:
        waited_s: by thread, for a processor that others had, of the watched process.
        own_s: processor time of the watched process.
        busy_s, steal_s: processor time of all processes, and what a hypervisor gave to others.
        stalled_s: during which any process at all waited for a processor.
    """

    at_s: float
    waited_s: dict[str, float] | None
    own_s: float | None
    busy_s: float | None
    steal_s: float | None
    stalled_s: float | None


@dataclass(frozen=True, slots=True)
class HostInterval:
    """What happened between two readings, as parts of the time; None where it is not known.

    Args:
        waited: time that the process's threads were ready and did not run, summed over threads.
        stolen: processors that the hypervisor gave to others.
        others: processors that other processes used (in steps of the system's clock, often 10 ms).
        stalled: part of the time during which any process waited for a processor.
    """

    seconds: float
    waited: float | None
    stolen: float | None
    others: float | None
    stalled: float | None

    @property
    def lost(self) -> float | None:
        """What others took from the process, as a part of the time; None where it is not known."""
        known = [part for part in (self.waited, self.stolen) if part is not None]
        return max(known, default=None)


class HostWatch:
    """Reads what the system counts about one process and about the others.

    Args:
        pid: of the process; this one if not given.
        whole_host: also read what all processes use together (``others``, ``stolen``): the file
            that tells costs a tenth of a millisecond, and more on hosts of many processors.
        proc, clock: where the system tells, and seconds; tests give others.
    """

    def __init__(
        self,
        pid: int | None = None,
        *,
        whole_host: bool = True,
        proc: Path = PROC,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._process = proc / ("self" if pid is None else str(pid))
        self._proc, self._clock = proc, clock
        self._whole_host = whole_host
        self._tick_s = 1.0 / (os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100)

    def read(self) -> HostReading:
        """Read the counters now."""
        busy, steal = self._all() if self._whole_host else (None, None)
        return HostReading(
            at_s=self._clock(),
            waited_s=self._waits(),
            own_s=self._own() if self._whole_host else None,
            busy_s=busy,
            steal_s=steal,
            stalled_s=self._stalled() if self._whole_host else None,
        )

    def since(self, before: HostReading) -> HostInterval:
        """Tell what happened since ``before``."""
        now = self.read()
        seconds = max(now.at_s - before.at_s, 1e-9)

        def part(later: float | None, earlier: float | None) -> float | None:
            if later is None or earlier is None:
                return None
            return max(0.0, later - earlier) / seconds

        busy, own = part(now.busy_s, before.busy_s), part(now.own_s, before.own_s)
        return HostInterval(
            seconds=seconds,
            waited=_waited(now.waited_s, before.waited_s, seconds),
            stolen=part(now.steal_s, before.steal_s),
            others=None if busy is None or own is None else max(0.0, busy - own),
            stalled=part(now.stalled_s, before.stalled_s),
        )

    def _waits(self) -> dict[str, float] | None:
        """Seconds that each thread waited; of the first thread alone where tasks are hidden."""
        try:
            tasks = [(t.name, t.path) for t in os.scandir(self._process / "task")]
        except OSError:
            tasks = [("", str(self._process))]
        waits = {}
        for name, path in tasks:
            text = _text(Path(path) / "schedstat")
            fields = [] if text is None else text.split()
            if len(fields) == 3:
                waits[name] = int(fields[1]) * 1e-9
        return waits or None

    def _own(self) -> float | None:
        text = _text(self._process / "stat")
        if text is None:
            return None
        fields = text.rpartition(")")[2].split()  # a program's name may hold anything
        return (int(fields[11]) + int(fields[12])) * self._tick_s

    def _all(self) -> tuple[float | None, float | None]:
        text = _text(self._proc / "stat")
        fields = [] if text is None else text.partition("\n")[0].split()
        if len(fields) < 9:
            return None, None
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
        return (user + nice + system + irq + softirq) * self._tick_s, steal * self._tick_s

    def _stalled(self) -> float | None:
        text = _text(self._proc / "pressure/cpu")
        if text is None or not text.startswith("some "):
            return None
        return int(text.partition("\n")[0].rpartition("total=")[2]) * 1e-6


class Patience:
    """Waits, after a disturbed round, until others leave the processors alone; not for ever.

    Programs that compute in bursts leave quiet moments, and waiting for one takes less time than
    rounds that do not count. Where none comes within ``limit_s``, waiting is given up for three
    times as long, and ``told`` says so.

    Args:
        needed: processors that a round uses.
        limit_s: longest wait.
        on_notice: told when waiting is given up.
        affinity, proc, clock, sleep: tests give others.
    """

    WINDOW_S = 0.1
    SLACK = 0.25
    """Processors: idle time is counted in steps of 10 ms, and this process looks at it."""

    def __init__(
        self,
        needed: int,
        limit_s: float = 10.0,
        on_notice: Callable[[str], None] | None = None,
        *,
        affinity: Collection[int] | None = None,
        proc: Path = PROC,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._allowed = _affinity() if affinity is None else set(affinity)
        self._needed, self._limit_s, self._on_notice = needed, limit_s, on_notice
        self._proc, self._clock, self._sleep = proc, clock, sleep
        self._resumes_at = float("-inf")
        self.waited_s = 0.0

    def wait(self) -> bool:
        """Wait for a quiet moment; returns whether there is one, as far as is known."""
        started = self._clock()
        if started < self._resumes_at:
            return False
        while (free := self._free()) is not None and free < self._needed - self.SLACK:
            if self._clock() - started > self._limit_s:
                self._give_up(free)
                break
        else:
            self.waited_s += self._clock() - started
            return True
        self.waited_s += self._clock() - started
        return False

    def _give_up(self, free: float) -> None:
        self._resumes_at = self._clock() + 3.0 * self._limit_s
        if self._on_notice:
            self._on_notice(
                f"other programs leave {free:.1f} of the {self._needed} processors that measuring "
                f"uses, for {self._limit_s:.0f} s now; measuring goes on, and rounds that they "
                "disturb do not count where there are others: stop them (top shows which), or "
                "measure later"
            )

    def _free(self) -> float | None:
        """Processors that are idle at present; None where that is not known, or needs none."""
        before, started = self._idle(), self._clock()
        if before is None or not self._needed:
            return None
        self._sleep(self.WINDOW_S)
        after = self._idle()
        seconds = max(self._clock() - started, 1e-9)
        if after is None:
            return None
        return sum(min(1.0, (s - before.get(cpu, s)) / seconds) for cpu, s in after.items())

    def _idle(self) -> dict[int, float] | None:
        """Idle seconds so far of each processor that this process may use."""
        tick_s = 1.0 / (os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100)
        idle = {}
        for line in (_text(self._proc / "stat") or "").splitlines()[1:]:
            if not line.startswith("cpu"):
                break
            name, *times = line.split()
            if (cpu := int(name[3:])) in self._allowed:
                idle[cpu] = (int(times[3]) + int(times[4])) * tick_s
        return idle or None


def _waited(
    now: dict[str, float] | None, before: dict[str, float] | None, seconds: float
) -> float | None:
    if now is None or before is None:
        return None
    # a thread that was not there before has waited since it was begun
    return sum(max(0.0, s - before.get(thread, 0.0)) for thread, s in now.items()) / seconds


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # not Linux, not allowed, or the process has ended
        return None
