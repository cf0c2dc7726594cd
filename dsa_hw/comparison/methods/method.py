"""What every compared method is given, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from dsa_hw.allocation.allocate import Allocation, Measure
from dsa_hw.cost.budget import BudgetRequest
from dsa_hw.cost.choices import WidthChoices
from dsa_hw.cost.latency.budget import ModelledLatency
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.network.removal import Keep
from dsa_hw.pipeline.pruner import DSAPruner
from dsa_hw.runs.config import PruneConfig
from dsa_hw.runs.folder import RunFolder
from dsa_hw.training.schedule import Stage
from dsa_hw.training.trainer import Trainer
from dsa_hw.worth.importance import split_atoms

State = dict[str, Any]
"""Tensors and plain values, as they are kept in a file."""


@dataclass(frozen=True)
class Workbench:
    """One run's network, data, device and target, as a method sees them.

    Args:
        fresh_model: a new network with the run's seeded (or given) weights.
        example: (N, C, H, W), N is the deployed batch size.
        graph: the dense network as it is deployed.
        choices: widths that the device's steps allow.
        budget: the latency model, with the target in ms.
        measure: times a network of given widths against the target; the closed loop's.
        search: trains a network under DSA with these budgets.
        shared: the state of that name that all runs of the seed have in common, and how to make it.
    """

    config: PruneConfig
    fresh_model: Callable[[], nn.Module]
    example: torch.Tensor
    graph: DeployedGraph
    choices: WidthChoices
    budget: ModelledLatency
    measure: Measure
    trainer: Trainer
    folder: RunFolder
    search: Callable[[Sequence[BudgetRequest]], DSAPruner]
    shared: Callable[[str, Callable[[], State]], State]

    @property
    def all_steps(self) -> int:
        """Optimizer steps of the whole run, which the learning rate's schedule spans."""
        return self.config.epochs * self.trainer.steps

    def modelled_ms(self, widths: np.ndarray) -> np.ndarray:
        """(n, groups) -> (n,) ms on the staircase, before any correction."""
        with torch.no_grad():
            rows = torch.as_tensor(np.asarray(widths), dtype=torch.float32)
            return self.budget.model.staircase_ms(rows).double().numpy()

    @property
    def widest_step(self) -> int:
        """Of the groups that have a choice."""
        allowed = zip(self.choices.steps, self.choices.widths, strict=True)
        return max(step for step, widths in allowed if len(widths) > 1)

    def train_dense(self, epochs: int, *, searching: bool = False) -> nn.Module:
        """A fresh network trained for the run's first ``epochs``, once for all targets.

        Args:
            searching: leave the validation split out of what it is trained on.
        """
        model = self.trainer.prepare(self.fresh_model())

        def train() -> State:
            stage = Stage("search", epochs, 0, self.all_steps)
            self.trainer.train(model, stage, searching=searching)
            return {"model": model.state_dict()}

        split = "-search-split" if searching else ""
        model.load_state_dict(self.shared(f"dense-{epochs}-epochs{split}", train)["model"])
        return model

    def split_atoms(self, scores: np.ndarray) -> list[np.ndarray]:
        """(groups, atoms) padded scores -> one (atoms,) array a group."""
        return split_atoms(self.graph.coupling, torch.as_tensor(scores))


@dataclass(frozen=True)
class Made:
    """A network at the target, before its fine-tuning.

    Args:
        model: the small network.
        keep: atoms of the dense network that it keeps.
        allocation: its widths, with the rounds of the closed loop.
        keep_ratios: (groups,) what the method decided on before steps and rounding had their say.
        source: the network that the channels were taken out of, masks off; None where the weights
            were trained since.
    """

    model: nn.Module
    keep: Keep
    allocation: Allocation
    keep_ratios: np.ndarray
    source: nn.Module | None = None


class Method(Protocol):
    """A way to choose which channels stay."""

    @property
    def title(self) -> str:
        """As tables and figures call it."""
        ...

    def epochs_before(self, config: PruneConfig) -> int:
        """Epochs of the run that are over when ``make`` returns."""
        ...

    def make(self, bench: Workbench) -> Made:
        """The small network at the target.

        Raises:
            InfeasibleBudget: the method cannot reach the target.
        """
        ...
