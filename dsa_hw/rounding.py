"""Keep ratios -> integer widths on the device's steps, at the budget.

Latency does not depend on the weights, so this is a discrete problem: maximise the sum of each
group's value over its allowed widths, with every cost at or under its target. Costs couple the
groups (a layer pays for both its sides), so the solver is a search over whole width vectors that
evaluates all single and paired moves of one step at once, from several starting points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dsa_hw.choices import WidthChoices
from dsa_hw.errors import InfeasibleBudget

PERTURBED_STARTS = {False: 12, True: 60}
ALL_PAIRS = 5_000

Cost = Callable[[np.ndarray], np.ndarray]
"""(candidates, groups) widths -> (candidates,) cost; batched."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """``cost(widths) <= target``.

    Args:
        slack: how far under the target a solution may stay before it counts as giving up value.
    """

    name: str
    unit: str
    cost: Cost
    target: float
    slack: float = 0.015


@dataclass(frozen=True, slots=True)
class Rounded:
    """An allocation: (groups,) widths, its value, and its cost under each constraint."""

    widths: np.ndarray
    value: float
    costs: tuple[float, ...]


def closeness(choices: WidthChoices, widths: np.ndarray) -> list[np.ndarray]:
    """Value of every choice of every group: minus the squared log distance to ``widths``."""
    return [
        -(np.log(np.array(allowed) / max(width, 1e-3)) ** 2)
        for allowed, width in zip(choices.widths, widths, strict=True)
    ]


def kept_importance(
    choices: WidthChoices, importance: Sequence[np.ndarray], layers: Sequence[int]
) -> list[np.ndarray]:
    """Value of every choice: log of the share of the group's importance that stays.

    Shares multiply along the network, hence the logarithm; a group counts once for each layer
    that makes its channels.

    Args:
        importance: a group's atoms, (atoms,), non-negative.
        layers: the number of layers of each group.
    """
    values = []
    for allowed, scores, count in zip(choices.widths, importance, layers, strict=True):
        ordered = np.cumsum(np.sort(scores + 1e-12)[::-1])
        atoms = np.array(allowed) * len(scores) // allowed[-1]
        values.append(count * np.log(ordered[atoms - 1] / ordered[-1]))
    return values


def round_widths(
    choices: WidthChoices,
    values: Sequence[np.ndarray],
    constraints: Sequence[Constraint],
) -> Rounded:
    """Allowed widths of the highest total value that meet every constraint.

    Args:
        values: per group, one number a choice (any scale, finite).

    Raises:
        InfeasibleBudget: even the least widths cost too much; says the least that can be had.
    """
    problem = _Problem(choices, values, constraints)
    least = problem.costs(problem.widths(np.zeros((1, len(values)), int)))[0]
    for constraint, cost in zip(constraints, least, strict=True):
        if cost > constraint.target:
            raise InfeasibleBudget(
                f"the {constraint.name} target of {constraint.target:.4g} {constraint.unit} cannot "
                f"be reached: the least this network can have here is {cost:.4g} "
                f"{constraint.unit} (every group at its smallest width)"
            )
    best = max(map(problem.climb, problem.starts()), key=problem.score)
    widths = problem.widths(best[None])[0]
    return Rounded(
        widths=widths,
        value=float(problem.value(best[None])[0]),
        costs=tuple(problem.costs(widths[None])[0].tolist()),
    )


class _Problem:
    """Index vectors (a choice per group) with values and costs, and moves between them."""

    def __init__(
        self,
        choices: WidthChoices,
        values: Sequence[np.ndarray],
        constraints: Sequence[Constraint],
    ) -> None:
        self._constraints = constraints
        size = max(map(len, values))
        self._counts = np.array([len(v) for v in values])
        self._values = np.full((len(values), size), -np.inf)
        self._widths = np.zeros((len(values), size))
        for row, (value, allowed) in enumerate(zip(values, choices.widths, strict=True)):
            self._values[row, : len(value)] = value
            self._widths[row, : len(value)] = allowed
        self._rows = np.arange(len(values))
        self._movable = np.flatnonzero(self._counts > 1)
        free = self._counts[self._movable]
        self._is_small = (free.sum() ** 2 - (free**2).sum()) / 2 <= ALL_PAIRS

    def widths(self, index: np.ndarray) -> np.ndarray:
        """(n, groups) indices -> widths."""
        return self._widths[self._rows, index].astype(int)

    def value(self, index: np.ndarray) -> np.ndarray:
        """(n,) total values."""
        return self._values[self._rows, index].sum(-1)

    def costs(self, widths: np.ndarray) -> np.ndarray:
        """(n, constraints)."""
        return np.stack([c.cost(widths) for c in self._constraints], axis=-1)

    def relative(self, index: np.ndarray) -> np.ndarray:
        """(n,) the tightest cost over its target."""
        targets = np.array([c.target for c in self._constraints])
        return (self.costs(self.widths(index)) / targets).max(-1)

    def score(self, index: np.ndarray) -> float:
        """Value, less what leaving the budget unused costs."""
        return float(self._scores(index[None])[0])

    def _scores(self, index: np.ndarray) -> np.ndarray:
        use = self.relative(index)
        slack = min(c.slack for c in self._constraints)
        unused = np.maximum(0.0, 1.0 - slack - use)
        scores = self.value(index) - 50.0 * len(self._movable) * unused
        return np.where(use <= 1.0, scores, -np.inf)

    def starts(self) -> list[np.ndarray]:
        """Allocations within budget, in different corners of the space, to climb from.

        The best choice of every group, brought under budget with the groups' values weighed by
        random factors; random choices brought under budget; the least widths.
        """
        best = self._values.argmax(-1)
        rng = np.random.default_rng(0)
        starts = PERTURBED_STARTS[self._is_small]
        factors = np.exp(rng.normal(0.0, 1.5, (starts, len(self._counts))))
        plain = np.ones((1, len(self._counts)))
        found = [self._descend(best, weights) for weights in np.concatenate([plain, factors])]
        anywhere = rng.integers(0, self._counts, (starts, len(self._counts)))
        found += [self._descend(start, plain[0]) for start in anywhere]
        return [*found, np.zeros(len(self._counts), int)]

    def _descend(self, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Step down where it costs the least weighted value per cost saved, until in budget."""

        def value(rows: np.ndarray) -> np.ndarray:
            return self._values[self._rows, rows] @ weights

        while (use := self.relative(index[None])[0]) > 1.0:
            moves = self._moves(index, down=True)
            saved = use - self.relative(moves)
            lost = value(index[None]) - value(moves)
            rate = np.where(saved > 1e-9, lost / np.maximum(saved, 1e-9), np.inf)
            if not np.isfinite(rate).any():
                return np.zeros_like(index)
            index = moves[rate.argmin()]
        return index

    def climb(self, index: np.ndarray) -> np.ndarray:
        """Take the best single or paired move until none improves the score."""
        score = self.score(index)
        while True:
            moves = np.concatenate([self._moves(index), self._pairs(index)])
            if not len(moves):
                return index
            scores = self._scores(moves)
            best = int(scores.argmax())
            if scores[best] <= score + 1e-12:
                return index
            index, score = moves[best], float(scores[best])

    def _moves(self, index: np.ndarray, down: bool | None = None) -> np.ndarray:
        """All vectors one step away."""
        found = []
        for delta in (-1, 1) if down is None else (-1 if down else 1,):
            rows = self._movable[
                (index[self._movable] + delta >= 0)
                & (index[self._movable] + delta < self._counts[self._movable])
            ]
            moves = np.repeat(index[None], len(rows), axis=0)
            moves[np.arange(len(rows)), rows] += delta
            found.append(moves)
        return np.concatenate(found)

    def _pairs(self, index: np.ndarray) -> np.ndarray:
        """All vectors that differ in two groups, where there are few enough of them; otherwise
        those with one group a step (or two) up and another a step (or two) down."""
        if self._is_small:
            return self._all_pairs(index)
        found = []
        for up, down in ((1, -1), (2, -1), (1, -2)):
            ups = self._movable[index[self._movable] + up < self._counts[self._movable]]
            downs = self._movable[index[self._movable] + down >= 0]
            first, second = (a.ravel() for a in np.meshgrid(ups, downs, indexing="ij"))
            different = first != second
            first, second = first[different], second[different]
            moves = np.repeat(index[None], len(first), axis=0)
            at = np.arange(len(first))
            moves[at, first] += up
            moves[at, second] += down
            found.append(moves)
        return np.concatenate(found)

    def _all_pairs(self, index: np.ndarray) -> np.ndarray:
        found = [index[None]]
        for position, first in enumerate(self._movable):
            for second in self._movable[position + 1 :]:
                sizes = int(self._counts[first]), int(self._counts[second])
                grid = np.indices(sizes).reshape(2, -1)
                moves = np.repeat(index[None], grid.shape[1], axis=0)
                moves[:, first], moves[:, second] = grid
                found.append(moves)
        return np.concatenate(found)
