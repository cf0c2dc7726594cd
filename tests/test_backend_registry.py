"""Runtimes by name: what is unknown is refused, and one from outside measures like our own."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from whole_way import COMMON

from dsa_hw import profile
from profilers.backends import open_backend
from profilers.backends.registry import RUNTIMES, BackendInfo
from profilers.errors import BackendUnavailable
from profilers.table import LatencyTable
from profilers.workers.server import in_process

TOY = """
from fake_device import FakeDevice

class Toy(FakeDevice):
    def __init__(self, backend, threads):
        super().__init__()
        self.name, self.threads = backend, threads

    def provenance(self):
        return super().provenance() | {"runtime": self.name, "threads": self.threads}
"""
ENTRY = BackendInfo("toy", "toy_runtime", "Toy", ("cpu",), takes=("backend", "threads"))


@pytest.fixture
def toy(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BackendInfo]:
    (workdir / "toy_runtime.py").write_text(TOY)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    RUNTIMES.register(ENTRY)
    yield ENTRY
    RUNTIMES.remove(ENTRY)


@pytest.mark.usefixtures("toy")
def test_a_runtime_from_outside_measures_a_network() -> None:
    """In the worker process, which has not seen it being registered."""
    command = [*COMMON, "--input-shape", "3", "16", "16", "--backend", "toy"]
    assert profile.main(command) == 0
    table = LatencyTable.load(Path("table.jsonl"))
    assert table.provenance["runtime"] == "toy"
    assert table.provenance["threads"] == 1
    assert len(list(table.networks())) >= 4


def test_what_a_runtime_cannot_do_is_refused(toy: BackendInfo) -> None:
    with pytest.raises(BackendUnavailable, match="toy is not measured at fp16 on cpu"):
        open_backend("cpu", backend="toy", precision="fp16")
    with pytest.raises(BackendUnavailable, match="toy runs on cpu only; on cuda there are"):
        open_backend("cuda:0", backend="toy")
    with pytest.raises(BackendUnavailable, match="torch is not measured at int8"):
        open_backend("cuda:0", backend="torch", precision="int8")
    with pytest.raises(ValueError, match="'toy' already"):
        RUNTIMES.register(toy)


def test_a_module_that_is_not_there_is_named() -> None:
    entry = dataclasses.asdict(BackendInfo("gone", "no_such_runtime", "Gone", ("cpu",)))
    with pytest.raises(BackendUnavailable, match=r"no_such_runtime\.Gone.*PYTHONPATH"):
        in_process(backend="gone", entry=entry)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_an_unknown_runtime_is_none_in_particular(device: str) -> None:
    """The worker took whatever it did not know for ONNX Runtime on CUDA."""
    for make in (in_process, open_backend):
        with pytest.raises(BackendUnavailable, match="unknown backend 'openvino'"):
            make(device, backend="openvino")


def test_every_runtime_of_ours_is_where_its_entry_says() -> None:
    for entry in RUNTIMES:
        source = Path(sys.modules["profilers"].__path__[0]).parent
        file = source / Path(*entry.module.split(".")).with_suffix(".py")
        assert f"class {entry.class_name}" in file.read_text(encoding="utf-8")
        assert entry.devices
        assert "fp32" in entry.precisions
    assert RUNTIMES.ranked("cpu") == ("onnxruntime",)
    assert RUNTIMES.ranked("cuda")[0] == "tensorrt"


def test_the_registry_imports_no_runtime() -> None:
    code = (
        "import sys, profilers.backends.registry; "
        "sys.exit(bool({'torch', 'onnxruntime', 'tensorrt'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
