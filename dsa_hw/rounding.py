"""Keep ratios -> integer widths on the device's steps, at the budget.

Latency does not depend on the weights, so this is a discrete problem: maximise the sum of each
group's value over its allowed widths, with every cost at or under its target. Costs couple the
groups (a layer pays for both its sides). A local search over whole width vectors finds a good
allocation for any cost; where costs are sums over layers, an integer program (``integer_program``)
then finds the best one, or says by how much it may be missed.

The internal groups of a branch that may be removed (``WidthChoices.together``) have width zero
together or not at all; allocations in which they disagree are never looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dsa_hw.choices import WidthChoices
from dsa_hw.errors import InfeasibleBudget
from dsa_hw.integer_program import PairwiseCost, decompose, interacting_groups, solve

PERTURBED_STARTS = {False: 12, True: 60}
ALL_PAIRS = 5_000
COARSE = 9
"""Choices of a group while a problem is too large to be looked at whole."""
PRODUCTS = 12_000
"""Pairs of choices up to which the whole problem goes to the integer program."""
TIME_LIMIT_S = 10.0
REMOVED = 0.25
"""Width of a removed group in values, in its narrowest widths. Closeness is even between the two
where the branch's gate is half closed; importance counts a removal like the loss of three quarters
of what the narrowest width keeps."""
KEPT_WEIGHT = 3.0
"""Of kept importance beside closeness; both are logarithms of shares."""
INEXACT = 2e-3
"""A cost further than this (of its target) from any sum over pairs is left to local search."""

Cost = Callable[[np.ndarray], np.ndarray]
"""(candidates, groups) widths -> (candidates,) cost; batched."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """``cost(widths) <= target``.

    Args:
        slack: how far under the target a solution may stay before it counts as giving up value.
        terms: (candidates, groups) widths -> (candidates, terms), where the cost is the maximum of
            terms that are each a sum over pairs of groups; None where it is one itself.
    """

    name: str
    unit: str
    cost: Cost
    target: float
    slack: float = 0.009
    terms: Cost | None = None


@dataclass(frozen=True, slots=True)
class Rounded:
    """An allocation.

    Args:
        widths: (groups,).
        value: of these widths.
        costs: under each constraint.
        bound: no allocation scores more than this; None where that is not known (the costs are no
            sums over layers, or the problem is too large to be solved whole).
        score: the value, less what leaving the budget unused costs; equal to the bound when the
            allocation is proven to be the best.
    """

    widths: np.ndarray
    value: float
    costs: tuple[float, ...]
    score: float
    bound: float | None = None


def closeness(choices: WidthChoices, widths: np.ndarray) -> list[np.ndarray]:
    """Value of every choice of every group: minus the squared log distance to ``widths``.

    Zero counts as ``REMOVED`` of the narrowest width, and so does any learned width below that.
    """
    values = []
    for allowed, width in zip(choices.widths, widths, strict=True):
        offered = np.array(allowed, float)
        least = 1e-3
        if allowed[0] == 0:
            least = offered[0] = REMOVED * offered[1]
        values.append(-(np.log(offered / max(width, least)) ** 2))
    return values


def kept_importance(
    choices: WidthChoices, importance: Sequence[np.ndarray], layers: Sequence[int]
) -> list[np.ndarray]:
    """Value of every choice: log of the share of the group's importance that stays.

    Shares multiply along the network, hence the logarithm; a group counts once for each layer
    that makes its channels. Without its branch a network still has the shortcut: zero counts as
    ``REMOVED`` of the share of the narrowest width, and not as nothing.

    Args:
        importance: a group's atoms, (atoms,), non-negative.
        layers: the number of layers of each group.
    """
    values = []
    for allowed, scores, count in zip(choices.widths, importance, layers, strict=True):
        ordered = np.cumsum(np.sort(scores + 1e-12)[::-1])
        there = np.array(allowed[1:] if allowed[0] == 0 else allowed)
        shares = ordered[there * len(scores) // allowed[-1] - 1] / ordered[-1]
        if allowed[0] == 0:
            shares = np.append(REMOVED * shares[0], shares)
        values.append(count * np.log(shares))
    return values


def near_and_important(
    choices: WidthChoices,
    widths: np.ndarray,
    importance: Sequence[np.ndarray],
    layers: Sequence[int],
) -> list[np.ndarray]:
    """Value of every choice: ``kept_importance``, and less so ``closeness`` to ``widths``.

    For a network that is cut at once. What its fine-tuning ends with follows the importance that
    stays more closely than any width that was learned (docs/decisions.md).
    """
    near = closeness(choices, widths)
    kept = kept_importance(choices, importance, layers)
    return [n + KEPT_WEIGHT * k for n, k in zip(near, kept, strict=True)]


def round_widths(
    choices: WidthChoices,
    values: Sequence[np.ndarray],
    constraints: Sequence[Constraint],
    time_limit_s: float = TIME_LIMIT_S,
) -> Rounded:
    """Allowed widths of the highest total value that meet every constraint.

    Args:
        values: per group, one number a choice (any scale, finite).
        time_limit_s: for the integer program; 0 leaves it out.

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
    found = _solved(problem, time_limit_s) if time_limit_s > 0 else None
    index, bound = found or (_locally_best(problem, many_starts=True), None)
    widths = problem.widths(index[None])[0]
    return Rounded(
        widths=widths,
        value=float(problem.value(index[None])[0]),
        costs=tuple(problem.costs(widths[None])[0].tolist()),
        score=problem.score(index),
        bound=None if bound is None else max(bound, problem.score(index)),
    )


def _locally_best(problem: _Problem, many_starts: bool) -> np.ndarray:
    """(groups,) choices: the best that climbing finds, among a few choices where there are many."""
    offered = problem.spread()
    part = problem.restricted(offered)
    starts = part.starts() if many_starts else [part.plain_start()]
    best = max(map(part.climb, starts), key=part.score)
    return np.array([o[i] for o, i in zip(offered, best, strict=True)])


def _solved(problem: _Problem, time_limit_s: float) -> tuple[np.ndarray, float | None] | None:
    """The integer program's choices, and its bound if it saw the whole problem.

    None where the costs are no sums over pairs of groups. A problem that is too large is solved in
    windows around the best known choices, coarse ones first.
    """
    deadline = time.monotonic() + time_limit_s
    index = _locally_best(problem, many_starts=False)
    sizes = [problem.counts[g] * problem.counts[h] for g, h in problem.interacting(index)]
    if sum(sizes) <= PRODUCTS:
        return problem.solve(problem.everything(), index, time_limit_s)
    stride = max(1, int(problem.counts.max()) // COARSE)
    while stride and (left := deadline - time.monotonic()) > 0:
        step = problem.solve(problem.window(index, stride), index, left)
        if step is None:
            return None
        if problem.score(step[0]) <= problem.score(index) + 1e-9:
            stride //= 2
        index = step[0]
    return index, None


class _Problem:
    """Index vectors (a choice per group) with values and costs, and moves between them."""

    def __init__(
        self,
        choices: WidthChoices,
        values: Sequence[np.ndarray],
        constraints: Sequence[Constraint],
    ) -> None:
        self._constraints = constraints
        self._given = choices, values
        size = max(map(len, values))
        self.counts = np.array([len(v) for v in values])
        self._values = np.full((len(values), size), -np.inf)
        self._widths = np.zeros((len(values), size))
        for row, (value, allowed) in enumerate(zip(values, choices.widths, strict=True)):
            self._values[row, : len(value)] = value
            self._widths[row, : len(value)] = allowed
        self._rows = np.arange(len(values))
        self._together = [np.array(groups) for groups in choices.together]
        self._movable = np.flatnonzero(self.counts > 1)
        free = self.counts[self._movable]
        self._slack = min(c.slack for c in constraints)
        self._unused_penalty = 50.0 * len(self._movable)
        self._is_small = (free.sum() ** 2 - (free**2).sum()) / 2 <= ALL_PAIRS

    def restricted(self, offered: Sequence[np.ndarray]) -> _Problem:
        """The same problem with a part of each group's choices (ascending indices)."""
        choices, values = self._given
        widths = tuple(
            tuple(allowed[i] for i in some)
            for allowed, some in zip(choices.widths, offered, strict=True)
        )
        fewer = [value[some] for value, some in zip(values, offered, strict=True)]
        fewer_choices = WidthChoices(widths, choices.steps, choices.together)
        return _Problem(fewer_choices, fewer, self._constraints)

    def everything(self) -> list[np.ndarray]:
        """All choices of every group."""
        return [np.arange(n) for n in self.counts]

    def spread(self) -> list[np.ndarray]:
        """All choices where they are few; elsewhere some, evenly spread, and the most valuable."""
        found = []
        for count, best in zip(self.counts, self._values.argmax(-1), strict=True):
            if count <= 2 * COARSE:
                found.append(np.arange(count))
            else:
                even = np.linspace(0, count - 1, 2 * COARSE - 1).round().astype(int)
                found.append(np.unique(np.append(even, best)))
        return found

    def window(self, index: np.ndarray, stride: int) -> list[np.ndarray]:
        """Choices around ``index``, ``stride`` apart; also the removal of branches."""
        steps = np.arange(-(COARSE // 2), COARSE // 2 + 1) * stride
        found = [
            np.unique(np.clip(own + steps, 0, count - 1))
            for own, count in zip(index, self.counts, strict=True)
        ]
        for group in (g for groups in self._together for g in groups):
            found[group] = np.unique(np.append(found[group], (0, 1)))
        return found

    def interacting(self, base: np.ndarray) -> list[tuple[int, int]]:
        """Pairs of groups that some cost couples."""
        found = [interacting_groups(cost, self.counts, base) for cost in self._relative_costs()]
        return list(dict.fromkeys(pair for pairs in found for pair in pairs))

    def solve(
        self, offered: Sequence[np.ndarray], index: np.ndarray, time_limit_s: float
    ) -> tuple[np.ndarray, float | None] | None:
        """The best choices among ``offered``, no worse than ``index``, and a bound on the score.

        None where the costs are no sums over pairs of groups.
        """
        part = self.restricted(offered)
        base = np.array([np.searchsorted(o, i) for o, i in zip(offered, index, strict=True)])
        costs = part.pairwise(base)
        if any(cost.error > INEXACT for cost in costs):
            return None
        solution = solve(
            self._own_values(offered), costs, slack=self._slack,
            unused_penalty=self._unused_penalty, at_least=part.score(base) - 1e-9,
            time_limit_s=time_limit_s, together=self._given[0].together,
        )  # fmt: skip
        if solution.index is None:
            return index, solution.bound
        found = np.array([o[i] for o, i in zip(offered, solution.index, strict=True)])
        better = self.score(found) > self.score(index)
        return (found if better else index), solution.bound

    def pairwise(self, base: np.ndarray) -> list[PairwiseCost]:
        """Every cost over its target, as a sum over pairs of groups."""
        return [decompose(cost, self.counts, base) for cost in self._relative_costs()]

    def _own_values(self, offered: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [value[some] for value, some in zip(self._given[1], offered, strict=True)]

    def _relative_costs(self) -> list[Callable[[np.ndarray], np.ndarray]]:
        """Each constraint over its target; one of several terms gives one a term."""
        any_widths = self.widths(np.zeros((1, len(self.counts)), int))
        found = []
        for c in self._constraints:
            if c.terms is None:
                found.append(lambda index, c=c: c.cost(self.widths(index)) / c.target)
                continue
            for term in range(c.terms(any_widths).shape[-1]):
                found.append(
                    lambda index, terms=c.terms, target=c.target, k=term: (
                        terms(self.widths(index))[:, k] / target
                    )
                )
        return found

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
        unused = np.maximum(0.0, 1.0 - self._slack - use)
        scores = self.value(index) - self._unused_penalty * unused
        return np.where((use <= 1.0) & self._agrees(index), scores, -np.inf)

    def _agrees(self, index: np.ndarray) -> np.ndarray:
        """(n,) whether groups that have width zero together do so."""
        found = np.ones(len(index), bool)
        for groups in self._together:
            zero = index[:, groups] == 0
            found &= zero.all(-1) | ~zero.any(-1)
        return found

    def _agreeing(self, index: np.ndarray) -> np.ndarray:
        """(groups,) choices with what disagrees in ``index`` removed or restored, whichever is of
        more value."""
        index = index.copy()
        for groups in self._together:
            zero = index[groups] == 0
            if zero.any() and not zero.all():
                there = np.maximum(index[groups], 1)
                keeps = self._values[groups, there].sum() >= self._values[groups, 0].sum()
                index[groups] = there if keeps else 0
        return index

    def starts(self) -> list[np.ndarray]:
        """Allocations within budget, in different corners of the space, to climb from.

        The best choice of every group, brought under budget with the groups' values weighed by
        random factors; random choices brought under budget; the least widths.
        """
        best = self._agreeing(self._values.argmax(-1))
        rng = np.random.default_rng(0)
        starts = PERTURBED_STARTS[self._is_small]
        factors = np.exp(rng.normal(0.0, 1.5, (starts, len(self.counts))))
        found = [self._descend(best, weights) for weights in factors]
        anywhere = rng.integers(0, self.counts, (starts, len(self.counts)))
        plain = np.ones(len(self.counts))
        found += [self._descend(self._agreeing(start), plain) for start in anywhere]
        return [self.plain_start(), *found, np.zeros(len(self.counts), int)]

    def plain_start(self) -> np.ndarray:
        """The best choice of every group, brought under budget."""
        best = self._agreeing(self._values.argmax(-1))
        return self._descend(best, np.ones(len(self.counts)))

    def _descend(self, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Step down where it costs the least weighted value per cost saved, until in budget."""

        def value(rows: np.ndarray) -> np.ndarray:
            return self._values[self._rows, rows] @ weights

        while (use := self.relative(index[None])[0]) > 1.0:
            moves = np.concatenate([self._moves(index, down=True), self._removals(index)])
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
            moves = np.concatenate([self._moves(index), self._pairs(index), self._toggles(index)])
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
                & (index[self._movable] + delta < self.counts[self._movable])
            ]
            moves = np.repeat(index[None], len(rows), axis=0)
            moves[np.arange(len(rows)), rows] += delta
            found.append(moves)
        moves = np.concatenate(found)
        return moves[self._agrees(moves)]

    def _removals(self, index: np.ndarray) -> np.ndarray:
        """All vectors with one branch less."""
        found = [index[None][:0]]
        for groups in self._together:
            if index[groups].all():
                without = index.copy()
                without[groups] = 0
                found.append(without[None])
        return np.concatenate(found)

    def _toggles(self, index: np.ndarray) -> np.ndarray:
        """All vectors with one branch less, or one more (at the best choices of its groups, or the
        narrowest), alone and with another group a step or two away."""
        toggled = list(self._removals(index))
        for groups in self._together:
            if not index[groups].any():
                for there in (1, 1 + self._values[groups, 1:].argmax(-1)):
                    restored = index.copy()
                    restored[groups] = there
                    toggled.append(restored)
        found = [index[None][:0]]
        for changed in toggled:
            once = self._moves(changed)
            twice = np.unique(np.clip(2 * once - changed, 0, self.counts - 1), axis=0)
            found += [changed[None], once, twice]
        return np.concatenate(found)

    def _pairs(self, index: np.ndarray) -> np.ndarray:
        """All vectors that differ in two groups, where there are few enough of them; otherwise
        those with one group a step (or two) up and another a step (or two) down."""
        if self._is_small:
            return self._all_pairs(index)
        found = []
        for up, down in ((1, -1), (2, -1), (1, -2)):
            ups = self._movable[index[self._movable] + up < self.counts[self._movable]]
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
                sizes = int(self.counts[first]), int(self.counts[second])
                grid = np.indices(sizes).reshape(2, -1)
                moves = np.repeat(index[None], grid.shape[1], axis=0)
                moves[:, first], moves[:, second] = grid
                found.append(moves)
        return np.concatenate(found)
