"""How well a profiled table predicts whole networks that were used for nothing else.

Each model is profiled from an empty table. Then random networks on the steps (half of them every
group by itself, half around a common keep ratio), and networks off the steps, are timed twice, in
two passes: the difference of the passes is the machine's own noise. Networks that were used for the
calibration are timed again in each pass, and say how fast the machine is now: the drift since the
table was measured is taken off, as the pipeline does with the dense network. Beside the
model's errors stand those of the plain sum of the table and of a predictor proportional to FLOPs,
and for one network those of a grid over all channel counts at a step of 8.

Tables are kept in ``runs/latency_prediction``; a model whose figures and tables are both removed is
measured from nothing again.

One thread: two of a shared machine's cores are slowed by other guests at different times, and the
benchmark is about the model.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks import harness
from dsa_hw.cost.choices import WidthChoices
from dsa_hw.cost.counted import flops_budget
from dsa_hw.cost.latency.calibration import calibrate
from dsa_hw.cost.latency.coefficients import uncalibrated
from dsa_hw.cost.latency.model import LatencyModel
from dsa_hw.cost.latency.profiling import CalibratedModel, profile_network
from dsa_hw.cost.latency.surfaces import channel_ranges
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.network.inventory import take_inventory
from dsa_hw.pipeline.opening import build_model, configured_backend, configured_table, example_for
from dsa_hw.runs.config import ProfileConfig
from dsa_hw.runs.console import Progress
from profilers.backends import Backend
from profilers.collect import Request, collect
from profilers.grid import Grid, grid_requests
from profilers.layers.spec import LayerSpec
from profilers.table import LatencyTable, NetworkKey

NAME = "latency_prediction"
MODELS = ("resnet18", "cifar_resnet56", "mobilenet_v2", "vgg11_bn", "resnet50", "densenet121")
LEAST_KEEP_RATIO = 0.25
EXHAUSTIVE_STEP = 8
EXHAUSTIVE_MODEL = "cifar_resnet56"
THREADS = 1
ROUNDS = 6
"""Rounds of each network in each of the two passes."""
PARTS = 4
"""Of a step: networks off the steps have widths at multiples of such a part."""
ANCHORS = 8
"""Calibration networks that are timed again in each pass."""


@dataclass(frozen=True)
class Sample:
    """How many networks are timed."""

    models: tuple[str, ...]
    on_steps: int
    off_steps: int


FULL = Sample(MODELS, 30, 15)
QUICK = Sample(("cifar_resnet56",), 10, 6)


def main(argv: list[str] | None = None) -> None:
    """All models; each model's figures are kept as soon as it is done."""
    options = harness.parse(NAME, __doc__, argv)
    sample = QUICK if options.quick else FULL
    progress = Progress()
    figures: dict[str, Any] = {}
    folder = options.out / NAME
    for model in sample.models:
        saved = folder / f"{model}{'_quick' if options.quick else ''}.json"
        figures[model] = harness.once(
            saved, functools.partial(_measure, model, sample, Path(f"runs/{NAME}"), progress)
        )
    backend = configured_backend(ProfileConfig(threads=THREADS))
    harness.finish(NAME, options, figures, harness.provenance(backend.provenance()), _show(figures))


def _measure(name: str, sample: Sample, folder: Path, progress: Progress) -> dict[str, Any]:
    config = ProfileConfig(model=name, table=str(folder / f"{name}.jsonl"), threads=THREADS)
    folder.mkdir(parents=True, exist_ok=True)
    backend = configured_backend(config)
    model, example = build_model(config), example_for(config)
    graph = take_inventory(model, example)
    started = time.perf_counter()
    table = configured_table(config, backend)
    begun_before = len(table.rounds)
    profiled = profile_network(graph, backend, table, on_progress=progress)
    seconds = time.perf_counter() - started
    progress.say(f"{name}: profiled in {seconds:.0f} s")
    used = {key.widths for key in table.networks()}
    choices = profiled.latency.choices
    rng = np.random.default_rng(20_000)
    on = _draw(sample.on_steps, used, lambda turn: on_steps(choices, rng, turn))
    off = _draw(sample.off_steps, used, lambda turn: off_steps(graph, choices, rng))
    (first, first_speed), (second, second_speed) = (
        _time(graph, backend, table, folder / f"{name}.{part}.jsonl", on + off, progress)
        for part in ("first", "second")
    )
    undrifted = (first + second) / 2
    first, second = first / first_speed, second / second_speed
    measured = (first + second) / 2
    count = len(on)
    grid = {}
    if name == EXHAUSTIVE_MODEL:
        model, entries = _exhaustive(graph, backend, table, profiled.latency, folder, progress)
        grid = {"exhaustive_measurements": entries}
        grid |= errors("exhaustive_", predicted(model, on), measured[:count])
    return {
        **errors("", predicted(profiled.latency.model, on), measured[:count]),
        **errors("flops_", _by_flops(graph, table, on), measured[:count]),
        **errors("uncalibrated_", predicted(_plain(profiled.latency), on), measured[:count]),
        **errors("off_steps_", predicted(profiled.latency.model, off), measured[count:]),
        **errors("with_drift_", predicted(profiled.latency.model, on), undrifted[:count]),
        "drift": [first_speed, second_speed],
        "noise_pct": float(np.mean(np.abs(first[:count] / second[:count] - 1.0))) * 100.0,
        "heldout_mape_pct": profiled.latency.calibration.heldout_mape_pct,
        **grid,
        "profile_s": seconds,
        "entries_before": begun_before,
        "measurements": profiled.collected.measured,
        "layer_measurements": sum(1 for _ in table.layers()),
        "unstable": profiled.collected.unstable,
        "exhaustive_measurements_step_8": exhaustive(graph, profiled.latency, EXHAUSTIVE_STEP),
        "calibration_networks": len(profiled.latency.calibration.points),
        "provenance": harness.provenance(dict(backend.provenance())),
        "networks": [
            {"widths": w, "predicted_ms": p, "first_ms": a, "second_ms": b}
            for w, p, a, b in zip(
                on + off, predicted(profiled.latency.model, on + off).tolist(), first.tolist(),
                second.tolist(), strict=True,
            )
        ],
    }  # fmt: skip


Networks = list[tuple[int, ...]]


def _draw(count: int, used: set[tuple[int, ...]], draw: Any) -> Networks:
    found: dict[tuple[int, ...], None] = {}
    turn = 0
    while len(found) < count:
        widths = draw(turn)
        turn += 1
        if widths not in used:
            found[widths] = None
    return list(found)


def on_steps(choices: WidthChoices, rng: np.random.Generator, turn: int) -> tuple[int, ...]:
    """Widths on steps between 25 and 100%: each group by itself, or around a common ratio."""
    if turn % 2:
        return choices.random(rng, LEAST_KEEP_RATIO)
    offered = [[w for w in allowed if w >= LEAST_KEEP_RATIO * allowed[-1]]
               for allowed in choices.widths]  # fmt: skip
    return tuple(int(rng.choice(widths)) for widths in offered)


def off_steps(
    graph: DeployedGraph, choices: WidthChoices, rng: np.random.Generator
) -> tuple[int, ...]:
    """Widths between steps, as no command chooses them: each costs the tread that it is on."""
    widths = []
    for group, step in zip(graph.coupling.groups, choices.steps, strict=True):
        dense = group.dense_width
        unit = math.lcm(group.atom_channels, max(1, step // PARTS))
        low = math.ceil(LEAST_KEEP_RATIO * dense / unit)
        most = dense // unit
        free = not group.frozen and most > low
        widths.append(int(rng.integers(low, most + 1)) * unit if free else dense)
    return tuple(widths)


def _time(
    graph: DeployedGraph,
    backend: Backend,
    table: LatencyTable,
    path: Path,
    networks: Networks,
    progress: Progress,
) -> tuple[np.ndarray, float]:
    """(networks,) ms in a table of their own; and now over then, by the anchors."""
    own = LatencyTable.open(path, table.provenance)
    anchors = [key for key in table.networks() if key.network == graph.digest][:ANCHORS]
    keys = [NetworkKey(graph.digest, widths) for widths in networks]
    requests = [Request(k, lambda w=k.widths: graph.resized(w)) for k in keys + anchors]
    collect(
        own, backend, requests, rounds=ROUNDS, on_progress=lambda d, n: progress(path.stem, d, n)
    )
    logs = [np.log(t.measurement(k).fastest_ms) for t in (own, table) for k in anchors]
    speed = float(np.exp(np.mean(logs[: len(anchors)]) - np.mean(logs[len(anchors) :])))
    return np.array([own.measurement(key).fastest_ms for key in keys]), speed


def predicted(model: LatencyModel, networks: Networks) -> np.ndarray:
    """(networks,) staircase predictions, ms."""
    return model.staircase_ms(torch.tensor(networks, dtype=torch.float32)).double().numpy()


def _plain(latency: CalibratedModel) -> LatencyModel:
    return latency.model.with_coefficients(uncalibrated(latency.model.graph))


def _by_flops(graph: DeployedGraph, table: LatencyTable, networks: Networks) -> np.ndarray:
    """Proportional to FLOPs, with the factor that suits the calibration networks best."""
    budget = flops_budget(graph, 1.0)

    def flops(widths: Networks) -> np.ndarray:
        return budget.cost(torch.tensor(widths, dtype=torch.float32)).double().numpy()

    keys = [key for key in table.networks() if key.network == graph.digest]
    times = np.array([table.measurement(key).fastest_ms for key in keys])
    return flops(networks) * float(np.median(times / flops([k.widths for k in keys])))


def errors(prefix: str, guess: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Absolute relative errors in per cent: mean, 95th percentile, largest."""
    found = 100.0 * np.abs(guess / measured - 1.0)
    return {
        f"{prefix}mape_pct": float(found.mean()),
        f"{prefix}p95_pct": float(np.percentile(found, 95)),
        f"{prefix}max_pct": float(found.max()),
    }


def exhaustive(graph: DeployedGraph, latency: CalibratedModel, step: int) -> int:
    """Measurements that a grid over all channel counts at ``step`` would take."""
    return sum(len(grid.pairs()) for grid in _all_widths(graph, latency, step).values())


def _all_widths(graph: DeployedGraph, latency: CalibratedModel, step: int) -> dict[LayerSpec, Grid]:
    def side(low: int, high: int) -> tuple[int, ...]:
        return (high,) if low == high else (*range(step, high, step), high)

    return {
        spec: Grid((1,) if spec.tied else side(*cin), side(*cout), spec.tied)
        for spec, (cin, cout) in channel_ranges(graph, latency.choices).items()
    }


def _exhaustive(
    graph: DeployedGraph,
    backend: Backend,
    table: LatencyTable,
    sampled: CalibratedModel,
    folder: Path,
    progress: Progress,
) -> tuple[LatencyModel, int]:
    """A model from all channel counts, calibrated on the same networks; and what it took."""
    step = EXHAUSTIVE_STEP
    full = LatencyTable.open(folder / f"{EXHAUSTIVE_MODEL}.exhaustive.jsonl", table.provenance)
    full.absorb(table)
    grids = _all_widths(graph, sampled, step)
    requests = [request for spec, grid in grids.items() for request in grid_requests(spec, grid)]
    collect(full, backend, requests, on_progress=lambda d, n: progress("exhaustive", d, n))
    model = LatencyModel(graph, full, sampled.choices, dict.fromkeys(sampled.steps, step))
    networks = [key for key in table.networks() if key.network == graph.digest]
    fit = calibrate(model, full, networks)
    return model.with_coefficients(fit.coefficients), len(requests)


def _show(figures: dict[str, Any]) -> Table:
    table = Table(title="prediction of whole networks, error in % of the measured latency")
    columns = ("model", "mean", "p95", "max", "off steps", "plain sum", "FLOPs", "noise",
               "profile s", "measurements")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    names = ("mape_pct", "p95_pct", "max_pct", "off_steps_mape_pct", "uncalibrated_mape_pct",
             "flops_mape_pct", "noise_pct")  # fmt: skip
    for model, row in figures.items():
        cells = [f"{row[name]:.2f}" for name in names]
        table.add_row(model, *cells, f"{row['profile_s']:.0f}", str(row["measurements"]))
    return table


if __name__ == "__main__":
    sys.exit(main())
