"""The augmented Lagrangian of inequality constraints.

Hestenes, "Multiplier and gradient methods", 1969; for inequalities Rockafellar, "The multiplier
method of Hestenes and Powell applied to convex programming", 1973:

    L(a, lambda) = loss(a) + sum_b (max(0, lambda_b + rho v_b(a))^2 - lambda_b^2) / (2 rho),
    lambda_b <- max(0, lambda_b + rho v_b(a)).

Two differences. The loss gradient is divided by a running average of its norm, so that rho means
the same for any loss. And the multiplier takes a part of the update at each move, since a move is
one gradient step and not a minimization.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsa_hw.constraints.mover import KeepRatioMover, Violations

RHO = 10.0
MULTIPLIER_RATE = 0.1
MEMORY = 0.95


class AugmentedLagrangian(KeepRatioMover):
    """A multiplier for each budget, and a penalty that grows with its violation."""

    betas = (0.9, 0.95)  # a far target's first pulls are large, and must be forgotten soon

    def __init__(self, keep_ratios: Tensor, least: Tensor, budgets: int) -> None:
        super().__init__(keep_ratios, least, budgets)
        self.multipliers = torch.zeros(budgets, device=keep_ratios.device, dtype=keep_ratios.dtype)
        self._norm = GradientNorm(keep_ratios)

    def move(self, loss_gradient: Tensor, violations: Violations, step: float) -> None:
        """See ``KeepRatioMover.move``."""
        found = violations(self.keep_ratios)
        with torch.no_grad():
            pressure = (self.multipliers + RHO * found).clamp_min(0.0)
        (push,) = torch.autograd.grad((pressure * found).sum(), self.keep_ratios)
        self._step(self._norm.divide(loss_gradient) + push, step)
        with torch.no_grad():
            rate = MULTIPLIER_RATE * RHO
            now = violations(self.keep_ratios)
            self.multipliers.add_(rate * now).clamp_min_(0.0)

    def state_dict(self) -> dict[str, Any]:
        """See ``KeepRatioMover.state_dict``."""
        own = {"multipliers": self.multipliers.clone(), "norm": self._norm.value.clone()}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``KeepRatioMover.load_state_dict``."""
        super().load_state_dict(state)
        if state["multipliers"].shape == self.multipliers.shape:  # else: other budgets, from zero
            self.multipliers.copy_(state["multipliers"])
        self._norm.value.copy_(state["norm"])


class GradientNorm:
    """Running average of a gradient's norm; multipliers are in its units."""

    def __init__(self, like: Tensor) -> None:
        self.value = torch.zeros((), device=like.device, dtype=like.dtype)

    def divide(self, gradient: Tensor) -> Tensor:
        """``gradient`` over the average, this one included."""
        norm = gradient.detach().norm()
        mixed = torch.lerp(norm, self.value, MEMORY)
        self.value.copy_(torch.where(self.value > 0, mixed, norm))
        return gradient / self.value.clamp_min(1e-20)
