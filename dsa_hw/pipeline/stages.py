"""The whole way behind ``python -m dsa_hw.prune``: each stage hands plain data to the next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dsa_hw.errors import UserError
from dsa_hw.network.inventory import frozen_note
from dsa_hw.pipeline.device import know_device
from dsa_hw.pipeline.finished_result import finished_result
from dsa_hw.pipeline.finished_search import load_finished_search
from dsa_hw.pipeline.opening import load_dense
from dsa_hw.pipeline.run import Run
from dsa_hw.runs.config import PruneConfig
from dsa_hw.runs.console import Progress
from dsa_hw.runs.processes import Processes, trains_on_cpu
from dsa_hw.runs.shared_folder import SharedRunFolder
from dsa_hw.training.precision import slow_precision_warning


def prune(
    config: PruneConfig, progress: Progress, processes: Processes | None = None
) -> dict[str, Any]:
    """Run (or go on with) everything; returns the content of ``result.json``.

    Args:
        processes: all of which call this; asked for from Accelerate if not given.

    Raises:
        UserError: the configuration cannot be carried out, or another command works in its folder;
            nothing was written over.
    """
    processes = processes or Processes(trains_on_cpu(config))
    folder = SharedRunFolder.check_for(config.out, config, processes)
    with folder.locked(config):
        return _prune(config, folder, progress, processes)


def _prune(
    config: PruneConfig, folder: SharedRunFolder, progress: Progress, processes: Processes
) -> dict[str, Any]:
    if (done := finished_result(folder)) is not None:
        progress.say(f"{folder.path} is finished already; this is its result")
        return done
    _check_teacher(config)
    for warning in slow_precision_warning(config):
        progress.say(f"warning: {warning}")
    learned = processes.from_main(lambda: load_finished_search(config))
    dense = processes.together(lambda: load_dense(config))
    for note in frozen_note(dense.graph):
        progress.say(note)
    known = processes.from_main(
        lambda: know_device(config, dense, progress),
        told=lambda known: replace(known, backend=None),
    )
    folder.start(config)
    run = Run(config, folder, dense, known, progress, learned, processes)
    run.watch.put("profile", run.watch.seconds.get("profile", 0.0) + known.seconds)
    return run.finish()


def _check_teacher(config: PruneConfig) -> None:
    """See that there is a trained dense network to learn from, if one is asked for."""
    given = config.train_dense or config.pretrained or config.weights or config.search_from
    if config.distill is not None and not given:
        raise UserError(
            "distill needs a trained dense network: add --train-dense true, --pretrained true or "
            "--weights FILE"
        )
