"""Uniform widths, trained from scratch: the honest strong baseline.

Liu et al., "Rethinking the Value of Network Pruning", ICLR 2019, arXiv:1810.05270: a network of
predefined widths, trained from scratch for as long, is often as good as a pruned one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dsa_hw.allocation.allocate import Allocation, Measure, allocate
from dsa_hw.comparison.methods.method import Made, Workbench
from dsa_hw.cost.budget import Budget
from dsa_hw.cost.choices import WidthChoices
from dsa_hw.network.removal import remove_channels
from dsa_hw.runs.config import PruneConfig
from dsa_hw.surgery.channels import keep_most_important
from dsa_hw.worth.importance import AtomImportance
from dsa_hw.worth.values import closeness

BISECTIONS = 40


class Uniform:
    """One keep ratio for all groups; all epochs are the small network's."""

    title = "uniform"

    def epochs_before(self, config: PruneConfig) -> int:
        """None: it is trained from scratch."""
        return 0

    def make(self, bench: Workbench) -> Made:
        """A fresh network of these widths (which of its random channels stay does not matter)."""
        allocation = allocate_uniform(bench.choices, [bench.budget], bench.measure)
        model, coupling = bench.fresh_model(), bench.graph.coupling
        scores = AtomImportance(model, coupling, "bn_scale")().cpu().numpy()
        keep = keep_most_important(coupling, allocation.widths, bench.split_atoms(scores))
        ratios = uniform_keep_ratio(bench.choices, bench.budget) * np.ones(len(keep))
        small = remove_channels(model, coupling, keep)
        return Made(small, keep, allocation, ratios, source=model)


def uniform_keep_ratio(choices: WidthChoices, budget: Budget) -> float:
    """The one keep ratio for all groups at which ``budget`` is just met, by its smooth cost."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        cost = float(budget.cost(torch.as_tensor(uniform_widths(choices, middle)).float()))
        low, high = (middle, high) if cost <= budget.target else (low, middle)
    return low


def uniform_widths(choices: WidthChoices, keep_ratio: float) -> np.ndarray:
    """(groups,) dense widths times the ratio, no less than the least; frozen groups stay."""
    widths = np.maximum(choices.least, keep_ratio * choices.dense)
    return np.where(choices.least == choices.dense, choices.dense, widths)


def allocate_uniform(
    choices: WidthChoices, budgets: Sequence[Budget], measure: Measure | None = None
) -> Allocation:
    """Widths as near to one common keep ratio as steps and budgets allow.

    Raises:
        InfeasibleBudget: no allowed widths meet the budgets.
    """
    ratio = min(uniform_keep_ratio(choices, budget) for budget in budgets)
    return allocate(choices, closeness(choices, ratio * choices.dense), budgets, measure)
