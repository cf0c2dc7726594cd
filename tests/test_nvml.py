"""NVML through a fake of its library: fingerprint, throttling, energy, and its absence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from profilers.cards import cuda_device, nvml
from profilers.cards.nvml import Card, NvmlAbsent, Watch, energy_per_run_mj, measuring_pids
from profilers.timing import SamplePlan
from profilers.workers.isolated import STEADY, TRIES, WatchedRunner

UUID = "GPU-11111111-2222-3333-4444-555555555555"


class NVMLError(Exception):
    pass


class FakeNvml:
    """Answers like a card; a list of masks is used up reading by reading."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, masks: list[int] | None = None, clocks: list[int] | None = None) -> None:
        self.masks, self.clocks = masks or [], clocks or []
        self.pids = [100]
        self.energy = 5_000_000
        self.unsupported: set[str] = set()
        self.writes: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvmlDeviceSet"):
            self.writes.append(name)
        raise AttributeError(name)

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != UUID:
            raise NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetIndex(self, handle: str) -> int:
        return 3

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return b"NVIDIA TEST CARD"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        return (8, 6)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(total=24 * 2**30)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 300_000

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return self.clocks.pop(0) if self.clocks else 1980

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if "power" in self.unsupported:
            raise NVMLError("Not Supported")
        return 250_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if "energy" in self.unsupported:
            raise NVMLError("Not Supported")
        return self.energy

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self.masks.pop(0) if self.masks else 0

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid) for pid in self.pids]


class FakeWorker:
    """Answers rounds with their number, for ms."""

    def __init__(self) -> None:
        self.rounds = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self.rounds += 1
        ms = float(self.rounds)
        return {"median_ms": ms, "p10_ms": ms, "p90_ms": ms, "samples": 1, "loops": 1}


def test_fingerprint_names_the_card_but_not_its_uuid() -> None:
    fingerprint = Card(UUID, FakeNvml()).fingerprint()
    found = fingerprint.provenance()
    assert found["device"] == "NVIDIA TEST CARD (sm_86)"
    assert (found["driver"], found["power_limit_w"], found["memory_mib"]) == ("580.1", 300, 24576)
    assert UUID not in str(found)
    assert UUID.removeprefix("GPU-") not in str(found)
    # with or without the prefix that CUDA leaves out, it is the same card
    assert Card(UUID.removeprefix("GPU-"), FakeNvml()).fingerprint() == fingerprint


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        (0x0, ()),
        (0x1, ()),  # idle
        (0x2 | 0x100, ()),  # application and display clocks: settings
        (0x4, ("software power cap",)),
        (0x8 | 0x40, ("hardware slowdown", "hardware thermal slowdown")),
        (0x20 | 0x80, ("software thermal slowdown", "hardware power brake")),
    ],
)
def test_what_counts_as_throttling(mask: int, names: tuple[str, ...]) -> None:
    assert Card(UUID, FakeNvml([mask])).read().throttling == names


def test_a_throttled_round_is_taken_again_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("profilers.workers.isolated.time.sleep", pauses.append)
    # readings come in pairs, before and after a round: the first two rounds are disturbed
    watch = Watch(Card(UUID, FakeNvml([0, 0x4, 0x20, 0, 0, 0])), lambda: {100})
    worker: Any = FakeWorker()
    taken = WatchedRunner(worker, watch).take_round(SamplePlan())
    assert taken.median_ms == 3.0
    assert dict(watch.dropped) == {"software power cap": 1, "software thermal slowdown": 1}
    assert watch.kept_throttled == 0
    assert pauses[1] == 2 * pauses[0]
    assert "software power cap 1" in watch.observations()[0]


def test_a_card_that_is_always_held_back_is_measured_all_the_same_and_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("profilers.workers.isolated.time.sleep", lambda seconds: None)
    watch = Watch(Card(UUID, FakeNvml([0x4] * 100, clocks=[1980, 1410] * 50)), lambda: {100})
    worker: Any = FakeWorker()
    assert WatchedRunner(worker, watch).take_round(SamplePlan()).median_ms == TRIES
    assert watch.kept_throttled == 1
    said = watch.observations()[1]
    # at the clock to which it was held back, which it keeps up
    assert "sudo nvidia-smi -i 3 --lock-gpu-clocks=1410,1410" in said
    assert "sudo nvidia-smi -i 3 --reset-gpu-clocks" in said


def test_waiting_is_given_up_where_it_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("profilers.workers.isolated.time.sleep", pauses.append)
    library = FakeNvml([0x4] * 2 * (STEADY * TRIES + 5))
    watch = Watch(Card(UUID, library), lambda: {100})
    worker: Any = FakeWorker()
    runner = WatchedRunner(worker, watch)
    for _ in range(STEADY + 5):
        runner.take_round(SamplePlan())
    assert len(pauses) == STEADY * (TRIES - 1)  # and none for the last five
    assert watch.kept_throttled == STEADY + 5
    runner.take_round(SamplePlan())  # the card is at speed again
    library.masks = [0x4, 0x4, 0, 0]
    runner.take_round(SamplePlan())
    assert len(pauses) == STEADY * (TRIES - 1) + 1  # so waiting is of use again


def test_a_clock_that_has_not_risen_yet_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profilers.workers.isolated.time.sleep", lambda seconds: None)
    watch = Watch(Card(UUID, FakeNvml(clocks=[1980, 1980, 1980, 345, 1980, 1980])), lambda: {100})
    worker: Any = FakeWorker()
    runner = WatchedRunner(worker, watch)
    assert runner.take_round(SamplePlan()).median_ms == 1.0
    assert runner.take_round(SamplePlan()).median_ms == 3.0
    assert dict(watch.dropped) == {"clock not at speed": 1}


@pytest.mark.parametrize(
    ("running", "own", "others"),
    [
        ([100], {100}, 0),
        ([100, 7], {100}, 1),
        ([7, 8], {100}, 1),
        ([], {100}, 0),
        ([7, 8], {100, 101}, 0),
    ],
    ids=["alone", "another", "another, in a container", "none listed", "ours, in a container"],
)
def test_other_processes_are_counted(running: list[int], own: set[int], others: int) -> None:
    library = FakeNvml()
    library.pids = running
    assert Card(UUID, library).read(own).other_processes == others


def test_the_processes_that_measure_are_ours() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        own = measuring_pids()
        assert child.pid in own
        assert os.getpid() not in own  # it has not used a card
        child.communicate(b"\n")
    assert child.pid not in measuring_pids()


def test_energy_is_the_counter_over_the_runs() -> None:
    library = FakeNvml()
    card = Card(UUID, library)

    def run_for(seconds: float) -> int:
        library.energy += round(seconds * 250_000)
        return 1000

    assert energy_per_run_mj(card, run_for, 2.0) == 500.0
    library.unsupported.add("energy")
    assert energy_per_run_mj(card, run_for, 2.0) is None


def test_what_a_card_does_not_support_is_none() -> None:
    library = FakeNvml()
    library.unsupported.add("power")
    assert Card(UUID, library).read().power_w is None


def test_a_card_that_does_not_tell_who_it_is_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in some containers: NVML starts, and refuses single questions."""

    class Silent(FakeNvml):
        def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
            raise NVMLError("Unknown Error")

    with pytest.raises(NvmlAbsent, match=r"does not tell what the card is .*Unknown Error"):
        Card(UUID, Silent()).fingerprint()
    properties = SimpleNamespace(
        uuid=UUID, name="NVIDIA TEST CARD", major=9, minor=0, total_memory=80 * 2**30
    )
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: properties)
    monkeypatch.setattr(cuda_device, "Card", lambda uuid: Card(uuid, Silent()))
    found = cuda_device.device_provenance(0)
    assert found["device"] == "NVIDIA TEST CARD (sm_90)"
    assert found["memory_mib"] == 80 * 1024
    assert "Unknown Error" in str(found["nvml"])
    assert UUID not in str(found)


def test_the_library_has_what_is_asked_of_it() -> None:
    """The fake above answers to names; these are the real library's."""
    source = Path(nvml.__file__).read_text(encoding="utf-8")
    asked = set(re.findall(r"nvml(?:Device|System|Init)\w*|NVML_\w+|NVMLError", source))
    assert {"nvmlInit", "nvmlDeviceGetHandleByUUID", "NVML_CLOCK_SM"} <= asked
    assert [name for name in asked if not hasattr(pynvml, name)] == []


def test_an_unknown_card_and_a_missing_driver_are_told() -> None:
    with pytest.raises(NvmlAbsent, match="Not Found"):
        Card("GPU-other", FakeNvml())

    class NoDriver(FakeNvml):
        def nvmlInit(self) -> None:
            raise NVMLError("Driver Not Loaded")

    with pytest.raises(NvmlAbsent, match="Driver Not Loaded"):
        Card(UUID, NoDriver())


def test_without_nvml_every_round_counts() -> None:
    watch = Watch(None, lambda: set())
    worker: Any = FakeWorker()
    assert WatchedRunner(worker, watch).take_round(SamplePlan()).median_ms == 1.0
    assert watch.observations() == ()


def test_nothing_here_can_change_a_card() -> None:
    source = Path(nvml.__file__).read_text(encoding="utf-8")
    assert "nvmlDeviceSet" not in source
    assert "nvmlDeviceReset" not in source
    assert "subprocess" not in source
