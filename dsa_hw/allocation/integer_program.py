"""The choice of widths as a mixed-integer linear program, solved by HiGHS through SciPy.

A layer's cost depends on two widths, so a network's cost is a sum over groups and over pairs of
groups. ``decompose`` finds that form by evaluating a cost, without knowing what it counts, and says
how far it is from the truth; a cost of another form (a maximum, a staircase over a concatenation)
shows there and is left to the local search.

In the program a binary x[g, i] chooses width i of group g, and a continuous z[i, j] >= 0 stands for
the product of two of them. Its sums over either side equal the other side's x (the local marginal
polytope), which is tighter than bounding each product by its factors.

A bound holds for the true costs, of which the program knows a form that may err: the program that
gives it (``relaxed``) allows every cost its error beyond the target, so that no allocation within
the true targets is left out. Its solution may then lie just outside of them; the one of the strict
program, which stays the error away from the target, does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array

NOISE = 3e-6
"""Costs come in float32; interactions below this part of the whole are its rounding."""
ALL_CHECKED = 4096
"""Up to so many allocations in all, every one of them is compared with the pairwise form; of more,
512 random ones are, and the others' error is taken to be at most twice the largest of theirs."""
CHECKS = 512
UNSEEN = 2.0
SCALE = 100.0
"""Costs are in hundredths of the target, so that HiGHS' tolerance of 1e-6 is 1e-8 of it."""
TOLERANCE = 2e-8
"""Of the target: what HiGHS' tolerance may let pass, and a little."""
GAP = 1e-5
"""Relative distance of solution and bound at which HiGHS stops. Values are in units of what the
budget costs, so it is that part of the value that the budget takes."""
BOUND_TOLERANCE = 2e-6
"""HiGHS' feasibility tolerance (1e-6) in units of value, and a little."""
OPTIMAL, NODE_LIMIT = 0, 1
"""SciPy's status: solved to the gap; the limit of nodes was reached, and the bound holds."""

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class PairwiseCost:
    """``constant + sum_g single[g][i_g] + sum_gh pairs[g, h][i_g, i_h]``, relative to a target.

    Args:
        error: how far the true cost is from this form at most.
    """

    constant: float
    single: tuple[np.ndarray, ...]
    pairs: dict[Pair, np.ndarray]
    error: float

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """(n, groups) choices -> (n,) cost."""
        total = np.full(len(index), self.constant)
        for g, single in enumerate(self.single):
            total += single[index[:, g]]
        for (g, h), table in self.pairs.items():
            total += table[index[:, g], index[:, h]]
        return total


def decompose(
    cost: Callable[[np.ndarray], np.ndarray],
    counts: Sequence[int] | np.ndarray,
    base: np.ndarray,
    pairs: Sequence[Pair] | None = None,
) -> PairwiseCost:
    """Find the pairwise form of ``cost``, anchored at ``base``.

    Args:
        cost: (n, groups) choices -> (n,), batched.
        counts: choices of every group.
        base: (groups,) choices at which the form is exact by construction.
        pairs: the groups that interact, where that is known.
    """
    constant = float(cost(base[None])[0])
    single = _singles(cost, counts, base, constant)
    if pairs is None:
        pairs = _interacting(cost, counts, base, constant, single)
    tables = {pair: _interaction(cost, counts, base, constant, single, pair) for pair in pairs}
    form = PairwiseCost(constant, single, tables, 0.0)
    return PairwiseCost(constant, single, tables, _error(form, cost, np.array(counts)))


def _error(form: PairwiseCost, cost: Callable, counts: np.ndarray) -> float:
    """Largest difference between the form and the true cost; see ``ALL_CHECKED``."""
    if np.log(counts).sum() <= np.log(ALL_CHECKED):
        index = np.indices(tuple(counts)).reshape(len(counts), -1).T
        return float(np.abs(form(index) - cost(index)).max())
    index = np.random.default_rng(0).integers(0, counts, (CHECKS, len(counts)))
    return UNSEEN * float(np.abs(form(index) - cost(index)).max())


def interacting_groups(
    cost: Callable[[np.ndarray], np.ndarray], counts: Sequence[int] | np.ndarray, base: np.ndarray
) -> list[Pair]:
    """Pairs of groups whose choices change ``cost`` together; see ``decompose``."""
    constant = float(cost(base[None])[0])
    return _interacting(cost, counts, base, constant, _singles(cost, counts, base, constant))


def _singles(cost, counts, base, constant) -> tuple[np.ndarray, ...]:
    """Change of cost with each group alone."""
    rows = np.repeat(base[None], sum(counts), axis=0)
    ends = np.cumsum([0, *counts])
    for group, (first, last) in enumerate(itertools.pairwise(ends)):
        rows[first:last, group] = np.arange(counts[group])
    return tuple(np.split(cost(rows) - constant, ends[1:-1]))


def _interacting(cost, counts, base, constant, single) -> list[Pair]:
    """Pairs whose joint change differs from the sum of their own, seen at corners."""
    movable = [g for g, n in enumerate(counts) if n > 1]
    probes, rows = [], []
    for g, h in itertools.combinations(movable, 2):
        for i, j in itertools.product({0, counts[g] - 1}, {0, counts[h] - 1}):
            if i != base[g] and j != base[h]:
                row = base.copy()
                row[g], row[h] = i, j
                probes.append((g, h, single[g][i] + single[h][j]))
                rows.append(row)
    if not rows:
        return []
    seen = cost(np.array(rows)) - constant
    limit = NOISE * max(abs(constant), float(np.abs(seen).max()))
    found = {
        (g, h): None
        for (g, h, apart), both in zip(probes, seen, strict=True)
        if abs(both - apart) > limit
    }
    return list(found)


def _interaction(cost, counts, base, constant, single, pair) -> np.ndarray:
    g, h = pair
    grid = np.indices((counts[g], counts[h])).reshape(2, -1)
    rows = np.repeat(base[None], grid.shape[1], axis=0)
    rows[:, g], rows[:, h] = grid
    joint = (cost(rows) - constant).reshape(counts[g], counts[h])
    return joint - single[g][:, None] - single[h][None, :]


@dataclass(frozen=True, slots=True)
class Solution:
    """What the solver found.

    Args:
        index: (groups,) choices; None if it found nothing at least as good as ``at_least``.
        bound: no choices that the program allows score more than this; None where the solver does
            not vouch for one.
    """

    index: np.ndarray | None
    bound: float | None


def solve(
    values: Sequence[np.ndarray],
    costs: Sequence[PairwiseCost],
    *,
    use_weight: float,
    at_least: float,
    nodes: int,
    relaxed: bool,
    together: Sequence[Sequence[int]] = (),
) -> Solution:
    """Choices of the highest score with every cost at most 1.

    The score is the sum of the values, and ``use_weight`` times the largest cost: of choices that
    are worth the same, those that use the budget. How long it takes is limited by nodes of the
    search tree and not by a clock: the result does not depend on what else the machine does.

    Args:
        values: per group, one number a choice, of the order of 1.
        costs: each over its target.
        at_least: a score that is known to be possible; less is not looked for.
        nodes: of the search tree, at most.
        relaxed: whether costs may be their error above 1, or have to be that much below.
        together: sets of groups that have their first choice together or not at all.
    """
    program = _Program(values, costs, use_weight, relaxed)
    for groups in together:
        program.tie_first_choices(groups)
    result = program.run(at_least - BOUND_TOLERANCE, nodes)
    bound = None
    dual = getattr(result, "mip_dual_bound", None)
    if result.status in (OPTIMAL, NODE_LIMIT) and dual is not None and np.isfinite(dual):
        bound = program.offset - float(dual) + BOUND_TOLERANCE
    return Solution(None if result.x is None else program.chosen(result.x), bound)


class _Program:
    """Columns: x by group, z by interacting pair, then u (unused budget) and y by cost."""

    def __init__(self, values, costs, use_weight: float, relaxed: bool) -> None:
        self._counts = [len(v) for v in values]
        self._x = np.cumsum([0, *self._counts])
        pairs = dict.fromkeys(pair for cost in costs for pair in cost.pairs)
        sizes = [self._counts[g] * self._counts[h] for g, h in pairs]
        starts = self._x[-1] + np.cumsum([0, *sizes])
        self._z = dict(zip(pairs, starts[:-1].tolist(), strict=True))
        self._u = int(starts[-1])
        self._y = self._u + 1
        self._columns = self._y + len(costs)
        self._rows: list[tuple[np.ndarray, np.ndarray, float, float]] = []
        self._gain = np.zeros(self._columns)
        best = [float(np.max(v)) for v in values]
        self._gain[: self._x[-1]] = np.concatenate(
            [np.asarray(v) - most for v, most in zip(values, best, strict=True)]
        )
        self._gain[self._u] = -use_weight
        self.offset = sum(best) + use_weight
        self._choose_one()
        self._marginals()
        for number, cost in enumerate(costs):
            self._limit(cost, number, cost.error if relaxed else -cost.error)
        ones = np.arange(self._y, self._columns)
        self._add(ones, np.ones(len(ones)), 1.0, 1.0)

    def run(self, at_least: float, nodes: int) -> OptimizeResult:
        """Solve for a score of at least ``at_least``."""
        self._add(np.arange(self._columns), self._gain, at_least - self.offset, np.inf)
        integrality = np.zeros(self._columns)
        integrality[: self._x[-1]] = 1
        integrality[self._y :] = 1
        upper = np.ones(self._columns)
        upper[self._u] = np.inf
        return milp(
            -self._gain,
            integrality=integrality,
            bounds=Bounds(0.0, upper),  # pyright: ignore[reportArgumentType]
            constraints=self._constraints(),
            options={"node_limit": nodes, "mip_rel_gap": GAP},
        )

    def tie_first_choices(self, groups: Sequence[int]) -> None:
        """All of these groups have their first choice, or none has."""
        for one, other in itertools.pairwise(groups):
            columns = np.array([self._x[one], self._x[other]])
            self._add(columns, np.array([1.0, -1.0]), 0.0, 0.0)

    def chosen(self, x: np.ndarray) -> np.ndarray:
        """(groups,) choices of a solution."""
        parts = np.split(x[: self._x[-1]], self._x[1:-1])
        return np.array([int(part.argmax()) for part in parts])

    def _add(self, columns: np.ndarray, factors: np.ndarray, low: float, high: float) -> None:
        self._rows.append((columns, factors, low, high))

    def _choose_one(self) -> None:
        for first, last in itertools.pairwise(self._x):
            self._add(np.arange(first, last), np.ones(last - first), 1.0, 1.0)

    def _marginals(self) -> None:
        for (g, h), start in self._z.items():
            z = start + np.arange(self._counts[g] * self._counts[h])
            z = z.reshape(self._counts[g], self._counts[h])
            for lines, group in ((z, g), (z.T, h)):
                for i, line in enumerate(lines):
                    columns = np.append(line, self._x[group] + i)
                    self._add(columns, np.append(np.ones(len(line)), -1.0), 0.0, 0.0)

    def _limit(self, cost: PairwiseCost, number: int, more: float) -> None:
        """cost <= 1 + more, and u >= 1 - cost - |more| if this is the cost that u is counted by.

        A relaxed program's bound must not be lowered by what the form says that a cost leaves
        unused, and may not: hence the absolute value. In the strict one it only moves a tie.
        """
        columns = [np.arange(self._x[-1])]
        factors = [np.concatenate(cost.single)]
        for pair, table in cost.pairs.items():
            columns.append(self._z[pair] + np.arange(table.size))
            factors.append(table.ravel())
        where, what = np.concatenate(columns), np.concatenate(factors)
        most = 1.0 + more + (TOLERANCE if more >= 0 else -TOLERANCE) - cost.constant
        self._add(where, SCALE * what, -np.inf, SCALE * most)
        where = np.concatenate([where, [self._u, self._y + number]])
        what = np.concatenate([what, [1.0, -1.0]])
        self._add(where, what, -abs(more) - cost.constant, np.inf)

    def _constraints(self) -> LinearConstraint:
        sizes = [len(columns) for columns, _, _, _ in self._rows]
        matrix = coo_array(
            (
                np.concatenate([factors for _, factors, _, _ in self._rows]),
                (
                    np.repeat(np.arange(len(self._rows)), sizes),
                    np.concatenate([columns for columns, _, _, _ in self._rows]),
                ),
            ),
            shape=(len(self._rows), self._columns),
        )
        low, high = (np.array([row[k] for row in self._rows]) for k in (2, 3))
        return LinearConstraint(matrix.tocsr(), low, high)  # pyright: ignore[reportArgumentType]
