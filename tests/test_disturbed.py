"""Rounds that others disturbed, and slow states of the machine: set aside, taken again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_device import FakeDevice

from profilers.collect import Collected, Request, collect
from profilers.host import Patience
from profilers.layers.spec import LayerSpec
from profilers.speed import FastWait, Speed
from profilers.table import LatencyTable, LayerKey
from profilers.timing import (
    LEAST_ROUNDS,
    TURNS,
    Measurement,
    Round,
    Runner,
    SamplePlan,
    Subject,
    measure_interleaved,
    ratio,
)

SPEC = LayerSpec.parse("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 8x8 b1 fp32")
BUSY = 1.7
"""What others make of a round's time."""


SLOW = Speed(1.7, 1.0)


class Scripted(Runner):
    """A round that was decided beforehand."""

    def __init__(self, ms: float, lost: float | None, speed: Speed | None = None) -> None:
        self.taken = Round(ms, ms, ms, 3, 1, lost, speed)

    def take_round(self, plan: SamplePlan) -> Round:
        return self.taken


class Machine:
    """A machine whose passes are disturbed, or which is slow, when a test says so.

    Every round takes a second of its clock.
    """

    def __init__(
        self,
        busy: Callable[[int], bool] = lambda number: False,
        slow: Callable[[int], bool] = lambda number: False,
        slow_speed: Speed = SLOW,
    ) -> None:
        self.busy, self.slow, self.slow_speed = busy, slow, slow_speed
        self.passes = -1
        self.now = 0.0

    def next_pass(self) -> None:
        self.passes += 1

    def subject(self, ms: float) -> Subject:
        @contextmanager
        def opened() -> Iterator[Runner]:
            self.now += 1.0
            busy, slow = self.busy(self.passes), self.slow(self.passes)
            wobble = 1.0 + 0.001 * (self.passes % 5)
            speed = Speed(1.0, 1.0)
            if slow:
                speed = self.slow_speed
            ms_now = ms * wobble * (BUSY if busy or slow else 1.0)
            yield Scripted(ms_now, 0.5 if busy else 0.0, speed)

        return opened

    def measure(self, fast: Speed | None = None, **more) -> dict[str, Measurement]:
        subjects = {"dense": self.subject(10.0), "pruned": self.subject(6.0)}
        return measure_interleaved(
            subjects, clock=lambda: self.now, before_round=self.next_pass, fast=fast, **more,
        )  # fmt: skip


def test_disturbed_passes_are_taken_again_and_counted() -> None:
    machine = Machine(busy=lambda number: number % 2 == 0)
    found = machine.measure(min_rounds=15)
    assert found["dense"].median_ms == pytest.approx(10.0, rel=0.005)  # the wobble
    assert found["dense"].rounds == 15
    assert found["dense"].disturbed == 15
    assert found["dense"].settled
    value, _ = ratio(found["pruned"], found["dense"])  # passes are kept or set aside together
    assert value == pytest.approx(0.6)


@pytest.mark.parametrize("slow_speed", [SLOW, Speed(1.0, 2.5)])
def test_passes_in_a_slow_state_are_taken_again_and_counted(slow_speed: Speed) -> None:
    machine = Machine(slow=lambda number: number % 3 != 0, slow_speed=slow_speed)
    found = machine.measure(min_rounds=10)
    assert found["pruned"].median_ms == pytest.approx(6.0, rel=0.005)
    assert found["pruned"].rounds == 10
    # each of two networks gets TURNS of rounds in a slow pass, and the pass does not count
    assert found["pruned"].disturbed == 18 * (2 * (TURNS - 1) + 1)
    assert found["pruned"].settled


@pytest.mark.parametrize("busy", [True, False])
def test_a_machine_that_is_never_quiet_ends_in_time_and_says_so(busy: bool) -> None:
    machine = Machine(busy=lambda number: busy, slow=lambda number: not busy)
    found = machine.measure(fast=Speed(1.0, 1.0), time_limit_s=60.0)
    assert machine.now < 65.0
    assert not found["dense"].settled
    assert found["dense"].warning is not None
    taken = found["dense"].taken
    assert taken >= 31
    assert found["dense"].warning.startswith(f"disturbed: in {taken} of {taken} rounds")


def test_a_slow_state_is_not_known_for_one_where_no_other_was_seen() -> None:
    found = Machine(slow=lambda number: True).measure()
    assert found["dense"].settled
    assert found["dense"].disturbed == 0


class Shared(FakeDevice):
    """A device of which others have a half in its ``busy`` rounds of layers."""

    def __init__(self, busy: Callable[[int], bool]) -> None:
        super().__init__()
        self.busy, self.layers = busy, 0

    @contextmanager
    def open_layer(self, model: bytes) -> Iterator[Runner]:
        with super().open_layer(model) as runner:
            ms = runner.elapsed_ms(1)
        self.layers += 1
        busy = self.busy(self.layers)
        yield Scripted(ms * (BUSY if busy else 1.0), 0.5 if busy else 0.0)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profilers.host.Patience.wait", lambda self: True)


def collected(device: FakeDevice, rounds: int = 4) -> tuple[LatencyTable, Collected]:
    table = LatencyTable(device.provenance() | {"reference_ms": 1.0})
    requests = [Request.layer(SPEC, 8, 8 * (i + 1)) for i in range(10)]
    return table, collect(table, device, requests, rounds=rounds)


def test_a_table_has_its_rounds_beside_the_disturbed_ones() -> None:
    quiet, _ = collected(FakeDevice())
    table, found = collected(Shared(lambda number: number % 4 == 0))
    assert found.disturbed > 0
    for key in quiet.layers():
        measured = table.measurement(key)
        assert sum(table.counts(one) for one in table.rounds[key]) >= 3
        reference = table.rounds[key][0].reference_ms / quiet.rounds[key][0].reference_ms
        assert measured.median_ms * reference == pytest.approx(quiet.measurement(key).median_ms)
        assert measured.settled


def test_a_table_of_a_machine_that_is_never_quiet_is_bounded_and_not_settled() -> None:
    table, found = collected(Shared(lambda number: True))
    assert all(len(rounds) == 6 for rounds in table.rounds.values())
    assert found.disturbed == 10 * 6
    assert not any(table.measurement(key).settled for key in table.layers())


def test_what_counts_follows_from_the_fast_state_that_the_table_has_seen() -> None:
    table = LatencyTable({"reference_ms": 1.0})
    key = LayerKey(SPEC, 8, 8)
    for _ in range(5):
        table.append(key, Round(1.5, 1.5, 1.5, 1, 1, speed=Speed(2.0, 1.0)), 2.0)
    slow = table.measurement(key)
    assert (slow.median_ms, slow.settled, slow.disturbed) == (1.5, True, 0)
    for _ in range(LEAST_ROUNDS):
        table.append(key, Round(1.0, 1.0, 1.0, 1, 1, speed=Speed(1.0, 1.0)), 1.0)
    fast = table.measurement(key)  # of more rounds: nothing old is remembered
    assert (fast.median_ms, fast.settled, fast.disturbed) == (1.0, True, 5)


class Idle:
    """A host of two processors; a test says how many of them others use at a time."""

    def __init__(self, folder: Path, used: Callable[[float], float]) -> None:
        self.folder, self.used, self.now, self.idle = folder, used, 0.0, 0.0
        self.write()

    def write(self) -> None:
        ticks = round(100 * self.idle)
        (self.folder / "stat").write_text(
            f"cpu  0 0 0 {2 * ticks} 0 0 0 0\ncpu0 0 0 0 {ticks} 0 0 0 0\n"
            f"cpu1 0 0 0 {ticks} 0 0 0 0\ncpu2 0 0 0 0 0 0 0 0\nintr 1\n"
        )

    def sleep(self, seconds: float) -> None:
        self.idle += seconds * (2.0 - self.used(self.now)) / 2.0
        self.now += seconds
        self.write()

    def patience(self, notices: list[str]) -> Patience:
        return Patience(
            2, 10.0, notices.append, affinity={0, 1}, proc=self.folder,
            clock=lambda: self.now, sleep=self.sleep,
        )  # fmt: skip


WAIT = Patience.wait


def test_a_quiet_moment_is_waited_for(tmp_path: Path) -> None:
    notices: list[str] = []
    host = Idle(tmp_path, lambda now: 1.0 if now < 2.5 else 0.0)
    assert WAIT(host.patience(notices))
    assert 2.5 <= host.now < 2.8
    assert notices == []


def test_waiting_is_given_up_and_told_with_numbers(tmp_path: Path) -> None:
    notices: list[str] = []
    host = Idle(tmp_path, lambda now: 1.0)
    patience = host.patience(notices)
    assert not WAIT(patience)
    assert 10.0 <= host.now < 10.5
    assert len(notices) == 1
    assert "leave 1.0 of the 2 processors" in notices[0]
    assert not WAIT(patience)  # not at once again
    assert host.now < 10.5


def test_a_system_that_tells_nothing_is_not_waited_for(tmp_path: Path) -> None:
    patience = Patience(2, affinity={0, 1}, proc=tmp_path / "none")
    assert WAIT(patience)
    assert patience.waited_s < 1.0


class Changing(Runner):
    """A machine that is slow until a moment of its clock, which goes on while it is waited for."""

    def __init__(self, slow_until: float) -> None:
        self.now, self.slow_until = 0.0, slow_until

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def speed(self) -> Speed:
        return Speed(1.7 if self.now < self.slow_until else 1.05, 1.0)

    def ready(self, notices: list[str]) -> FastWait:
        return FastWait(
            lambda: Speed(1.0, 1.0), 5.0, notices.append, clock=lambda: self.now, sleep=self.sleep
        )


def test_the_fast_state_is_waited_for() -> None:
    machine, notices = Changing(2.0), []
    assert machine.ready(notices).wait(machine)
    assert 2.0 <= machine.now < 2.1
    assert notices == []


def test_waiting_for_the_fast_state_is_given_up_told_and_begun_again_later() -> None:
    machine, notices = Changing(100.0), []
    ready = machine.ready(notices)
    assert not ready.wait(machine)
    assert 5.0 <= machine.now < 5.1
    assert len(notices) == 1
    assert "1.7 times slower than it can be for 5 s" in notices[0]
    assert not ready.wait(machine)  # not at once again
    assert machine.now < 5.1
    machine.now = 100.5
    assert ready.wait(machine)


def test_a_machine_whose_speed_nobody_reads_is_not_waited_for() -> None:
    assert FastWait(lambda: None).wait(Runner(lambda: None))
    assert FastWait(lambda: Speed(1.0, 1.0)).wait(Runner(lambda: None))
