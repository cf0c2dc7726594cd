"""DSA under a latency budget against DSA under FLOPs and six other ways to the same latency.

Under FLOPs twice: with widths on the device's steps, and with multiples of 8.

``python -m dsa_hw.compare`` with the committed configurations: glyphs, a residual network and a
MobileNetV2-style one, 70, 50 and 30% of the dense latency, three seeds. Hours on two cores; stopped
and called again it goes on, and several processes can work at once. Both networks have their first
seed before either has its second, so that a stopped sweep says something of everything.

A network's seed is one sweep, whose figures are kept in a file of their own as soon as it is
complete: what takes more than a day is done on one device, and not all at once. What is kept there
is not measured again; another ``--out`` measures everything. The report in a sweep's folder is that
of the seed summed up last; ``python -m dsa_hw.compare`` with the configuration writes that of all.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import harness
from dsa_hw.comparison import compare
from dsa_hw.comparison.cell_run import method_title
from dsa_hw.comparison.methods import LATENCY_DSA
from dsa_hw.comparison.summary import mean_and_error, over_seeds
from dsa_hw.errors import UserError
from dsa_hw.pipeline.opening import configured_backend
from dsa_hw.reports.compare_record import SLOWER_PCT
from dsa_hw.runs.config import CompareConfig
from dsa_hw.runs.console import Progress
from dsa_hw.runs.options import parse

NAME = "compare_methods"
CONFIGS = {
    "glyphs_resnet10": "configs/compare_glyphs_resnet.yaml",
    "glyphs_mobilenet5": "configs/compare_glyphs_mobilenet.yaml",
}
QUICK = {
    "out": f"runs/{NAME}_quick", "methods": ("dsa", "uniform", "magnitude"), "seeds": (0,),
    "target_ratios": (0.5,), "epochs": 3, "finetune_epochs": 2, "from_dense": 0,
    "train_size": 3000, "test_size": 1000, "calibration_networks": 12, "rounds": 2,
    "measure_seconds": 5.0,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run (or go on with) the sweeps, and say who is ahead where; returns 1 if a run is missing."""
    options = harness.parse(NAME, __doc__, argv, models=tuple(CONFIGS))
    progress = Progress()
    configs = [parse("compare", CompareConfig, ["--config", CONFIGS[m]]) for m in options.models]
    if options.quick:
        configs = [dataclasses.replace(configs[0], **QUICK)]
    by_model: dict[str, list[dict[str, Any]]] = {}
    for config in seed_by_seed(configs):
        progress.say(f"{config.model}, seed {config.seeds[0]}")
        try:
            figures = harness.once(
                _file(options, config), functools.partial(_complete, config, progress)
            )
            _check_device(config, figures)
        except (_Incomplete, UserError) as error:
            print(error, file=sys.stderr)
            return 1
        by_model.setdefault(config.model, []).append(figures)
    networks = {model: together(seeds) for model, seeds in by_model.items()}
    figures = {
        "ahead_by_more_than_its_standard_error": {m: _ahead(n) for m, n in networks.items()},
        "ahead_at_the_others_latency": {m: _ahead_level(n) for m, n in networks.items()},
        "networks": networks,
    }
    origin = {m: [seed["provenance"] for seed in seeds] for m, seeds in by_model.items()}
    harness.finish(NAME, options, figures, origin, _table(networks), _gains_table(networks))
    return 0


def seed_by_seed(configs: Sequence[CompareConfig]) -> list[CompareConfig]:
    """The same sweeps, a seed each, in turn."""
    most = max(len(c.seeds) for c in configs)
    return [
        dataclasses.replace(config, seeds=(config.seeds[turn],))
        for turn in range(most)
        for config in configs
        if turn < len(config.seeds)
    ]


class _Incomplete(Exception):
    """A sweep has runs that failed or that another process is at."""


def _complete(config: CompareConfig, progress: Progress) -> dict[str, Any]:
    """The figures of a sweep with all its runs."""
    result = compare(config, progress)
    if left := result["unfinished"]:
        raise _Incomplete(
            f"{config.model}, seed {config.seeds[0]}: not finished, call it again: "
            f"{', '.join(left)}. Failed: {result['failed'] or 'none'}"
        )
    kept = (
        "model", "data", "epochs", "seeds", "methods", "targets", "dense", "shares", "warnings",
    )  # fmt: skip
    cells = [{k: v for k, v in c.items() if k != "keep_ratios"} for c in result["cells"]]
    origin = harness.provenance(result["environment"]) | {"config": dataclasses.asdict(config)}
    return {k: result[k] for k in kept} | {"cells": cells, "provenance": origin}


def _file(options: harness.Options, config: CompareConfig) -> Path:
    name = f"{config.model}_seed{config.seeds[0]}{'_quick' if options.quick else ''}.json"
    return options.out / NAME / name


def _check_device(config: CompareConfig, figures: dict[str, Any]) -> None:
    """Seeds of one network are of one device, or their latencies say nothing together."""
    here, there = configured_backend(config).provenance(), figures["provenance"]
    for name in ("device", "cpu_features", "runtime", "precision", "batch_size", "threads"):
        if here[name] != there[name]:
            raise UserError(
                f"figures are kept of {name} = {there[name]!r}, and this is {here[name]!r}: "
                "give another --out"
            )


def together(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One network's figures over its seeds."""
    first = seeds[0]
    methods, targets = [m["name"] for m in first["methods"]], first["targets"]
    cells = [cell for seed in seeds for cell in seed["cells"]]
    accuracies = [seed["dense"]["accuracy"] for seed in seeds]
    return {
        "seeds": [s for seed in seeds for s in seed["seeds"]],
        "methods": first["methods"],
        "targets": targets,
        "dense": first["dense"] | mean_and_error("accuracy", accuracies),
        **over_seeds(methods, targets, cells),
        "cells": cells,
        "warnings": [w for seed in seeds for w in seed["warnings"]],
    }


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


def _ahead_level(result: dict[str, Any]) -> int:
    """The same of the gains at the other's latency, which count whoever is slower."""
    count = 0
    for target in result["targets"]:
        gains = [g for g in result["gains"] if g["target"] == target]
        pairs = [
            (g["points_at_its_latency"], g["points_at_its_latency_standard_error"]) for g in gains
        ]
        count += bool(pairs) and all(
            points is not None and error is not None and points > error for points, error in pairs
        )
    return count


def _table(results: dict[str, dict[str, Any]]) -> Table:
    return _by_target("accuracy at the same measured latency", results, "rows", _accuracy)


def _gains_table(results: dict[str, dict[str, Any]]) -> Table:
    title = "points that DSA under latency is ahead at the other's latency"
    return _by_target(title, results, "gains", _points)


def _by_target(
    title: str,
    results: dict[str, dict[str, Any]],
    kind: str,
    said: Callable[[dict[str, Any]], str],
) -> Table:
    """A line a network and method, a column a target.

    Args:
        kind: ``rows`` or ``gains`` of a network's figures.
        said: of one of them.
    """
    targets = list(dict.fromkeys(t for r in results.values() for t in r["targets"]))
    table = Table(title=title)
    table.add_column("network")
    table.add_column("method")
    for target in targets:
        table.add_column(target, justify="right")
    for model, result in results.items():
        for name in dict.fromkeys(item["title"] for item in result[kind]):
            cells = {i["target"]: said(i) for i in result[kind] if i["title"] == name}
            style = "bold" if name == method_title(LATENCY_DSA) else None
            table.add_row(model, name, *(cells.get(t, "") for t in targets), style=style)
    return table


def _accuracy(row: dict[str, Any]) -> str:
    if row["accuracy"] is None:
        return "not reached"
    error = row["accuracy_standard_error"]
    spread = "" if error is None else f" ± {100 * error:.2f}"
    return f"{100 * row['accuracy']:.2f}{spread} at {row['ratio']:.3f}"


def _points(gain: dict[str, Any]) -> str:
    points, error = gain["points_at_its_latency"], gain["points_at_its_latency_standard_error"]
    if points is None:
        return "none"
    return f"{points:+.2f}" + ("" if error is None else f" ± {error:.2f}")


if __name__ == "__main__":
    sys.exit(main())
