"""The discrete problem of rounding: choices of every group, their values and costs, and moves.

An allocation here is an index vector, one choice a group. ``Problem.climb`` is a local search for
any cost, ``Problem.solve`` the integer program for costs that are sums over pairs of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dsa_hw.allocation.integer_program import (
    Pair,
    PairwiseCost,
    decompose,
    interacting_groups,
    solve,
)
from dsa_hw.cost.choices import WidthChoices

PERTURBED_STARTS = {False: 12, True: 60}
ALL_PAIRS = 5_000
COARSE = 9
"""Choices of a group while a problem is too large to be looked at whole."""
INEXACT = 2e-3
"""A cost further than this (of its target) from any sum over pairs is left to local search."""
TIE = 1e-3
"""Part of the value that the budget costs, within which the use of the budget decides."""
LIKELY = 400
"""Paired moves of a large problem that are looked at exactly, at most."""
NODES = 400
"""Nodes of the integer program's search tree, at most. A limit of nodes and not of seconds: the
widths do not depend on how busy the machine is."""

Cost = Callable[[np.ndarray], np.ndarray]
"""(candidates, groups) widths -> (candidates,) cost; batched."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """``cost(widths) <= target``.

    Args:
        terms: (candidates, groups) widths -> (candidates, terms), where the cost is the maximum of
            terms that are each a sum over pairs of groups; None where it is one itself.
    """

    name: str
    unit: str
    cost: Cost
    target: float
    terms: Cost | None = None


class Problem:
    """Index vectors (a choice per group) with values and costs, and moves between them.

    Args:
        scale: what the budget costs in value, as far as that is known; ``TIE`` is a part of it.
    """

    def __init__(
        self,
        choices: WidthChoices,
        values: Sequence[np.ndarray],
        constraints: Sequence[Constraint],
        scale: float = 0.0,
    ) -> None:
        self._constraints = constraints
        self._given = choices, values
        self.scale = scale
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
        self._top = self._values.max(-1)
        self._is_small = (free.sum() ** 2 - (free**2).sum()) / 2 <= ALL_PAIRS

    def scaled_at(self, index: np.ndarray) -> Problem:
        """The same problem with ties broken by use, as suits a good allocation.

        The scale is what that one loses to the choices that nothing limits; where it loses nothing,
        a millionth of the values' range.
        """
        lowest = np.array([np.min(v) for v in self._given[1]])
        lost = float(self._top.sum() - self.value(index[None])[0])
        scale = max(lost, 1e-6 * float((self._top - lowest).sum())) or 1.0
        return Problem(*self._given, self._constraints, scale)

    def restricted(self, offered: Sequence[np.ndarray]) -> Problem:
        """The same problem with a part of each group's choices (ascending indices)."""
        choices, values = self._given
        widths = tuple(
            tuple(allowed[i] for i in some)
            for allowed, some in zip(choices.widths, offered, strict=True)
        )
        fewer = [value[some] for value, some in zip(values, offered, strict=True)]
        fewer_choices = WidthChoices(widths, choices.steps, choices.together)
        return Problem(fewer_choices, fewer, self._constraints, self.scale)

    def promising(self, index: np.ndarray) -> list[np.ndarray]:
        """Choices of every group that some allocation as good as ``index`` may have.

        With all other groups at their best and the whole budget used, the others score less.
        """
        regret = self._top[:, None] - self._values
        allowed = self._top.sum() + TIE * self.scale - self.score(index)
        good = regret <= allowed + 1e-6 * self.scale
        for group in (g for groups in self._together for g in groups):
            good[group, :2] = True  # the first is the removal, and must stay the first
        return [np.flatnonzero(row) for row in good]

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

    def window(self, index: np.ndarray, stride: int, reach: int) -> list[np.ndarray]:
        """Choices up to ``reach`` strides around ``index``; also the removal of branches."""
        steps = np.arange(-reach, reach + 1) * stride
        found = [
            np.unique(np.clip(own + steps, 0, count - 1))
            for own, count in zip(index, self.counts, strict=True)
        ]
        for group in (g for groups in self._together for g in groups):
            found[group] = np.unique(np.append(found[group], (0, 1)))
        return found

    def interacting(self, base: np.ndarray) -> list[Pair]:
        """Pairs of groups that some cost couples."""
        found = [interacting_groups(cost, self.counts, base) for cost in self._relative_costs()]
        return list(dict.fromkeys(pair for pairs in found for pair in pairs))

    def solve(
        self, offered: Sequence[np.ndarray], index: np.ndarray
    ) -> tuple[np.ndarray, float | None] | None:
        """The best choices among ``offered``, no worse than ``index``, and a bound on the score.

        None where the costs are no sums over pairs of groups.
        """
        part = self.restricted(offered)
        base = np.array([np.searchsorted(o, i) for o, i in zip(offered, index, strict=True)])
        costs = part.pairwise(base)
        if any(cost.error > INEXACT for cost in costs):
            return None
        best, bound = part._program(costs, base)
        return np.array([o[i] for o, i in zip(offered, best, strict=True)]), bound

    def _program(
        self, costs: Sequence[PairwiseCost], base: np.ndarray
    ) -> tuple[np.ndarray, float | None]:
        """The best of ``base`` and what the integer program finds, and a bound for all.

        The relaxed program bounds the true optimum. Where its solution is over a true target, the
        strict one finds one that is not.
        """
        values = [v / self.scale for v in self._given[1]]
        best, bound = base, None
        for relaxed in (True, False):
            found = solve(
                values,
                costs,
                use_weight=TIE,
                at_least=self.score(best) / self.scale,
                nodes=NODES,
                relaxed=relaxed,
                together=self._given[0].together,
            )
            if relaxed and found.bound is not None:
                bound = found.bound * self.scale
            if found.index is None:
                break
            if self.score(found.index) > self.score(best):
                best = found.index
            if np.isfinite(self.score(found.index)):
                break
        return best, None if bound is None else max(bound, self.score(best))

    def pairwise(self, base: np.ndarray) -> list[PairwiseCost]:
        """Every cost over its target, as a sum over pairs of groups."""
        return [decompose(cost, self.counts, base) for cost in self._relative_costs()]

    def next_step(self, index: np.ndarray) -> tuple[int, int] | None:
        """The group, and its next choice of a higher value, that misses the targets by least.

        None where every such step fits, or there is none.
        """
        steps, rows = [], []
        for group in self._movable:
            better = self._values[group] > self._values[group, index[group]]
            above = np.flatnonzero(better[index[group] + 1 :])
            if len(above):
                row = index.copy()
                row[group] += 1 + above[0]
                steps.append((int(group), int(row[group])))
                rows.append(row)
        if not rows:
            return None
        use = np.where(self._agrees(np.array(rows)), self.relative(np.array(rows)), np.inf)
        use = np.where(use > 1.0, use, np.inf)
        best = int(use.argmin())
        return steps[best] if np.isfinite(use[best]) else None

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
        """Value, and by how much of the budget is used a little more; -inf over a target."""
        return float(self._scores(index[None])[0])

    def _scores(self, index: np.ndarray) -> np.ndarray:
        use = self.relative(index)
        scores = self.value(index) + TIE * self.scale * use
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
        """Take the best single move, or else the best paired one, until none improves the score."""
        score = self.score(index)
        while True:
            for moves in (self._moves, self._toggles, self._pairs):
                rows = moves(index)
                if not len(rows):
                    continue
                scores = self._scores(rows)
                best = int(scores.argmax())
                if scores[best] > score + 1e-12:
                    index, score = rows[best], float(scores[best])
                    break
            else:
                return index

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
        the likeliest with one group a step (or two) up and another a step (or two) down."""
        if self._is_small:
            return self._all_pairs(index)
        groups, deltas = (a.ravel() for a in np.meshgrid(self._movable, (-2, -1, 1, 2)))
        there = (index[groups] + deltas >= 0) & (index[groups] + deltas < self.counts[groups])
        groups, deltas = groups[there], deltas[there]
        singles = np.repeat(index[None], len(groups), axis=0)
        singles[np.arange(len(groups)), groups] += deltas
        up, down = np.nonzero(
            (deltas[:, None] > 0)
            & (deltas[None] < 0)
            & (groups[:, None] != groups[None])
            & (np.abs(deltas[:, None] * deltas[None]) < 4)  # two steps either way reach too far
        )
        chosen = self._likeliest(index, singles, up, down)
        moves = singles[up[chosen]]
        moves[np.arange(len(chosen)), groups[down[chosen]]] += deltas[down[chosen]]
        return moves

    def _likeliest(
        self, index: np.ndarray, singles: np.ndarray, up: np.ndarray, down: np.ndarray
    ) -> np.ndarray:
        """Of pairs of single moves, the (at most ``LIKELY``) best ones, if costs were sums.

        Args:
            singles: (moves, groups) vectors one move away.
            up, down: (pairs,) moves that make each pair.
        """
        targets = np.array([c.target for c in self._constraints])
        now = self.costs(self.widths(index[None])) / targets
        changes = self.costs(self.widths(singles)) / targets - now
        use = (now + changes[up] + changes[down]).max(-1)
        gains = self.value(singles) - self.value(index[None])
        score = gains[up] + gains[down] + TIE * self.scale * (use - now.max())
        fits = np.flatnonzero((use <= 1.0 + INEXACT) & (score > 0))
        return fits[np.argsort(-score[fits], kind="stable")[:LIKELY]]

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
