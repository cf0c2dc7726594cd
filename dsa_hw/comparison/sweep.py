"""The sweep: which runs are still to be done, whose they are, and what they add up to.

Several processes (of one machine, or of several of the same kind that share the folder) can work
one sweep: each run is claimed by a lock on a file, and skipped by the others. Only one process of
a machine times at once, and the others pause their training for it; whoever finds everything
finished times all networks against each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import traceback
from pathlib import Path
from typing import Any

from filelock import FileLock

from dsa_hw.comparison.cell_run import CellRun, claim, lock_path, train_dense
from dsa_hw.comparison.cells import (
    DENSE,
    Cell,
    dense_weights,
    plan,
    run_config,
    starts_from_dense,
)
from dsa_hw.comparison.final_timing import time_everything
from dsa_hw.comparison.summary import CSV_FILE, summarize, to_csv
from dsa_hw.cost.latency.profiling import ProfiledNetwork, profile_network
from dsa_hw.errors import UserError
from dsa_hw.pipeline.device import KnownDevice, check_target
from dsa_hw.pipeline.opening import (
    Dense,
    build_model,
    configured_backend,
    configured_table,
    load_dense,
)
from dsa_hw.reports import write_comparison_report
from dsa_hw.runs.config import CompareConfig
from dsa_hw.runs.console import Progress, counted
from dsa_hw.runs.folder import CONFIG_FILE, RESULT_FILE, RunFolder
from dsa_hw.runs.lock import RunLock
from dsa_hw.runs.options import to_yaml
from dsa_hw.training.precision import slow_precision_warning
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
    folder, cells, ground = prepare(config, progress)
    failed: dict[str, str] = {}
    for number, (cell, following) in enumerate(
        zip(cells, [*cells[1:], None], strict=True), start=1
    ):
        which = f"run {number} of {len(cells)}"
        if (problem := _tried(config, cell, ground, which, progress)) is not None:
            failed[cell.name] = problem
        if following is not None and _last_of_its_target(cell, following):
            _write_up(config, cells, ground, folder, failed)
    left = [c for c in cells if not (c.folder(folder.path) / RESULT_FILE).is_file()]
    others = [c.name for c in left if c.name not in failed]
    if others:
        progress.say(f"in other processes' hands: {counted(len(others), 'run')} ({others[0]}, ...)")
    else:
        with _timing_lock(folder.path):
            time_everything(config, cells, ground.dense.graph, ground.backend, progress)
    return _write_up(config, cells, ground, folder, failed)


def prepare(config: CompareConfig, progress: Progress) -> tuple[RunFolder, list[Cell], Ground]:
    """All that comes before the first run: a sweep that is called again finds it done.

    Raises:
        UserError: the configuration cannot be carried out.
    """
    folder = RunFolder.check(config.out, config, EXTENSIBLE)
    cells = plan(config)
    return folder, cells, _prepare(config, cells, folder, progress)


def _last_of_its_target(cell: Cell, following: Cell) -> bool:
    """Whether all methods have had their turn at the cell's target and seed."""
    return cell.target is not None and (cell.target, cell.seed) != (
        following.target,
        following.seed,
    )


def _tried(
    config: CompareConfig, cell: Cell, ground: Ground, which: str, progress: Progress
) -> str | None:
    """Do one run; returns what went wrong, if something did.

    One method's failure must not keep the others from a night's work. It is kept in a file beside
    the run's folder, said at once and in the sweep's result, and tried again by the next call.
    """
    path = cell.folder(Path(config.out))
    problem_file = path.with_name(f"{path.name}.error")
    try:
        _work(config, cell, ground, which, progress)
    except Exception as error:
        with contextlib.suppress(OSError):  # on a full disk what is said below has to do
            problem_file.write_text(traceback.format_exc(), encoding="utf-8")
        problem = f"{type(error).__name__}: {error}"
        progress.say(f"{cell.name} failed; the others go on. {problem} ({problem_file})")
        return problem
    problem_file.unlink(missing_ok=True)
    return None


def _prepare(
    config: CompareConfig, cells: list[Cell], folder: RunFolder, progress: Progress
) -> Ground:
    """Device, data, network and latency model; what cannot be is refused before anything runs."""
    for warning in slow_precision_warning(config):
        progress.say(f"warning: {warning}")
    backend = configured_backend(config)
    dense = load_dense(run_config(config, cells[0]))
    folder.path.mkdir(parents=True, exist_ok=True)
    # At once: a folder without it is not taken up again, and profiling takes minutes.
    folder.write_text(CONFIG_FILE, to_yaml(config))
    with _timing_lock(folder.path):
        table = configured_table(config, backend)
        progress.say(f"latency table: {table.path}")
        profiled = profile_network(
            dense.graph, backend, table, networks=config.calibration_networks,
            rounds=config.rounds, seed=config.seed, on_progress=progress,
            on_notice=progress.say,
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
    with claim(path) as mine, contextlib.ExitStack() as exclusive:
        if not mine or (path / RESULT_FILE).is_file():
            return
        exclusive.enter_context(RunLock(path))  # a prune command may be at this very folder
        progress.say(f"{which}: {cell.name}")
        own = run_config(config, cell)
        if starts_from_dense(config, cell):
            _wait_for_dense(config, cell, progress)
        folder = RunFolder.check(path, own)
        folder.start(own)
        classes = ground.dense.data.num_classes if ground.dense.data else None
        dense = dataclasses.replace(ground.dense, model=build_model(own, classes))
        if cell.method == DENSE:
            train_dense(own, folder, _timing_lock(sweep), dense, progress)
            return
        target_ms = check_target(own, ground.profiled)
        assert target_ms is not None
        known = KnownDevice(ground.backend, ground.table, ground.profiled, target_ms, 0.0)
        CellRun(cell, sweep, _timing_lock(sweep), own, folder, dense, known, progress).result()


def _wait_for_dense(config: CompareConfig, cell: Cell, progress: Progress) -> None:
    """Until the process that trains this seed's dense network has let go of it.

    Raises:
        UserError: it has failed.
    """
    folder = dense_weights(config, cell.seed).parent
    if not (folder / RESULT_FILE).is_file():
        progress.say("waiting for the dense network, which another process trains")
        with FileLock(lock_path(folder)):
            pass
    if not (folder / RESULT_FILE).is_file():
        raise UserError(f"there is no dense network to start from in {folder}")


def _timing_lock(sweep: Path) -> FileLock:
    """Held by the one process of this machine that times."""
    return FileLock(sweep / f"timing-{platform.node()}.lock")


def _write_up(
    config: CompareConfig,
    cells: list[Cell],
    ground: Ground,
    folder: RunFolder,
    failed: dict[str, str],
) -> dict[str, Any]:
    """Result, table and report of what is there so far."""
    result = summarize(config, cells, ground.dense.graph, ground.profiled, ground.table, failed)
    with FileLock(folder.path / "report.lock"):
        folder.write_json(RESULT_FILE, result)
        folder.write_text(CSV_FILE, to_csv(result["cells"]))
        write_comparison_report(folder.path)
    return result
