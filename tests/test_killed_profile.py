"""A profile that is killed loses no finished measurement, and goes on from there."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from profilers.collect import RETAKEN
from profilers.layers.spec import LayerSpec
from profilers.table import LatencyTable, LayerKey
from profilers.timing import TURNS

pytestmark = pytest.mark.measures

KILLS = 20
ROUNDS = 8
SPEC = "conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 8x8 b1 fp32 +relu"
WIDTHS = range(8, 168, 8)

PROFILE = f"""
import sys
from profilers.backends import open_backend
from profilers.collect import Request, collect
from profilers.layers.spec import LayerSpec
from profilers.table import LatencyTable

backend = open_backend("cpu", threads=1)
table = LatencyTable.open(sys.argv[1], backend.provenance() | {{"reference_ms": 1.0}})
before = len(table)  # a seed: each profile takes another order
spec = LayerSpec.parse({SPEC!r})
requests = [Request.layer(spec, w, w) for w in {list(WIDTHS)}]
report = lambda done, planned: print(len(table), flush=True)
collect(table, backend, requests, rounds={ROUNDS}, seed=before, on_progress=report)
"""


def test_killed_at_twenty_moments(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    moments = random.Random(0)
    reported = 0
    for _ in range(KILLS):
        child = subprocess.Popen(
            [sys.executable, "-c", PROFILE, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        # some kills come before the first report, the others between two
        wait_for = moments.randrange(6)
        seen = [child.stdout.readline() for _ in range(wait_for)]
        time.sleep(moments.uniform(0.0, 0.1 if wait_for else 1.0))
        child.kill()
        output, _ = child.communicate()
        if lines := "".join([*seen, output]).split():
            reported = int(lines[-1])
        if path.exists():
            table = LatencyTable.load(path)
            # what was reported is there; at most one more was written and not yet reported
            assert reported <= len(table) <= reported + 1
            reported = len(table)
    assert reported > 0, "every kill came before the first measurement: the test proves nothing"
    subprocess.run([sys.executable, "-c", PROFILE, str(path)], check=True, capture_output=True)
    table = LatencyTable.load(path)
    spec = LayerSpec.parse(SPEC)
    assert {LayerKey(spec, w, w) for w in WIDTHS} == set(table.layers())
    # where others disturbed rounds more are taken, up to a limit, and none because of a kill; what
    # is open when the limit is reached stays so for its rounds in a row
    most = round(RETAKEN * ROUNDS) + TURNS - 1
    for rounds in table.rounds.values():
        counting = sum(map(table.counts, rounds))
        assert counting >= ROUNDS or len(rounds) >= RETAKEN * ROUNDS
        assert len(rounds) <= most
