"""Rounding against exhaustive search, and the closed loop against devices that disagree."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import milp

from dsa_hw.allocation.integer_program import decompose
from dsa_hw.allocation.rounding import Constraint, round_widths
from dsa_hw.cost.choices import WidthChoices, merged_choices
from dsa_hw.errors import InfeasibleBudget, UserError
from dsa_hw.worth.values import closeness, kept_importance, near_and_important


def chain_cost(widths: np.ndarray) -> np.ndarray:
    """Products of neighbouring widths, as a chain of convolutions costs."""
    return (widths[:, :-1] * widths[:, 1:]).sum(-1).astype(float) + 10.0 * widths.sum(-1)


def choices_of(*widths: tuple[int, ...]) -> WidthChoices:
    return WidthChoices(tuple(widths), tuple(16 for _ in widths))


WIDE = choices_of(*[tuple(range(8, 129, 8))] * 6)
CHOICES = choices_of((16, 32, 48, 64), (16, 32), (32,), (16, 32, 48), (16, 32, 48, 64, 80))


def every_allocation(choices: WidthChoices) -> np.ndarray:
    """(all, groups) widths."""
    return np.array(list(itertools.product(*choices.widths)))


def total_values(choices: WidthChoices, values: list[np.ndarray]) -> np.ndarray:
    """(all,) values, in the order of ``every_allocation``."""
    rows = itertools.product(*(range(len(w)) for w in choices.widths))
    return np.array([sum(v[i] for v, i in zip(values, row, strict=True)) for row in rows])


def random_instance(
    seed: int, share: float, constraints: int, staircase: bool, inexact: float = 0.0
) -> tuple[list[np.ndarray], list[Constraint], np.ndarray]:
    """Values and costs at random, and the (all,) largest use of the targets.

    Args:
        share: of the dense cost that each target is.
        inexact: size of a part of the cost, over the target, that is no sum over pairs of groups.
    """
    rng = np.random.default_rng(seed)
    values = closeness(CHOICES, np.array(CHOICES.dense) * rng.uniform(0.2, 1.0, 5))
    pair = rng.uniform(0.1, 2.0, (2, 4))
    single = rng.uniform(0.0, 20.0, (2, 5))
    waves = rng.uniform(0.01, 1.0, (2, 5))

    def cost(number: int):
        def charged(widths: np.ndarray) -> np.ndarray:
            w = 32 * np.ceil(widths / 32) if staircase else widths
            products = (pair[number] * w[:, :-1] * w[:, 1:]).sum(-1) + w @ single[number]
            products = products * (1.0 + inexact * np.sin(widths @ waves[number]))
            return products.astype(np.float32).astype(float)

        return charged

    found = [
        Constraint(f"c{n}", "u", cost(n), float(share * cost(n)(CHOICES.dense[None])[0]))
        for n in range(constraints)
    ]
    everything = every_allocation(CHOICES)
    return values, found, np.stack([c.cost(everything) / c.target for c in found]).max(0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.3, 0.95), st.sampled_from([1, 2]), st.booleans())
def test_as_good_as_exhaustive_search(
    seed: int, share: float, constraints: int, staircase: bool
) -> None:
    """No allocation within the targets has a higher value, but for a thousandth of what the budget
    costs, and none of that value uses more; with costs that are sums over pairs it is proven."""
    values, limits, use = random_instance(seed, share, constraints, staircase)
    if use.min() > 1:
        return  # infeasible: another test's law
    found = round_widths(CHOICES, values, limits)
    totals = total_values(CHOICES, values)
    lost = totals.max() - totals[use <= 1].max()
    best = totals[use <= 1].max()
    # the scale is what the budget costs at the start of the climb, which is at least what it costs
    assert found.value >= best - 3e-3 * max(lost, 1e-3)
    as_good = (use <= 1) & (totals >= found.value - 1e-9)
    assert 1.0 - min(found.headroom) >= use[as_good].max() - 1e-4
    assert all(c <= k.target for c, k in zip(found.costs, limits, strict=True))
    assert found.proven


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.floats(0.3, 0.95),
    st.sampled_from([1, 2]),
    st.sampled_from([0.0, 1e-6, 1e-4, 8e-4, 3e-2]),
)
def test_no_allocation_is_above_the_bound(
    seed: int, share: float, constraints: int, inexact: float
) -> None:
    """Also where the costs are only nearly sums over pairs; and what is proven is the best."""
    values, limits, use = random_instance(seed, share, constraints, False, inexact)
    if use.min() > 1:
        return
    found = round_widths(CHOICES, values, limits)
    assert all(c <= k.target for c, k in zip(found.costs, limits, strict=True))
    if found.bound is None:
        assert inexact > 1e-4
        return
    totals = total_values(CHOICES, values)
    best = totals[use <= 1].max()
    assert best <= found.bound + 1e-9
    if found.proven:
        assert found.value >= best - 3e-3 * max(totals.max() - best, 1e-3)


def test_a_better_value_with_less_latency_is_chosen() -> None:
    """The target is an upper limit: 50 of 64 channels are closer to what was learned than 64."""
    choices = choices_of((16, 32, 48, 64), (16, 32, 48, 64))
    values = closeness(choices, np.array([33.0, 47.0]))
    limit = Constraint("sum", "ch", lambda w: w.sum(-1).astype(float), 112.0)
    found = round_widths(choices, values, [limit])
    assert found.widths.tolist() == [32, 48]
    assert found.headroom == pytest.approx((1 - 80 / 112,))
    assert found.next_step is None  # wider is worth less
    assert found.proven


def test_between_equal_values_the_budget_is_used() -> None:
    choices = choices_of((16, 32, 48), (16, 32, 48))
    values = [np.array([0.0, 0.0, 0.0]), np.array([0.0, 1.0, 1.0])]
    limit = Constraint("sum", "ch", lambda w: w @ np.array([1.0, 3.0]), 150.0)
    found = round_widths(choices, values, [limit])
    assert found.widths.tolist() == [48, 32]  # 144; 32 and 48 would be 176, over the target


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.3, 0.95))
def test_the_next_step_is_the_cheapest_that_does_not_fit(seed: int, share: float) -> None:
    values, limits, use = random_instance(seed, share, 2, False)
    if use.min() > 1:
        return
    found = round_widths(CHOICES, values, limits)
    position = [a.index(w) for a, w in zip(CHOICES.widths, found.widths, strict=True)]
    needs = {}
    for group, allowed in enumerate(CHOICES.widths):
        better = [i for i in range(position[group] + 1, len(allowed))
                  if values[group][i] > values[group][position[group]]]  # fmt: skip
        if better:
            row = found.widths.copy()
            row[group] = allowed[better[0]]
            need = max(float(c.cost(row[None])[0]) / c.target for c in limits)
            if need > 1.0:
                needs[group, int(row[group])] = need
    if not needs:
        assert found.next_step is None
        return
    step = found.next_step
    assert step is not None
    assert (step.group, step.next_width) == min(needs, key=lambda key: needs[key])
    assert step.gain > 0
    used = [1.0 - h + e for h, e in zip(found.headroom, step.extra, strict=True)]
    assert max(used) == pytest.approx(min(needs.values()), abs=1e-6)


def test_widths_do_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that jumps by an hour a look, and no clock limits the solver."""
    values = closeness(WIDE, np.array([100.0, 30, 60, 120, 90, 20]))
    limit = Constraint("c", "u", chain_cost, 25_000.0)
    expected = {}
    options: list[dict] = []

    def watched(*args, options: dict, seen: list = options, **more):
        seen.append(options)
        return milp(*args, options=options, **more)

    monkeypatch.setattr("dsa_hw.allocation.integer_program.milp", watched)
    for products in (12_000, 60):
        monkeypatch.setattr("dsa_hw.allocation.rounding.PRODUCTS", products)
        expected[products] = round_widths(WIDE, values, [limit]).widths.tolist()
    hours = itertools.count(0.0, 3600.0)
    for clock in ("monotonic", "perf_counter", "time", "process_time"):
        monkeypatch.setattr(f"time.{clock}", lambda: next(hours))
    for products, widths in expected.items():
        monkeypatch.setattr("dsa_hw.allocation.rounding.PRODUCTS", products)
        assert round_widths(WIDE, values, [limit]).widths.tolist() == widths
    assert len(options) >= 4
    assert all("time_limit" not in given for given in options)


def test_nearness_weighs_as_much_as_the_loss_bends() -> None:
    """Two groups as far from their widths; the one whose loss bends more gets the channels."""
    choices = choices_of((16, 32), (16, 32))
    learned = np.array([23.0, 23.0])
    limit = Constraint("sum", "ch", lambda w: w.sum(-1).astype(float), 48.0)
    for bends, expected in (([1.0, 4.0], [16, 32]), ([4.0, 1.0], [32, 16])):
        values = closeness(choices, learned, np.array(bends))
        assert round_widths(choices, values, [limit]).widths.tolist() == expected
    plain = closeness(choices, learned)
    for one, other in zip(plain, closeness(choices, learned, np.ones(2)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_no_number_is_refused() -> None:
    """Before it reaches the solver, and with the group that has it."""
    limit = Constraint("sum", "ch", lambda w: w.sum(-1).astype(float), 48.0)
    choices = choices_of((16, 32), (16, 32))
    broken = [np.zeros(2), np.array([0.0, np.nan])]
    with pytest.raises(UserError, match="group 1 are not finite"):
        round_widths(choices, broken, [limit])
    with pytest.raises(UserError, match="group 1 are not finite"):
        round_widths(choices, closeness(choices, np.array([20.0, np.nan])), [limit])
    scores = [np.ones(32), np.append(np.ones(31), np.nan)]
    with pytest.raises(UserError, match="group 1 is not finite at 1 of its 32"):
        kept_importance(choices, scores, [1, 1])
    nothing = Constraint("c", "u", lambda w: np.full(len(w), np.nan), 48.0)
    with pytest.raises(UserError, match="nan"):
        round_widths(choices, closeness(choices, np.array([20.0, 20.0])), [nothing])


def test_costs_that_are_no_sums_over_pairs_are_searched() -> None:
    """A maximum is no sum; the local search still meets it, and claims no bound."""
    values = closeness(CHOICES, np.array([64.0, 32, 32, 48, 80]))

    def peak(widths: np.ndarray) -> np.ndarray:
        return (widths[:, :-1] * widths[:, 1:]).max(-1).astype(float)

    limit = Constraint("peak", "u", peak, 1600.0)
    found = round_widths(CHOICES, values, [limit])
    everything = every_allocation(CHOICES)
    within = peak(everything) <= 1600.0
    assert found.bound is None
    assert not found.proven
    assert found.costs[0] <= 1600.0
    assert found.value == pytest.approx(total_values(CHOICES, values)[within].max())


@pytest.mark.parametrize("products", [60, 130, 400])
def test_windows_find_what_the_whole_program_finds(
    products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for so many pairs of choices, of 1,280; and where the rest is seen to be worse, all
    is known."""
    values = closeness(WIDE, np.array([100.0, 30, 60, 120, 90, 20]))
    limit = Constraint("c", "u", chain_cost, 25_000.0)
    whole = round_widths(WIDE, values, [limit])
    monkeypatch.setattr("dsa_hw.allocation.rounding.PRODUCTS", products)
    part = round_widths(WIDE, values, [limit])
    assert whole.proven
    assert part.value == pytest.approx(whole.value, abs=1e-4)
    assert part.bound is None or part.value <= part.bound


def test_costs_that_couple_too_much_are_searched_locally(monkeypatch: pytest.MonkeyPatch) -> None:
    values = closeness(WIDE, np.array([100.0, 30, 60, 120, 90, 20]))
    limit = Constraint("c", "u", chain_cost, 25_000.0)
    whole = round_widths(WIDE, values, [limit])
    monkeypatch.setattr("dsa_hw.allocation.rounding.PRODUCTS", 0)
    found = round_widths(WIDE, values, [limit])
    assert found.bound is None
    assert found.costs[0] <= limit.target
    assert found.value >= whole.value - 0.02 * abs(whole.value)  # six groups are searched well


def test_a_pairwise_form_is_exact_where_the_cost_is_pairwise() -> None:
    widths = np.array([[16, 32, 48, 64, 80]] * 4).T

    def cost(index: np.ndarray) -> np.ndarray:
        return chain_cost(np.take_along_axis(widths, index, 0))

    form = decompose(cost, [5] * 4, np.array([2, 1, 4, 0]))
    assert sorted(form.pairs) == [(0, 1), (1, 2), (2, 3)]
    index = np.random.default_rng(1).integers(0, 5, (200, 4))
    np.testing.assert_allclose(form(index), cost(index), rtol=1e-12)


def test_every_constraint_holds() -> None:
    values = closeness(CHOICES, np.array([64.0, 32, 32, 48, 80]))
    totals = Constraint("sum", "ch", lambda w: w.sum(-1).astype(float), 180.0)
    products = Constraint("chain", "u", chain_cost, 9000.0)
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


def test_coarse_steps_do_not_take_important_channels_away() -> None:
    """Of two groups near 23 of 32 channels one has to go to 16, and the other to 32: nearness alone
    takes the one that is a little further away, whatever is in its upper half."""
    choices = choices_of((16, 32), (16, 32))
    learned = np.array([23.5, 22.5])
    limit = Constraint("sum", "ch", lambda w: w.sum(-1).astype(float), 48.0)
    concentrated = np.append(np.ones(16), np.full(16, 1e-3))
    spread = np.ones(32)

    def widths(values: list[np.ndarray]) -> list[int]:
        return round_widths(choices, values, [limit]).widths.tolist()

    assert widths(closeness(choices, learned)) == [32, 16]
    importance = [concentrated, spread]
    assert widths(near_and_important(choices, learned, importance, [1, 1])) == [16, 32]
    assert widths(near_and_important(choices, learned, [spread, spread], [1, 1])) == [32, 16]


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
