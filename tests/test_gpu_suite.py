"""The GPU suite's parts end to end on a device of formulas; its guards, its resume, its minutes."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Residual
from fake_device import FakeDevice

from benchmarks import gpu_suite
from benchmarks.guarded_parts import (
    LEAST_S,
    STATE_FILE,
    Deadline,
    NotHere,
    OutOfTime,
    Part,
    run_parts,
)
from dsa_hw.runs.console import Progress
from profilers.backends import open_backend
from profilers.errors import BackendUnavailable
from profilers.timing import Round, summarize
from profilers.workers.isolated import Isolated
from profilers.workers.parallel import Parallel

pytestmark = pytest.mark.measures


def network() -> Residual:
    """A factory for ``--model``."""
    return Residual()


SCALE = dataclasses.replace(
    gpu_suite.ON_CPU, models=("test_gpu_suite:network",), networks=4, targets=(0.6,),
    backends=("onnxruntime", "tensorrt"), step_batch=1, turns=1,
)  # fmt: skip


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(device: str, backend: str | None = None, **options: Any) -> FakeDevice:
        if backend == "tensorrt":
            raise BackendUnavailable("tensorrt is not installed")
        return FakeDevice()

    monkeypatch.setattr(gpu_suite, "open_backend", opened)
    monkeypatch.setattr(gpu_suite, "ON_CPU", SCALE)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_all_parts_run_and_are_written(fake: None, tmp_path: Path, capsys: Any) -> None:
    assert gpu_suite.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["benchmark"] == "gpu_suite"
    parts = last["figures"]["parts"]
    statuses = {name: record["status"] for name, record in parts.items()}
    absent = [n for n, s in statuses.items() if s == "absent"]
    assert absent == [
        "energy", "dense on tensorrt", "layers inside the network",
        "table test_gpu_suite:network b1 tensorrt",
    ]  # fmt: skip
    assert {s for n, s in statuses.items() if n not in absent} == {"done"}
    for target in SCALE.targets:
        pruned = parts[f"prune test_gpu_suite:network to {target:.0%}"]
        # the device has no noise, and the network few widths near a target
        assert 0.9 < pruned["over_target"] <= 1.0
    compared = parts["flops against latency"]
    assert compared["latency"]["flops_ratio"] >= compared["uniform"]["flops_ratio"] - 1e-9
    assert compared["latency"]["latency_ratio"] <= 0.6 + 1e-9
    table = parts["table test_gpu_suite:network b1 best"]
    assert (tmp_path / "tables" / table["table"]).is_file()
    assert json.loads((tmp_path / "gpu_suite_quick.json").read_text()) == last


def part(run: Any, budget_s: float = 30.0) -> Part:
    """Of a function, or of given figures."""
    made: Any = run if callable(run) else lambda deadline: dict(run)
    return Part(made, budget_s)


class FakeTime:
    """A clock that parts move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spending(self, seconds: float, log: list[str], name: str, **figures: Any) -> Part:
        def run(deadline: Deadline) -> dict[str, Any]:
            log.append(name)
            self.now += seconds
            return {"summary": name} | figures

        return Part(run, 30.0)


def statuses(records: dict[str, Any]) -> list[str]:
    return [r["status"] for r in records.values()]


def quiet(text: str) -> None: ...


def test_a_failure_is_told_and_hides_nothing(tmp_path: Path) -> None:
    def broken(deadline: Deadline) -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access")

    def elsewhere(deadline: Deadline) -> dict[str, Any]:
        raise NotHere("no such card")

    parts = {"a": part(broken), "b": part(elsewhere), "c": part({"summary": "fine"})}
    records = run_parts(parts, tmp_path, quiet, minutes=1)
    assert statuses(records) == ["failed", "absent", "done"]
    assert "illegal memory access" in records["a"]["summary"]
    assert "RuntimeError" in records["a"]["traceback"]


def test_what_is_done_is_not_done_again_and_failures_come_last(tmp_path: Path) -> None:
    log: list[str] = []
    fails = [True]
    clock = FakeTime()

    def first(deadline: Deadline) -> dict[str, Any]:
        log.append("first")
        if fails[0]:
            raise ValueError("not yet")
        return {"summary": "1"}

    parts = {
        "first": part(first), "second": clock.spending(70.0, log, "second"),
        "third": clock.spending(1.0, log, "third"),
    }  # fmt: skip
    records = run_parts(parts, tmp_path, quiet, minutes=1, clock=clock)
    assert statuses(records) == ["failed", "done", "left"]
    fails[0] = False
    records = run_parts(parts, tmp_path, quiet, minutes=1, clock=clock)
    assert log == ["first", "second", "third", "first"]
    assert statuses(records) == ["done", "done", "done"]


def test_a_part_gets_its_budget_and_no_more_than_is_left(tmp_path: Path) -> None:
    clock = FakeTime()
    given: list[float] = []

    def run(deadline: Deadline) -> dict[str, Any]:
        given.append(deadline.left_s())
        clock.now += 25.0
        return {"summary": ""}

    parts = {name: part(run, 30.0) for name in "abc"}
    records = run_parts(parts, tmp_path, quiet, minutes=45 / 60, clock=clock)
    assert given == [30.0, 20.0]
    assert statuses(records) == ["done", "done", "left"]
    assert statuses(run_parts(parts, tmp_path, quiet, minutes=1, clock=clock))[2] == "done"


def test_stopping_early_is_told_and_goes_on_next_time(tmp_path: Path) -> None:
    left = [3]

    def table(deadline: Deadline) -> dict[str, Any]:
        left[0] -= 1
        if left[0] == 2:
            raise OutOfTime("7 of 30 layers were measured")
        return {"summary": "", "left": left[0]}

    parts = {"table": part(table), "other": part({"summary": ""})}
    found = [statuses(run_parts(parts, tmp_path, quiet, minutes=1)) for _ in range(4)]
    assert [first for first, _ in found] == ["unfinished", "early", "done", "done"]
    assert left == [0]


def test_figures_are_not_lost_to_a_failure_of_their_completion(tmp_path: Path) -> None:
    calls: list[int] = []

    def table(deadline: Deadline) -> dict[str, Any]:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("the card fell off the bus")
        return {"summary": "1.2 ms", "left": 5}

    for _ in range(2):
        records = run_parts({"table": part(table)}, tmp_path, quiet, minutes=1)
        assert (records["table"]["status"], records["table"]["summary"]) == ("early", "1.2 ms")


def test_what_was_done_is_on_disk_before_the_next_part(tmp_path: Path) -> None:
    def second(deadline: Deadline) -> dict[str, Any]:
        kept = json.loads((tmp_path / STATE_FILE).read_text())
        assert kept["first"]["summary"] == "kept"
        raise KeyboardInterrupt

    parts = {"first": part({"summary": "kept"}), "second": part(second)}
    with pytest.raises(KeyboardInterrupt):
        run_parts(parts, tmp_path, quiet, minutes=1)
    assert statuses(run_parts(parts | {"second": part({"summary": ""})}, tmp_path, quiet, 1)) == [
        "done", "done",
    ]  # fmt: skip


def test_a_part_that_hangs_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.guarded_parts.GRACE_S", 0.0)
    ended = threading.Event()

    def hangs(deadline: Deadline) -> dict[str, Any]:
        assert ended.wait(timeout=30)
        raise BackendUnavailable("the measuring process ended unexpectedly")

    parts = {"hangs": part(hangs, 0.05), "next": part({"summary": ""})}
    records = run_parts(parts, tmp_path, quiet, minutes=1, interrupt=ended.set)
    assert statuses(records) == ["failed", "done"]


def test_an_interrupt_ends_the_worker_that_is_waited_for() -> None:
    backend: Any = open_backend("cpu", backend="torch-eager")
    assert backend.provenance()["runtime"] == "torch-eager"
    worker = backend._worker
    threading.Timer(0.2, backend.interrupt).start()

    def ask_on() -> None:
        while True:  # whatever it is at
            worker.ask({"describe": True})

    with pytest.raises(BackendUnavailable, match="ended unexpectedly"):
        ask_on()
    assert worker.ask({"describe": True})["uuid"] is None  # a new one


def test_a_table_stops_with_its_time_and_goes_on(fake: None, tmp_path: Path) -> None:
    clock = FakeTime()
    finished: list[int] = []
    exported: dict[Any, Any] = {}

    def suite() -> gpu_suite.Suite:
        def progress(what: str, done: int, planned: int) -> None:
            clock.now += 1.0

        made: Any = progress
        found = gpu_suite.Suite("cpu", SCALE, tmp_path, made)
        found._networks = exported
        return found

    model, batch = SCALE.models[0], SCALE.batches[0]
    for _ in range(20):
        deadline = Deadline(clock.now + 200.0, clock)  # of some 900 rounds
        try:
            figures = suite().table(model, batch, None, deadline)
        except OutOfTime:
            finished.append(-1)
            continue
        finished.append(figures["left"])
        if figures["left"] == 0:
            break
        assert "stopped early" in figures["summary"]
    assert finished[0] == -1
    assert finished[-1] == 0
    whole = gpu_suite.Suite("cpu", SCALE, tmp_path / "whole", Progress())
    whole._networks = exported
    expected = whole.table(model, batch, None, Deadline(float("inf")))
    assert figures["dense_ms"] == pytest.approx(expected["dense_ms"], rel=1e-5)
    assert figures["entries"] == expected["entries"]


def test_dense_latencies_are_kept_one_by_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A runtime that compiles for longer than the part may last gets through all the same."""
    clock = FakeTime()
    opened: list[int] = []

    def slow(device: str, backend: str | None, precision: str, batch_size: int) -> FakeDevice:
        opened.append(batch_size)
        clock.now += 40.0
        return FakeDevice()

    def timed(backend: Any, models: dict[str, bytes], time_limit_s: float) -> Any:
        assert list(models) == ["dense"]
        return {"dense": summarize([Round(float(len(models["dense"])), 1.0, 1.0, 1, 1)])}

    monkeypatch.setattr(gpu_suite, "open_backend", slow)
    monkeypatch.setattr(gpu_suite, "time_networks", timed)
    scale = dataclasses.replace(SCALE, models=("a", "b"), batches=(1, 64))
    graph: Any = SimpleNamespace(dense_widths=(8,), resized=lambda widths: b"0000")
    found: list[Any] = []
    for _ in range(4):
        suite: Any = gpu_suite.Suite("cpu", scale, tmp_path, Progress())
        suite._networks = {(m, b): (None, graph) for m in scale.models for b in scale.batches}
        figures = suite.dense_on("torch-compile", Deadline(clock.now + 30.0, clock))
        found.append((figures["left"], len(figures["networks"])))
        assert suite._opened == {}  # the card is free for the next part
    assert found == [(3, 1), (2, 2), (1, 3), (0, 4)]
    assert opened == [1, 1, 64, 64]
    assert figures["networks"]["b b64"]["ms"] == 4.0
    nothing_yet: Any = gpu_suite.Suite("cpu", scale, tmp_path / "other", Progress())
    with pytest.raises(OutOfTime, match="a b1"):
        nothing_yet.dense_on("torch-compile", Deadline(clock.now, clock))


def test_a_part_is_not_begun_with_no_time_to_speak_of(tmp_path: Path) -> None:
    clock = FakeTime()
    log: list[str] = []
    parts = {"a": clock.spending(60 - LEAST_S / 2, log, "a"), "b": clock.spending(1, log, "b")}
    records = run_parts(parts, tmp_path, quiet, minutes=1, clock=clock)
    assert (statuses(records), log) == (["done", "left"], ["a"])


@pytest.mark.parametrize("several", [False, True])
def test_what_hangs_is_ended_on_every_card(several: bool, tmp_path: Path) -> None:
    ended: list[str] = []

    class Member(Isolated):
        layers_pay_call = False  # pyright: ignore[reportAssignmentType]

        def provenance(self) -> dict[str, str | int]:
            return {}

        def interrupt(self) -> None:
            ended.append("interrupted")

        def close(self) -> None:
            ended.append("closed")

    members = [Member(f"cuda:{i}", "torch") for i in range(1 + several)]
    backend = Parallel(members, ["cuda:0", "cuda:1"]) if several else members[0]
    suite = gpu_suite.Suite("cuda:0", SCALE, tmp_path, Progress())
    suite._opened["torch", 1] = backend
    suite.interrupt()
    suite._release("torch", 1)
    assert ended == ["interrupted"] * len(members) + ["closed"] * len(members)


def test_without_a_card_the_suite_says_so(tmp_path: Path, capsys: Any) -> None:
    assert gpu_suite.main(["--device", "cuda:0", "--out", str(tmp_path)]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
