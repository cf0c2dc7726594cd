"""The sweep: which runs are still to be done, whose they are, and what they add up to.

Several processes (of one machine, or of several of the same kind that share the folder) can work
one sweep: each run is claimed by a lock on a file, and skipped by the others. Only one process of
a machine times at once; whoever finds everything finished times all networks against each other.
"""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any

from filelock import FileLock

from dsa_hw.cli import to_yaml
from dsa_hw.comparison.cell_run import CellRun, claim, train_dense
from dsa_hw.comparison.cells import DENSE, Cell, plan, run_config
from dsa_hw.comparison.final_timing import time_everything
from dsa_hw.comparison.summary import CSV_FILE, summarize, to_csv
from dsa_hw.config import CompareConfig
from dsa_hw.console import Progress
from dsa_hw.html_report import write_comparison_report
from dsa_hw.pipeline import (
    Dense,
    build_model,
    check_target,
    configured_backend,
    configured_table,
    load_dense,
)
from dsa_hw.profiling import ProfiledNetwork, profile_network
from dsa_hw.run_folder import CONFIG_FILE, RESULT_FILE, RunFolder
from profilers.backends import Backend
from profilers.table import LatencyTable

EXTENSIBLE = frozenset({"methods", "budgets", "seeds", "targets_ms", "target_ratios"})
"""What a sweep may be asked for more of, in the same folder."""


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all runs of a sweep have in common."""

    dense: Dense
    backend: Backend
    table: LatencyTable
    profiled: ProfiledNetwork


def compare(config: CompareConfig, progress: Progress) -> dict[str, Any]:
    """Do (or go on with) every run; returns the content of the sweep's ``result.json``.

    Raises:
        UserError: the configuration cannot be carried out.
    """
    folder = RunFolder.check(config.out, config, EXTENSIBLE)
    cells = plan(config)
    ground = _prepare(config, cells, folder.path, progress)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_text(CONFIG_FILE, to_yaml(config))
    for number, cell in enumerate(cells, start=1):
        _work(config, cell, ground, f"run {number} of {len(cells)}", progress)
    left = [c for c in cells if not (c.folder(folder.path) / RESULT_FILE).is_file()]
    if left:
        progress.say(f"{len(left)} runs are in other processes' hands ({left[0].name}, ...)")
    else:
        with _timing_lock(folder.path):
            time_everything(config, cells, ground.dense.graph, ground.backend, progress)
    return _write_up(config, cells, ground, folder)


def _prepare(config: CompareConfig, cells: list[Cell], path: Path, progress: Progress) -> Ground:
    """Data, network and latency model; targets that cannot be are refused before anything runs."""
    first = run_config(config, cells[0])
    dense = load_dense(first)
    backend = configured_backend(config)
    path.mkdir(parents=True, exist_ok=True)
    with _timing_lock(path):
        table = configured_table(config, backend)
        progress.say(f"latency table: {table.path}")
        profiled = profile_network(
            dense.graph, backend, table, networks=config.calibration_networks,
            rounds=config.rounds, seed=config.seed, on_progress=progress,
        )  # fmt: skip
    for cell in cells:
        if cell.target is not None:
            check_target(run_config(config, cell), profiled)
    return Ground(dense, backend, table, profiled)


def _work(
    config: CompareConfig, cell: Cell, ground: Ground, which: str, progress: Progress
) -> None:
    """Do one run, unless it is finished or another process is at it."""
    sweep = Path(config.out)
    path = cell.folder(sweep)
    with claim(path) as mine:
        if not mine or (path / RESULT_FILE).is_file():
            return
        progress.say(f"{which}: {cell.name}")
        own = run_config(config, cell)
        folder = RunFolder.check(path, own)
        folder.start(own)
        classes = ground.dense.data.num_classes if ground.dense.data else None
        dense = dataclasses.replace(ground.dense, model=build_model(own, classes))
        if cell.method == DENSE:
            train_dense(own, folder, dense, progress)
            return
        target_ms = check_target(own, ground.profiled)
        assert target_ms is not None
        CellRun(
            cell, _timing_lock(sweep), own, folder, dense, ground.backend, ground.table,
            ground.profiled, target_ms, progress,
        ).result()  # fmt: skip


def _timing_lock(sweep: Path) -> FileLock:
    """Held by the one process of this machine that times."""
    return FileLock(sweep / f"timing-{platform.node()}.lock")


def _write_up(
    config: CompareConfig, cells: list[Cell], ground: Ground, folder: RunFolder
) -> dict[str, Any]:
    result = summarize(config, cells, ground.dense.graph, ground.profiled, ground.table)
    folder.write_json(RESULT_FILE, result)
    folder.write_text(CSV_FILE, to_csv(result["cells"]))
    write_comparison_report(folder.path)
    return result
