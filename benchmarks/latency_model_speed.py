"""How fast the latency model is: forward and backward for one width vector and for a thousand.

The table is fabricated (a formula fills it), since speed does not depend on what the numbers are.
One core. ``matmul_ms`` is a 512x512 float32 product timed in the same rounds: a yardstick for the
machine.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks import harness
from dsa_hw.cost.choices import width_choices
from dsa_hw.cost.latency.model import LatencyModel
from dsa_hw.cost.latency.surfaces import table_requests
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.network.inventory import take_inventory
from dsa_hw.pipeline.opening import build_model, configured_backend, example_for
from dsa_hw.runs.config import ProfileConfig
from profilers.table import LatencyTable, LayerKey
from profilers.timing import Round

NAME = "latency_model_speed"
MODELS = ("resnet50", "mobilenet_v2", "cifar_resnet56")
STEP = 16
CANDIDATES = 1000


def main(argv: list[str] | None = None) -> None:
    """All models."""
    options = harness.parse(NAME, __doc__, argv)
    torch.set_num_threads(1)
    rounds = 40 if options.quick else 150
    figures = {name: _measure(name, rounds) for name in MODELS}
    table = Table(title="latency model, median ms on one core (p90)")
    for column in ("model", "layers", "forward + backward", "1,000 candidates", "512x512 matmul"):
        table.add_column(column, justify="right")
    for name, row in figures.items():
        pairs = [f"{row[f'{key}_ms']:.3f} ({row[f'{key}_p90_ms']:.3f})" for key in
                 ("gradient", "candidates", "matmul")]  # fmt: skip
        table.add_row(name, str(row["layers"]), *pairs)
    origin = harness.provenance(configured_backend(ProfileConfig()).provenance())
    harness.finish(NAME, options, figures, origin, table)


def _measure(name: str, rounds: int) -> dict[str, Any]:
    config = ProfileConfig(model=name)
    model, example = build_model(config), example_for(config)
    graph = take_inventory(model, example)
    latency = formula_model(graph)
    rng = np.random.default_rng(0)
    one = torch.tensor(latency.choices.random(rng), dtype=torch.float32, requires_grad=True)
    many = torch.tensor(
        np.array([latency.choices.random(rng) for _ in range(CANDIDATES)]), dtype=torch.float32
    )
    matrix = torch.randn(512, 512)

    def gradient() -> None:
        torch.autograd.grad(latency.predict_ms(one), one)

    def candidates() -> None:
        with torch.no_grad():
            latency.staircase_ms(many)

    subjects: dict[str, tuple[Callable[[], object], int]] = {
        "gradient": (gradient, 20), "candidates": (candidates, 5),
        "matmul": (lambda: matrix @ matrix, 5),
    }  # fmt: skip
    times: dict[str, list[float]] = {key: [] for key in subjects}
    for _ in range(rounds):
        for key, (run, loops) in subjects.items():
            run()
            start = time.perf_counter()
            for _ in range(loops):
                run()
            times[key].append((time.perf_counter() - start) / loops * 1e3)
    figures: dict[str, Any] = {"layers": len(graph.layers)}
    for key, values in times.items():
        figures[f"{key}_ms"] = statistics.median(values)
        figures[f"{key}_p90_ms"] = float(np.percentile(values, 90))
    return figures


def formula_model(graph: DeployedGraph) -> LatencyModel:
    """A latency model on a table, in memory, whose times are proportional to FLOPs."""
    table = LatencyTable({"reference_ms": 1.0})
    steps = {layer.spec.kind: STEP for layer in graph.layers}
    choices = width_choices(graph, steps)
    for request in table_requests(graph, choices, steps):
        key = request.key
        assert isinstance(key, LayerKey)
        ms = key.spec.flops(key.cin, key.cout) / 5e7
        table.append(key, Round(ms, ms, ms, 1, 1), 1.0)
    return LatencyModel(graph, table, choices, steps)


if __name__ == "__main__":
    sys.exit(main())
