"""What the methods that hold the search's budgets have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Violations = Callable[[Tensor], Tensor]
"""(groups,) keep ratios -> (budgets,) cost over target less 1, differentiable."""

FITTINGS = 3


class KeepRatioMover(ABC):
    """Moves keep ratios down the loss while budgets hold, or come to hold.

    Args:
        keep_ratios: (groups,) leaf that requires a gradient; moved in place by Adam.
        least: (groups,) smallest keep ratios; the greatest is 1.
        budgets: how many there are.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's memories of the gradient and of its square."""

    def __init__(self, keep_ratios: Tensor, least: Tensor, budgets: int) -> None:
        self.keep_ratios, self.least = keep_ratios, least
        self.budgets = budgets
        self._adam = torch.optim.Adam([keep_ratios], betas=self.betas)

    @abstractmethod
    def move(self, loss_gradient: Tensor, violations: Violations, step: float) -> None:
        """One move.

        Args:
            loss_gradient: (groups,) of the validation loss by the keep ratios.
            violations: of the targets that hold now.
            step: Adam's learning rate.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything but the keep ratios themselves."""
        return {"adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._adam.load_state_dict(state["adam"])

    def _step(self, gradient: Tensor, step: float) -> None:
        """Adam, then back within the bounds."""
        for options in self._adam.param_groups:
            options["lr"] = step
        self.keep_ratios.grad = gradient
        self._adam.step()
        self.keep_ratios.grad = None
        with torch.no_grad():
            self.keep_ratios.copy_(within_bounds(self.keep_ratios, self.least))


def within_bounds(keep_ratios: Tensor, least: Tensor) -> Tensor:
    """(groups,) clamped to [least, 1]; without a scalar tensor, which would live on the host."""
    return torch.maximum(keep_ratios, least).clamp_max(1.0)


def fit_to_budget(
    keep_ratios: Tensor, least: Tensor, violations: Violations, rounds: int = FITTINGS
) -> None:
    """Scale all keep ratios by one factor, in place, until the tightest budget is just met."""
    for _ in range(rounds):
        violation = violations(keep_ratios).max()
        (slope,) = torch.autograd.grad(violation, keep_ratios)
        with torch.no_grad():
            per_log = (slope * keep_ratios).sum().clamp_min(1e-6)
            scaled = keep_ratios * torch.exp((-violation / per_log).clamp(-0.5, 0.5))
            keep_ratios.copy_(within_bounds(scaled, least))
