"""Every way of holding budgets reaches the known optimum of problems with one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear
from torch import Tensor

from dsa_hw.constraints import METHODS, ConstraintMethod, make_mover
from dsa_hw.constraints.admm import nearest_within
from dsa_hw.constraints.mover import Violations
from dsa_hw.constraints.projection import along_budget

WISHED = torch.tensor([0.9, 0.8, 0.3, 0.6], dtype=torch.float64)
"""min |a - WISHED|^2 without a budget."""
LEAST = torch.full((4,), 0.05, dtype=torch.float64)
MOVES = 500


def optimize(
    method: ConstraintMethod,
    violations: Violations,
    budgets: int = 1,
    scale: float = 1.0,
    least: Tensor = LEAST,
) -> Tensor:
    """Where the keep ratios end, from all 1, by steps that fall to a hundredth."""
    ratios = torch.ones(4, dtype=torch.float64, requires_grad=True)
    mover = make_mover(method, ratios, least, budgets)
    for move in range(MOVES):
        gradient = 2.0 * scale * (ratios.detach() - WISHED)
        step = 0.02 * (0.005 + 0.99 * 0.5 * (1 + math.cos(math.pi * move / MOVES)))
        mover.move(gradient, violations, step)
    return ratios.detach()


def total(limit: float) -> Violations:
    """sum of keep ratios <= limit"""
    return lambda a: (a.sum(-1, keepdim=True) / limit) - 1.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_binding_budget(method: ConstraintMethod, scale: float) -> None:
    # By symmetry each keep ratio gives up the same: (2.6 - 1.8) / 4. The loss's scale is not
    # known beforehand and must not matter.
    found = optimize(method, total(1.8), scale=scale)
    # one step of 1e-4 away, times the dual's lag
    torch.testing.assert_close(found, WISHED - 0.2, atol=5e-3, rtol=0)


def test_a_budget_that_does_not_bind_is_ignored() -> None:
    found = optimize("admm", total(3.5))
    torch.testing.assert_close(found, WISHED, atol=5e-3, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_bounds_hold_at_the_optimum(method: ConstraintMethod) -> None:
    # 1.0 in all: the third would be at 0.3 - 0.4 < 0.05, so it stays at its least and the others
    # share the rest: (0.9 + 0.8 + 0.6 - 0.95) / 3 = 0.45 less each
    found = optimize(method, total(1.0))
    expected = torch.tensor([0.45, 0.35, 0.05, 0.15], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_group_that_may_not_change_has_no_say(method: ConstraintMethod) -> None:
    """Most of the cost is the last group's, which is frozen: the others share what is left."""
    least = torch.tensor([0.05, 0.05, 0.05, 1.0], dtype=torch.float64)
    costs = torch.tensor([1.0, 1.0, 1.0, 20.0], dtype=torch.float64)
    found = optimize(method, lambda a: ((costs @ a) / 21.4 - 1.0)[None], least=least)
    expected = torch.tensor([0.7, 0.6, 0.1, 1.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_curved_budget_is_met(method: ConstraintMethod) -> None:
    """Products of neighbours, as a chain of layers costs; all methods end on the budget."""

    def chain(a: Tensor) -> Tensor:
        return ((a[:-1] * a[1:]).sum() / 0.8 - 1.0)[None]

    found = optimize(method, chain)
    assert abs(float(chain(found))) < 0.01
    assert (found >= LEAST).all()
    assert (found <= 1).all()


def test_two_budgets_both_hold() -> None:
    """The first two may have 1.0 together, all four 1.9: less 0.35 each, then 0.9 - 0.9 = 0."""

    def two(a: Tensor) -> Tensor:
        return torch.stack([a[:2].sum() / 1.0, a.sum() / 1.9]) - 1.0

    found = optimize("projection", two, budgets=2)
    expected = torch.tensor([0.55, 0.45, 0.3, 0.6], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)


def test_projection_never_leaves_the_budget() -> None:
    ratios = torch.ones(4, dtype=torch.float64, requires_grad=True)
    mover = make_mover("projection", ratios, LEAST, 1)
    for move in range(200):
        mover.move(2.0 * (ratios.detach() - WISHED), total(1.8), 0.01)
        assert move < 5 or abs(float(ratios.detach().sum()) - 1.8) < 1e-6


@pytest.mark.parametrize("groups", [1, 2, 5, 9])
def test_the_direction_along_the_budget_is_the_nearest_one(groups: int) -> None:
    """Against SciPy's bounded least squares: groups at either bound, frozen, without a
    cost, and with one that falls."""
    generator = torch.Generator().manual_seed(groups)
    for _ in range(40):
        kinds = torch.randint(0, 5, (groups,), generator=generator)
        gradient = torch.randn(groups, generator=generator)
        normal = torch.rand(groups, generator=generator) + 0.05
        normal[kinds == 4] *= 0.0 if gradient[0] > 0 else -1.0
        ratios = torch.rand(groups, generator=generator) * 0.6 + 0.3
        least = torch.full((groups,), 0.2)
        ratios[kinds == 1] = 1.0
        ratios[kinds == 2] = 0.2
        ratios[kinds == 3] = least[kinds == 3] = 1.0
        found = -along_budget(ratios, least, gradient, normal).double().numpy()
        free = (least < 1).numpy()
        low = torch.where(ratios <= least, 0.0, -1e3).numpy()[free]
        high = torch.where(ratios >= 1, 0.0, 1e3).numpy()[free]
        g, n = (v.double().numpy()[free] for v in (gradient, normal))
        assert (found[~free] == 0).all()
        if free.any():  # the budget as one more, heavy square
            rows = np.vstack([np.eye(len(g)), 1e4 * n])
            best = lsq_linear(rows, np.append(-g, 0.0), (low, high), method="bvls", tol=1e-14)
            assert found[free] == pytest.approx(best.x, abs=1e-4)


def test_a_first_move_is_no_rounding_noise() -> None:
    """With all keep ratios at 1 there is no way along the budget: none may grow. Adam's step is of
    the same size whatever it gets, so it must get nothing."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        gradient = torch.randn(4, generator=generator)
        normal = torch.rand(4, generator=generator) + 0.1
        assert (along_budget(torch.ones(4), torch.full((4,), 0.1), gradient, normal) == 0).all()


def test_the_nearest_point_within_a_halfspace_and_bounds() -> None:
    point = torch.tensor([1.2, 0.7, 0.1, 0.4], dtype=torch.float64)
    found = nearest_within(point, LEAST, total(1.5))
    # the third hits its bound: (1.2 + 0.7 + 0.4 - 1.45) / 3 = 0.28333 less for the others
    expected = torch.tensor([0.916667, 0.416667, 0.05, 0.116667], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(nearest_within(WISHED, LEAST, total(4.0)), WISHED)


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_exact(method: ConstraintMethod) -> None:
    def moved(ratios: Tensor, mover, moves: int) -> Tensor:
        for _ in range(moves):
            mover.move(2.0 * (ratios.detach() - WISHED), total(1.8), 0.01)
        return ratios.detach().clone()

    ratios = torch.ones(4, dtype=torch.float64, requires_grad=True)
    mover = make_mover(method, ratios, LEAST, 1)
    half = moved(ratios, mover, 10)
    state = mover.state_dict()
    state["adam"] = {**state["adam"], "state": {0: {k: v.clone() for k, v in
                     state["adam"]["state"][0].items()}}}  # fmt: skip
    again = half.clone().requires_grad_()
    other = make_mover(method, again, LEAST, 1)
    whole = moved(ratios, mover, 10)
    other.load_state_dict(state)
    assert torch.equal(moved(again, other, 10), whole)
