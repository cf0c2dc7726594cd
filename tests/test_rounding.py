"""Rounding against exhaustive search, and the closed loop against devices that disagree."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dsa_hw.baselines import allocate_uniform
from dsa_hw.budgets import ModelledLatency
from dsa_hw.choices import WidthChoices, merged_choices
from dsa_hw.closed_loop import Timed, allocate
from dsa_hw.errors import InfeasibleBudget
from dsa_hw.rounding import Constraint, closeness, kept_importance, round_widths


def chain_cost(widths: np.ndarray) -> np.ndarray:
    """Products of neighbouring widths, as a chain of convolutions costs."""
    return (widths[:, :-1] * widths[:, 1:]).sum(-1).astype(float) + 10.0 * widths.sum(-1)


def choices_of(*widths: tuple[int, ...]) -> WidthChoices:
    return WidthChoices(tuple(widths), tuple(16 for _ in widths))


CHOICES = choices_of((16, 32, 48, 64), (16, 32), (32,), (16, 32, 48), (16, 32, 48, 64, 80))


def exhaustive(values: list[np.ndarray], target: float, slack: float) -> float:
    """The best value of all allocations that use the budget up to ``slack``."""
    best = -np.inf
    for index in itertools.product(*(range(len(w)) for w in CHOICES.widths)):
        widths = np.array([[w[i] for w, i in zip(CHOICES.widths, index, strict=True)]])
        cost = float(chain_cost(widths)[0])
        if (1 - slack) * target <= cost <= target:
            best = max(best, sum(float(v[i]) for v, i in zip(values, index, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_as_good_as_exhaustive_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    learned = np.array([w[-1] for w in CHOICES.widths]) * rng.uniform(0.2, 1.0, 5)
    values = closeness(CHOICES, learned)
    target = float(rng.uniform(0.4, 0.9)) * float(
        chain_cost(np.array([[w[-1] for w in CHOICES.widths]]))[0]
    )
    found = round_widths(CHOICES, values, [Constraint("c", "u", chain_cost, target, slack=0.05)])
    best = exhaustive(values, target, 0.05)
    assert found.costs[0] <= target
    if np.isfinite(best):  # some allocation uses the budget
        assert found.costs[0] >= 0.95 * target
        # local search may miss the optimum; a gap of 0.05 is a quarter step in one group
        assert found.value >= best - 0.05


def test_every_constraint_holds() -> None:
    values = closeness(CHOICES, np.array([64.0, 32, 32, 48, 80]))
    totals = Constraint("sum", "ch", lambda w: w.sum(-1).astype(float), 180.0, slack=0.5)
    products = Constraint("chain", "u", chain_cost, 9000.0, slack=0.5)
    found = round_widths(CHOICES, values, [totals, products])
    assert found.costs[0] <= 180.0
    assert found.costs[1] <= 9000.0


def test_infeasible_says_the_least() -> None:
    values = closeness(CHOICES, np.array([64.0, 32, 32, 48, 80]))
    least = float(chain_cost(np.array([[16, 16, 32, 16, 16]]))[0])
    with pytest.raises(InfeasibleBudget, match=f"least .* {least:.4g}"):
        round_widths(CHOICES, values, [Constraint("c", "u", chain_cost, 100.0)])


def test_rescaling_costs_and_target_changes_nothing() -> None:
    values = closeness(CHOICES, np.array([40.0, 20, 32, 30, 50]))
    plain = round_widths(CHOICES, values, [Constraint("c", "u", chain_cost, 5000.0)])
    scaled = round_widths(
        CHOICES, values, [Constraint("c", "u", lambda w: 1e-3 * chain_cost(w), 5.0)]
    )
    assert plain.widths.tolist() == scaled.widths.tolist()


def test_importance_prefers_the_group_that_has_more_to_lose() -> None:
    choices = choices_of((16, 32), (16, 32))
    flat, peaked = np.ones(32), np.array([1.0] * 16 + [0.01] * 16)
    values = kept_importance(choices, [flat, peaked], [1, 1])
    found = round_widths(
        choices, values, [Constraint("c", "u", lambda w: w.sum(-1).astype(float), 48.0)]
    )
    assert found.widths.tolist() == [32, 16]


def test_merged_choices_are_allowed_everywhere() -> None:
    merged = merged_choices([choices_of((16, 32, 48, 64)), choices_of((8, 32, 64))])
    assert merged.widths == ((32, 64),)


class ChainModel:
    """A latency model of the chain, for budgets."""

    def predict_ms(self, widths: torch.Tensor) -> torch.Tensor:
        return (widths[..., :-1] * widths[..., 1:]).sum(-1) + 10.0 * widths.sum(-1)

    staircase_ms = predict_ms


WIDE = choices_of(*[tuple(range(8, 129, 8))] * 6)


@pytest.mark.parametrize("bias", [0.8, 0.95, 1.0, 1.1, 1.3])
def test_the_loop_corrects_a_wrong_model(bias: float) -> None:
    budget = ModelledLatency(ChainModel(), 30_000.0)  # pyright: ignore[reportArgumentType]
    rng = np.random.default_rng(0)

    def measure(widths: np.ndarray) -> Timed:
        ms = bias * float(chain_cost(widths[None])[0]) * float(rng.normal(1.0, 0.002))
        return Timed(ms, (0.99 * ms, 1.01 * ms), 30_000.0)

    values = closeness(WIDE, np.full(6, 100.0))
    found = allocate(WIDE, values, [budget], measure)
    chosen = found.chosen
    assert chosen is not None
    assert 0.97 <= chosen.use <= 1.0
    assert len(found.rounds) <= 4


def test_the_loop_follows_a_target_that_drifts_with_the_machine() -> None:
    budget = ModelledLatency(ChainModel(), 30_000.0)  # pyright: ignore[reportArgumentType]

    def measure(widths: np.ndarray) -> Timed:
        ms = 1.25 * float(chain_cost(widths[None])[0])  # everything is 25% slower now,
        return Timed(ms, (ms, ms), 1.25 * 30_000.0)  # the dense network too

    found = allocate(WIDE, closeness(WIDE, np.full(6, 100.0)), [budget], measure)
    assert len(found.rounds) == 1
    assert found.chosen is not None
    assert 0.97 <= found.chosen.use <= 1.0


def test_uniform_widths_are_near_one_keep_ratio() -> None:
    budget = ModelledLatency(ChainModel(), 30_000.0)  # pyright: ignore[reportArgumentType]
    found = allocate_uniform(WIDE, [budget])
    assert found.costs["latency"] <= 30_000.0
    assert found.widths.max() - found.widths.min() <= 16
