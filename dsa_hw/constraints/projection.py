"""Projected gradient: along the budget, then back onto it."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_hw.constraints.mover import KeepRatioMover, Violations, fit_to_budget

ROUNDING = 1e-5
"""Of a gradient's largest component, at float32. Adam makes a whole step of whatever it gets."""


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
    """(groups,) the negative of the best direction along the budget: none out of the bounds.

    Of all d with ``normal @ d = 0``, 0 where a group may not change, at most 0 where its keep ratio
    is 1 and at least 0 where it is the least, the one nearest to ``-gradient``: ``t * normal -
    gradient`` within these signs, for the one t that makes it hold. (Rosen, "The gradient
    projection method for nonlinear programming", 1960.) ``normal @ d`` rises with t, in straight
    pieces between the values at which a component is 0: it is computed at each of them, and t is
    found between two.
    """
    least_d = torch.where(keep_ratios <= least, 0.0, -torch.inf)
    most_d = torch.where(keep_ratios >= 1.0, 0.0, torch.inf)
    movable = least < 1.0

    def direction(t: Tensor) -> Tensor:
        """(..., groups) for t (..., 1)."""
        return (t * normal - gradient).clamp(least_d, most_d) * movable

    counts = movable & (normal.abs() > ROUNDING * normal.abs().max())
    corners = torch.where(counts, gradient / torch.where(counts, normal, 1.0), 0.0)
    slack = direction(corners[:, None]) @ (normal * counts)
    low = _last(corners, counts, slack <= 0)
    high = -_last(-corners, counts, slack >= 0)
    below, above = (direction(t[None]) @ (normal * counts) for t in (low, high))
    share = torch.where(above > below, -below / (above - below).clamp_min(1e-30), 0.0)
    rest = -direction(torch.lerp(low, high, share.clamp(0.0, 1.0)))
    return torch.where(rest.abs() > ROUNDING * gradient.abs().max(), rest, 0.0)


def _last(values: Tensor, there: Tensor, fits: Tensor) -> Tensor:
    """() the largest value that fits, or else the smallest there is; 0 where there are none."""
    smallest = torch.where(there, values, torch.inf).min()
    largest = torch.where(there & fits, values, smallest).max()
    return torch.where(there.any(), largest, torch.zeros_like(largest))
