"""Projected gradient: along the budget, then back onto it."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_hw.search.holding.mover import KeepRatioMover, Violations, fit_to_budget

ROUNDING = 1e-5
"""Of a gradient's largest component, at float32. Adam makes a whole step of whatever it gets."""
ACTIVE = 2.0
"""Distance of the second budget's violation from the tightest's, in steps of a move, at which both
count as used up: a move can cross so much."""
HALVINGS = 24
"""Of the interval in which the second budget's multiplier is looked for: to 1e-7 of it."""


class Projection(KeepRatioMover):
    """Keeps the tightest budget exactly used at all times.

    The loss gradient loses its component along that budget's cost; after Adam's step all keep
    ratios are scaled by one factor until the budget is just met. There is no multiplier to tune,
    and no stretch of the search at another cost than the one that was asked for.

    Where a second budget is as tight, the move may not raise its cost either (``along_two``): with
    one normal at a time the moves would cross from one budget to the other and back.
    """

    def move(self, loss_gradient: Tensor, violations: Violations, step: float) -> None:
        """See ``KeepRatioMover.move``."""
        found = violations(self.keep_ratios)
        tightest = found.topk(min(2, len(found))).values
        normals = [
            torch.autograd.grad(one, self.keep_ratios, retain_graph=True)[0] for one in tightest
        ]
        ratios = self.keep_ratios.detach()
        move = along_budget(ratios, self.least, loss_gradient, normals[0])
        if len(normals) == 2:
            both = along_two(ratios, self.least, loss_gradient, normals[0], normals[1])
            active = tightest[0] - tightest[1] <= ACTIVE * step
            move = torch.where(active, both, move)
        self._step(move, step)
        fit_to_budget(self.keep_ratios, self.least, violations)


def along_two(
    keep_ratios: Tensor, least: Tensor, gradient: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """(groups,) the negative of the best direction where two budgets are used up.

    Along one of them and not into the other, if there is such a direction, the one that is nearer
    to ``-gradient``; else along both. Within the bounds, as in ``along_budget``.
    """

    def distance(move: Tensor) -> Tensor:
        return (gradient - move).square().sum()

    one = along_budget(keep_ratios, least, gradient, first)
    other = along_budget(keep_ratios, least, gradient, second)
    noise = ROUNDING * gradient.abs().max()
    one_fits = -(one @ second) <= noise * second.abs().max()
    other_fits = -(other @ first) <= noise * first.abs().max()
    first_is_nearer = distance(one) <= distance(other)
    edge = _along_both(keep_ratios, least, gradient, first, second)
    found = torch.where(other_fits, other, edge)
    return torch.where(one_fits & (first_is_nearer | ~other_fits), one, found)


def _along_both(
    keep_ratios: Tensor, least: Tensor, gradient: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """(groups,) the negative of the direction nearest to ``-gradient`` that changes neither cost.

    ``along_budget`` of the first, with a multiple t of the second normal added to the direction.
    The second cost's change rises with t; the interval that it is 0 in is halved. The mean of the
    interval's two ends, weighed so that the second cost does not change, is along the first budget
    and within the bounds as both of them are.
    """

    def move(t: Tensor) -> Tensor:
        return along_budget(keep_ratios, least, gradient - t * second, first)

    free = least < 1.0
    within = first * free
    part = (second @ within) / within.square().sum().clamp_min(1e-30)
    second = (second - part * first) * free  # what ``first`` does not say already
    unit = gradient.abs().max() / second.abs().max().clamp_min(1e-30)
    low, high = -torch.ones_like(unit), torch.ones_like(unit)

    def at(position: Tensor) -> Tensor:
        """A position in (-1, 1) -> t, of any size."""
        return unit * position / (1.0 - position.square()).clamp_min(1e-6)

    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        rises = -(move(at(middle)) @ second) > 0
        low, high = torch.where(rises, low, middle), torch.where(rises, middle, high)
    below, above = move(at(low)), move(at(high))
    down, up = -(below @ second), -(above @ second)
    share = torch.where(up > down, -down / (up - down).clamp_min(1e-30), 0.5)
    return torch.lerp(below, above, share.clamp(0.0, 1.0))


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
