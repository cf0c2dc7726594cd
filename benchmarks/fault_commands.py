"""What a user's machine does to commands, and strangers' files: run as commands, for ``faults``.

Each case returns None where it went as it should, a text that says what did not, or raises
``Skipped`` where this machine cannot try it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

NETWORK = """
import torch
from torch import nn

def small(num_classes=10):
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU(),
        nn.Conv2d(96, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
"""
OPTIONS = (
    "--model", "small_network:small", "--input-shape", "3", "48", "48", "--table", "table.jsonl",
    "--calibration-networks", "6", "--rounds", "2", "--threads", "1", "--measure-seconds", "0.5",
)  # fmt: skip
PLAN = (*OPTIONS, "--epochs", "0", "--target-ratio", "0.6")
LIMIT_S = 600.0
"""A command takes some 20 s on two idle cores; what takes longer than this hangs."""
EVIL = "open('ran', 'w').close()\n"


class Skipped(Exception):
    """This machine cannot try the case; says why."""


def command(verb: str, *words: str) -> list[str]:
    """A command of the project, as a user starts it."""
    return [sys.executable, "-m", f"dsa_hw.{verb}", *words]


def run(words: list[str], folder: Path, user: str | None = None) -> subprocess.CompletedProcess:
    """A command to its end; one that hangs raises ``TimeoutExpired``."""
    return subprocess.run(
        words, cwd=folder, capture_output=True, text=True, check=False, timeout=LIMIT_S,
        user=user, env=environment(),
    )  # fmt: skip


def environment() -> dict[str, str]:
    """With this checkout's code, wherever a command is started."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    return os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def new_folder(parent: Path, name: str, finished: Path | None = None) -> Path:
    """A working folder with the network in it, and copies of a finished run and its table."""
    folder = parent / name
    folder.mkdir()
    (folder / "small_network.py").write_text(NETWORK)
    if finished is not None:
        shutil.copytree(finished, folder / "run")
        shutil.copy(finished.parent / "table.jsonl", folder / "table.jsonl")
    return folder


def refused(done: subprocess.CompletedProcess, said: str) -> str | None:
    """None where a command ended with code 2 and one message that has ``said`` in it."""
    if "Traceback" in done.stderr:
        return f"traceback: {done.stderr.strip().splitlines()[-1]}"
    if done.returncode != 2 or said not in done.stderr:
        return f"exit code {done.returncode}, {done.stderr.strip()[-300:]!r}; expected {said!r}"
    return None


def finished(done: subprocess.CompletedProcess) -> str | None:
    """None where a command ended well."""
    if done.returncode == 0:
        return None
    kind = "traceback: " if "Traceback" in done.stderr else ""
    return f"{kind}exit code {done.returncode}, {done.stderr.strip()[-300:]!r}"


@contextmanager
def started(words: list[str], folder: Path, log: Path) -> Iterator[psutil.Popen]:
    """A command that is running; ended with the block."""
    with open(log, "w") as out:
        process = psutil.Popen(words, cwd=folder, stdout=out, stderr=out, env=environment())
        try:
            yield process
        finally:
            for each in [*process.children(recursive=True), process]:
                each.kill()
            process.wait()


def wait_for(what: Callable[[], object], process: psutil.Popen) -> bool:
    """Whether ``what`` came true while the process was running."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end and process.poll() is None:
        if what():
            return True
        time.sleep(0.02)
    return False


def two_at_once(parent: Path, run_folder: Path) -> str | None:
    """The second command on a folder is refused by the name of the first."""
    folder = new_folder(parent, "two_at_once")
    words = command("prune", *PLAN, "--out", "run")
    with started(words, folder, folder / "log") as first:
        if not wait_for((folder / "run" / ".lock.json").exists, first):
            return f"the first did not lock its folder: {(folder / 'log').read_text()[-300:]!r}"
        problem = refused(run(words, folder), f"process {first.pid} on")
        if problem is None and first.wait(LIMIT_S) != 0:
            problem = f"the first failed: {(folder / 'log').read_text()[-300:]!r}"
    return problem


def _profile_that_loses(
    parent: Path, name: str, how: signal.Signals, often: int
) -> tuple[subprocess.CompletedProcess, int]:
    """A profile whose measuring process is stopped or killed; and how often it was."""
    folder, lost = new_folder(parent, name), set()
    log = folder / "log"
    with started(command("profile", *OPTIONS), folder, log) as process:
        table = folder / "table.jsonl"
        wait_for(lambda: table.exists() and table.read_bytes().count(b"\n") > 10, process)
        end = time.monotonic() + LIMIT_S
        while process.poll() is None and time.monotonic() < end:
            for child in process.children() if len(lost) < often else ():
                if child.pid not in lost:
                    lost.add(child.pid)
                    child.send_signal(how)
            time.sleep(0.02)
        if process.poll() is None:
            raise subprocess.TimeoutExpired("profile", LIMIT_S)
        text = log.read_text()
        return subprocess.CompletedProcess([], process.wait(), text, text), len(lost)


def stopped_worker(parent: Path, run_folder: Path) -> str | None:
    """A measuring process that is stopped is replaced."""
    done, lost = _profile_that_loses(parent, "stopped", signal.SIGSTOP, 1)
    if lost != 1:
        return "it could not be stopped in time: nothing was tried"
    return finished(done) or _counted(done)


def killed_worker(parent: Path, run_folder: Path) -> str | None:
    """A measuring process that is killed is replaced."""
    done, lost = _profile_that_loses(parent, "killed", signal.SIGKILL, 1)
    if lost != 1:
        return "it could not be killed in time: nothing was tried"
    return finished(done) or _counted(done)


def worker_killed_each_time(parent: Path, run_folder: Path) -> str | None:
    """A measuring process that is killed again and again ends the command, naming the signal."""
    done, _ = _profile_that_loses(parent, "killed_each_time", signal.SIGKILL, 10_000)
    return refused(done, "killed by SIGKILL (signal 9)")


def _counted(done: subprocess.CompletedProcess) -> str | None:
    return None if "lost and replaced" in done.stdout else "the replacement was not told"


def full_disk(parent: Path, run_folder: Path) -> str | None:
    """On a full disk there is one message; with room again the same command finishes."""
    folder, disk = new_folder(parent, "full_disk"), parent / "disk"
    shutil.copy(run_folder.parent / "table.jsonl", folder / "table.jsonl")
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        raise Skipped("a small disk cannot be mounted here (no root)")
    try:
        filler = disk / "filler"
        room = 24 * 1024  # enough for the configuration, too little for the network
        filler.write_bytes(bytes(8 * 2**20 - room))
        words = command("prune", *PLAN, "--out", str(disk / "run"))
        problem = refused(run(words, folder), "No space left on device")
        filler.unlink()
        return problem or finished(run(words, folder))
    finally:
        subprocess.run(["umount", str(disk)], capture_output=True, check=False)


def torn_log(parent: Path, run_folder: Path) -> str | None:
    """A line that a crash cut off costs that line alone."""
    folder = new_folder(parent, "torn_log", run_folder)
    with open(folder / "run" / "log.jsonl", "a") as file:
        file.write('{"event":')
    (folder / "run" / "result.json").unlink()
    return finished(run(command("prune", *PLAN, "--out", "run"), folder))


def two_users(parent: Path, run_folder: Path) -> str | None:
    """Another user's table and run folder are refused with a message."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise Skipped("only root can become another user")
    probe = [sys.executable, "-c", "import torch, dsa_hw.pipeline.stages"]
    folder = new_folder(parent, "two_users", run_folder)
    for each in (parent, folder):
        each.chmod(0o755)
    if run(probe, folder, user="nobody").returncode:
        raise Skipped("the user nobody cannot read this installation")
    with open(folder / "table.jsonl", "a") as file:  # one more than is needed: it must be written
        file.truncate((folder / "table.jsonl").stat().st_size // 2)
    words = command("profile", *OPTIONS)
    problem = refused(run(words, folder, user="nobody"), "Permission denied")
    again = command("prune", *PLAN, "--out", "run")
    return problem or refused(run(again, folder, user="nobody"), "cannot write to")


def hostile_run_folder(parent: Path, run_folder: Path) -> str | None:
    """Nothing that a stranger's run folder names or shadows is run."""
    folder = new_folder(parent, "hostile_run", run_folder) / "run"
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("small_network:small", "evil:factory"))
    for name in ("evil", "yaml", "numpy", "onnx", "rich", "json", "onnxruntime"):
        (folder / f"{name}.py").write_text(EVIL)
    problem = refused(run(command("validate", "--run", "."), folder), "names code of its own")
    problem = problem or finished(run(command("report", "."), folder))
    alone = command("validate", "--onnx", "model.onnx", "--measure-seconds", "0.2")
    problem = problem or finished(run(alone, folder))
    return problem or ("loss: its code was run" if (folder / "ran").exists() else None)


def hostile_comparison(parent: Path, run_folder: Path) -> str | None:
    """A comparison's report reads nothing outside of its folder."""
    folder = new_folder(parent, "hostile_comparison", run_folder)
    sweep = folder / "sweep"
    (sweep / "cells").mkdir(parents=True)
    for cell in ("../../run", str(folder / "run")):
        content = {"cells": [{"method": "dsa-latency", "seed": 0, "cell": cell}]}
        (sweep / "result.json").write_text(json.dumps(content))
        problem = refused(run(command("report", "sweep"), folder), "plain name")
        if problem:
            return problem
    (sweep / "result.json").write_text(json.dumps({"cells": [{"method": "dsa-latency"}]}))
    return finished(run(command("report", "sweep"), folder))


CASES = (
    two_at_once, stopped_worker, killed_worker, worker_killed_each_time, full_disk, torn_log,
    two_users, hostile_run_folder, hostile_comparison,
)  # fmt: skip
