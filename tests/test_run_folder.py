"""A run folder: one process at a time, and nothing in it lost by a full disk or a power cut."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_hw import prune
from dsa_hw.errors import RunFolderError, UserError
from dsa_hw.pipeline import record
from dsa_hw.pipeline.finished_search import config_of
from dsa_hw.runs import durable_files
from dsa_hw.runs.config import ProfileConfig, PruneConfig
from dsa_hw.runs.folder import RunFolder, Stopwatch
from dsa_hw.runs.lock import HOLDER_FILE, LOCK_FILE, RunLock
from dsa_hw.runs.options import run_command

CONFIG = PruneConfig(target_ratio=0.5)
HOLD = """
import sys, time
from pathlib import Path
from dsa_hw.runs.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.start(CONFIG)
    return made


def test_a_second_command_is_refused_by_the_name_of_the_first(tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == b"held\n"
            assert prune.main(["--target-ratio", "0.5", "--epochs", "0", "--out", str(out)]) == 2
            said = capsys.readouterr().err
            assert f"process {first.pid} on {platform.node()}" in said
            assert "from dsa_hw.runs.lock import RunLock" in said  # its command
        finally:
            first.send_signal(signal.SIGKILL)
    # a killed process holds nothing, though what it wrote of itself is still there
    assert (out / HOLDER_FILE).is_file()
    with RunLock(out):
        assert json.loads((out / HOLDER_FILE).read_text())["pid"] == os.getpid()


def test_a_lock_leaves_nothing_where_nothing_was_written(tmp_path: Path) -> None:
    with RunLock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK_FILE).is_file()
        with pytest.raises(RunFolderError, match=f"process {os.getpid()} on"):
            RunLock(tmp_path / "a" / "b").acquire()
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path / "a"):
        (tmp_path / "a" / "kept").touch()
    assert (tmp_path / "a" / "kept").is_file()
    assert not (tmp_path / "a" / HOLDER_FILE).exists()


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing reaches the disk."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable_files.os, "fsync", full)


def test_a_full_disk_is_one_message_and_loses_nothing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    folder.save_checkpoint("search", {"epoch": 1})
    folder.write_json("result.json", {"a": 1})
    before = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    fill_disk(monkeypatch)

    def run(config: ProfileConfig) -> int:
        with Stopwatch(folder).measure("search"):  # whose own writing fails as well
            folder.save_checkpoint("search", {"epoch": 2})
        return 0

    assert run_command("prune", ProfileConfig, run, []) == 2
    said = capsys.readouterr().err
    assert "search.pt: No space left on device" in said
    assert "Traceback" not in said
    with pytest.raises(RunFolderError, match=r"result\.json: No space left"):
        folder.write_json("result.json", {"a": 2})
    assert {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()} == before


def test_a_stopwatch_does_not_hide_what_failed(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch)
    with pytest.raises(ZeroDivisionError), Stopwatch(folder).measure("search"):
        raise ZeroDivisionError


@pytest.mark.parametrize("left", [b"", b"PK\x03\x04torn", None])
def test_a_torn_checkpoint_falls_back_to_the_one_before(
    folder: RunFolder, left: bytes | None
) -> None:
    for epoch in (1, 2):
        folder.log({"event": "epoch", "epoch": epoch})
        folder.save_checkpoint("search", {"epoch": epoch, "weights": torch.arange(1000.0)})
    path = folder.path / "checkpoints" / "search.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if left is None else left)
    state = folder.load_checkpoint("search")
    assert state is not None
    assert state["epoch"] == 1
    assert torch.equal(state["weights"], torch.arange(1000.0))
    folder.resume_stage("search", state["log_bytes"])
    assert (folder.path / "log.jsonl").read_text() == '{"event": "epoch", "epoch": 1}\n'
    (folder.path / "checkpoints" / "search.earlier.pt").write_bytes(b"")
    with pytest.raises(RunFolderError, match=r"search\.pt cannot be read.*search\.earlier\.pt"):
        folder.load_checkpoint("search")


def test_a_changed_checkpoint_is_not_believed(folder: RunFolder) -> None:
    folder.save_checkpoint("search", {"weights": torch.zeros(1000)})
    path = folder.path / "checkpoints" / "search.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match="checksum"):
        folder.load_checkpoint("search")


def test_a_torn_log_line_costs_that_line_alone(folder: RunFolder) -> None:
    folder.log({"event": "warning", "message": "first"})
    with open(folder.path / "log.jsonl", "a") as file:
        file.write('{"event":')
    folder.log({"event": "warning", "message": "second"})
    first, second, problem = record.logged_warnings(folder)
    assert (first, second) == ("first", "second")
    assert "1 unreadable line" in problem


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "3\n", "a: [", "\x00", "[" * 5000, "1: 2\n"])
def test_a_configuration_of_another_shape_is_told(folder: RunFolder, content: str) -> None:
    (folder.path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml"):
        RunFolder.check(folder.path, CONFIG)
    with pytest.raises(UserError, match=r"config\.yaml"):
        config_of(folder)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("epochs: [1]", r"epochs is \[1\]; expected a whole number"),
        ("epochs: null", "epochs is None; expected a whole number"),
        ("exclude: 5", "exclude is 5; expected a list of which each is text"),
        ("lr: .nan", "lr is nan; expected a finite number"),
        ("precision: fp8", "precision is 'fp8'; expected one of fp32, fp16, int8"),
        ("remove_branches: 1", "remove-branches is 1; expected true or false"),
        ("modle: x", "unknown option modle .*did you mean model"),
    ],
)
def test_a_run_s_options_are_checked_as_the_command_line_s_are(
    folder: RunFolder, line: str, expected: str
) -> None:
    path = folder.path / "config.yaml"
    lines = [x for x in path.read_text().splitlines() if x.split(":")[0] != line.split(":")[0]]
    if line.startswith("exclude"):
        lines = [x for x in lines if not x.startswith("- ")] + ["budget: [latency]"]
        lines = [x for x in lines if x != "budget:"]
    path.write_text("\n".join([*lines, line, ""]))
    with pytest.raises(UserError, match=expected):
        config_of(folder)


def test_a_run_s_configuration_comes_back(folder: RunFolder) -> None:
    assert config_of(folder) == CONFIG
    path = folder.path / "config.yaml"
    path.write_text(path.read_text().replace("model: resnet18\n", ""))
    with pytest.raises(RunFolderError, match="does not say model"):
        config_of(folder)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "t.jsonl"), 2, "t.jsonl (free some"),
        (PermissionError(errno.EACCES, "Permission denied", "t.lock"), 2, "t.lock (it may belong"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_system_refuses_is_one_message(
    error: BaseException, code: int, said: str, capsys
) -> None:
    def fail(config: Any) -> int:
        raise error

    assert run_command("report", ProfileConfig, fail, []) == code
    assert said in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_output_that_nobody_takes_is_no_traceback() -> None:
    code = (
        "import sys; from dsa_hw.runs.options import run_command; "
        "from dsa_hw.runs.config import ProfileConfig; "
        "sys.exit(run_command('report', ProfileConfig, lambda c: print('x' * 100_000), []))"
    )
    command = [sys.executable, "-c", code]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "report: No space left on device (free some space; the same command " \
        "then goes on from what is kept)\n"  # fmt: skip
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
