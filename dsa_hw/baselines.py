"""What DSA is compared with, brought to the same target by the same rounding and closed loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dsa_hw.budgets import Budget
from dsa_hw.choices import WidthChoices
from dsa_hw.closed_loop import Allocation, Measure, allocate
from dsa_hw.rounding import closeness

BISECTIONS = 40


def uniform_keep_ratio(choices: WidthChoices, budget: Budget) -> float:
    """The one keep ratio for all groups at which ``budget`` is just met, by its smooth cost."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        widths = np.maximum(choices.least, middle * choices.dense)
        widths = np.where(choices.least == choices.dense, choices.dense, widths)
        cost = float(budget.cost(torch.as_tensor(widths, dtype=torch.float32)))
        low, high = (middle, high) if cost <= budget.target else (low, middle)
    return low


def allocate_uniform(
    choices: WidthChoices, budgets: Sequence[Budget], measure: Measure | None = None
) -> Allocation:
    """Widths as near to one common keep ratio as steps and budgets allow.

    Raises:
        InfeasibleBudget: no allowed widths meet the budgets.
    """
    ratio = min(uniform_keep_ratio(choices, budget) for budget in budgets)
    return allocate(choices, closeness(choices, ratio * choices.dense), budgets, measure)
