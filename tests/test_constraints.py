"""Every way of holding budgets reaches the known optimum of problems with one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear, minimize
from torch import Tensor

from dsa_hw.search.holding import METHODS, ConstraintMethod, make_mover
from dsa_hw.search.holding.admm import nearest_within
from dsa_hw.search.holding.mover import Violations
from dsa_hw.search.holding.projection import along_budget, along_two

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


def two_totals(a: Tensor) -> Tensor:
    """The first two may have 1.0 together, all four 1.9."""
    return torch.stack([a[:2].sum() / 1.0, a.sum() / 1.9]) - 1.0


def test_two_budgets_both_hold() -> None:
    """The first two give up 0.35 each; then all four have 1.9 as they are."""
    found = optimize("projection", two_totals, budgets=2)
    expected = torch.tensor([0.55, 0.45, 0.3, 0.6], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)


def test_between_two_budgets_projection_does_not_zigzag() -> None:
    """Where the optimum has both budgets used up, moves end on both, and stay there."""

    def two(a: Tensor) -> Tensor:
        return torch.stack([a[:2].sum() / 1.0, a[1:].sum() / 1.3]) - 1.0

    # WISHED less a multiple of each budget's normal: the multiples from the two sums
    first = np.array([[2.0, 1.0], [1.0, 3.0]])  # inner products of the two budgets' normals
    more = np.array([0.9 + 0.8 - 1.0, 0.8 + 0.3 + 0.6 - 1.3])
    pulls = np.linalg.solve(first, more)
    normals = np.array([[1.0, 1, 0, 0], [0, 1, 1, 1]])
    expected = WISHED - torch.as_tensor(pulls @ normals)
    assert (pulls > 0).all()
    assert (expected > LEAST).all()
    found = optimize("projection", two, budgets=2)
    # both count as used up within two steps of each other, which is not made up for any more
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)

    ratios = expected.clone().requires_grad_()
    mover = make_mover("projection", ratios, LEAST, 2)
    for _ in range(50):
        before = ratios.detach().clone()
        mover.move(2.0 * (before - WISHED), two, 0.01)
        assert float((ratios.detach() - before).abs().max()) < 1e-4  # a hundredth of a step


@pytest.mark.parametrize("groups", [2, 3, 5, 9])
def test_the_direction_along_two_budgets_is_the_nearest_one(groups: int) -> None:
    """Against SciPy's SLSQP, which takes the bounds and both budgets: on one and not into the
    other, or on both."""
    generator = torch.Generator().manual_seed(groups)
    for _ in range(25):
        gradient = torch.randn(groups, generator=generator, dtype=torch.float64)
        first, second = torch.rand(2, groups, generator=generator, dtype=torch.float64) + 0.05
        kinds = torch.randint(0, 4, (groups,), generator=generator)
        ratios = torch.full((groups,), 0.5, dtype=torch.float64)
        least = torch.full((groups,), 0.2, dtype=torch.float64)
        ratios[kinds == 1] = 1.0
        ratios[kinds == 2] = 0.2
        found = -along_two(ratios, least, gradient, first, second).numpy()
        low = torch.where(ratios <= least, 0.0, -1e3).tolist()
        high = torch.where(ratios >= 1, 0.0, 1e3).tolist()
        g, n, m = gradient.numpy(), first.numpy(), second.numpy()
        assert (found >= np.array(low) - 1e-9).all()
        assert (found <= np.array(high) + 1e-9).all()
        assert max(found @ n, found @ m) == pytest.approx(0.0, abs=1e-4)
        distances = []
        for kept, other in ((n, m), (m, n)):
            best = minimize(
                lambda d, g=g: float(((d + g) ** 2).sum()), np.zeros(groups), method="SLSQP",
                jac=lambda d, g=g: 2.0 * (d + g), bounds=list(zip(low, high, strict=True)),
                constraints=[{"type": "eq", "fun": lambda d, kept=kept: kept @ d},
                             {"type": "ineq", "fun": lambda d, other=other: -(other @ d)}],
                options={"ftol": 1e-12, "maxiter": 500},
            )  # fmt: skip
            distances.append(best.fun)
        # SLSQP's tolerance, and that of the halving
        assert float(((found + g) ** 2).sum()) == pytest.approx(min(distances), abs=1e-3)


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
