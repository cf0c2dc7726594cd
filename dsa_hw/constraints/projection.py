"""Projected gradient: along the budget, then back onto it."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_hw.constraints.mover import KeepRatioMover, Violations, fit_to_budget


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
        share = (loss_gradient @ normal) / (normal @ normal).clamp_min(1e-20)
        self._step(loss_gradient - normal * share, step)
        fit_to_budget(self.keep_ratios, self.least, violations)
