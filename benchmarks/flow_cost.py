"""What the whole flow costs in time: search, rounding, fine-tuning, on one machine in one run.

Against plainly training the dense network for the same epochs (the claim: no more, since the small
network trains faster), and against a greedy search after NetAdapt and an iterative one after HALP,
which begin with a trained dense network; its training counts for them. FLOPs stand for the cost, so
that no device is needed; the target is half of them.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import harness, methods
from benchmarks.methods import Bench, glyphs_config
from dsa_hw.config import PruneConfig

NAME = "flow_cost"
LIMITS = {"over_dense": 1.0, "greedy_over_dsa": 3.0, "iterative_over_dsa": 3.0}


def _one(config: PruneConfig, folder: Path, quick: bool) -> dict[str, Any]:
    bench = Bench(config, folder)
    dense, dense_accuracy, dense_s = bench.train_dense(config.epochs)
    found = {
        "dsa": methods.dsa(bench, "dsa"),
        "greedy": methods.netadapt(
            bench, "greedy", dense, short_steps=2 if quick else 20,
            reduction=0.1 if quick else 0.025,
        ),
        "iterative": methods.iterative_knapsack(
            bench, "iterative", dense, rounds=3 if quick else 30,
            steps_between=2 if quick else 40,
        ),
    }  # fmt: skip
    seconds = {
        name: outcome.seconds + (0.0 if name == "dsa" else dense_s)
        for name, outcome in found.items()
    }
    return {
        "seed": config.seed,
        "dense_s": dense_s,
        "dense_accuracy": dense_accuracy,
        "seconds": seconds,
        "search_s": {name: outcome.allocation_seconds for name, outcome in found.items()},
        "accuracy": {name: outcome.accuracy for name, outcome in found.items()},
        "cost_over_target": {name: outcome.cost_over_target for name, outcome in found.items()},
        "over_dense": seconds["dsa"] / dense_s,
        "greedy_over_dsa": seconds["greedy"] / seconds["dsa"],
        "iterative_over_dsa": seconds["iterative"] / seconds["dsa"],
    }


def main() -> None:
    """Every seed from an empty folder: a stage that is there already would cost nothing."""
    options = harness.parse(NAME, __doc__)
    base = glyphs_config(options.quick)
    rows = []
    for config in methods.for_seeds(base, (0,) if options.quick else (0, 1, 2)):
        folder = _empty(Path(f"runs/{NAME}{'_quick' if options.quick else ''}_{config.seed}"))
        rows.append(_one(config, folder, options.quick))
        print(f"seed {config.seed}: {rows[-1]['over_dense']:.3f} of dense", file=sys.stderr)
    table = Table(title="time of the whole flow")
    for column in ("seed", "dense s", "DSA s", "over dense", "greedy / DSA", "iterative / DSA"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["seed"]), f"{row['dense_s']:.0f}", f"{row['seconds']['dsa']:.0f}",
            f"{row['over_dense']:.3f}", f"{row['greedy_over_dsa']:.2f}",
            f"{row['iterative_over_dsa']:.2f}",
        )  # fmt: skip
    figures = {name: statistics.mean(r[name] for r in rows) for name in LIMITS}
    origin = harness.provenance(harness.machine()) | {"config": dataclasses.asdict(base)}
    harness.finish(NAME, options, figures | {"limits": LIMITS, "runs": rows}, origin, table)


def _empty(folder: Path) -> Path:
    """``folder``, or the next one of that name that does not exist yet."""
    number = 0
    while (found := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return found


if __name__ == "__main__":
    sys.exit(main())
