"""What the whole flow costs in time: search, rounding, fine-tuning, on one machine in one run.

DSA at half of the dense latency against plainly training the dense network for the same epochs (the
claim: no more, since the small network trains faster), and against the greedy search after NetAdapt
and the iterative knapsack after HALP, which are those of ``python -m dsa_hw.compare``, in its
harness: same data, epochs, fine-tuning and closed loop. There all methods search while they train
from scratch; in the papers these two begin with a trained dense network, so that their ratios are
given with its training added too. What measuring takes (the closed loop, the export, the last
timing) is the same for all methods, and stands beside.

One seed after the other, a run of each at a time; stopped and called again it goes on.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import harness
from dsa_hw.comparison import compare
from dsa_hw.comparison.cells import DENSE, plan
from dsa_hw.comparison.methods import LATENCY_DSA
from dsa_hw.runs.config import CompareConfig
from dsa_hw.runs.console import Progress
from dsa_hw.runs.folder import RESULT_FILE
from dsa_hw.runs.options import parse

NAME = "flow_cost"
CONFIG = "configs/compare_flow_cost.yaml"
LIMITS = {"over_dense": 1.0, "greedy_over_dsa": 3.0, "iterative_over_dsa": 3.0}
TITLES = {LATENCY_DSA: "dsa", "netadapt": "greedy", "halp": "iterative"}
QUICK = {
    "out": f"runs/{NAME}_quick", "seeds": (0,), "epochs": 4, "finetune_epochs": 2,
    "train_size": 1500, "test_size": 500, "calibration_networks": 8, "rounds": 2,
    "measure_seconds": 3.0,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Every seed; returns 1 if a run failed."""
    options = harness.parse(NAME, __doc__, argv)
    config = parse("compare", CompareConfig, ["--config", CONFIG])
    if options.quick:
        config = dataclasses.replace(config, **QUICK)
    result = compare(config, Progress())
    if result["failed"]:
        print(f"failed, and with it the benchmark: {result['failed']}", file=sys.stderr)
        return 1
    rows = [_of_seed(dataclasses.replace(config, seeds=(seed,))) for seed in config.seeds]
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    figures: dict[str, Any] = {name: statistics.mean(r[name] for r in rows) for name in names}
    origin = harness.provenance(result["environment"]) | {"config": dataclasses.asdict(config)}
    figures |= {"limits": LIMITS, "runs": rows}
    harness.finish(NAME, options, figures, origin, _table(rows))
    return 0


def _of_seed(config: CompareConfig) -> dict[str, Any]:
    results = {
        cell.method: json.loads(
            (cell.folder(Path(config.out)) / RESULT_FILE).read_text(encoding="utf-8")
        )
        for cell in plan(config)
    }
    return {"seed": config.seeds[0]} | costs(results)


def costs(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds of one seed's runs, and their ratios.

    Args:
        results: ``result.json`` of each run, by its method.
    """
    dense_s = results[DENSE]["seconds"]["dense"]
    seconds = {
        title: results[name]["seconds"]["search"] + results[name]["seconds"]["finetune"]
        for name, title in TITLES.items()
    }
    measuring = {t: results[name]["seconds"]["validate"] for name, t in TITLES.items()}
    others = [title for title in seconds if title != "dsa"]
    return {
        "dense_s": dense_s,
        "seconds": seconds,
        "measuring_s": measuring,
        "over_dense": seconds["dsa"] / dense_s,
        "over_dense_with_measuring": (seconds["dsa"] + measuring["dsa"]) / dense_s,
        **{f"{t}_over_dsa": seconds[t] / seconds["dsa"] for t in others},
        **{f"{t}_from_trained_over_dsa": (seconds[t] + dense_s) / seconds["dsa"] for t in others},
        "accuracy": {t: results[name]["pruned"]["accuracy"] for name, t in TITLES.items()},
        "dense_accuracy": results[DENSE]["accuracy"],
        "measured_over_dense": {t: results[n]["ratio"]["measured"] for n, t in TITLES.items()},
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="time of the whole flow at half of the dense latency")
    columns = ("seed", "dense s", "DSA s", "DSA / dense", "greedy / DSA", "from trained",
               "iterative / DSA", "from trained")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["seed"]), f"{row['dense_s']:.0f}", f"{row['seconds']['dsa']:.0f}",
            f"{row['over_dense']:.3f}", f"{row['greedy_over_dsa']:.2f}",
            f"{row['greedy_from_trained_over_dsa']:.2f}", f"{row['iterative_over_dsa']:.2f}",
            f"{row['iterative_from_trained_over_dsa']:.2f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
