"""What the finished runs add up to: tables of accuracies with standard errors, and their CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsa_hw.allocation.verdict import flag, verdict_of
from dsa_hw.comparison.cell_run import method_title
from dsa_hw.comparison.cells import DENSE, Cell, Target, method_names, plan, targets
from dsa_hw.comparison.final_timing import DENSE_NETWORK, TIMING, timing_name
from dsa_hw.comparison.methods import LATENCY_DSA
from dsa_hw.comparison.separability import separability
from dsa_hw.cost.counted import count, flops_budget, params_budget
from dsa_hw.cost.latency.profiling import ProfiledNetwork
from dsa_hw.cost.latency.shares import group_shares
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.reports.page import inert
from dsa_hw.runs.config import CompareConfig
from dsa_hw.runs.folder import RESULT_FILE, RunFolder
from dsa_hw.training.precision import training_precision
from profilers.steps import canonical_layers, sweep_keys
from profilers.table import LatencyTable

CSV_FILE = "cells.csv"
KIND = "comparison"
COLUMNS: tuple[str, ...] = (
    "cell", "method", "target", "seed", "accuracy", "target_ms", "measured_ms", "ci95_low_ms",
    "ci95_high_ms", "ratio", "dense_ms", "predicted_ms", "met", "flops", "params", "minutes",
    "infeasible",
)  # fmt: skip

Record = dict[str, Any]


def summarize(
    config: CompareConfig,
    cells: list[Cell],
    graph: DeployedGraph,
    profiled: ProfiledNetwork,
    table: LatencyTable,
    failed: dict[str, str],
) -> Record:
    """The content of the sweep's ``result.json``.

    Args:
        failed: what went wrong in runs that broke off, by their names.
    """
    sweep = Path(config.out)
    read = {c: RunFolder(c.folder(sweep)).read_json(RESULT_FILE) for c in cells}
    done = {c: r for c, r in read.items() if r is not None}
    records = [_cell_record(c, r, sweep) for c, r in done.items() if c.target is not None]
    names = method_names(config)
    labels = [t.label for t in targets(config)]
    flops, params = flops_budget(graph, 1.0), params_budget(graph, 1.0)
    dense = [r["accuracy"] for c, r in done.items() if c.method == DENSE]
    dense_ms = [r["dense_ms"] for r in records if r["dense_ms"] is not None]
    provenance = dict(table.provenance)
    return {
        "kind": KIND,
        "model": config.model,
        "data": config.data,
        "epochs": config.epochs,
        "from_dense": config.from_dense,
        "seeds": list(config.seeds),
        "device": provenance["device"],
        "backend": provenance["runtime"],
        "precision": provenance["precision"],
        "batch_size": provenance["batch_size"],
        "threads": provenance["threads"],
        "statistic": "median",
        "methods": [{"name": n, "title": method_title(n)} for n in names],
        "targets": labels,
        "dense": {
            **mean_and_error("accuracy", dense),
            "measured_ms": statistics.fmean(dense_ms) if dense_ms else None,
            "flops": count(flops, graph.dense_widths),
            "params": count(params, graph.dense_widths),
        },
        **over_seeds(names, labels, records),
        "cells": records,
        "unfinished": [c.name for c in plan(config) if c not in done],
        "failed": failed,
        "networks": _networks(graph, table),
        "shares": [dataclasses.asdict(s) for s in group_shares(graph, profiled.latency)],
        "staircases": _staircases(graph, table),
        "calibration": {
            "heldout_mape_pct": profiled.latency.calibration.heldout_mape_pct,
            "heldout_max_pct": profiled.latency.calibration.heldout_max_pct,
        },
        "environment": provenance
        | {"torch": torch.__version__, "training_precision": training_precision(config)},
        "warnings": [f"{n} failed: {problem}" for n, problem in failed.items()] + _warnings(done),
    }


def over_seeds(
    methods: Sequence[str], targets: Sequence[str], records: Sequence[Record]
) -> dict[str, list[Record]]:
    """``rows``: every method at every target; ``gains``: DSA under latency over the others;
    ``spreads``: how much runs differ by themselves at a target, and methods beyond that.

    Args:
        methods, targets: their names, as the records have them.
        records: the ``cells`` of one or more results.
    """
    return {
        "rows": [_row(m, label, records) for label in targets for m in methods],
        "gains": [g for label in targets for g in _gains(methods, label, records)],
        "spreads": [s for label in targets if (s := _spread(methods, label, records))],
    }


def to_csv(records: Sequence[Record]) -> str:
    """One line a run."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: inert(value) for name, value in r.items()} for r in records)
    return out.getvalue()


def _cell_record(cell: Cell, result: Record, sweep: Path) -> Record:
    assert cell.target is not None
    record: Record = dict.fromkeys(COLUMNS) | {
        "cell": cell.name, "method": cell.method, "target": cell.target.label, "seed": cell.seed,
    }  # fmt: skip
    if "infeasible" in result:
        return record | {"infeasible": result["infeasible"], "target_ms": result["target_ms"]}
    pruned = result["pruned"]
    record |= {
        "accuracy": pruned["accuracy"], "target_ms": result["target_ms"],
        "predicted_ms": pruned["predicted_ms"], "flops": pruned["flops"],
        "params": pruned["params"], "minutes": sum(result["seconds"].values()) / 60,
        "keep_ratios": [g["width"] / g["dense_width"] for g in result["groups"]],
    }  # fmt: skip
    joint = RunFolder(sweep / TIMING).read_json(timing_name(cell.target, cell.seed)) or {}
    if cell.method in joint:
        return record | _timed_together(cell.target, joint[cell.method], joint[DENSE_NETWORK])
    low, high = pruned["ci95_ms"]
    return record | {
        "measured_ms": pruned["measured_ms"], "ci95_low_ms": low, "ci95_high_ms": high,
        "ratio": result["ratio"]["measured"], "dense_ms": result["dense"]["measured_ms"],
        "met": result["met"], "verdict": result.get("verdict"),
    }  # fmt: skip


def _timed_together(target: Target, own: Record, dense: Record) -> Record:
    """Latency from the joint measurement at the end, and the target as it holds in it."""
    target_ms = target.ms if target.ms is not None else (target.ratio or 0) * dense["measured_ms"]
    low, high = own["ci95_ms"]
    use = (low / target_ms, high / target_ms)
    if target.ratio is not None:
        least, most = own["ratio_ci95"]
        use = (least / target.ratio, most / target.ratio)
    verdict = verdict_of(use, settled=own.get("settled", True) and dense.get("settled", True))
    return {
        "measured_ms": own["measured_ms"], "ci95_low_ms": low, "ci95_high_ms": high,
        "ratio": own["ratio"], "dense_ms": dense["measured_ms"], "target_ms": target_ms,
        "met": flag(verdict), "verdict": verdict,
    }  # fmt: skip


def _row(method: str, label: str, records: Sequence[Record]) -> Record:
    """A method at a target, over its seeds."""
    own = [r for r in records if (r["method"], r["target"]) == (method, label)]
    reached = [r for r in own if r["infeasible"] is None]
    return {
        "method": method, "title": method_title(method), "target": label,
        "runs": len(reached), "infeasible": len(own) - len(reached),
        **mean_and_error("accuracy", [r["accuracy"] for r in reached]),
        **mean_and_error("measured_ms", [r["measured_ms"] for r in reached]),
        **mean_and_error("ratio", [r["ratio"] for r in reached]),
        **mean_and_error("flops", [r["flops"] for r in reached]),
        "params": statistics.fmean([r["params"] for r in reached]) if reached else None,
        "target_ms": statistics.fmean([r["target_ms"] for r in reached]) if reached else None,
        "met": sum(r["met"] is True for r in reached),
        "undecided": sum(r["met"] is None for r in reached),
        "minutes": statistics.fmean([r["minutes"] for r in reached]) if reached else None,
    }  # fmt: skip


def _gains(names: Sequence[str], label: str, records: Sequence[Record]) -> list[Record]:
    """How far DSA under latency is ahead of each other method, seed by seed, in points; and how
    much slower its networks are, in per cent, which should be nothing: a gain may come from there.
    A second gain is therefore that at the other network's latency, read off the line through the
    seed's own networks of all targets; not where the other is slower than the dense network, which
    no line through pruned ones reaches.
    """
    by_seed: dict[str, dict[int, Record]] = {}
    fronts: dict[int, dict[float, float]] = {}
    for r in records:
        if r["accuracy"] is None:
            continue
        if r["target"] == label:
            by_seed.setdefault(r["method"], {})[r["seed"]] = r
        if r["method"] == LATENCY_DSA:
            fronts.setdefault(r["seed"], {})[r["ratio"]] = r["accuracy"]
    ours = by_seed.get(LATENCY_DSA, {})
    gains = []
    for name in names:
        theirs = by_seed.get(name, {})
        shared = sorted(set(ours) & set(theirs))
        if name == LATENCY_DSA or not shared:
            continue
        points = [100 * (ours[s]["accuracy"] - theirs[s]["accuracy"]) for s in shared]
        slower = [100 * (ours[s]["ratio"] / theirs[s]["ratio"] - 1) for s in shared]
        level = [
            100 * (accuracy_at(theirs[s]["ratio"], fronts[s]) - theirs[s]["accuracy"])
            for s in shared
            if len(fronts[s]) > 1 and theirs[s]["ratio"] <= 1
        ]
        gains.append(
            {"target": label, "over": name, "title": method_title(name), "seeds": len(shared)}
            | mean_and_error("points", points)
            | mean_and_error("slower_pct", slower)
            | mean_and_error("points_at_its_latency", level)
        )
    return gains


def accuracy_at(ratio: float, front: Mapping[float, float]) -> float:
    """Accuracy at a latency on the line through ``front``, straight in the logarithm of latency.

    Args:
        ratio: latency over that of the dense network; beyond the ends, the outermost two networks'
            line goes on.
        front: accuracy by ratio, of two networks or more.
    """
    ratios, accuracies = np.array(sorted(front.items())).T
    logs = np.log(ratios)
    right = int(np.clip(np.searchsorted(logs, np.log(ratio)), 1, len(logs) - 1))
    part = (np.log(ratio) - logs[right - 1]) / (logs[right] - logs[right - 1])
    return float((1 - part) * accuracies[right - 1] + part * accuracies[right])


def _spread(names: Sequence[str], label: str, records: Sequence[Record]) -> Record | None:
    """Of the methods that reached the target with every seed that any of them has."""
    reached = {
        (r["method"], r["seed"]): r["accuracy"]
        for r in records
        if r["target"] == label and r["accuracy"] is not None
    }
    seeds = sorted({seed for _, seed in reached})
    whole = [n for n in names if all((n, seed) in reached for seed in seeds)]
    accuracies = np.array([[reached[n, seed] for seed in seeds] for n in whole])
    found = separability(whole, accuracies.reshape(len(whole), len(seeds)))
    return None if found is None else {"target": label} | dataclasses.asdict(found)


def mean_and_error(name: str, values: Sequence[float]) -> Record:
    """The mean over seeds and its standard error (None from one value)."""
    several = len(values) > 1
    error = statistics.stdev(values) / len(values) ** 0.5 if several else None
    return {
        name: statistics.fmean(values) if values else None,
        f"{name}_standard_error": error,
    }


def _networks(graph: DeployedGraph, table: LatencyTable) -> list[Record]:
    """Whole networks of random widths: FLOPs beside measured ms."""
    flops = flops_budget(graph, 1.0)
    return [
        {"flops": count(flops, key.widths), "measured_ms": table.measurement(key).median_ms}
        for key in table.networks()
        if key.network == graph.digest
    ]


def _staircases(graph: DeployedGraph, table: LatencyTable) -> list[Record]:
    """The sweeps that showed the steps of each kind of layer."""
    found = []
    for kind, spec in canonical_layers(x.spec for x in graph.layers).items():
        keys = [k for k in sweep_keys(spec) if k in table]
        measured = [table.measurement(k) for k in keys]
        found.append(
            {
                "kind": kind, "layer": str(spec), "cout": [k.cout for k in keys],
                "cin": keys[0].cin if keys and not spec.tied else None,
                "measured_ms": [m.median_ms for m in measured],
            }
        )  # fmt: skip
    return found


def _warnings(done: dict[Cell, Record]) -> list[str]:
    return [f"{c.name}: {w}" for c, r in done.items() for w in r.get("warnings", [])]
