"""Commands given a second time: after a kill, and for another target."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from whole_way import TRAIN, result_of

from dsa_hw import prune
from profilers.table import LatencyTable

pytestmark = pytest.mark.measures


def test_a_new_target_without_a_new_search(
    workdir: Path, small_table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--search-from takes over what was learned and the dense network, also to distil from."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    shutil.copy(small_table, "table.jsonl")
    assert prune.main([*TRAIN, "--train-dense", "true", "--out", "runs/s"]) == 0
    other = [*TRAIN, "--search-from", "runs/s"]
    other[other.index("0.6")] = "0.9"
    assert prune.main([*other, "--distill", "0.5", "--out", "runs/n"]) == 0
    first, second = result_of("runs/s"), result_of("runs/n")
    # what is left of the search is its rounding
    assert '"stage": "search"' in Path("runs/s/log.jsonl").read_text()
    assert '"stage": "search"' not in Path("runs/n/log.jsonl").read_text()
    assert second["seconds"]["search"] < first["seconds"]["search"]
    assert second["table"]["measured"] == 0
    assert second["dense"]["accuracy"] == first["dense"]["accuracy"]
    # Widths hang on what was measured beside other tests; what was learned is scaled up for sure.
    ratios = [[g["keep_ratio"] for g in run["groups"]] for run in (first, second)]
    assert all(b >= a for a, b in zip(*ratios, strict=True))
    assert sum(ratios[1]) > sum(ratios[0]) + 0.1
    assert second["pruned"]["accuracy"] > 0.5  # ten classes
    assert prune.main([*other, "--importance", "bn_scale", "--out", "runs/x"]) == 2
    assert "importance: 'auto' there, 'bn_scale' here" in capsys.readouterr().err
    assert prune.main([*TRAIN, "--search-from", "nowhere", "--out", "runs/x"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert prune.main([*TRAIN, "--distill", "0.5", "--out", "runs/x"]) == 2
    assert "needs a trained dense network" in capsys.readouterr().err


@pytest.mark.parametrize(("event", "number"), [("table", 30), ("log", 3), ("log", 10)])
def test_kill_and_resume(
    workdir: Path, request: pytest.FixtureRequest, event: str, number: int
) -> None:
    """kill -9 while profiling, in the search, and later; the same command then finishes."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    if event != "table":
        shutil.copy(request.getfixturevalue("small_table"), "table.jsonl")
    command = [sys.executable, "-m", "dsa_hw.prune", *TRAIN, "--out", "runs/k"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    watched = Path("table.jsonl" if event == "table" else "runs/k/log.jsonl")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if watched.exists() and watched.read_bytes().count(b"\n") >= number:
            break
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(LatencyTable.load("table.jsonl"))
    before = Path("table.jsonl").read_bytes()
    assert prune.main([*TRAIN, "--out", "runs/k"]) == 0
    after = Path("table.jsonl").read_bytes()
    complete = before[: before.rfind(b"\n") + 1]
    assert after.startswith(complete)
    assert len(LatencyTable.load("table.jsonl")) >= kept
    steps = [
        e["step"]
        for e in map(json.loads, Path("runs/k/log.jsonl").read_text().splitlines())
        if e["event"] == "search_step"
    ]
    assert steps == sorted(set(steps))  # nothing logged twice
    assert result_of("runs/k")["pruned"]["accuracy"] > 0.3
