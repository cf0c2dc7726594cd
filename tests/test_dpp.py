"""The differentiable pruning process: the expectation condition, its derivative, its limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_hw.search.dpp import (
    hard_top_masks,
    keep_probabilities,
    sample_masks,
    standardized_inexactness,
)

GROUPS = [[0.5, 1.0, 2.0, 4.0], [1.0], [3.0, 3.0, 3.0], [1e-30, 1.0, 1e-12, 5.0, 2.0]]


def padded(groups: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(groups, atoms) float64 log importance and which are there."""
    size = max(map(len, groups))
    scores = torch.zeros(len(groups), size, dtype=torch.float64)
    present = torch.zeros(len(groups), size, dtype=torch.bool)
    for row, group in enumerate(groups):
        scores[row, : len(group)] = torch.tensor(group, dtype=torch.float64).log()
        present[row, : len(group)] = True
    return scores, present


@pytest.mark.parametrize("alpha", [1e-4, 0.01, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("beta2", [0.1, 1.0, 10.0, 100.0])
def test_mean_probability_is_the_keep_ratio(alpha: float, beta2: float) -> None:
    scores, present = padded(GROUPS)
    ratios = torch.full((4,), alpha, dtype=torch.float64)
    p = keep_probabilities(ratios, scores, present, torch.full((4,), beta2, dtype=torch.float64))
    mean = p.sum(-1) / present.sum(-1)
    # 1e-7: the bracket is halved at least 24 times over at most 90 nats, then Newton
    torch.testing.assert_close(mean, ratios, atol=1e-6, rtol=0)
    assert (p[~present] == 0).all()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-34.0, 34.0), min_size=1, max_size=40),
    st.floats(0.001, 1.0),
    st.floats(0.05, 60.0),
)
def test_any_importance_over_thirty_orders_of_magnitude(
    logs: list[float], alpha: float, beta2: float
) -> None:
    scores = torch.tensor([logs], dtype=torch.float64)
    present = torch.ones_like(scores, dtype=torch.bool)
    p = keep_probabilities(
        torch.tensor([alpha], dtype=torch.float64), scores, present, torch.tensor([beta2])
    )[0]
    assert torch.isfinite(p).all()
    assert float(p.mean()) == pytest.approx(alpha, abs=1e-5)
    order = scores[0].argsort()
    assert (p[order].diff() >= -1e-12).all()  # monotone in importance


def test_derivative_matches_finite_differences() -> None:
    scores, present = padded(GROUPS)
    beta2 = torch.tensor([1.0, 2.0, 0.7, 0.3], dtype=torch.float64)
    ratios = torch.tensor([0.3, 0.6, 0.5, 0.4], dtype=torch.float64, requires_grad=True)
    # gradcheck perturbs by 1e-6; the solver is good to 1e-9 here, hence atol
    assert torch.autograd.gradcheck(
        lambda a: keep_probabilities(a, scores, present, beta2), (ratios,), atol=1e-4
    )


def test_derivative_is_finite_when_the_process_is_exact() -> None:
    scores, present = padded(GROUPS)
    ratios = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    p = keep_probabilities(ratios, scores, present, torch.full((4,), 1e4, dtype=torch.float64))
    p.sum().backward()
    # the sum of a group's probabilities is atoms * alpha, whatever beta2
    torch.testing.assert_close(ratios.grad, present.sum(-1).double(), atol=1e-6, rtol=0)


def test_large_beta2_tends_to_a_threshold() -> None:
    scores, present = padded([[1.0, 2.0, 3.0, 4.0]])
    p = keep_probabilities(
        torch.tensor([0.5], dtype=torch.float64), scores, present, torch.tensor([500.0])
    )
    torch.testing.assert_close(p[0].round(), torch.tensor([0.0, 0.0, 1.0, 1.0]).double())


def test_equal_importances_get_equal_probabilities() -> None:
    scores, present = padded([[3.0] * 7])
    beta2 = standardized_inexactness(scores, present, 50.0)
    p = keep_probabilities(torch.tensor([0.25], dtype=torch.float64), scores, present, beta2)
    torch.testing.assert_close(p, torch.full_like(p, 0.25), atol=1e-6, rtol=0)


def test_masks_are_binary_and_pass_the_gradient_straight_through() -> None:
    p = torch.full((4, 4000), 0.3, requires_grad=True)
    masks = sample_masks(p, torch.Generator().manual_seed(0))
    assert torch.isin(masks.detach().round(decimals=5), torch.tensor([0.0, 1.0])).all()
    # 16,000 draws: the mean's standard error is 0.0036
    assert float(masks.detach().mean()) == pytest.approx(0.3, abs=0.015)
    (gradient,) = torch.autograd.grad((masks * 2.0).sum(), p)
    torch.testing.assert_close(gradient, torch.full_like(p, 2.0))


@pytest.mark.parametrize("alpha", [0.01, 0.35, 0.55, 1.0])
def test_hard_masks_keep_the_most_important_and_learn_as_soft_ones(alpha: float) -> None:
    scores, present = padded(GROUPS)
    beta2 = torch.full((4,), 3.0, dtype=torch.float64)
    weights = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)).double()
    gradients = []
    for hard in (True, False):
        ratios = torch.full((4,), alpha, dtype=torch.float64, requires_grad=True)
        masks = keep_probabilities(ratios, scores, present, beta2)
        if hard:
            masks = hard_top_masks(masks, scores.exp(), present)
            assert set(masks.detach().unique().tolist()) <= {0.0, 1.0}
            for row, real, kept in zip(scores, present, masks.detach(), strict=True):
                count = max(1, round(alpha * int(real.sum()) + 1e-9))
                assert int(kept.sum()) == count
                closed = row[real & (kept == 0)]
                assert not len(closed) or row[kept > 0].min() >= closed.max()
        (gradient,) = torch.autograd.grad((weights * masks).sum(), ratios)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[1])


class Reader:
    """The loss of what reads a group of 16 channels: a linear layer, its outputs normalized over
    the batch or not, against the outputs of the whole group."""

    def __init__(self, normalized: bool) -> None:
        generator = torch.Generator().manual_seed(4)
        self._inputs = torch.rand(64, 16, generator=generator).double()
        self._weights = torch.randn(16, 8, generator=generator).double()
        self._normalized = normalized
        self._wanted = self._outputs(torch.ones(16).double())

    def _outputs(self, masks: torch.Tensor) -> torch.Tensor:
        found = (masks * self._inputs) @ self._weights
        return (found - found.mean(0)) / found.std(0) if self._normalized else found

    def loss(self, masks: torch.Tensor) -> torch.Tensor:
        return (self._outputs(masks) - self._wanted).square().mean()


def slope(reader: Reader, hard: bool) -> float:
    """Of the loss by the keep ratio at one half, where importances hardly differ."""
    scores = 0.01 * torch.linspace(-1, 1, 16).double()[None]
    present = torch.ones(1, 16, dtype=torch.bool)
    ratio = torch.full((1,), 0.5, dtype=torch.float64, requires_grad=True)
    masks = keep_probabilities(ratio, scores, present, torch.full((1,), 2.0).double())
    if hard:
        masks = hard_top_masks(masks, scores, present)
    (gradient,) = torch.autograd.grad(reader.loss(masks[0]), ratio)
    return float(gradient)


def removal(reader: Reader) -> float:
    """What the loss rises by, for each part of the group, when the lesser half is removed."""
    masks = torch.cat([torch.zeros(8), torch.ones(8)]).double()
    return 2.0 * float(reader.loss(masks) - reader.loss(torch.ones(16).double()))


def test_soft_masks_before_a_batch_norm_are_scale_free_and_hard_ones_are_not() -> None:
    """Soft masks of one value change nothing behind a batch-norm: the group seems to cost nothing.
    Without one they are felt. Hard masks are felt in both."""
    normed, plain = Reader(normalized=True), Reader(normalized=False)
    assert removal(normed) > 0.1
    assert removal(plain) > 0.1
    assert abs(slope(normed, hard=False)) < 0.02 * removal(normed)
    assert slope(plain, hard=False) < -0.1 * removal(plain)
    for reader in (normed, plain):
        assert slope(reader, hard=True) < -0.1 * removal(reader)
