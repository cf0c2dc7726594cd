"""The GPU suite's parts end to end on a device of formulas; its guards, its resume, its minutes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Residual
from fake_device import FakeDevice

from benchmarks import gpu_suite
from benchmarks.gpu_suite import NotHere, run_parts
from dsa_hw.console import Progress
from profilers.errors import BackendUnavailable


def network() -> Residual:
    """A factory for ``--model``."""
    return Residual()


SCALE = dataclasses.replace(
    gpu_suite.ON_CPU, models=("test_gpu_suite:network",), networks=4, targets=(0.6,),
    backends=("onnxruntime", "tensorrt"),
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
        "energy", "layers inside the network", "table test_gpu_suite:network b1 tensorrt",
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


def test_a_failure_is_told_and_hides_nothing(tmp_path: Path) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access")

    def elsewhere() -> dict[str, Any]:
        raise NotHere("no such card")

    parts = {"a": broken, "b": elsewhere, "c": lambda: {"summary": "fine"}}
    records = run_parts(parts, tmp_path, Progress(), minutes=1)
    assert [r["status"] for r in records.values()] == ["failed", "absent", "done"]
    assert "illegal memory access" in records["a"]["summary"]
    assert "RuntimeError" in records["a"]["traceback"]


def test_what_is_done_is_not_done_again_and_failures_are_tried_again(tmp_path: Path) -> None:
    calls: list[str] = []
    fails = [True]

    def first() -> dict[str, Any]:
        calls.append("first")
        return {"summary": "1"}

    def second() -> dict[str, Any]:
        calls.append("second")
        if fails[0]:
            raise ValueError("not yet")
        return {"summary": "2"}

    parts = {"first": first, "second": second}
    run_parts(parts, tmp_path, Progress(), minutes=1)
    fails[0] = False
    records = run_parts(parts, tmp_path, Progress(), minutes=1)
    assert calls == ["first", "second", "second"]
    assert [r["status"] for r in records.values()] == ["done", "done"]


def test_no_part_begins_after_the_minutes(tmp_path: Path) -> None:
    now = [0.0]

    def part() -> dict[str, Any]:
        now[0] += 50.0
        return {"summary": "50 s"}

    parts = {name: part for name in "abc"}
    records = run_parts(parts, tmp_path, Progress(), minutes=1, clock=lambda: now[0])
    assert [r["status"] for r in records.values()] == ["done", "done", "left"]
    records = run_parts(parts, tmp_path, Progress(), minutes=1, clock=lambda: now[0])
    assert records["c"]["status"] == "done"


def test_without_a_card_the_suite_says_so(tmp_path: Path, capsys: Any) -> None:
    assert gpu_suite.main(["--device", "cuda:0", "--out", str(tmp_path)]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
