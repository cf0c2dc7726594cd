"""A measuring process that stops, dies or is short of anything is replaced once, and told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from profilers.errors import BackendUnavailable
from profilers.layers.models import layer_model
from profilers.layers.spec import LayerSpec
from profilers.timing import SamplePlan
from profilers.workers import process as worker_process
from profilers.workers import scratch
from profilers.workers.fresh import can_copy
from profilers.workers.isolated import IsolatedOnnxRuntimeCpu
from profilers.workers.scratch import LOCK, Scratch, remove_abandoned

SPEC = LayerSpec.parse("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 8x8 b1 fp32 +relu")
PLAN = SamplePlan(sample_ms=0.1, samples=2, warmup_ms=0.1)


@pytest.fixture
def cpu() -> Iterator[Any]:
    backend: Any = IsolatedOnnxRuntimeCpu(threads=1)
    yield backend
    backend.renew()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_is_replaced_in_the_middle_of_a_model(
    cpu: Any, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cpu.observations() == ()
    with cpu.open_layer(layer_model(SPEC, 8, 8)) as runner:
        runner.take_round(PLAN)
        lost = cpu._worker._process.pid
        measuring = psutil.Process(lost).children() or [psutil.Process(lost)]
        os.kill(measuring[0].pid, how)
        limits = [1.0]  # of the question that the stopped one does not answer
        whole = cpu._worker.limit_s
        monkeypatch.setattr(
            cpu._worker, "limit_s", lambda asked: limits.pop() if limits else whole(asked)
        )
        assert runner.take_round(PLAN).median_ms > 0
        assert cpu._worker._process.pid != lost
    assert cpu.observations() == ("the measuring process was lost and replaced once",)


def test_a_renewed_process_is_another_one_of_the_same_parent(cpu: Any) -> None:
    parents, measuring = set(), set()
    for _ in range(3):
        with cpu.open_layer(layer_model(SPEC, 8, 8)) as runner:
            assert runner.take_round(PLAN).median_ms > 0
            parents.add(cpu._worker._process.pid)
            measuring |= {c.pid for c in psutil.Process(cpu._worker._process.pid).children()}
        cpu.renew()
    if can_copy():
        assert (len(parents), len(measuring)) == (1, 3)
    else:
        assert len(parents) == 3
    assert cpu.observations() == ()


def test_no_process_outlives_its_owner(cpu: Any) -> None:
    with cpu.open_layer(layer_model(SPEC, 8, 8)):
        process = psutil.Process(cpu._worker._process.pid)
        family = [process, *process.children()]
        process.kill()
        gone, alive = psutil.wait_procs(family, timeout=10.0)
    assert {p.pid for p in gone} == {p.pid for p in family}
    assert alive == []


OWNER = """
import sys
from profilers.layers.models import layer_model
from profilers.timing import SamplePlan
from profilers.workers.isolated import IsolatedOnnxRuntimeCpu
from profilers.layers.spec import LayerSpec

backend = IsolatedOnnxRuntimeCpu(threads=1)
with backend.open_layer(layer_model(LayerSpec.parse(sys.argv[1]), 8, 8)) as runner:
    print(backend._worker._process.pid, flush=True)
    while True:
        runner.take_round(SamplePlan(sample_ms=20.0))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_is_left_where_the_owner_is_ended_in_a_round(how: signal.Signals) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(SPEC)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert owner.stdout is not None
    worker = psutil.Process(int(owner.stdout.readline()))
    time.sleep(0.3)
    family = [worker, *worker.children()]
    owner.send_signal(how)
    _, alive = psutil.wait_procs(family, timeout=10.0)
    assert alive == []
    _, said = owner.communicate(timeout=10.0)
    assert "terminate called" not in said
    assert "BrokenPipe" not in said


def test_a_round_tells_how_fast_the_machine_was(cpu: Any) -> None:
    with cpu.open_layer(layer_model(SPEC, 8, 8)) as runner:
        speed = runner.speed()
        taken = runner.take_round(PLAN)
    for one in (speed, taken.speed):
        assert min(one.compute_ms, one.memory_ms) > 0.01


def test_two_losses_over_one_question_name_the_signal(
    cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(worker_process, "BOOT", dying)
    with (
        pytest.raises(BackendUnavailable, match=r"killed by SIGKILL \(signal 9\); a new one"),
        cpu.open_layer(layer_model(SPEC, 8, 8)),
    ):
        pass
    assert cpu._worker._process is None


def test_a_limit_follows_what_such_questions_took() -> None:
    worker = worker_process.Worker({"device": "cpu"})
    network, layer = {"open": "n.onnx", "layer": False}, {"open": "l.onnx", "layer": True}
    first = worker.limit_s(network)
    worker._longest_s = {"open": 100.0}
    assert worker.limit_s(network) == worker_process.GRACE_S + worker_process.PATIENCE * 100.0
    assert worker.limit_s(layer) == first < worker.limit_s(network)
    assert worker_process.Worker({"device": "cuda:0"}).limit_s(network) > first


@pytest.mark.parametrize("name", ["numpy", "onnx", "onnxruntime", "json", "profilers"])
def test_files_in_the_working_folder_are_not_run(
    name: str, cpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(f"{name}.py").write_text("open('ran', 'w').close()\n")
    with cpu.open_layer(layer_model(SPEC, 8, 8)) as runner:
        assert runner.take_round(PLAN).median_ms > 0
    assert not Path("ran").exists()


def test_folders_of_dead_processes_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "scratch_folder", lambda: tmp_path)
    names = ("dead", "alive", "young", "strange")
    folders = {name: tmp_path / f"{scratch.PREFIX}{name}" for name in names}
    for name, folder in folders.items():
        folder.mkdir()
        (folder / "model.onnx").touch()
        if name != "strange":  # not made by this version: nobody can tell whose it is
            (folder / LOCK).touch()
        if name != "young":
            os.utime(folder, (0, 0))
    (tmp_path / f"{scratch.PREFIX}link").symlink_to(folders["strange"])
    with FileLock(folders["alive"] / LOCK):
        own = Scratch()
        assert not folders["dead"].exists()
        assert all(folders[name].is_dir() for name in ("alive", "young", "strange"))
    assert remove_abandoned(tmp_path) == [folders["alive"]]
    assert own.path.is_dir()
    own.remove()
    assert not own.path.exists()
