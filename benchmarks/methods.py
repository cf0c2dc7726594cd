"""Ways to a smaller network on one data set, for the benchmarks that compare them.

All get the same data, epochs, optimizer and schedule, and end with the same FLOPs target reached by
the same rounding. Each returns the trained small network's accuracy and what it took.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dsa_hw import pipeline
from dsa_hw.baselines import uniform_keep_ratio
from dsa_hw.budgets import Budget, FlopsBudget, count
from dsa_hw.choices import WidthChoices
from dsa_hw.closed_loop import allocate
from dsa_hw.config import PruneConfig
from dsa_hw.coupling import Coupling
from dsa_hw.importance import AtomImportance
from dsa_hw.pipeline import Dense
from dsa_hw.rounding import closeness, kept_importance
from dsa_hw.run_folder import RunFolder
from dsa_hw.search import DSAPruner, SearchSettings
from dsa_hw.surgery import keep_most_important, remove_channels
from dsa_hw.training import Stage, Trainer

STEP = 4
"""Widths are multiples of it."""


@dataclass(frozen=True)
class Outcome:
    """A finished small network.

    Args:
        cost_over_target: FLOPs over their target.
        seconds: of everything: search, rounding, fine-tuning.
        allocation_seconds: of what comes before fine-tuning.
    """

    accuracy: float
    cost_over_target: float
    widths: list[int]
    seconds: float
    allocation_seconds: float


class Bench:
    """A data set, a network and a FLOPs target, at one seed.

    Args:
        config: training; its ``flops_ratio`` is the target.
        folder: checkpoints and logs; a stage that is there already is not run again.
    """

    def __init__(self, config: PruneConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.dense: Dense = pipeline.load_dense(config)
        assert config.flops_ratio is not None
        self.request = FlopsBudget(config.flops_ratio, STEP)
        self.budget, self.choices = self.request.bind(self.dense.graph)

    @property
    def coupling(self) -> Coupling:
        """Of the dense network."""
        return self.dense.graph.coupling

    def trainer(self, name: str) -> Trainer:
        """A trainer with a folder of its own."""
        assert self.dense.data is not None
        folder = RunFolder(self.folder / name)
        folder.start(self.config)
        return Trainer(self.config, self.dense.data, folder)

    def fresh(self) -> nn.Module:
        """The dense network with the seed's weights."""
        assert self.dense.data is not None
        return pipeline.build_model(self.config, self.dense.data.num_classes)

    def train_dense(self, epochs: int, name: str = "dense") -> tuple[nn.Module, float, float]:
        """The dense network after so many epochs, its accuracy, and the seconds it took."""
        trainer = self.trainer(name)
        model = trainer.prepare(self.fresh())
        start = time.perf_counter()
        trainer.train(model, Stage("dense", epochs, 0, epochs * trainer.steps))
        return model, trainer.accuracy(model), time.perf_counter() - start

    def scores(self, model: nn.Module) -> list[np.ndarray]:
        """Importance of every group's atoms."""
        found = AtomImportance(model, self.coupling, "filter_l1")().cpu().numpy()
        return [s[: g.atoms] for s, g in zip(found, self.coupling.groups, strict=True)]

    def cut(self, model: nn.Module, widths: np.ndarray) -> nn.Module:
        """``model`` with its most important channels only."""
        keep = keep_most_important(self.coupling, widths, self.scores(model))
        return remove_channels(model, self.coupling, keep)

    def outcome(
        self, name: str, small: nn.Module, widths: np.ndarray, epochs: int, before: float
    ) -> Outcome:
        """Train the small network for so many epochs (the end of the whole schedule)."""
        trainer = self.trainer(name)
        small = trainer.prepare(small)
        whole = max(epochs, self.config.epochs)
        stage = Stage("finetune", epochs, (whole - epochs) * trainer.steps, whole * trainer.steps)
        start = time.perf_counter()
        trainer.train(small, stage)
        accuracy = trainer.accuracy(small)
        return Outcome(
            accuracy=accuracy,
            cost_over_target=count(self.budget, widths.tolist()) / self.budget.target,
            widths=widths.tolist(),
            seconds=before + time.perf_counter() - start,
            allocation_seconds=before,
        )


def dsa(
    bench: Bench,
    name: str,
    start_from: nn.Module | None = None,
    settings: SearchSettings | None = None,
    training_data: bool = False,
    **options: Any,
) -> Outcome:
    """DSA from scratch, or from a trained network.

    Args:
        training_data: move the keep ratios on training batches (the ablation of the split).
        options: of ``DSAPruner``.
    """
    config, trainer = bench.config, bench.trainer(name)
    model = trainer.prepare(bench.fresh())
    if start_from is not None:
        model.load_state_dict(start_from.state_dict())
    steps = config.search_epochs * trainer.steps
    start = time.perf_counter()
    pruner = DSAPruner(
        model, bench.dense.example.to(trainer.device), bench.request, steps, settings=settings,
        seed=config.seed, on_event=RunFolder(bench.folder / name).log, **options,
    )  # fmt: skip
    loss = trainer.training_loss(model) if training_data else trainer.validation_loss(model)
    trainer.train(
        model,
        Stage("search", config.search_epochs, 0, config.epochs * trainer.steps),
        searching=True,
        after_step=lambda: pruner.step(loss),
        extra_state=pruner.state_dict,
        load_extra=pruner.load_state_dict,
    )
    found = pruner.finish_with_report()
    before = time.perf_counter() - start
    epochs = config.resolved_finetune_epochs
    return bench.outcome(name, found.model, found.allocation.widths, epochs, before)


def uniform(bench: Bench, name: str) -> Outcome:
    """One keep ratio for all groups, from scratch, for all epochs."""
    start = time.perf_counter()
    ratio = uniform_keep_ratio(bench.choices, bench.budget)
    found = allocate(
        bench.choices, closeness(bench.choices, ratio * bench.choices.dense), [bench.budget]
    )
    small = bench.cut(bench.fresh(), found.widths)
    before = time.perf_counter() - start
    return bench.outcome(name, small, found.widths, bench.config.epochs, before)


def magnitude(bench: Bench, name: str, start_from: nn.Module | None = None) -> Outcome:
    """Train (as long as DSA searches), cut by magnitude, fine-tune (as long as DSA does)."""
    config, before = bench.config, 0.0
    model = start_from
    if model is None:
        model, _, before = bench.train_dense(config.search_epochs, f"{name}_dense")
    start = time.perf_counter()
    layers = [len(g.layers) for g in bench.coupling.groups]
    values = kept_importance(bench.choices, bench.scores(model), layers)
    found = allocate(bench.choices, values, [bench.budget])
    small = bench.cut(model, found.widths)
    before += time.perf_counter() - start
    return bench.outcome(name, small, found.widths, config.resolved_finetune_epochs, before)


def netadapt(
    bench: Bench, name: str, start_from: nn.Module, *, short_steps: int, reduction: float
) -> Outcome:
    """Greedy: in each round every group is narrowed alone until the round's cost is met.

    Yang et al., "NetAdapt", ECCV 2018, arXiv:1804.03230, algorithm 1: each candidate gets a short
    fine-tuning, the best on held-out data stays, and the rounds go on until the target.

    Args:
        short_steps: optimizer steps of each candidate.
        reduction: part of the dense cost that the first round takes off; each takes 0.96 of the
            one before.
    """
    trainer = bench.trainer(name)
    start = time.perf_counter()
    widths, weights = bench.choices.dense.copy(), start_from
    dense_cost = count(bench.budget, widths.tolist())
    while (cost := count(bench.budget, widths.tolist())) > bench.budget.target:
        limit = max(bench.budget.target, cost - reduction * dense_cost)
        reduction *= 0.96
        best: tuple[float, np.ndarray, nn.Module] | None = None
        for candidate in _narrowed(bench.budget, bench.choices, widths, limit):
            model = trainer.prepare(bench.cut(weights, candidate))
            loss = trainer.brief(model, short_steps)
            if best is None or loss < best[0]:
                best = (loss, candidate, model)
        if best is None:
            raise RuntimeError(f"no single group reaches {limit:.3g}; take a smaller reduction")
        # The long-term weights stay the dense ones (masks of the widths are cut from them): a
        # candidate's short training only ranks it, which spares re-mapping its channels.
        widths = best[1]
    small = bench.cut(weights, widths)
    before = time.perf_counter() - start
    return bench.outcome(name, small, widths, bench.config.resolved_finetune_epochs, before)


def _narrowed(
    budget: Budget, choices: WidthChoices, widths: np.ndarray, limit: float
) -> list[np.ndarray]:
    """For every group that can do it alone, the widest width at which the limit is met."""
    found = []
    for group, allowed in enumerate(choices.widths):
        for width in sorted((w for w in allowed if w < widths[group]), reverse=True):
            candidate = widths.copy()
            candidate[group] = width
            if count(budget, candidate.tolist()) <= limit:
                found.append(candidate)
                break
    return found


def iterative_knapsack(
    bench: Bench, name: str, start_from: nn.Module, *, rounds: int, steps_between: int
) -> Outcome:
    """Target lowered over rounds; each allocates by importance and trains on.

    After Shen et al., "HALP", arXiv:2210.06659: importance a chunk of channels, cost saved a chunk,
    an exact allocation each round (here the integer program), training in between.
    """
    trainer = bench.trainer(name)
    model = trainer.prepare(bench.fresh())
    model.load_state_dict(start_from.state_dict())
    layers = [len(g.layers) for g in bench.coupling.groups]
    dense_cost = count(bench.budget, bench.choices.dense.tolist())
    start = time.perf_counter()
    widths = bench.choices.dense
    for number in range(1, rounds + 1):
        share = (bench.budget.target / dense_cost) ** (number / rounds)
        now, _ = FlopsBudget(share, STEP).bind(bench.dense.graph)
        values = kept_importance(bench.choices, bench.scores(model), layers)
        widths = allocate(bench.choices, values, [now]).widths
        trainer.brief(trainer.prepare(bench.cut(model, widths)), steps_between)
        trainer.brief(model, steps_between)
    small = bench.cut(model, widths)
    before = time.perf_counter() - start
    return bench.outcome(name, small, widths, bench.config.resolved_finetune_epochs, before)


def for_seeds(config: PruneConfig, seeds: Sequence[int]) -> list[PruneConfig]:
    """The configuration at each seed."""
    return [dataclasses.replace(config, seed=seed) for seed in seeds]


def glyphs_config(quick: bool) -> PruneConfig:
    """The network, data and recipe of the benchmarks that train under a FLOPs budget."""
    return PruneConfig(
        model="glyphs_resnet", data="glyphs", budget=("flops",), flops_ratio=0.5,
        train_size=512 if quick else 12_000, test_size=500 if quick else None,
        epochs=3 if quick else 12, train_batch_size=64, lr=0.05,
        mixed_precision="no" if quick else "bf16",
    )  # fmt: skip
