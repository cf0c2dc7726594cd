"""Projected gradient: along the budget, then back onto it."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_hw.constraints.mover import KeepRatioMover, Violations, fit_to_budget

TURNS = 4
"""In which groups that push against a bound are found; each may set others free or stop them."""


class Projection(KeepRatioMover):
    """Keeps the tightest budget exactly used at all times.

    The loss gradient loses its component along that budget's cost; after Adam's step all keep
    ratios are scaled by one factor until the budget is just met. There is no multiplier to tune,
    and no stretch of the search at another cost than the one that was asked for.
    """

    def move(self, loss_gradient: Tensor, violations: Violations, step: float) -> None:
        """See ``KeepRatioMover.move``."""
        tightest = violations(self.keep_ratios).max()
        (normal,) = torch.autograd.grad(tightest, self.keep_ratios)
        ratios = self.keep_ratios.detach()
        self._step(along_budget(ratios, self.least, loss_gradient, normal), step)
        fit_to_budget(self.keep_ratios, self.least, violations)


def along_budget(keep_ratios: Tensor, least: Tensor, gradient: Tensor, normal: Tensor) -> Tensor:
    """(groups,) ``gradient`` without its component along ``normal``, among groups that can move.

    A group that may not change, or whose rest of a gradient pushes it against its bound, has no
    say in how much of the budget's cost the loss is worth: it is zero in the result. (The active
    set of the gradient projection method, Rosen, "The gradient projection method for nonlinear
    programming", 1960.)
    """
    movable = least < 1.0
    free = movable
    for _ in range(TURNS):
        kept = normal * free
        rest = gradient - normal * ((gradient @ kept) / (kept @ kept).clamp_min(1e-20))
        outwards = ((keep_ratios >= 1.0) & (rest < 0)) | ((keep_ratios <= least) & (rest > 0))
        free = movable & ~outwards
    return rest * free
