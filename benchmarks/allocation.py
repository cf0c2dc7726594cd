"""Is the allocation worth it? Accuracy at one FLOPs budget, the same epochs for all, on glyphs.

DSA from scratch and from a trained network, against uniform widths from scratch and magnitude
pruning, several seeds, FLOPs budgets of 50% and 25%. Methods are compared with those of as many
epochs in all: from scratch the schedule's; from a trained network twice as many, since its training
counts, and uniform widths have a schedule twice as long beside them. Ablations of DSA from scratch:
the validation split, the masks, when the search begins, the way of holding the budget, the
importance.

Every network is a run with a folder of its own; stopped and called again, the benchmark goes on,
and a finished run is not done twice. Seed by seed, so that what there is compares everything.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import harness, methods
from benchmarks.methods import Bench, Outcome, glyphs_config
from dsa_hw.pipeline.opening import load_dense
from dsa_hw.runs.config import PruneConfig
from dsa_hw.search.settings import SearchSettings

NAME = "allocation"
BUDGETS = (0.5, 0.25)
SEEDS = (0, 1, 2)
ABLATED_AT = 0.25

Method = Callable[[Bench, str], Outcome]
METHODS: dict[str, Method] = {
    "dsa": methods.dsa,
    "uniform": lambda b, name: methods.uniform(b, name, b.config.epochs),
    "magnitude": methods.magnitude,
    "dsa_trained": functools.partial(methods.dsa, from_trained=True),
    "uniform_twice_as_long": lambda b, name: methods.uniform(b, name, 2 * b.config.epochs),
    "magnitude_trained": functools.partial(methods.magnitude, from_trained=True),
}
ABLATIONS: dict[str, Method] = {
    "no_validation_split": functools.partial(methods.dsa, training_data=True),
    "masked_training": functools.partial(
        methods.dsa, settings=SearchSettings(mask_training=True), importance="filter_l1"
    ),
    "sampled_masks": functools.partial(methods.dsa, settings=SearchSettings(masks="sampled")),
    "admm": functools.partial(methods.dsa, settings=SearchSettings(constraint="admm")),
    "hard_masks": functools.partial(methods.dsa, settings=SearchSettings(masks="hard")),
    "early_search": functools.partial(
        methods.dsa, settings=SearchSettings(warmup=(0.15, 0.7), budget_ramp=0.6)
    ),
    "bn_scale": functools.partial(methods.dsa, importance="bn_scale"),
    "filter_l1": functools.partial(methods.dsa, importance="filter_l1"),
}


def main(argv: list[str] | None = None) -> None:
    """Every method and ablation at every budget and seed."""
    options = harness.parse(NAME, __doc__, argv)
    base = glyphs_config(options.quick)
    root = Path(f"runs/{NAME}{'_quick' if options.quick else ''}")
    runs: list[dict[str, Any]] = []
    dense: list[dict[str, Any]] = []
    for config in methods.for_seeds(base, SEEDS[:1] if options.quick else SEEDS):
        found, accuracy = _of_seed(config, root, BUDGETS[1:] if options.quick else BUDGETS)
        runs += found
        dense.append({"seed": config.seed, "accuracy": accuracy})
    figures = {"rows": means(runs), "dense": dense, "runs": runs}
    origin = harness.provenance(harness.machine()) | {"config": dataclasses.asdict(base)}
    harness.finish(NAME, options, figures, origin, _table(figures["rows"]))


def _of_seed(
    config: PruneConfig, root: Path, budgets: tuple[float, ...]
) -> tuple[list[dict[str, Any]], float]:
    """All runs of a seed, and the dense network's accuracy."""
    shared = root / f"seed{config.seed}"
    network = load_dense(config)
    benches = {
        ratio: Bench(
            dataclasses.replace(config, flops_ratio=ratio), shared / f"{ratio}", shared, network
        )
        for ratio in budgets
    }
    runs = []
    for ratio, bench in benches.items():
        for name, method in (METHODS | (ABLATIONS if ratio == ABLATED_AT else {})).items():
            outcome = once(bench, name, method)
            key = {"method": name, "flops_ratio": ratio, "seed": config.seed}
            print(f"{key}: {outcome['accuracy']}", file=sys.stderr)
            runs.append(key | outcome)
    first = benches[budgets[0]]
    dense = harness.once(shared / "dense.json", lambda: {"accuracy": first.dense_accuracy()})
    return runs, dense["accuracy"]


def once(bench: Bench, name: str, method: Method) -> dict[str, Any]:
    """A run's outcome; a finished one is read, if it is one of this configuration."""
    bench.run(bench.folder / name)
    path = bench.folder / name / "outcome.json"
    return harness.once(path, lambda: dataclasses.asdict(method(bench, name)))


def means(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each method at each budget, over its seeds."""
    rows = []
    for key in dict.fromkeys((r["flops_ratio"], r["method"]) for r in runs):
        mine = [r for r in runs if (r["flops_ratio"], r["method"]) == key]
        accuracies = [r["accuracy"] for r in mine]
        spread = statistics.stdev(accuracies) / len(mine) ** 0.5 if len(mine) > 1 else None
        rows.append(
            {
                "flops_ratio": key[0], "method": key[1], "epochs": mine[0]["epochs"],
                "accuracy": statistics.mean(accuracies),
                "standard_error_points": None if spread is None else 100 * spread,
                "cost_over_target": statistics.mean(r["cost_over_target"] for r in mine),
            }
        )  # fmt: skip
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="accuracy on glyphs at a FLOPs budget")
    for column in ("budget", "method", "epochs", "accuracy %", "standard error", "cost / target"):
        table.add_column(column, justify="right")
    for row in rows:
        error = row["standard_error_points"]
        table.add_row(
            f"{row['flops_ratio']:.2f}", row["method"], str(row["epochs"]),
            f"{100 * row['accuracy']:.2f}", "-" if error is None else f"{error:.2f}",
            f"{row['cost_over_target']:.3f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
