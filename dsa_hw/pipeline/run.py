"""One run: the stages that ``prune`` puts in a row, each skipped when its outcome is there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dsa_hw.allocation.allocate import Measure, Refine, Refined, allocate
from dsa_hw.allocation.target_loop import Timed, verdict_sentence
from dsa_hw.cost.budget import Budget, BudgetRequest
from dsa_hw.cost.choices import merged_choices
from dsa_hw.cost.latency.around_allocation import refine_around
from dsa_hw.cost.latency.budget import ModelledLatency
from dsa_hw.deployment.exported import export_checked
from dsa_hw.deployment.finished_run import LAST_HALF_WIDTH_PCT, LAST_LEAST_ROUNDS
from dsa_hw.deployment.timing import (
    Target,
    loop_measure,
    time_networks,
    timed_to_target,
)
from dsa_hw.errors import UserError
from dsa_hw.network.removal import Keep, remove_channels
from dsa_hw.pipeline.device import KnownDevice, budget_requests
from dsa_hw.pipeline.finished_search import FinishedSearch
from dsa_hw.pipeline.opening import Dense, build_model
from dsa_hw.pipeline.proof import LastTiming, masked_difference
from dsa_hw.pipeline.pruner import DSAPruner
from dsa_hw.pipeline.record import (
    Small,
    small_of,
)
from dsa_hw.pipeline.result import Outcome, result_record
from dsa_hw.reports import write_run_report
from dsa_hw.runs.config import PruneConfig
from dsa_hw.runs.console import Progress
from dsa_hw.runs.folder import ONNX_FILE, RESULT_FILE, RunFolder, Stopwatch
from dsa_hw.runs.importances import IMPORTANCES, chosen_importance
from dsa_hw.runs.processes import Processes, trains_on_cpu
from dsa_hw.search.settings import SearchSettings
from dsa_hw.surgery.channels import keep_most_important
from dsa_hw.surgery.saved import save_pruned
from dsa_hw.training.distillation import Distillation
from dsa_hw.training.schedule import Stage
from dsa_hw.training.trainer import Trainer
from dsa_hw.worth.importance import split_atoms
from dsa_hw.worth.values import kept_importance
from profilers.backends import Backend


@dataclass(frozen=True)
class RunPlan:
    """What a run does in a way of its own; the defaults are those of ``prune``.

    Args:
        makes_small: makes the small network; None: DSA's search, or a plan without training.
        alone: held while something is timed.
        judges_dense: whether the dense network's accuracy belongs to the run.
        refines: whether networks around the first allocation refine the latency model.
        test_every_epoch: whether the log has the test accuracy of every epoch.
        last_measurement: at most so many times ``measure_seconds``.
        epochs_before: epochs that the small network's weights have had when fine-tuning begins;
            None: those of the search.
        completes: has the last word on the content of ``result.json``.
    """

    makes_small: Callable[[], Small] | None = None
    alone: Callable[[], AbstractContextManager[object]] = nullcontext
    judges_dense: bool = True
    refines: bool = True
    test_every_epoch: bool = True
    last_measurement: float = 1.5
    epochs_before: int | None = None
    completes: Callable[[dict[str, Any]], dict[str, Any]] = dict


class Run:
    """One run's stages; each is skipped when the folder has its outcome.

    In several processes all train, and the main one does everything else.

    Args:
        known: the device; its backend is None in processes that do not measure.
        learned: by a finished search that this run goes on from.
        plan: what this run does in a way of its own.
    """

    def __init__(
        self,
        config: PruneConfig,
        folder: RunFolder,
        dense: Dense,
        known: KnownDevice,
        progress: Progress,
        learned: FinishedSearch | None = None,
        processes: Processes | None = None,
        plan: RunPlan | None = None,
    ) -> None:
        self.config, self.folder, self.dense = config, folder, dense
        self.processes = processes or Processes(trains_on_cpu(config))
        self._backend, self.table, self.profiled = known.backend, known.table, known.profiled
        self.target_ms, self.learned, self.progress = known.target_ms, learned, progress
        self.plan = plan or RunPlan()
        self.trained_dense: nn.Module | None = None
        self._confirmed: dict[tuple[int, ...], LastTiming] = {}
        self._exported: tuple[tuple[int, ...], float] | None = None
        self.watch = Stopwatch(folder)
        before = self.plan.epochs_before
        self.epochs_before = config.search_epochs if before is None else before
        self.trainer = (
            Trainer(
                config if learned is None else continued(config, learned),
                dense.data,
                folder,
                progress,
                test_every_epoch=self.plan.test_every_epoch,
            )
            if dense.data is not None
            else None
        )

    @property
    def backend(self) -> Backend:
        """The device, in the process that measures."""
        assert self._backend is not None
        return self._backend

    def finish(self) -> dict[str, Any]:
        """All stages."""
        dense_accuracy = self._dense_accuracy()
        small = self._load_small() or self._make_small()
        accuracy = self._finetune(small.model)
        return self.processes.from_main(lambda: self._prove(small, dense_accuracy, accuracy))

    def _prove(
        self, small: Small, dense_accuracy: float | None, accuracy: float | None
    ) -> dict[str, Any]:
        """Export, check and time what came out, and write everything down."""
        small.model.cpu().to(memory_format=torch.contiguous_format)  # pyright: ignore
        with self.watch.measure("validate"):
            widths = tuple(small.widths)
            if self._exported is None or self._exported[0] != widths:
                self._exported = widths, self._export(small.model)
            _, onnx_difference = self._exported
            measured = self._confirmed.get(widths) or self._time()
            save_pruned(
                self.folder.path, small.model, self.dense.graph.coupling, small.keep,
                self.dense.example, self.config.exclude, self.dense.graph.branches,
            )  # fmt: skip
        outcome = Outcome(small, measured, dense_accuracy, accuracy, onnx_difference)
        result = self.plan.completes(result_record(self, outcome))
        self.folder.write_json(RESULT_FILE, result)
        write_run_report(self.folder.path)
        return result

    # -- accuracy of the dense network -----------------------------------------------------

    def _dense_accuracy(self) -> float | None:
        config, trainer = self.config, self.trainer
        if trainer is None or not self.plan.judges_dense:
            return None
        if self.learned is not None and self.learned.dense is not None:
            with self.watch.measure("dense"):
                model = trainer.prepare(build_model(config, self.classes))
                model.load_state_dict(self.learned.dense)
                self.trained_dense = model
                return trainer.accuracy(model)
        if config.train_dense:
            with self.watch.measure("dense"):
                model = trainer.prepare(build_model(config, self.classes))
                steps = config.epochs * trainer.steps
                trainer.train(model, Stage("dense", config.epochs, 0, steps))
                self.trained_dense = model
                return trainer.accuracy(model)
        if config.starts_trained:
            with self.watch.measure("dense"):
                self.trained_dense = trainer.prepare(self.dense.model)
                return trainer.accuracy(self.trained_dense)
        return None

    @property
    def classes(self) -> int | None:
        """The data's; None without data."""
        return self.dense.data.num_classes if self.dense.data else None

    # -- the small network -----------------------------------------------------------------

    def _requests(self) -> list[BudgetRequest]:
        latency = self.profiled.latency
        return budget_requests(self.config, self.target_ms, self.table, latency.choices, latency)

    def measure(self) -> Measure | None:
        """What times a network of given widths against the target; None without one."""
        config = self.config
        if self.target_ms is None:
            return None
        inner = loop_measure(
            self.dense.graph, self.backend,
            target_ms=config.target_ms, target_ratio=config.target_ratio,
            time_limit_s=0.5 * config.measure_seconds,
            fast=self.table.fast_speed, on_notice=self.progress.say,
        )  # fmt: skip

        def measure(widths: np.ndarray) -> Timed:
            with self.plan.alone(), self.watch.measure("validate"):
                timed = inner(widths)
            set_aside = f"; {timed.disturbed} rounds set aside" if timed.disturbed else ""
            self.progress.say(
                f"closed loop: measured {timed.measured_ms:.4g} ms of {timed.target_ms:.4g} ms"
                f"{set_aside}"
            )
            return timed

        return measure

    def _refine(self) -> dict[str, Refine]:
        """By budget's name, what measures networks around an allocation and fits again."""
        target_ms = self.target_ms
        if target_ms is None or not self.plan.refines:
            return {}

        def around(widths: np.ndarray) -> Refined:
            with self.watch.measure("validate"):
                refined = refine_around(
                    self.dense.graph,
                    self.backend,
                    self.table,
                    self.profiled.latency,
                    widths,
                    rounds=self.config.rounds,
                    seed=self.config.seed,
                    on_progress=functools.partial(self.progress, "networks around the allocation"),
                    on_notice=self.progress.say,
                )
            self.profiled = replace(self.profiled, latency=refined.latency)
            budget = ModelledLatency(refined.latency.model, target_ms)
            return Refined(budget, refined.scatter)

        return {"latency": around}

    def _make_small(self) -> Small:
        """Made by the main process, after all have trained; all take it from the folder."""
        if self.plan.makes_small is not None:
            make = self.plan.makes_small
        else:
            make = self._search() if self.trainer is not None else self._plan
        self.processes.from_main(lambda: self._save_small(make()))
        small = self._load_small()
        assert small is not None
        return small

    def _save_small(self, small: Small) -> None:
        self.folder.save_checkpoint(
            "pruned",
            {
                "model": small.model.state_dict(),
                "keep": [torch.as_tensor(k) for k in small.keep],
                "keep_ratios": small.keep_ratios,
                "masked_vs_pruned_max_abs": small.masked_vs_pruned_max_abs,
                "predicted_ms": small.predicted_ms,
                "rounds": small.rounds,
                "headroom": small.headroom,
                "next_step": small.next_step,
            },
        )

    def _load_small(self) -> Small | None:
        state = self.folder.load_checkpoint("pruned")
        if state is None:
            return None
        graph = self.dense.graph
        coupling = graph.coupling
        keep = [k.numpy() for k in state["keep"]]
        model = remove_channels(self.dense.model, coupling, keep, graph.branches)
        model.load_state_dict(state["model"])
        widths = [int(k.sum()) * g.atom_channels for k, g in zip(keep, coupling.groups,
                                                                 strict=True)]  # fmt: skip
        return Small(
            model, keep, widths, state["keep_ratios"], state["masked_vs_pruned_max_abs"],
            state["predicted_ms"], state["rounds"], state["headroom"], state["next_step"],
        )  # fmt: skip

    def _plan(self) -> Small:
        """Allocate from the given weights' importance alone."""
        model, example, graph = self.dense.model, self.dense.example, self.dense.graph
        bound = [request.bind(graph) for request in self._requests()]
        choices = merged_choices([c for _, c in bound])
        config = self.config
        name = chosen_importance(config.importance, trains=False)  # no gradients here
        importance = IMPORTANCES.find(name)(model, graph.coupling, example.device)
        if importance.wants != "weights":
            raise UserError(
                f"importance {name} comes from gradients of training, and epochs is 0: use "
                "bn_scale or filter_l1, or train"
            )
        groups = graph.coupling.groups
        atoms = split_atoms(graph.coupling, importance())
        values = kept_importance(choices, atoms, [len(g.layers) for g in groups])
        budgets: list[Budget] = [b for b, _ in bound]

        def cut(widths: np.ndarray) -> tuple[nn.Module, Keep]:
            keep = keep_most_important(graph.coupling, widths, atoms)
            return remove_channels(model, graph.coupling, keep, graph.branches), keep

        measure = self.measure()
        confirm = self._confirmation(lambda widths: cut(widths)[0]) if measure else None
        allocation = allocate(choices, values, budgets, measure, confirm, self._refine())
        small, keep = cut(allocation.widths)
        difference = masked_difference(model, small, graph, keep, example)
        ratios = (allocation.widths / choices.dense).tolist()
        return small_of(small, allocation, keep, ratios, difference)

    def _confirmation(self, cut: Callable[[np.ndarray], nn.Module]) -> Measure:
        """The last measurement, where no training stands before it: its word is the loop's too.

        Args:
            cut: widths -> the smaller network.
        """

        def confirm(widths: np.ndarray) -> Timed:
            own = tuple(widths.tolist())
            with self.watch.measure("validate"):
                self._exported = own, self._export(cut(widths))
                measured = self._time()
            self._confirmed[own] = measured
            assert measured.timed is not None
            self.progress.say(f"last measurement: {verdict_sentence(measured.timed)}")
            return measured.timed

        return confirm

    def _search(self) -> Callable[[], Small]:
        """Train with DSA; returns what then rounds and removes."""
        pruner = self.searched(self._requests())

        def cut() -> Small:
            with self.watch.measure("search"):
                found = pruner.finish_with_report(self.measure(), refine=self._refine())
            return small_of(
                found.model, found.allocation, found.keep, found.keep_ratios.tolist(),
                found.masked_vs_pruned_max_abs,
            )  # fmt: skip

        return cut

    def searched(self, requests: Sequence[BudgetRequest]) -> DSAPruner:
        """A model trained under DSA for the search's epochs, masks still on it."""
        config, trainer = self.config, self.trainer
        assert trainer is not None
        model = trainer.prepare(build_model(config, self.classes))
        per_epoch = trainer.steps
        steps = config.search_epochs * per_epoch
        pruner = DSAPruner(
            model, self.dense.example.to(trainer.device), requests, steps,
            settings=SearchSettings(constraint=config.constraint),
            trained=self.learned.trained if self.learned else config.starts_trained,
            importance=self.learned.importance if self.learned else config.importance,
            exclude=config.exclude, remove_branches=config.remove_branches,
            seed=config.seed, on_event=self.folder.log,
        )  # fmt: skip
        if self.learned is not None:
            model.load_state_dict(self.learned.model)
            pruner.load_state_dict(self.learned.pruner)
            pruner.retarget()
            return pruner
        validation_loss = trainer.validation_loss(model)

        def go_on(state: dict[str, Any]) -> None:
            pruner.load_state_dict(state)
            validation_loss.seen = state["validated"]

        with self.watch.measure("search"):
            trainer.train(
                model,
                Stage("search", config.search_epochs, 0, self._all_steps()),
                searching=True,
                after_step=lambda: pruner.step(validation_loss, trainer.loss_scale),
                extra_state=lambda: pruner.state_dict() | {"validated": validation_loss.seen},
                load_extra=go_on,
            )
        return pruner

    def _all_steps(self) -> int:
        config, trainer = self.config, self.trainer
        assert trainer is not None
        return config.epochs * trainer.steps

    def _finetune(self, small: nn.Module) -> float | None:
        config, trainer = self.config, self.trainer
        if trainer is None:
            return None
        trainer.prepare(small)
        first = self.epochs_before * trainer.steps
        stage = Stage("finetune", config.epochs - self.epochs_before, first, self._all_steps())
        with self.watch.measure("finetune"):
            trainer.retake_statistics(small)
            trainer.train(small, stage, distillation=self._distillation())
            return trainer.accuracy(small)

    def _distillation(self) -> Distillation | None:
        config = self.config
        if config.distill is None:
            return None
        if self.trained_dense is None:
            raise UserError("distill: the run that search-from names trained no dense network")
        return Distillation(self.trained_dense, config.distill, config.distill_temperature)

    # -- proof -----------------------------------------------------------------------------

    def _export(self, small: nn.Module) -> float:
        """Write the run's ONNX file; returns how far the runtime is from PyTorch on it."""
        with self.plan.alone():  # it runs the network
            return export_checked(
                small, self.dense.example, self.folder.path / ONNX_FILE, self.backend
            )

    @property
    def _target(self) -> Target | None:
        if self.target_ms is None:
            return None
        return Target(self.config.target_ms, self.config.target_ratio)

    def _time(self) -> LastTiming:
        with self.plan.alone():
            return self._timed()

    def _timed(self) -> LastTiming:
        """The run's ONNX file and the dense network's, in turn."""
        self.progress.say("timing the pruned network beside the dense one")
        dense_path = self.folder.path / "checkpoints" / "dense.onnx"
        dense_path.parent.mkdir(exist_ok=True)
        graph = self.dense.graph  # with any weights: they do not matter to the time
        dense_path.write_bytes(graph.resized(graph.dense_widths))
        models: dict[str, bytes | Path] = {
            "dense": dense_path,
            "pruned": self.folder.path / ONNX_FILE,
        }
        limit_s = self.plan.last_measurement * self.config.measure_seconds
        target = self._target
        if target is None:
            measured = time_networks(
                self.backend,
                models,
                time_limit_s=limit_s,
                fast=self.table.fast_speed,
                on_notice=self.progress.say,
            )
            timed = None
        else:
            measured, timed = timed_to_target(
                self.backend,
                models,
                target,
                half_width_pct=LAST_HALF_WIDTH_PCT,
                time_limit_s=limit_s,
                min_rounds=LAST_LEAST_ROUNDS,
                needs_verdict=True,
                fast=self.table.fast_speed,
                on_notice=self.progress.say,
            )
        dense_path.unlink()
        return LastTiming(measured, timed)


def continued(config: PruneConfig, learned: FinishedSearch) -> PruneConfig:
    """How what a finished search has learned is trained on: at its learning rate, if none is asked
    for."""
    return config if config.lr is not None else replace(config, lr=learned.lr)
