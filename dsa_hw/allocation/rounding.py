"""Keep ratios -> integer widths on the device's steps, at the budget.

Latency does not depend on the weights, so this is a discrete problem: maximise the sum of each
group's value over its allowed widths, with every cost at or under its target. A target is an upper
limit: only between allocations of the same value (to a thousandth of what the budget costs) does it
matter which of them uses more of it. Costs couple the groups (a layer pays for both its sides). A
local search over whole width vectors finds a good allocation for any cost; where costs are sums
over layers, an integer program (``integer_program``) then finds the best one, or says by how much
it may be missed.

The internal groups of a branch that may be removed (``WidthChoices.together``) have width zero
together or not at all; allocations in which they disagree are never looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsa_hw.allocation.problem import COARSE, Constraint, Problem
from dsa_hw.cost.choices import WidthChoices
from dsa_hw.errors import InfeasibleBudget, UserError

PRODUCTS = 12_000
"""Pairs of choices up to which the whole problem goes to the integer program."""
WINDOWS = 12
"""Integer programs that a larger problem is solved by, at most."""
PROVEN = 3e-5
"""Distance from the bound, in what the budget costs, at which an allocation is proven to be the
best: the integer program stops at a gap of 1e-5."""


@dataclass(frozen=True, slots=True)
class NextStep:
    """The cheapest single step of one group that would add value, and does not fit.

    Args:
        group: its index.
        gain: of value.
        extra: what it costs more, under each constraint, as a part of the target.
    """

    group: int
    width: int
    next_width: int
    gain: float
    extra: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Rounded:
    """An allocation.

    Args:
        widths: (groups,).
        value: of these widths.
        costs: under each constraint.
        headroom: under each constraint, the part of the target that is not used.
        next_step: what the headroom is too small for; None where nothing would add value.
        score: the value, and within ``TIE`` of what the budget costs, its use.
        bound: no allocation scores more than this; None where that is not known (the costs are no
            sums over layers, or the problem is too large to be solved whole).
        proven: whether the bound says that there is no better allocation.
    """

    widths: np.ndarray
    value: float
    costs: tuple[float, ...]
    headroom: tuple[float, ...]
    next_step: NextStep | None
    score: float
    bound: float | None = None
    proven: bool = False


def round_widths(
    choices: WidthChoices,
    values: Sequence[np.ndarray],
    constraints: Sequence[Constraint],
    *,
    exact: bool = True,
) -> Rounded:
    """Allowed widths of the highest total value that meet every constraint.

    The result depends on the arguments alone, and not on how fast the machine is.

    Args:
        values: per group, one number a choice (any scale).
        exact: whether the integer program follows the local search.

    Raises:
        InfeasibleBudget: even the least widths cost too much; says the least that can be had.
        UserError: a value is not finite, or a cost is not.
    """
    _refuse_what_is_not_finite(values)
    plain = Problem(choices, values, constraints)
    _refuse_infeasible(plain, constraints)
    index = _locally_best(plain, many_starts=False)
    problem = plain.scaled_at(index)
    index = problem.climb(index)
    found = _solved(problem, index) if exact else None
    if found is None:
        index = max(index, _locally_best(problem, many_starts=True), key=problem.score)
        found = index, None
    index, bound = found
    widths = problem.widths(index[None])[0]
    score = problem.score(index)
    return Rounded(
        widths=widths,
        value=float(problem.value(index[None])[0]),
        costs=tuple(problem.costs(widths[None])[0].tolist()),
        headroom=headroom(constraints, widths),
        next_step=_step_up(problem, constraints, values, index),
        score=score,
        bound=bound,
        proven=bound is not None and bound - score <= PROVEN * problem.scale,
    )


def headroom(constraints: Sequence[Constraint], widths: np.ndarray) -> tuple[float, ...]:
    """Under each constraint, the part of its target that these widths leave."""
    return tuple(1.0 - float(c.cost(widths[None])[0]) / c.target for c in constraints)


def next_step(
    choices: WidthChoices,
    values: Sequence[np.ndarray],
    constraints: Sequence[Constraint],
    widths: Sequence[int] | np.ndarray,
) -> NextStep | None:
    """Return the cheapest single step from ``widths`` that adds value and does not fit."""
    problem = Problem(choices, values, constraints)
    index = np.array([allowed.index(w) for allowed, w in zip(choices.widths, widths, strict=True)])
    return _step_up(problem, constraints, values, index)


def _step_up(
    problem: Problem,
    constraints: Sequence[Constraint],
    values: Sequence[np.ndarray],
    index: np.ndarray,
) -> NextStep | None:
    found = problem.next_step(index)
    if found is None:
        return None
    group, choice = found
    row = index.copy()
    row[group] = choice
    now, then = problem.widths(np.stack([index, row]))
    costs = problem.costs(np.stack([now, then]))
    extra = (costs[1] - costs[0]) / np.array([c.target for c in constraints])
    gain = float(values[group][choice] - values[group][index[group]])
    return NextStep(group, int(now[group]), int(then[group]), gain, tuple(extra.tolist()))


def _refuse_what_is_not_finite(values: Sequence[np.ndarray]) -> None:
    for group, own in enumerate(values):
        if not np.isfinite(own).all():
            raise UserError(
                f"the values of group {group} are not finite ({np.asarray(own).tolist()}): see "
                "that the network's weights and its learned widths are numbers"
            )


def _refuse_infeasible(problem: Problem, constraints: Sequence[Constraint]) -> None:
    least = problem.costs(problem.widths(np.zeros((1, len(problem.counts)), int)))[0]
    for constraint, cost in zip(constraints, least, strict=True):
        if not np.isfinite(cost):
            raise UserError(
                f"the {constraint.name} of the smallest widths is {cost} {constraint.unit}; "
                "expected a number: see what its budget computes"
            )
        if cost > constraint.target:
            raise InfeasibleBudget(
                f"the {constraint.name} target of {constraint.target:.4g} {constraint.unit} cannot "
                f"be reached: the least this network can have here is {cost:.4g} "
                f"{constraint.unit} (every group at its smallest width)"
            )


def _locally_best(problem: Problem, many_starts: bool) -> np.ndarray:
    """(groups,) choices: the best that climbing finds, among a few choices where there are many."""
    offered = problem.spread()
    part = problem.restricted(offered)
    starts = part.starts() if many_starts else [part.plain_start()]
    best = max(map(part.climb, starts), key=part.score)
    return np.array([o[i] for o, i in zip(offered, best, strict=True)])


def _solved(problem: Problem, index: np.ndarray) -> tuple[np.ndarray, float | None] | None:
    """The integer program's choices, and its bound if it saw the whole problem.

    None where the costs are no sums over pairs of groups, or couple too many of them. A problem
    that is too large is solved in windows around the best known choices, coarse ones first, until
    so few choices can still be part of a better allocation that they are seen together.

    Args:
        index: (groups,) choices that are known to be possible.
    """
    pairs = problem.interacting(index)

    def fits(offered: Sequence[np.ndarray]) -> bool:
        return sum(len(offered[g]) * len(offered[h]) for g, h in pairs) <= PRODUCTS

    stride = max(1, int(problem.counts.max()) // COARSE)
    for _ in range(WINDOWS):
        promising = problem.promising(index)
        if fits(promising):
            return problem.solve(promising, index)
        for reach in range(COARSE // 2, 0, -1):
            near = problem.window(index, stride, reach)
            offered = [np.intersect1d(*both) for both in zip(near, promising, strict=True)]
            if fits(offered):
                break
        else:
            return None
        step = problem.solve(offered, index)
        if step is None:
            return None
        if problem.score(step[0]) <= problem.score(index) + 1e-9 * problem.scale:
            stride //= 2
        index = step[0]
        if not stride:
            break
    return index, None
