"""Ways to a smaller network under a FLOPs budget, for the benchmark that compares allocations.

All get the same data, optimizer and schedule, and end with the same FLOPs target reached by the
same rounding. Each returns the trained small network's accuracy and what it took; stopped, it goes
on from its folder's checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dsa_hw.allocation.allocate import allocate
from dsa_hw.comparison.methods import uniform_keep_ratio
from dsa_hw.cost.counted import FlopsBudget, count
from dsa_hw.network.coupling import Coupling
from dsa_hw.network.removal import Keep, remove_channels
from dsa_hw.pipeline import opening
from dsa_hw.pipeline.opening import Dense
from dsa_hw.pipeline.pruner import DSAPruner
from dsa_hw.runs.config import PruneConfig
from dsa_hw.runs.console import Progress
from dsa_hw.runs.folder import RunFolder, Stopwatch
from dsa_hw.search.settings import SearchSettings
from dsa_hw.surgery.channels import keep_most_important
from dsa_hw.training.schedule import Stage
from dsa_hw.training.trainer import Trainer
from dsa_hw.worth.importance import AtomImportance
from dsa_hw.worth.values import closeness, kept_importance

STEP = 4
"""Widths are multiples of it."""
DENSE_FOLDER = "dense"


@dataclass(frozen=True)
class Outcome:
    """A finished small network.

    Args:
        epochs: that its weights have had in all, those of a network it began from included.
        cost_over_target: FLOPs over their target.
        seconds: by part; without those of a trained network that it began from.
    """

    accuracy: float
    epochs: int
    cost_over_target: float
    widths: list[int]
    seconds: dict[str, float]


class Bench:
    """A data set, a network and a FLOPs target, at one seed.

    Args:
        config: training; its ``flops_ratio`` is the target.
        folder: of this target and seed; checkpoints and logs, a folder a method.
        seed_folder: of what all targets of the seed share.
        dense: network and data; loaded if not given.
    """

    def __init__(
        self, config: PruneConfig, folder: Path, seed_folder: Path, dense: Dense | None = None
    ) -> None:
        self.config, self.folder, self.seed_folder = config, folder, seed_folder
        self.dense = dense or opening.load_dense(config)
        self._progress = Progress()
        assert config.flops_ratio is not None
        self.request = FlopsBudget(config.flops_ratio, STEP)
        self.budget, self.choices = self.request.bind(self.dense.graph)

    @property
    def coupling(self) -> Coupling:
        """Of the dense network."""
        return self.dense.graph.coupling

    def run(self, path: Path) -> tuple[Trainer, Stopwatch]:
        """A trainer and a watch of the run in ``path``.

        Raises:
            RunFolderError: it holds a run of another configuration.
        """
        assert self.dense.data is not None
        folder = RunFolder.check(path, self.config, frozenset({"flops_ratio"}))
        folder.start(self.config)
        trainer = Trainer(
            self.config, self.dense.data, folder, self._progress, test_every_epoch=False
        )
        return trainer, Stopwatch(folder)

    def fresh(self) -> nn.Module:
        """The dense network with the seed's weights."""
        assert self.dense.data is not None
        return opening.build_model(self.config, self.dense.data.num_classes)

    def trained_dense(self, epochs: int, of: int) -> nn.Module:
        """The dense network after the first ``epochs`` of a schedule ``of`` so many.

        Once a seed: no target changes it.
        """
        trainer, watch = self.run(self.seed_folder / f"{DENSE_FOLDER}-{epochs}-of-{of}")
        model = trainer.prepare(self.fresh())
        with watch.measure("dense"):
            trainer.train(model, Stage("dense", epochs, 0, of * trainer.steps))
        return model

    def dense_accuracy(self) -> float:
        """Of the dense network trained for the whole schedule."""
        epochs = self.config.epochs
        trainer, _ = self.run(self.seed_folder / f"{DENSE_FOLDER}-{epochs}-of-{epochs}")
        return trainer.accuracy(self.trained_dense(epochs, epochs))

    def scores(self, model: nn.Module) -> list[np.ndarray]:
        """Importance of every group's atoms."""
        found = AtomImportance(model, self.coupling, "filter_l1")().cpu().numpy()
        return [s[: g.atoms] for s, g in zip(found, self.coupling.groups, strict=True)]

    def keep(self, model: nn.Module, widths: np.ndarray) -> Keep:
        """The most important atoms of ``model`` at these widths."""
        return keep_most_important(self.coupling, widths, self.scores(model))

    def outcome(
        self, name: str, small: nn.Module, widths: np.ndarray, epochs: int, before: int
    ) -> Outcome:
        """Train the small network for so many epochs, the end of its schedule.

        Args:
            before: epochs that its weights have had; those of a finished schedule do not count in
                this one's.
        """
        trainer, watch = self.run(self.folder / name)
        small = trainer.prepare(small)
        whole = max(epochs, self.config.epochs)
        stage = Stage("finetune", epochs, (whole - epochs) * trainer.steps, whole * trainer.steps)
        with watch.measure("finetune"):
            trainer.train(small, stage)
        return Outcome(
            accuracy=trainer.accuracy(small),
            epochs=before + epochs,
            cost_over_target=count(self.budget, widths.tolist()) / self.budget.target,
            widths=widths.tolist(),
            seconds=watch.seconds,
        )


def dsa(
    bench: Bench,
    name: str,
    *,
    from_trained: bool = False,
    settings: SearchSettings | None = None,
    training_data: bool = False,
    **options: Any,
) -> Outcome:
    """DSA from scratch, or from a network trained for as many epochs.

    Args:
        training_data: move the keep ratios on training batches (the ablation of the split).
        options: of ``DSAPruner``.
    """
    config = bench.config
    trainer, watch = bench.run(bench.folder / name)
    model = trainer.prepare(bench.fresh())
    if from_trained:
        model.load_state_dict(bench.trained_dense(config.epochs, config.epochs).state_dict())
    steps = config.search_epochs * trainer.steps
    pruner = DSAPruner(
        model, bench.dense.example.to(trainer.device), bench.request, steps, settings=settings,
        trained=from_trained, seed=config.seed, on_event=RunFolder(bench.folder / name).log,
        **options,
    )  # fmt: skip
    loss = trainer.training_loss(model) if training_data else trainer.validation_loss(model)

    def go_on(state: dict[str, Any]) -> None:
        pruner.load_state_dict(state)
        loss.seen = state["seen"]

    with watch.measure("search"):
        trainer.train(
            model,
            Stage("search", config.search_epochs, 0, config.epochs * trainer.steps),
            searching=True,
            after_step=lambda: pruner.step(loss, trainer.loss_scale),
            extra_state=lambda: pruner.state_dict() | {"seen": loss.seen},
            load_extra=go_on,
        )
        found = pruner.finish_with_report()
    before = config.search_epochs + (config.epochs if from_trained else 0)
    epochs = config.resolved_finetune_epochs
    return bench.outcome(name, found.model, found.allocation.widths, epochs, before)


def uniform(bench: Bench, name: str, epochs: int) -> Outcome:
    """One keep ratio for all groups, from scratch, for so many epochs."""
    ratio = uniform_keep_ratio(bench.choices, bench.budget)
    found = allocate(
        bench.choices, closeness(bench.choices, ratio * bench.choices.dense), [bench.budget]
    )
    model = bench.fresh()
    keep = bench.keep(model, found.widths)
    small = remove_channels(model, bench.coupling, keep)
    return bench.outcome(name, small, found.widths, epochs, 0)


def magnitude(bench: Bench, name: str, *, from_trained: bool = False) -> Outcome:
    """Train, cut by magnitude, fine-tune, for as many epochs in all as DSA.

    From scratch it is trained as long as DSA searches. From a network trained to the end, where
    DSA has its search and fine-tuning, all of that is fine-tuning.
    """
    config = bench.config
    before = config.epochs if from_trained else config.search_epochs
    after = config.epochs if from_trained else config.resolved_finetune_epochs
    model = bench.trained_dense(before, config.epochs)
    layers = [len(g.layers) for g in bench.coupling.groups]
    values = kept_importance(bench.choices, bench.scores(model), layers)
    found = allocate(bench.choices, values, [bench.budget])
    small = remove_channels(model, bench.coupling, bench.keep(model, found.widths))
    return bench.outcome(name, small, found.widths, after, before)


def for_seeds(config: PruneConfig, seeds: Sequence[int]) -> list[PruneConfig]:
    """The configuration at each seed."""
    return [dataclasses.replace(config, seed=seed) for seed in seeds]


def glyphs_config(quick: bool) -> PruneConfig:
    """The network, data and recipe of the benchmarks that train under a FLOPs budget."""
    return PruneConfig(
        model="glyphs_resnet", data="glyphs", budget=("flops",), flops_ratio=0.5,
        train_size=512 if quick else 12_000, test_size=500 if quick else 16_000,
        epochs=3 if quick else 12, train_batch_size=64, lr=0.05,
        mixed_precision="no" if quick else "auto",
    )  # fmt: skip
