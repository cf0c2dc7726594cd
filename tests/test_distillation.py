"""Distillation: what its loss is, and that it pulls a student to its teacher."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsa_hw.training.distillation import Distillation, soft_cross_entropy


def test_a_perfect_imitation_costs_nothing() -> None:
    outputs = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    # 1e-6: float32 logarithms of probabilities
    assert float(soft_cross_entropy(outputs, outputs, 3.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(soft_cross_entropy(outputs + 4.0, outputs, 3.0)) == pytest.approx(0.0, abs=1e-6)


def test_high_temperatures_match_outputs() -> None:
    """Hinton et al., eq. 4: the gradient tends to (z - v) / classes for centred outputs."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(1, 6, generator=generator, dtype=torch.float64) for _ in "ab")
    ours, theirs = ours - ours.mean(), theirs - theirs.mean()
    ours.requires_grad_()
    (gradient,) = torch.autograd.grad(soft_cross_entropy(ours, theirs, 1e4), ours)
    # the next term is a 1e-4 of it
    torch.testing.assert_close(gradient, (ours - theirs).detach() / 6, rtol=1e-3, atol=1e-6)


def test_the_weight_mixes_and_the_teacher_does_not_learn() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 4))
    student = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    x, y = torch.randn(6, 3, 2, 2), torch.randint(4, (6,))
    before = {n: t.clone() for n, t in teacher.state_dict().items()}
    labels = F.cross_entropy(student(x), y)
    whole = Distillation(teacher, 1.0, 2.0).loss(labels, student(x), x)
    mixed = Distillation(teacher, 0.25, 2.0).loss(labels, student(x), x)
    torch.testing.assert_close(mixed, 0.75 * labels + 0.25 * whole)
    mixed.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())
