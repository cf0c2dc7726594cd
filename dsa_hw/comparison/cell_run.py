"""One run of a comparison: the pipeline of ``prune`` with the method's own way to the widths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save

from dsa_hw.comparison.cells import DENSE_WEIGHTS, Cell
from dsa_hw.comparison.methods import LATENCY_DSA, Workbench, find_method
from dsa_hw.comparison.shared_training import SHARED, WAITING, SharedTraining
from dsa_hw.cost.latency.budget import ModelledLatency
from dsa_hw.errors import InfeasibleBudget
from dsa_hw.pipeline.device import KnownDevice
from dsa_hw.pipeline.opening import Dense, build_model
from dsa_hw.pipeline.proof import masked_difference
from dsa_hw.pipeline.record import Small, small_of
from dsa_hw.pipeline.run import Run, RunPlan
from dsa_hw.runs.config import PruneConfig
from dsa_hw.runs.console import Progress
from dsa_hw.runs.durable_files import replace_file
from dsa_hw.runs.folder import RESULT_FILE, RunFolder, Stopwatch
from dsa_hw.training.schedule import Stage
from dsa_hw.training.trainer import Trainer

LATENCY_DSA_TITLE = "DSA on latency"


def method_title(name: str) -> str:
    """As tables and figures call a method."""
    return LATENCY_DSA_TITLE if name == LATENCY_DSA else find_method(name).title


class CellRun:
    """A run whose small network comes from a method.

    One process of a machine times at once, and the others' training waits for it.

    Args:
        sweep: the sweep's folder.
        timing: held while networks are timed.
    """

    def __init__(
        self,
        cell: Cell,
        sweep: Path,
        timing: FileLock,
        config: PruneConfig,
        folder: RunFolder,
        dense: Dense,
        known: KnownDevice,
        progress: Progress,
    ) -> None:
        self._cell, self._sweep, self._timing = cell, sweep, timing
        self._method = None if cell.method == LATENCY_DSA else find_method(cell.method)
        method = self._method
        plan = RunPlan(
            makes_small=None if method is None else self._made_by_method,
            alone=self._alone,
            # The dense run's affair, also where a run starts from its weights.
            judges_dense=False,
            # The closed loop is the same for all methods, and most have no model to refine.
            refines=False,
            # The test images are looked at once, in the end: a run's accuracy is their only use.
            test_every_epoch=False,
            # What counts is the measurement of all networks of a target against each other.
            last_measurement=0.5,
            epochs_before=None if method is None else method.epochs_before(config),
            completes=self._completed,
        )
        self._run = Run(config, folder, dense, known, progress, plan=plan)
        if self._run.trainer is not None:
            self._run.trainer.before_batch = lambda: give_way(timing, self._run.watch)

    def result(self) -> dict[str, Any]:
        """All stages; a target that the method cannot reach is a result too."""
        run = self._run
        try:
            return run.finish()
        except InfeasibleBudget as error:
            config = run.config
            result = {
                "model": config.model, "seed": config.seed, "target_ratio": config.target_ratio,
                "target_ms": run.target_ms, "infeasible": str(error),
            } | self._method_record()  # fmt: skip
            run.folder.write_json(RESULT_FILE, result)
            return result

    def _made_by_method(self) -> Small:
        run = self._run
        assert self._method is not None
        with run.watch.measure("search"):
            made = self._method.make(self._workbench())
        difference = None
        if made.source is not None:
            example = run.dense.example
            source, small = made.source.cpu(), made.model.cpu()
            difference = masked_difference(source, small, run.dense.graph, made.keep, example)
        return small_of(
            made.model, made.allocation, made.keep, made.keep_ratios.tolist(), difference
        )  # fmt: skip

    def _workbench(self) -> Workbench:
        run = self._run
        trainer, measure, target_ms = run.trainer, run.measure(), run.target_ms
        assert trainer is not None
        assert measure is not None
        assert target_ms is not None
        latency = run.profiled.latency
        return Workbench(
            config=run.config,
            fresh_model=lambda: build_model(run.config, run.classes),
            example=run.dense.example,
            graph=run.dense.graph,
            choices=latency.choices.without_removal(),
            budget=ModelledLatency(latency.model, target_ms),
            measure=measure,
            trainer=trainer,
            folder=run.folder,
            search=run.searched,
            shared=SharedTraining(self._sweep, run.config.seed, run.watch),
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The one process of this machine that times; the wait counts apart."""
        with self._run.watch.measure(WAITING):
            self._timing.acquire()
        try:
            yield
        finally:
            self._timing.release()

    def _completed(self, result: dict[str, Any]) -> dict[str, Any]:
        result["seconds"]["search"] += self._run.watch.seconds.get(SHARED, 0.0)
        return result | self._method_record()

    def _method_record(self) -> dict[str, Any]:
        target = self._cell.target
        return {
            "method": self._cell.method,
            "method_title": method_title(self._cell.method),
            "target": target.label if target else None,
        }


def train_dense(
    config: PruneConfig, folder: RunFolder, timing: FileLock, dense: Dense, progress: Progress
) -> dict[str, Any]:
    """The dense network, trained for as many epochs; its accuracy."""
    assert dense.data is not None
    trainer = Trainer(config, dense.data, folder, progress, test_every_epoch=False)
    watch = Stopwatch(folder)
    trainer.before_batch = lambda: give_way(timing, watch)
    with watch.measure("dense"):
        model = trainer.prepare(build_model(config, dense.data.num_classes))
        trainer.train(model, Stage("dense", config.epochs, 0, config.epochs * trainer.steps))
        accuracy = trainer.accuracy(model)
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    replace_file(folder.path / DENSE_WEIGHTS, save(weights))
    result = {
        "method": "dense", "model": config.model, "seed": config.seed,
        "accuracy": accuracy, "seconds": watch.seconds,
    }  # fmt: skip
    folder.write_json(RESULT_FILE, result)
    return result


def give_way(timing: FileLock, watch: Stopwatch) -> None:
    """Wait while another process of this machine times: training beside it would slow it.

    Args:
        timing: held by whoever times; one that this process holds already is no hindrance.
        watch: counts the wait apart from what is waited with.
    """
    try:
        timing.acquire(blocking=False)
    except Timeout:
        with watch.measure(WAITING):
            timing.acquire()
    timing.release()


def lock_path(path: Path) -> Path:
    """Of the lock that whoever works on the run at ``path`` holds."""
    return path.with_name(path.name + ".lock")


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process has the run at ``path`` to itself, for as long as the block lasts.

    The operating system's lock on a file beside it: a killed process loses its claim.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
