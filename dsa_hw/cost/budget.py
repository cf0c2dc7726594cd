"""What a network may cost: budgets over the widths of its groups, differentiable and batched.

A budget is anything with the members of ``Budget``. Two more members are optional: ``terms``
(``HasTerms``) lets the integer program see through a maximum, and ``corrected``
(``MeasuredBudget``) lets the closed loop measure the network and correct the budget's predictions.
Neither asks which class a budget is of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dsa_hw.cost.choices import WidthChoices
from dsa_hw.errors import UserError
from dsa_hw.network.graph import DeployedGraph


class Budget(Protocol):
    """One resource with a target.

    ``cost`` is differentiable, for gradients; ``charged`` is what is really paid.
    """

    @property
    def name(self) -> str:
        """What is limited."""
        ...

    @property
    def unit(self) -> str:
        """Unit of cost and target."""
        ...

    @property
    def target(self) -> float:
        """The most it may cost."""
        ...

    def cost(self, widths: Tensor) -> Tensor:
        """(..., groups) widths -> (...,) cost, differentiable."""
        ...

    def charged(self, widths: Tensor) -> Tensor:
        """(..., groups) widths -> (...,) cost as the device or the counter charges it."""
        ...

    def to(self, device: torch.device | str) -> Budget:
        """The same budget for widths on another device."""
        ...


@runtime_checkable
class HasTerms(Budget, Protocol):
    """A budget whose charged cost is the largest of several terms.

    Each term is a sum over layers, which the maximum is not: the integer program limits them one by
    one.
    """

    def terms(self, widths: Tensor) -> Tensor:
        """(..., groups) widths -> (..., terms) costs; their maximum is what is charged."""
        ...


@runtime_checkable
class MeasuredBudget(Budget, Protocol):
    """A budget whose cost can be measured on a device, and predictions of it corrected."""

    def corrected(self, by: float) -> Budget:
        """Return the same budget, target included, with all costs multiplied by ``by``."""
        ...


class BudgetRequest(Protocol):
    """A budget before it knows the network."""

    def bind(self, graph: DeployedGraph) -> tuple[Budget, WidthChoices]:
        """Return the budget over this network's widths, and the widths that suit it."""
        ...


def check_names(budgets: Sequence[Budget]) -> None:
    """See that budgets can be told apart in logs and results.

    Raises:
        UserError: two have the same name.
    """
    names = [budget.name for budget in budgets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{names.count(name)} budgets are called {name!r}; give them names, as in "
                "LatencyBudget(table, target_ms, name='phone')"
            )
