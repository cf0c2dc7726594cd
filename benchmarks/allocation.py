"""Is the allocation worth it? Accuracy at one FLOPs budget, the same epochs for all, on glyphs.

DSA from scratch and from a trained network, against uniform widths from scratch and magnitude
pruning, several seeds, FLOPs budgets of 50% and 25%. From scratch all have the same epochs; from a
trained network DSA and magnitude pruning both begin with the same dense network. Ablations of DSA
from scratch: the validation split, the masks, the way of holding the budget, the importance.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import harness, methods
from benchmarks.methods import Bench, Outcome, glyphs_config
from dsa_hw.search import SearchSettings

NAME = "allocation"
ABLATED_AT = 0.25

METHODS: dict[str, Callable[[Bench], Outcome]] = {
    "dsa": lambda b: methods.dsa(b, "dsa"),
    "uniform": lambda b: methods.uniform(b, "uniform"),
    "magnitude": lambda b: methods.magnitude(b, "magnitude"),
    "dsa_trained": lambda b: methods.dsa(b, "dsa_trained", _trained(b)),
    "magnitude_trained": lambda b: methods.magnitude(b, "magnitude_trained", _trained(b)),
}
ABLATIONS: dict[str, Callable[[Bench], Outcome]] = {
    "no_validation_split": lambda b: methods.dsa(b, "no_split", training_data=True),
    "sampled_masks": lambda b: methods.dsa(b, "sampled", settings=SearchSettings(stochastic=True)),
    "admm": lambda b: methods.dsa(b, "admm", settings=SearchSettings(constraint="admm")),
    "augmented_lagrangian": lambda b: methods.dsa(
        b, "lagrangian", settings=SearchSettings(constraint="augmented_lagrangian")
    ),
    "filter_l1": lambda b: methods.dsa(b, "filter_l1", importance="filter_l1"),
    "taylor": lambda b: methods.dsa(b, "taylor", importance="taylor"),
}


def _trained(bench: Bench):
    return bench.train_dense(bench.config.epochs)[0]


def main() -> None:
    """Every method and ablation at every budget and seed."""
    options = harness.parse(NAME, __doc__)
    base = glyphs_config(options.quick)
    runs: list[dict[str, Any]] = []
    for ratio in (0.25,) if options.quick else (0.5, 0.25):
        chosen = METHODS | (ABLATIONS if ratio == ABLATED_AT else {})
        at_ratio = dataclasses.replace(base, flops_ratio=ratio)
        for config in methods.for_seeds(at_ratio, (0,) if options.quick else (0, 1, 2)):
            bench = Bench(config, _folder(options.quick, ratio, config.seed))
            for name, method in chosen.items():
                found = method(bench)
                print(f"{name} at {ratio}, seed {config.seed}: {found.accuracy}", file=sys.stderr)
                own = dataclasses.asdict(found)
                runs.append({"method": name, "flops_ratio": ratio, "seed": config.seed} | own)
    rows = _means(runs)
    table = Table(title="accuracy on glyphs at a FLOPs budget")
    for column in ("budget", "method", "accuracy %", "standard error", "cost / target"):
        table.add_column(column, justify="right")
    for row in rows:
        error = row["standard_error_points"]
        table.add_row(
            f"{row['flops_ratio']:.2f}", row["method"], f"{100 * row['accuracy']:.2f}",
            "-" if error is None else f"{error:.2f}", f"{row['cost_over_target']:.3f}",
        )  # fmt: skip
    origin = harness.provenance(harness.machine()) | {"config": dataclasses.asdict(base)}
    harness.finish(NAME, options, {"rows": rows, "runs": runs}, origin, table)


def _folder(quick: bool, ratio: float, seed: int) -> Path:
    return Path(f"runs/{NAME}{'_quick' if quick else ''}/{ratio}_{seed}")


def _means(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for key in dict.fromkeys((r["flops_ratio"], r["method"]) for r in runs):
        mine = [r for r in runs if (r["flops_ratio"], r["method"]) == key]
        accuracies = [r["accuracy"] for r in mine]
        spread = statistics.stdev(accuracies) / len(mine) ** 0.5 if len(mine) > 1 else None
        rows.append(
            {
                "flops_ratio": key[0], "method": key[1],
                "accuracy": statistics.mean(accuracies),
                "standard_error_points": None if spread is None else 100 * spread,
                "cost_over_target": statistics.mean(r["cost_over_target"] for r in mine),
            }
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
