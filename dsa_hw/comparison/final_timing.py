"""All finished networks of a target and a seed timed against each other, and the dense one.

Runs end hours apart, and the machine drifts; what is compared in the end alternates within
seconds, when nothing is being trained any more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsa_hw.comparison.cells import Cell, Target
from dsa_hw.deployment.timing import time_networks
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.runs.config import CompareConfig
from dsa_hw.runs.console import Progress
from dsa_hw.runs.folder import ONNX_FILE, RunFolder
from profilers.backends import Backend
from profilers.timing import ratio

TIMING = "timing"
DENSE_NETWORK = "dense"


def timing_name(target: Target, seed: int) -> str:
    """File of one joint measurement."""
    return f"{target.label.replace('%', 'pct')}-seed{seed}.json"


def time_everything(
    config: CompareConfig,
    cells: list[Cell],
    graph: DeployedGraph,
    backend: Backend,
    progress: Progress,
) -> None:
    """Time what has not been timed in this company yet."""
    sweep = Path(config.out)
    folder = RunFolder(sweep / TIMING)
    folder.path.mkdir(exist_ok=True)
    for (target, seed), rivals in _by_rivals(cells).items():
        models = {c.method: c.folder(sweep) / ONNX_FILE for c in rivals}
        models = {name: path for name, path in models.items() if path.is_file()}
        name = timing_name(target, seed)
        done = folder.read_json(name)
        if not models or (done is not None and set(models) <= set(done)):
            continue
        progress.say(f"timing {len(models)} networks against each other: {target.label}, {seed}")
        folder.write_json(name, _timed(config, graph, backend, models))


def _by_rivals(cells: list[Cell]) -> dict[tuple[Target, int], list[Cell]]:
    found: dict[tuple[Target, int], list[Cell]] = {}
    for cell in cells:
        if cell.target is not None:
            found.setdefault((cell.target, cell.seed), []).append(cell)
    return found


def _timed(
    config: CompareConfig, graph: DeployedGraph, backend: Backend, models: dict[str, Path]
) -> dict[str, Any]:
    """Per network: ms, its interval, and both over the dense network's."""
    together: dict[str, bytes | Path] = {DENSE_NETWORK: graph.resized(graph.dense_widths), **models}
    found = time_networks(backend, together, time_limit_s=config.measure_seconds * len(together))
    record = {}
    for name, measured in found.items():
        value, interval = ratio(measured, found[DENSE_NETWORK])
        record[name] = {
            "measured_ms": measured.median_ms, "ci95_ms": list(measured.ci95_ms),
            "ratio": value, "ratio_ci95": list(interval), "warning": measured.warning,
            "settled": measured.settled, "disturbed": measured.disturbed,
        }  # fmt: skip
    return record
