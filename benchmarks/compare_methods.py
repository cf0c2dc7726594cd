"""DSA under a latency budget against DSA under FLOPs and six other ways to the same latency.

``python -m dsa_hw.compare`` with the committed configurations: glyphs, a residual network and a
MobileNetV2-style one, 70, 50 and 30% of the dense latency, three seeds. Hours on two cores; stopped
and called again it goes on, and several processes can work at once. Both networks have their first
seed before either has its second, so that a stopped sweep says something of everything.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from benchmarks import harness
from dsa_hw.baselines import LATENCY_DSA
from dsa_hw.cli import parse
from dsa_hw.comparison import compare, prepare
from dsa_hw.config import CompareConfig
from dsa_hw.console import Progress
from dsa_hw.html_report.compare_record import SLOWER_PCT

NAME = "compare_methods"
CONFIGS = ("configs/compare_glyphs_resnet.yaml", "configs/compare_glyphs_mobilenet.yaml")
QUICK = {
    "out": f"runs/{NAME}_quick", "methods": ("dsa", "uniform", "magnitude"), "seeds": (0,),
    "target_ratios": (0.5,), "epochs": 3, "finetune_epochs": 2, "train_size": 3000,
    "test_size": 1000, "calibration_networks": 12, "rounds": 2, "measure_seconds": 5.0,
}  # fmt: skip


def main() -> int:
    """Run (or go on with) the sweeps, and say who is ahead where; returns 1 if a run failed."""
    options = harness.parse(NAME, __doc__)
    progress = Progress()
    configs = [parse("compare", CompareConfig, ["--config", path]) for path in CONFIGS]
    if options.quick:
        configs = [dataclasses.replace(configs[0], **QUICK)]
    for config in configs:
        prepare(config, progress)  # what cannot be is refused before anything is trained
    results = {}
    for config in seed_by_seed(configs):
        progress.say(f"{config.model}, seeds {config.seeds}")
        results[config.model] = compare(config, progress)
    figures = {
        "ahead_by_more_than_its_standard_error": {m: _ahead(r) for m, r in results.items()},
        "networks": {m: _figures(r) for m, r in results.items()},
    }
    first = next(iter(results.values()))
    settings = [dataclasses.asdict(config) for config in configs]
    origin = harness.provenance(first["environment"]) | {"configs": settings}
    harness.finish(NAME, options, figures, origin, _table(results))
    return int(any(r["failed"] for r in results.values()))


def seed_by_seed(configs: Sequence[CompareConfig]) -> list[CompareConfig]:
    """The same sweeps with one seed more at a time, in turn; what is finished is not done again."""
    most = max(len(c.seeds) for c in configs)
    return [
        dataclasses.replace(config, seeds=config.seeds[:count])
        for count in range(1, most + 1)
        for config in configs
        if count <= len(config.seeds)
    ]


def _ahead(result: dict[str, Any]) -> int:
    """Targets at which DSA under latency is ahead of every other method by more than the error.

    Not where its networks are slower than the other's by more than ``SLOWER_PCT`` in the mean.
    """
    count = 0
    for target in result["targets"]:
        gains = [g for g in result["gains"] if g["target"] == target]
        errors = [g["points_standard_error"] for g in gains]
        certain = all(e is not None for e in errors)
        count += bool(gains) and certain and all(
            g["points"] > e and g["slower_pct"] <= SLOWER_PCT
            for g, e in zip(gains, errors, strict=True)
        )  # fmt: skip
    return count


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    kept = ("model", "data", "epochs", "seeds", "dense", "rows", "gains", "unfinished", "failed",
            "warnings")  # fmt: skip
    cells = [{k: v for k, v in c.items() if k != "keep_ratios"} for c in result["cells"]]
    return {k: result[k] for k in kept} | {"cells": cells}


def _table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="accuracy at the same measured latency")
    table.add_column("network")
    table.add_column("method")
    targets = list(dict.fromkeys(t for r in results.values() for t in r["targets"]))
    for target in targets:
        table.add_column(target, justify="right")
    for model, result in results.items():
        for method in result["methods"]:
            rows = {r["target"]: r for r in result["rows"] if r["method"] == method["name"]}
            style = "bold" if method["name"] == LATENCY_DSA else None
            cells = [_accuracy(rows[t]) if t in rows else "" for t in targets]
            table.add_row(model, method["title"], *cells, style=style)
    return table


def _accuracy(row: dict[str, Any]) -> str:
    if row["accuracy"] is None:
        return "not reached" if row["infeasible"] else "not finished"
    error = row["accuracy_standard_error"]
    spread = "" if error is None else f" ± {100 * error:.2f}"
    return f"{100 * row['accuracy']:.2f}{spread} at {row['ratio']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
