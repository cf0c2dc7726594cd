"""Budgets by name: what ``--budget`` can ask for, and what a factory of one is told.

A factory takes a ``BudgetSetting`` and returns a request (``cost.budget.BudgetRequest``) that binds
to a network. A budget of one's own needs no change here: ``BUDGETS.register`` it, or name its
factory on the command line, as in ``--budget latency my_package.energy:budget=0.6``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsa_hw.runs.registry import Registry

if TYPE_CHECKING:
    from dsa_hw.cost.budget import BudgetRequest
    from dsa_hw.cost.choices import WidthChoices
    from dsa_hw.cost.latency.profiling import CalibratedModel
    from profilers.table import LatencyTable


@dataclass(frozen=True, slots=True)
class BudgetSetting:
    """What a command knows when it makes a budget.

    Args:
        name: what the budget was asked for by.
        value: the number given for it: milliseconds of a latency budget, of others what their
            factory makes of it (the project's own: the part of the dense network's cost to keep).
        table: the device's measurements, with this network in them.
        choices: widths on the device's steps.
        latency: the network's calibrated model on the device, where it has been fitted already.
    """

    name: str
    value: float
    table: LatencyTable
    choices: WidthChoices
    latency: CalibratedModel | None = None


BudgetFactory = Callable[[BudgetSetting], "BudgetRequest"]

BUDGETS: Registry[BudgetFactory] = Registry(
    "budget",
    {
        "latency": "dsa_hw.cost.latency.budget:latency_request",
        "flops": "dsa_hw.cost.counted:flops_request",
        "params": "dsa_hw.cost.counted:params_request",
        "memory": "dsa_hw.cost.counted:memory_request",
    },
)
"""The budgets that a command can be given by name."""
