"""What NVIDIA's management library says of a card: who it is, and whether it is being held back.

Read only: nothing here changes a setting of a card. ``lock_clock_commands`` are for the user.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

THROTTLE_REASONS = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
"""Bits of nvmlClocksEventReasons that mean the card runs slower than it was asked to. The others
(idle, application clocks, sync boost, display clock) are settings or rest."""

SLOW_CLOCK = 0.8
"""An SM clock below this part of the fastest seen means the card was not at speed (yet)."""


class NvmlAbsent(Exception):
    """NVML cannot be asked about a card; the message says why."""


@dataclass(frozen=True, slots=True)
class GpuFingerprint:
    """A card. ``uuid_sha256`` tells two cards apart without naming one."""

    name: str
    uuid_sha256: str
    driver: str
    compute_capability: str
    memory_mib: int
    power_limit_w: int
    sm_clock_max_mhz: int
    memory_clock_max_mhz: int

    def provenance(self) -> dict[str, str | int]:
        """Fields of a table's header."""
        return {
            "device": f"{self.name} (sm_{self.compute_capability.replace('.', '')})",
            "driver": self.driver,
            "memory_mib": self.memory_mib,
            "power_limit_w": self.power_limit_w,
            "sm_clock_max_mhz": self.sm_clock_max_mhz,
            "memory_clock_max_mhz": self.memory_clock_max_mhz,
            "uuid_sha256": self.uuid_sha256,
        }


@dataclass(frozen=True, slots=True)
class Reading:
    """A card at one moment; None where it does not say."""

    throttle_mask: int
    temperature_c: int | None
    sm_clock_mhz: int | None
    power_w: float | None
    other_processes: int

    @property
    def throttling(self) -> tuple[str, ...]:
        """Names of what holds the card back."""
        return tuple(name for bit, name in THROTTLE_REASONS.items() if self.throttle_mask & bit)


def hashed(uuid: str) -> str:
    """The first 12 hex digits of a UUID's SHA-256."""
    return hashlib.sha256(uuid.encode()).hexdigest()[:12]


class Card:
    """One card, by the UUID that CUDA gives for it (NVML may count cards in another order).

    Args:
        uuid: with or without the prefix ``GPU-``.
        nvml: the ``pynvml`` module, or a fake of it.

    Raises:
        NvmlAbsent: no library, no driver, or no such card.
    """

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        self._nvml = nvml if nvml is not None else _library()
        self._uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(self._uuid)
        except self._nvml.NVMLError as error:
            raise NvmlAbsent(f"NVML does not know the card ({error})") from error

    def fingerprint(self) -> GpuFingerprint:
        """Who the card is.

        Raises:
            NvmlAbsent: NVML does not say, as in some containers and virtual machines.
        """
        nvml, handle = self._nvml, self._handle
        try:
            name, driver = nvml.nvmlDeviceGetName(handle), nvml.nvmlSystemGetDriverVersion()
            major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle).total
        except nvml.NVMLError as error:
            raise NvmlAbsent(f"NVML does not tell what the card is ({error})") from error
        return GpuFingerprint(
            name=_text(name),
            uuid_sha256=hashed(self._uuid),
            driver=_text(driver),
            compute_capability=f"{major}.{minor}",
            memory_mib=memory // 2**20,
            power_limit_w=self._ask("nvmlDeviceGetEnforcedPowerLimit", 0) // 1000,
            sm_clock_max_mhz=self._ask("nvmlDeviceGetMaxClockInfo", 0, nvml.NVML_CLOCK_SM),
            memory_clock_max_mhz=self._ask("nvmlDeviceGetMaxClockInfo", 0, nvml.NVML_CLOCK_MEM),
        )

    def read(self, own_pids: Collection[int] = ()) -> Reading:
        """The card now; processes other than ``own_pids`` are counted."""
        nvml = self._nvml
        power = self._ask("nvmlDeviceGetPowerUsage", None)
        return Reading(
            throttle_mask=self._throttle_mask(),
            temperature_c=self._ask("nvmlDeviceGetTemperature", None, nvml.NVML_TEMPERATURE_GPU),
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", None, nvml.NVML_CLOCK_SM),
            power_w=None if power is None else power / 1000,
            other_processes=self._others(own_pids),
        )

    def index(self) -> int:
        """Its number for nvidia-smi."""
        return self._ask("nvmlDeviceGetIndex", 0)

    def energy_mj(self) -> int | None:
        """Millijoules since the driver was loaded; None where the card does not count them."""
        return self._ask("nvmlDeviceGetTotalEnergyConsumption", None)

    def _throttle_mask(self) -> int:
        for name in (
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetCurrentClocksThrottleReasons",  # its name before driver 535
        ):
            if hasattr(self._nvml, name) and (mask := self._ask(name, None)) is not None:
                return mask
        return 0

    def _others(self, own_pids: Collection[int]) -> int:
        running = self._ask("nvmlDeviceGetComputeRunningProcesses", None) or ()
        pids = {process.pid for process in running}
        own = pids & set(own_pids)
        if not own:  # a container: the driver counts in another namespace
            return max(0, len(pids) - len(own_pids))
        return len(pids - own)

    def _ask(self, name: str, otherwise: Any, *arguments: Any) -> Any:
        """A query that not every card answers; what it does not support is ``otherwise``."""
        try:
            return getattr(self._nvml, name)(self._handle, *arguments)
        except self._nvml.NVMLError:
            return otherwise


class Watch:
    """Watches a card while it is measured: which rounds count, and what went on.

    Args:
        card: None where NVML is absent: every round counts then.
        own_pids: gives the processes that belong to the measurement.
    """

    def __init__(self, card: Card | None, own_pids: Callable[[], Collection[int]]) -> None:
        self.card = card
        self._own_pids = own_pids
        self._fastest_mhz = 0
        self._held_mhz: int | None = None
        self.dropped: Counter[str] = Counter()
        self.kept_throttled = 0
        self.kept_in_a_row = 0
        self.most_others = 0
        self.hottest_c: int | None = None

    def held_back(self, before: Reading | None) -> tuple[str, ...]:
        """What held the card back between ``before`` and now; empty if nothing did."""
        if self.card is None or before is None:
            return ()
        after = self.read()
        assert after is not None
        found = dict.fromkeys([*before.throttling, *after.throttling])
        clock = after.sm_clock_mhz
        if found and clock is not None:
            self._held_mhz = min(clock, self._held_mhz or clock)
        if clock is not None:
            self._fastest_mhz = max(self._fastest_mhz, clock)
            if clock < SLOW_CLOCK * self._fastest_mhz:
                found["clock not at speed"] = None
        return tuple(found)

    def read(self) -> Reading | None:
        """The card now; its extremes are remembered."""
        if self.card is None:
            return None
        reading = self.card.read(self._own_pids())
        self.most_others = max(self.most_others, reading.other_processes)
        if reading.temperature_c is not None:
            self.hottest_c = max(self.hottest_c or 0, reading.temperature_c)
        return reading

    def drop(self, reasons: Collection[str]) -> None:
        """Count a round that is taken again."""
        self.dropped.update(reasons)

    def keep_throttled(self) -> None:
        """Count a round that is kept although the card was held back."""
        self.kept_throttled += 1
        self.kept_in_a_row += 1

    def observations(self) -> tuple[str, ...]:
        """What a user should know of the card during the measurement; empty if it was quiet."""
        found = []
        if self.dropped:
            counts = ", ".join(f"{reason} {count}" for reason, count in self.dropped.items())
            found.append(f"rounds dropped because the card was held back: {counts}")
        if self.kept_throttled:
            index = 0 if self.card is None else self.card.index()
            lock, release = lock_clock_commands(index, self._held_mhz)
            found.append(
                f"{self.kept_throttled} rounds were kept although the card was held back every "
                f"time; lock its clocks:  {lock}  (and afterwards:  {release})"
            )
        if self.most_others:
            found.append(f"other processes used the card meanwhile: up to {self.most_others}")
        return tuple(found)


def energy_per_run_mj(
    card: Card, run_for: Callable[[float], int], seconds: float = 2.0
) -> float | None:
    """Millijoules of the whole card for one run; None where the card does not count energy.

    The counter moves every 20 to 100 ms, so that 2 seconds are good to some 5%.

    Args:
        run_for: runs the network for about so many seconds and returns how often it ran.
    """
    before = card.energy_mj()
    if before is None:
        return None
    runs = run_for(seconds)
    after = card.energy_mj()
    return None if after is None else (after - before) / runs


def lock_clock_commands(index: int = 0, sm_clock_mhz: int | None = None) -> tuple[str, str]:
    """(lock, release): for a user with the rights to run them; this project never does.

    Args:
        sm_clock_mhz: one that the card keeps up, as the lowest to which it was held back.
    """
    clock = sm_clock_mhz or "MHZ"
    return (
        f"sudo nvidia-smi -i {index} --lock-gpu-clocks={clock},{clock}",
        f"sudo nvidia-smi -i {index} --reset-gpu-clocks",
    )


def measuring_pids() -> Collection[int]:
    """The processes that this one started, and itself where it has used a card (trained on it)."""
    import psutil

    torch = sys.modules.get("torch")
    own = {os.getpid()} if torch is not None and torch.cuda.is_initialized() else set()
    return own | {child.pid for child in psutil.Process().children()}


def _library() -> Any:
    with contextlib.suppress(ImportError):
        import pynvml

        return _checked(pynvml)
    raise NvmlAbsent("nvidia-ml-py is not installed (pip install nvidia-ml-py)")


def _checked(nvml: Any) -> Any:
    """A module that can be initialized: its shared library comes with the driver."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise NvmlAbsent(f"NVML does not start ({error}): no NVIDIA driver here") from error
    return nvml


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
