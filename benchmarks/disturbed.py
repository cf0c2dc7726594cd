"""Plans made while another program burns one core half of the time: are they right afterwards?

Each network is planned to 0.6 of its dense latency, from an empty latency table, under a load of
bursts of random seconds (``benchmarks.burst_load``). Then the load ends, and the exported network
is timed in turn with the dense one by a program that shares no code with the package
(``benchmarks.plain_timer``): only what it times while the dense network has the latency that the
plan gives for it, before and after, counts. A plan is right where that ratio is within 0.57 to
0.60, or where it said *undecided*, and why. Two networks that are bound by memory are planned
without the load, on the host as it is.

Stopped and called again, it goes on; its working folder is ``runs/disturbed``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import harness
from dsa_hw.pipeline.opening import dense_of_run
from dsa_hw.runs.folder import ONNX_FILE, RESULT_FILE, RunFolder

NAME = "disturbed"
TARGET = 0.6
WITHIN = (0.57, 0.60)
LOADED = ("resnet18", "timm:regnetx_002", "timm:fbnetc_100")
AS_IT_IS = ("timm:tinynet_a", "mobilenet_v2")
SEEDS = (0, 1)
STATE = 0.08
"""Relative difference of the dense latencies, then and afterwards, from which the machine counts as
being in another state: those that were seen are 30% and 60 to 80% apart."""
HERE = Path(__file__).parent
QUICK = ("--calibration-networks", "24", "--rounds", "3")


@dataclass(frozen=True)
class Plan:
    """One plan to make."""

    model: str
    seed: int
    loaded: bool

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.model.replace(':', '_')}-seed{self.seed}"


def main(argv: list[str] | None = None) -> None:
    """Every plan, one after the other."""
    options = harness.parse(NAME, __doc__, argv)
    work = Path("runs") / (f"{NAME}_quick" if options.quick else NAME)
    plans = [Plan(model, seed, True) for model in LOADED for seed in SEEDS]
    plans += [Plan(model, 0, False) for model in AS_IT_IS]
    if options.quick:
        plans = [Plan("timm:regnetx_002", 0, True)]
    rows = []
    for plan in plans:
        folder = work / plan.name
        folder.mkdir(parents=True, exist_ok=True)
        result = _planned(plan, folder, QUICK if options.quick else ())
        row = harness.once(
            folder / "row.json",
            lambda p=plan, f=folder, r=result: _row(p, r, _read_again(f, r, options.quick)),
        )
        print(f"{plan.name}: {row['ratio']:.3f}, {row['verdict']}", file=sys.stderr)
        rows.append(row)
    figures: dict[str, Any] = {
        "right": sum(r["right"] for r in rows),
        "within": sum(r["within"] for r in rows),
        "undecided": sum(r["verdict"] == "undecided" for r in rows),
        "of": len(rows),
        "target": TARGET,
        "limits": WITHIN,
        "plans": rows,
    }
    environment = _result(work / plans[0].name)["environment"]
    harness.finish(NAME, options, figures, harness.provenance(environment), _table(rows))


@contextmanager
def _load(seed: int, wanted: bool) -> Iterator[None]:
    """The other program, for as long as the block lasts."""
    if not wanted:
        yield
        return
    other = subprocess.Popen([sys.executable, str(HERE / "burst_load.py"), str(seed)])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def _planned(plan: Plan, folder: Path, more: tuple[str, ...]) -> dict[str, Any]:
    """The plan's result; the minutes that it took are beside it."""
    if not (folder / "run" / RESULT_FILE).exists():
        words = [
            sys.executable, "-m", "dsa_hw.prune", "--model", plan.model, "--epochs", "0",
            "--target-ratio", str(TARGET), "--seed", str(plan.seed),
            "--table", str(folder / "table.jsonl"), "--out", str(folder / "run"), *more,
        ]  # fmt: skip
        started = time.monotonic()
        with _load(plan.seed, plan.loaded):
            subprocess.run(words, check=True)
        minutes = (time.monotonic() - started) / 60
        (folder / "minutes.json").write_text(json.dumps(minutes) + "\n", encoding="utf-8")
    return _result(folder)


def _result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / RESULT_FILE).read_text(encoding="utf-8"))


def _read_again(folder: Path, result: dict[str, Any], quick: bool) -> dict[str, Any]:
    """The independent reading, in the plan's state of the machine if that comes."""
    run = RunFolder(folder / "run")
    dense = folder / "dense.onnx"
    dense.write_bytes(dense_of_run(run, result))
    words = [
        sys.executable, str(HERE / "plain_timer.py"), str(dense), str(run.path / ONNX_FILE),
        "--threads", str(result["threads"]), "--pairs", "12" if quick else "20",
    ]  # fmt: skip
    state = ["--dense-ms", str(result["dense"]["measured_ms"]), "--within", str(STATE)]
    reading: dict[str, Any] = {}
    for more in (state, []):
        done = subprocess.run([*words, *more], stdout=subprocess.PIPE, text=True, check=True)
        reading = json.loads(done.stdout) | {"same_state": bool(more)}
        if "ratio" in reading:
            break
    minutes = json.loads((folder / "minutes.json").read_text(encoding="utf-8"))
    return reading | {"minutes": minutes}


def _row(plan: Plan, result: dict[str, Any], reading: dict[str, Any]) -> dict[str, Any]:
    within = WITHIN[0] <= reading["ratio"] <= WITHIN[1]
    undecided = result["verdict"] == "undecided"
    return {
        "model": plan.model,
        "seed": plan.seed,
        "loaded": plan.loaded,
        "verdict": result["verdict"],
        "verdict_reason": result["verdict_reason"],
        "plan_ratio": result["ratio"]["measured"],
        "plan_dense_ms": result["dense"]["measured_ms"],
        "within": within,
        "right": (within and reading["same_state"]) or undecided,
        **{k: v for k, v in reading.items() if k != "ratios"},
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"planned to {TARGET} of dense, read afterwards by an independent timer")
    for column in ("network", "seed", "load", "plan says", "ratio", "95% interval",
                   "within", "verdict", "dense ms, plan", "afterwards", "minutes"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row["ratio_ci95"]
        table.add_row(
            row["model"], str(row["seed"]), "yes" if row["loaded"] else "no",
            f"{row['plan_ratio']:.3f}", f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}",
            "yes" if row["within"] else "no", row["verdict"], f"{row['plan_dense_ms']:.4g}",
            f"{row['dense_ms']:.4g}" + ("" if row["same_state"] else " (another state)"),
            f"{row['minutes']:.1f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
