"""Round, measure the deployed network, correct the model, round again: before any fine-tuning.

Latency does not depend on the weights, so the loop needs none. First the model is refined where it
is about to be believed: networks around the first allocation are timed, the model is fitted again,
and rounding runs again. What is left of a measured miss scales the predictions of that budget, and
rounding runs once more. Every budget that can be measured is, each with its own measurements and
its own correction. Where no training follows, the last and longest measurement belongs to the loop:
a network that it finds off the target is not the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dsa_hw.allocation.rounding import Constraint, NextStep, next_step, round_widths
from dsa_hw.allocation.target_loop import (
    CONVERGED,
    LEAST_ROUNDS,
    ROUNDS,
    LoopRound,
    TargetLoop,
    Timed,
    widths_within,
)
from dsa_hw.allocation.verdict import Verdict
from dsa_hw.cost.budget import Budget, HasTerms, MeasuredBudget
from dsa_hw.cost.choices import WidthChoices
from dsa_hw.errors import UserError

CONFIRMATIONS = 3
"""At most so many measurements to the end, of a network in place of one found off the target, or of
the same one again where the machine was disturbed."""
CONFIRMED_WEIGHT = 2.0
"""Of a last measurement, which takes about twice a round's time, among the rounds."""
CONFIRMED_TRUST = 0.5
"""Of a measurement on a machine so slow that the same network may be measured again."""

Measure = Callable[[np.ndarray], Timed]
"""(groups,) widths -> their measurement, on the device, in the runtime."""


@dataclass(frozen=True, slots=True)
class Refined:
    """A budget whose model has seen networks around an allocation.

    Args:
        scatter: standard deviation of the logarithm of measured over predicted among them, each
            predicted without itself; None where it is not known.
    """

    budget: Budget
    scatter: float | None = None


Refine = Callable[[np.ndarray], Refined]
"""(groups,) widths of a first allocation -> the budget, refined around them."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """Widths at the budgets.

    Args:
        costs: by budget's name, as charged (corrected where the loop ran).
        rounds: of the closed loop, in order, of every measured budget; empty without one.
        headroom: by budget's name, the part of its target that these costs leave.
        next_step: the cheapest single step that would add value, and does not fit; its ``extra`` is
            in the order of ``headroom``.
    """

    widths: np.ndarray
    costs: dict[str, float]
    rounds: tuple[LoopRound, ...] = ()
    headroom: dict[str, float] = field(default_factory=dict)
    next_step: NextStep | None = None

    @property
    def chosen(self) -> LoopRound | None:
        """The last round whose widths these are, of the first measured budget."""
        own = _as_key(self.widths)
        return next(
            (r for r in reversed(self.rounds) if r.widths == own and r.budget == self.first), None
        )

    @property
    def first(self) -> str | None:
        """The name of the first measured budget."""
        return self.rounds[0].budget if self.rounds else None


def allocate(
    choices: WidthChoices,
    values: Sequence[np.ndarray],
    budgets: Sequence[Budget],
    measure: Measure | Mapping[str, Measure] | None = None,
    confirm: Measure | Mapping[str, Measure] | None = None,
    refine: Mapping[str, Refine] | None = None,
) -> Allocation:
    """The most valuable widths at the budgets, verified by measuring if ``measure`` is given.

    Args:
        values: per group, one number a choice.
        budgets: on the CPU.
        measure: of each budget that is to be measured, by its name; a single one where there is one
            budget that can be.
        confirm: longer measurements, which the widths returned have passed through; where they
            speak against them, others are tried. Of the same budgets as ``measure``.
        refine: by budget's name, what refines its model around the first allocation.

    Raises:
        InfeasibleBudget: no allowed widths meet the budgets.
        UserError: it is not clear which budget a measurement is of.
    """
    measures = by_budget(budgets, measure)
    rounding = _Rounding(choices, values, budgets, list(measures))
    if measures:
        if refine:
            rounding.refine(refine)
        rounding.set_least_rounds(refined=bool(refine), confirmed=confirm is not None)
        rounding.run(measures)
        confirms = by_budget(budgets, confirm)
        widths = rounding.confirmed(confirms) if confirms else rounding.best()
    else:
        widths = rounding.rounded(())
    return rounding.described(widths)


def by_budget(
    budgets: Sequence[Budget], measure: Measure | Mapping[str, Measure] | None
) -> dict[str, Measure]:
    """Return each measurement by the name of its budget, in the budgets' order.

    Raises:
        UserError: a name is not a budget's, or a single measurement was given for several budgets.
    """
    if measure is None:
        return {}
    measurable = [b.name for b in budgets if isinstance(b, MeasuredBudget)]
    if not isinstance(measure, Mapping):
        if len(measurable) != 1:
            raise UserError(
                f"one measurement was given for {len(measurable)} budgets that can be measured "
                f"({', '.join(measurable) or 'none'}); give one for each, by the budget's name: "
                "measure={'phone': ..., 'server': ...}"
            )
        return {measurable[0]: measure}
    for name in measure:
        if name not in measurable:
            raise UserError(
                f"a measurement was given for {name!r}; the budgets that can be measured are "
                f"{', '.join(measurable) or 'none'}"
            )
    return {name: measure[name] for name in measurable if name in measure}


class _Rounding:
    """Rounds, at what the loops know so far, and measures; one loop a measured budget."""

    def __init__(
        self,
        choices: WidthChoices,
        values: Sequence[np.ndarray],
        budgets: Sequence[Budget],
        measured: Sequence[str],
    ) -> None:
        self._choices, self._values = choices, values
        self._budgets = {b.name: b for b in budgets}
        self._loops = {name: TargetLoop() for name in measured}
        self.rounds: list[LoopRound] = []

    # -- rounding --------------------------------------------------------------------------

    def rounded(self, aims: Sequence[float]) -> np.ndarray:
        """(groups,) the most valuable widths at these parts of the measured budgets' targets."""
        return round_widths(self._choices, self._values, self._limits(aims)).widths

    def described(self, widths: np.ndarray) -> Allocation:
        """These widths, with what they leave of the targets as now known."""
        limits = self._limits((1.0,) * len(self._loops))
        costs = {limit.name: float(limit.cost(widths[None])[0]) for limit in limits}
        return Allocation(
            widths,
            costs,
            tuple(self.rounds),
            headroom={limit.name: 1.0 - costs[limit.name] / limit.target for limit in limits},
            next_step=next_step(self._choices, self._values, limits, widths),
        )

    def _limits(self, aims: Sequence[float]) -> list[Constraint]:
        """What rounding must keep to. Only measured budgets are corrected, and aimed below their
        targets: what is counted needs no margin."""
        aim_of = dict(zip(self._loops, aims, strict=True))
        return [
            Constraint(
                budget.name,
                budget.unit,
                _batched(self._corrected(budget).charged),
                budget.target * aim_of.get(budget.name, 1.0),
                terms=_batched(budget.terms) if isinstance(budget, HasTerms) else None,
            )
            for budget in self._budgets.values()
        ]

    def _corrected(self, budget: Budget) -> Budget:
        loop = self._loops.get(budget.name)
        if loop is None:
            return budget
        assert isinstance(budget, MeasuredBudget)
        return budget.corrected(loop.correction)

    def _next(self) -> tuple[np.ndarray, tuple[float, ...]]:
        """The most valuable widths, and the aims that they are within; the least widths where only
        the corrections rule all others out."""
        loops = list(self._loops.values())
        found = widths_within(loops, self.rounded)
        return found or (self._choices.least, (1.0,) * len(loops))

    def refine(self, refine: Mapping[str, Refine]) -> None:
        """Round, and have the budgets' models refined around the widths."""
        widths, _ = self._next()
        for name, around in refine.items():
            refined = around(widths)
            self._budgets[name] = refined.budget
            self._loops[name].scatter = refined.scatter

    def set_least_rounds(self, *, refined: bool, confirmed: bool) -> None:
        """How many measurements a loop takes before it may end: the networks around a refined
        allocation, and the last measurement, count as such."""
        least = 1 if refined else LEAST_ROUNDS - 1
        for loop in self._loops.values():
            loop.least_rounds = least if confirmed else least + 1

    # -- measuring -------------------------------------------------------------------------

    def run(self, measures: Mapping[str, Measure]) -> None:
        """Round and measure until every loop accepts, or rounding finds nothing new."""
        for _ in range(ROUNDS):
            widths, aims = self._next()
            if self._is_known(widths):
                return
            if self._measured(widths, aims, measures):
                return

    def _measured(
        self,
        widths: np.ndarray,
        aims: Sequence[float],
        measures: Mapping[str, Measure],
        weight: float = 1.0,
    ) -> bool:
        """Measure a network for every budget; returns whether all loops may end with it."""
        ends = []
        for (name, loop), aim in zip(self._loops.items(), aims, strict=True):
            budget = self._budgets[name]
            cost = _batched(self._corrected(budget).charged)(widths[None])
            turn = LoopRound(
                widths=_as_key(widths),
                predicted_ms=float(cost[0]),
                correction=loop.correction,
                model_target_ms=budget.target,
                timed=measures[name](widths),
                weight=weight,
                aim=aim,
                budget=name,
            )
            ends.append(loop.add(turn))
            self.rounds.append(turn)
        return all(ends)

    def _is_known(self, widths: np.ndarray) -> bool:
        """Whether enough was measured, and these widths among it, believed under all targets."""
        turns = self._turns(_as_key(widths))
        return len(turns) == len(self._loops) and all(
            len(loop.rounds) >= loop.least_rounds and loop.use(turn) <= loop.most
            for loop, turn in turns
        )

    def _turns(self, key: tuple[int, ...]) -> list[tuple[TargetLoop, LoopRound]]:
        """Each loop with its last round of a network."""
        found = [(loop, loop.of(key)) for loop in self._loops.values()]
        return [(loop, turn) for loop, turn in found if turn is not None]

    # -- choosing --------------------------------------------------------------------------

    def best(self) -> np.ndarray:
        """(groups,) the most valuable network of those believed within all aims; where none is, the
        one that is the least above them.

        Within the aims, as in rounding: of several that are believed near the target, the most
        valuable one is there by the luck of its measurement.
        """

        def rank(key: tuple[int, ...]) -> tuple[float, float]:
            over = max(loop.use(turn) - loop.aim for loop, turn in self._turns(key))
            return (0.0, -self._value(key)) if over <= CONVERGED / 2 else (over, 0.0)

        return np.array(min(dict.fromkeys(r.widths for r in self.rounds), key=rank))

    def _value(self, key: tuple[int, ...]) -> float:
        rows = zip(self._values, self._choices.widths, key, strict=True)
        return float(sum(value[allowed.index(width)] for value, allowed, width in rows))

    def confirmed(self, confirms: Mapping[str, Measure]) -> np.ndarray:
        """(groups,) the first network that ``confirms`` prove and that rounding stays with,
        beginning with the loops' best.

        Where they prove none, the best of those measured: proven at the target before undecided
        before missed.
        """
        widths = self.best()
        aims = tuple(loop.of(_as_key(widths)).aim for loop in self._loops.values())  # pyright: ignore
        tried: list[tuple[int, ...]] = []
        for _ in range(CONFIRMATIONS):
            self._measured(widths, aims, confirms, CONFIRMED_WEIGHT)
            tried.append(_as_key(widths))
            turns = self._turns(tried[-1])
            proven = all(loop.proves(turn) for loop, turn in turns)
            if proven and all(loop.is_converged(turn) for loop, turn in turns):
                break
            widths, aims = self._next()
            disturbed = any(loop.trust(turn) < CONFIRMED_TRUST for loop, turn in turns)
            if _as_key(widths) in tried and (proven or not disturbed):
                break  # nothing nearer to the target is known
        return np.array(min(tried, key=self._confirmed_rank))

    def _confirmed_rank(self, key: tuple[int, ...]) -> tuple[int, float]:
        turns = self._turns(key)
        order: list[Verdict] = ["met", "undecided", "missed"]
        worst = max(order.index(turn.timed.judged.verdict) for _, turn in turns)
        if worst == 0:
            return worst, -self._value(key)
        return worst, max(loop.miss(turn) for loop, turn in turns)


def _as_key(widths: np.ndarray) -> tuple[int, ...]:
    return tuple(int(w) for w in widths)


def _batched(charged: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    @torch.no_grad()
    def cost(widths: np.ndarray) -> np.ndarray:
        return charged(torch.as_tensor(widths, dtype=torch.float32)).double().numpy()

    return cost
