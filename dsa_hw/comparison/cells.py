"""The runs that a comparison is made of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from dsa_hw.runs.config import CompareConfig, PruneConfig, TrainingConfig

CELLS = "cells"
DENSE = "dense"
UNIFORM = "uniform"
DENSE_WEIGHTS = "dense.safetensors"
"""In the folder of a dense run, where other runs start from it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A latency to reach: so many ms, or a part of the dense network's."""

    ms: float | None
    ratio: float | None

    @property
    def label(self) -> str:
        """As tables and folders call it."""
        return f"{self.ms:g}ms" if self.ms is not None else f"{100 * (self.ratio or 0):g}%"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: a method brought to a target with a seed; without a target, the dense network."""

    method: str
    target: Target | None
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        target = f"-{self.target.label.replace('%', 'pct')}" if self.target else ""
        return f"{self.method}{target}-seed{self.seed}"

    def folder(self, sweep: Path) -> Path:
        """Where it is in the sweep's folder."""
        return sweep / CELLS / self.name


def method_names(config: CompareConfig) -> list[str]:
    """The methods that are asked for; ``dsa`` is one method a budget."""
    names: list[str] = []
    for name in config.methods:
        names += [f"dsa-{budget}" for budget in config.budgets] if name == "dsa" else [name]
    return names


def targets(config: CompareConfig) -> list[Target]:
    """The highest first."""
    found = [Target(ms, None) for ms in config.targets_ms or ()]
    found += [Target(None, ratio) for ratio in config.target_ratios or ()]
    return sorted(found, key=lambda t: -(t.ms or t.ratio or 0.0))


def plan(config: CompareConfig) -> list[Cell]:
    """All runs, seed by seed, so that a stopped sweep still compares everything.

    Where runs start from dense networks, a seed's comes before the runs of the seed before it:
    a second process need not wait for the one that the first is training.
    """
    dense = [Cell(DENSE, None, seed) for seed in config.seeds]
    cells = dense[:1]
    for number, seed in enumerate(config.seeds):
        following = dense[number + 1 : number + 2]
        compared = [Cell(m, t, seed) for t in targets(config) for m in method_names(config)]
        cells += [*following, *compared] if config.from_dense else [*compared, *following]
    return cells


def dense_weights(config: CompareConfig, seed: int) -> Path:
    """Where the weights of a seed's dense network are, once it is trained."""
    return Cell(DENSE, None, seed).folder(Path(config.out)) / DENSE_WEIGHTS


def starts_from_dense(config: CompareConfig, cell: Cell) -> bool:
    """Whether a run needs its seed's trained dense network. Uniform widths train from scratch."""
    return config.from_dense > 0 and cell.method not in (DENSE, UNIFORM)


def run_config(config: CompareConfig, cell: Cell) -> PruneConfig:
    """What the pipeline is asked for in one run. The dense run has a target that nothing reads.

    Beside runs that start from a trained network, one from scratch has all epochs of both.
    """
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainingConfig)}
    if starts_from_dense(config, cell):
        shared["weights"] = str(dense_weights(config, cell.seed))
    elif config.from_dense:
        # None of a dense network's epochs are search, and none of uniform widths': this says
        # nothing but how many there are.
        more = config.epochs if cell.method == UNIFORM else 0
        shared |= {"epochs": config.from_dense + more, "finetune_epochs": None}
    target = cell.target or Target(None, 0.5)
    return PruneConfig(
        **shared
        | {
            "out": str(cell.folder(Path(config.out))),
            "seed": cell.seed,
            "target_ms": target.ms,
            "target_ratio": target.ratio,
            "train_dense": False,
        }
    )
