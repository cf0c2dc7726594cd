"""Splitting after ADMM, as in DSA (Ning et al., ECCV 2020, arXiv:2004.02164).

    min loss(a)  subject to  a = z, z meets the budgets;  in turn, with the scaled dual u:
    a <- a - step * (gradient of loss(a) + rho (a - z + u)),
    z <- the nearest point to a + u that meets the budgets and the bounds,
    u <- u + a - z.

Where this differs from the paper: a takes Adam's steps, the loss gradient is divided by a running
average of its norm, so that rho means the same for any loss, and u takes a part of its update at
each move, since a move is one gradient step and not a minimization. The problem of z is solved by
linearizing the tightest budget a few times and bisecting its multiplier.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsa_hw.search.holding.mover import KeepRatioMover, Violations, within_bounds

RHO = 10.0
DUAL_RATE = 0.1
LINEARIZATIONS = 2
BISECTIONS = 20
MEMORY = 0.95
"""How much of the average of the loss gradient's norm stays at each move."""


class Admm(KeepRatioMover):
    """Keep ratios, their projected copy, and the dual variable that pulls them together."""

    betas = (0.9, 0.95)  # a far target's first pulls are large, and must be forgotten soon

    def __init__(self, keep_ratios: Tensor, least: Tensor, budgets: int) -> None:
        super().__init__(keep_ratios, least, budgets)
        self.copy = keep_ratios.detach().clone()
        self.dual = torch.zeros_like(self.copy)
        self._norm = GradientNorm(keep_ratios)

    def move(self, loss_gradient: Tensor, violations: Violations, step: float) -> None:
        """See ``KeepRatioMover.move``."""
        ratios = self.keep_ratios.detach()
        pull = RHO * (ratios - self.copy + self.dual)
        self._step(self._norm.divide(loss_gradient) + pull, step)
        ratios = self.keep_ratios.detach()
        self.copy = nearest_within(ratios + self.dual, self.least, violations)
        self.dual += DUAL_RATE * (ratios - self.copy)

    def state_dict(self) -> dict[str, Any]:
        """See ``KeepRatioMover.state_dict``."""
        own = {"copy": self.copy, "dual": self.dual.clone(), "norm": self._norm.value.clone()}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``KeepRatioMover.load_state_dict``."""
        super().load_state_dict(state)
        self.copy = state["copy"].to(self.dual.device)
        self.dual.copy_(state["dual"])
        self._norm.value.copy_(state["norm"])


def nearest_within(point: Tensor, least: Tensor, violations: Violations) -> Tensor:
    """The nearest keep ratios to ``point`` (in the Euclidean sense) that meet the tightest budget.

    Exact for one linear budget; a curved one is linearized anew at each result.
    """
    found = within_bounds(point, least)
    for _ in range(LINEARIZATIONS):
        at = found.requires_grad_()
        tightest = violations(at).max()
        (normal,) = torch.autograd.grad(tightest, at)
        at, tightest = at.detach(), tightest.detach()
        found = _onto_halfspace(point, least, normal, normal @ at - tightest)
    return found.detach()


def _onto_halfspace(point: Tensor, least: Tensor, normal: Tensor, limit: Tensor) -> Tensor:
    """Nearest to ``point`` with ``normal @ x <= limit`` within the bounds, by its multiplier."""
    low = torch.zeros((), device=point.device, dtype=point.dtype)
    steepest = (normal * normal).mean().sqrt().clamp_min(1e-12)
    high = 2.0 * (point.abs().max() + 1.0) / steepest
    outside = normal @ within_bounds(point, least) > limit
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        over = normal @ within_bounds(point - middle * normal, least) > limit
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return within_bounds(point - torch.where(outside, high, 0.0) * normal, least)


class GradientNorm:
    """Running average of a gradient's norm; the penalty is in its units."""

    def __init__(self, like: Tensor) -> None:
        self.value = torch.zeros((), device=like.device, dtype=like.dtype)

    def divide(self, gradient: Tensor) -> Tensor:
        """``gradient`` over the average, this one included."""
        norm = gradient.detach().norm()
        mixed = torch.lerp(norm, self.value, MEMORY)
        self.value.copy_(torch.where(self.value > 0, mixed, norm))
        return gradient / self.value.clamp_min(1e-20)
