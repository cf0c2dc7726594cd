"""The content of a run's ``result.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dsa_hw.cost.counted import count, flops_budget, memory_budget, params_budget
from dsa_hw.network.branches.branch import Branch, removed_branches
from dsa_hw.network.inventory import fixed_branches_warning
from dsa_hw.pipeline.device import staircase_latency_ms
from dsa_hw.pipeline.opening import unknown_operations_warning
from dsa_hw.pipeline.proof import LastTiming
from dsa_hw.pipeline.record import (
    Small,
    disturbed_warning,
    logged_warnings,
    validate_command,
    verdict_record,
)
from dsa_hw.training.precision import slow_precision_warning
from profilers.table import NetworkKey
from profilers.timing import paired, ratio

if TYPE_CHECKING:
    from dsa_hw.pipeline.run import Run


@dataclass(frozen=True)
class Outcome:
    """What a run ends with.

    Args:
        last: the last measurement.
        dense_accuracy, accuracy: of the test images, in [0, 1]; None where nothing was trained.
        onnx_difference: how far the runtime is from PyTorch on the exported network.
    """

    small: Small
    last: LastTiming
    dense_accuracy: float | None
    accuracy: float | None
    onnx_difference: float


def result_record(run: Run, outcome: Outcome) -> dict[str, Any]:
    """Return the content of ``result.json``."""
    small, last = outcome.small, outcome.last
    config, graph, fast = run.config, run.dense.graph, run.table.fast_speed
    again = validate_command(run.folder.path, config.model, config.data)
    dense, pruned = last.measured["dense"], last.measured["pruned"]
    if config.target_ms is None:
        pruned = paired(pruned, dense)
    predicted = small.predicted_ms
    if predicted is None:
        predicted = staircase_latency_ms(run.profiled, np.array(small.widths))
    # Predictions are of the fastest rounds when the table was measured; the dense network, timed
    # then and now, says what a median of now is over that.
    drift = dense.median_ms / run.table.measurement(_dense_key(run)).fastest_ms
    # The loop's corrections know it already where the target is a number of milliseconds.
    slower = 1.0 if config.target_ms is not None and small.rounds else drift
    flops, params = flops_budget(graph, 1.0), params_budget(graph, 1.0)
    memory = memory_budget(graph, 1.0)
    here = run.backend.provenance()
    provenance = dict(run.table.provenance) | here
    mismatched = [
        f"the latency table was measured with {name} = {theirs!r}, and this is {mine!r} "
        "(--allow-mismatch)"
        for name, theirs, mine in run.table.mismatches(here)
    ]
    warnings = (
        mismatched
        + slow_precision_warning(config)
        + unknown_operations_warning(graph)
        + fixed_branches_warning(graph)
        + disturbed_warning(small.rounds, dense.median_ms, again)
        + [w for m in last.measured.values() if (w := m.warning)]
        + logged_warnings(run.folder)
    )
    return {
        "model": config.model,
        "data": config.data if run.trainer else None,
        "num_classes": run.classes,
        "input_shape": list(run.dense.example.shape[1:]),
        "seed": config.seed,
        "epochs": config.epochs,
        "target_ms": None if last.timed is None else last.timed.target_ms,
        "target_ratio": config.target_ratio,
        **verdict_record(last.timed, again),
        "statistic": "median",
        "device": provenance["device"],
        "backend": provenance["runtime"],
        "precision": provenance["precision"],
        "batch_size": provenance["batch_size"],
        "threads": provenance["threads"],
        "dense": {
            "measured_ms": dense.median_ms,
            "ci95_ms": list(dense.ci95_ms),
            "accuracy": outcome.dense_accuracy,
            "flops": count(flops, graph.dense_widths),
            "params": count(params, graph.dense_widths),
            "peak_memory_bytes": count(memory, graph.dense_widths),
        },
        "pruned": {
            "predicted_ms": predicted * slower,
            "measured_ms": pruned.median_ms,
            "ci95_ms": list(pruned.ci95_ms),
            "accuracy": outcome.accuracy,
            "flops": count(flops, small.widths),
            "params": count(params, small.widths),
            "peak_memory_bytes": count(memory, small.widths),
            "masked_vs_pruned_max_abs": small.masked_vs_pruned_max_abs,
            "torch_vs_onnx_max_rel": outcome.onnx_difference,
        },
        "ratio": dict(zip(("measured", "ci95"), ratio(pruned, dense), strict=True)),
        "seconds": {
            name: run.watch.seconds.get(name, 0.0)
            for name in ("profile", "dense", "search", "finetune", "validate")
        },
        "headroom": small.headroom,
        "next_step": _next_step(run, small),
        "closed_loop": small.rounds,
        "removed_branches": [b.name for b in _removed(run, small)],
        "groups": _groups(run, small),
        "layers": _layers(run, small),
        "calibration": _calibration(run),
        "table": {
            "path": str(run.table.path),
            "entries": len(run.table.rounds),
            "measured": run.profiled.collected.measured,
            "reused": run.profiled.collected.reused,
            "unstable": run.profiled.collected.unstable,
            "disturbed_rounds": run.profiled.collected.disturbed,
        },
        "drift_since_table": drift,
        "fast_state": None if fast is None else asdict(fast),
        "environment": provenance | {"torch": torch.__version__} | _training(run),
        "warnings": list(dict.fromkeys(warnings)),
    }


def _training(run: Run) -> dict[str, str]:
    return {"training_precision": run.trainer.precision} if run.trainer else {}


def _next_step(run: Run, small: Small) -> dict[str, Any] | None:
    """With the group's name in place of its index."""
    if small.next_step is None:
        return None
    group = run.dense.graph.coupling.groups[small.next_step["group"]]
    return small.next_step | {"group": group.name}


def _removed(run: Run, small: Small) -> tuple[Branch, ...]:
    return removed_branches(run.dense.graph.branches, small.widths)


def _dense_key(run: Run) -> NetworkKey:
    graph = run.dense.graph
    return NetworkKey(graph.digest, graph.dense_widths)


def _groups(run: Run, small: Small) -> list[dict[str, Any]]:
    rows = zip(
        run.dense.graph.coupling.groups, small.widths, run.profiled.latency.choices.steps,
        small.keep_ratios, strict=True,
    )  # fmt: skip
    return [
        {
            "name": group.name, "dense_width": group.dense_width, "width": width,
            "step": step, "keep_ratio": keep_ratio, "members": list(group.layers),
            "frozen": group.frozen, "frozen_reason": group.frozen,
        }
        for group, width, step, keep_ratio in rows
    ]  # fmt: skip


def _layers(run: Run, small: Small) -> list[dict[str, Any]]:
    model, graph = run.profiled.latency.model, run.dense.graph
    both = torch.tensor([graph.dense_widths, small.widths], dtype=torch.float32)
    before, after = model.layer_ms(both, staircase=True).tolist()
    return [
        {
            "name": layer.name, "op": str(layer.spec),
            "cin_dense": round(layer.cin(graph.dense_widths)),
            "cout_dense": round(layer.cout(graph.dense_widths)),
            "cin": round(layer.cin(small.widths)), "cout": round(layer.cout(small.widths)),
            "dense_ms": old, "pruned_ms": new,
        }
        for layer, old, new in zip(graph.layers, before, after, strict=True)
    ]  # fmt: skip


def _calibration(run: Run) -> dict[str, Any]:
    calibration = run.profiled.latency.calibration
    return {
        "networks": [
            {
                "predicted_ms": p.predicted_ms, "measured_ms": p.measured_ms,
                "ci95_ms": list(p.ci95_ms), "held_out": True,
            }
            for p in calibration.points
        ],
        "heldout_mape_pct": calibration.heldout_mape_pct,
        "heldout_max_pct": calibration.heldout_max_pct,
        "constant_ms": calibration.coefficients.constant_ms,
        "scales": dict(calibration.coefficients.scales),
        "rates_ms": dict(calibration.coefficients.rates_ms),
    }  # fmt: skip
