"""The quickstart against the honest baseline: uniform widths, trained from scratch.

Same network, data, epochs, optimizer, and the same measured latency target, reached by the same
rounding and closed loop. Several seeds; each seed's two networks are timed against each other.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks import harness
from dsa_hw.comparison.methods import allocate_uniform
from dsa_hw.cost.counted import count, flops_budget
from dsa_hw.cost.latency.budget import LatencyBudget
from dsa_hw.deployment.exported import export_checked
from dsa_hw.deployment.timing import loop_measure, time_networks
from dsa_hw.network.removal import remove_channels
from dsa_hw.pipeline import opening, stages
from dsa_hw.runs.config import PruneConfig
from dsa_hw.runs.console import Progress
from dsa_hw.runs.folder import RunFolder
from dsa_hw.runs.options import parse
from dsa_hw.surgery.channels import keep_most_important
from dsa_hw.training.schedule import Stage
from dsa_hw.training.trainer import Trainer
from dsa_hw.worth.importance import AtomImportance

NAME = "quickstart_baseline"
CONFIG = "configs/quickstart.yaml"


def main() -> None:
    """Run all seeds; figures are means over them."""
    options = harness.parse(NAME, __doc__)
    seeds = (0,) if options.quick else (0, 1, 2)
    progress = Progress()
    rows = []
    for seed in seeds:
        config = parse(
            "prune",
            PruneConfig,
            [
                "--config",
                CONFIG,
                "--seed",
                str(seed),
                "--train-dense",
                "false",
                "--out",
                f"runs/{NAME}/dsa{seed}",
            ],
        )
        result = stages.prune(config, progress)
        progress.say(f"seed {seed}: DSA {result['pruned']['accuracy']}, now uniform widths")
        rows.append(_compare(config, result, progress))
    _report(options, rows, seeds)


def _compare(config: PruneConfig, result: dict[str, Any], progress: Progress) -> dict[str, Any]:
    dense = opening.load_dense(config)
    backend = opening.configured_backend(config)
    table = opening.configured_table(config, backend)
    assert dense.data is not None
    folder = RunFolder(Path(f"runs/{NAME}/uniform{config.seed}"))
    folder.start(config)
    budget, choices = LatencyBudget(table, result["target_ms"]).bind(dense.graph)
    measure = loop_measure(
        dense.graph,
        backend,
        target_ms=config.target_ms,
        target_ratio=config.target_ratio,
        time_limit_s=0.5 * config.measure_seconds,
    )
    done = folder.read_json("uniform.json")
    if done is None:
        allocation = allocate_uniform(choices, [budget], measure)
        done = {"widths": allocation.widths.tolist()}
        folder.write_json("uniform.json", done)
    widths = np.array(done["widths"])
    trainer = Trainer(config, dense.data, folder, progress)
    model = opening.build_model(config, dense.data.num_classes)
    scores = AtomImportance(model, dense.graph.coupling, "bn_scale")().cpu().numpy()
    atoms = [s[: g.atoms] for s, g in zip(scores, dense.graph.coupling.groups, strict=True)]
    keep = keep_most_important(dense.graph.coupling, widths, atoms)
    small = trainer.prepare(remove_channels(model, dense.graph.coupling, keep))
    steps = config.epochs * trainer.steps
    trainer.train(small, Stage("uniform", config.epochs, 0, steps))
    accuracy = trainer.accuracy(small)
    uniform_path = folder.path / "model.onnx"
    export_checked(small.cpu(), dense.example, uniform_path, backend)
    dsa_path = Path(config.out) / "model.onnx"
    timed = time_networks(backend, {"dsa": dsa_path, "uniform": uniform_path})
    pruned = result["pruned"]
    return {
        "seed": config.seed,
        "dense_accuracy": result["dense"]["accuracy"],
        "dsa_accuracy": pruned["accuracy"],
        "uniform_accuracy": accuracy,
        "target_ms": result["target_ms"],
        "dsa_over_target": pruned["measured_ms"] / result["target_ms"],
        "dsa_met": result["met"],
        "dsa_verdict": result["verdict"],
        "predicted_over_measured": pruned["predicted_ms"] / pruned["measured_ms"],
        "dsa_ms": timed["dsa"].median_ms,
        "dsa_ci95_ms": timed["dsa"].ci95_ms,
        "uniform_ms": timed["uniform"].median_ms,
        "uniform_ci95_ms": timed["uniform"].ci95_ms,
        "dsa_flops": pruned["flops"],
        "uniform_flops": count(flops_budget(dense.graph, 1.0), widths.tolist()),
        "dsa_widths": [g["width"] for g in result["groups"]],
        "uniform_widths": widths.tolist(),
        "minutes": sum(result["seconds"].values()) / 60,
        "environment": result["environment"],
    }


def _report(options: harness.Options, rows: list[dict[str, Any]], seeds: tuple[int, ...]) -> None:
    table = Table(title="quickstart against uniform widths from scratch")
    columns = ("seed", "DSA %", "uniform %", "dense %", "DSA ms", "uniform ms", "of target", "min")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        dense = row["dense_accuracy"]
        table.add_row(
            str(row["seed"]),
            f"{100 * row['dsa_accuracy']:.2f}",
            f"{100 * row['uniform_accuracy']:.2f}",
            "-" if dense is None else f"{100 * dense:.2f}",
            f"{row['dsa_ms']:.4f}",
            f"{row['uniform_ms']:.4f}",
            f"{row['dsa_over_target']:.3f}",
            f"{row['minutes']:.1f}",
        )
    gains = [100 * (r["dsa_accuracy"] - r["uniform_accuracy"]) for r in rows]
    figures: dict[str, Any] = {
        "dsa_accuracy": statistics.mean(r["dsa_accuracy"] for r in rows),
        "uniform_accuracy": statistics.mean(r["uniform_accuracy"] for r in rows),
        "gain_points": statistics.mean(gains),
        "gain_standard_error_points": (
            statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
        ),
        "dsa_over_uniform_ms": statistics.mean(r["dsa_ms"] / r["uniform_ms"] for r in rows),
        "targets_met": sum(r["dsa_met"] is True for r in rows),
        "seeds": list(seeds),
        "runs": [{k: v for k, v in r.items() if k != "environment"} for r in rows],
    }
    config = dataclasses.asdict(parse("prune", PruneConfig, ["--config", CONFIG]))
    origin = harness.provenance(rows[0]["environment"]) | {"config": config}
    harness.finish(NAME, options, figures, origin, table)


if __name__ == "__main__":
    sys.exit(main())
