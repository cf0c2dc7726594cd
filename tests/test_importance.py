"""Importances: what they read, how a group's members combine, and that no scale breaks them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import Residual, randomize_norms
from torch import nn

from dsa_hw.comparison.methods.gates import TaylorGates
from dsa_hw.cost.counted import FlopsBudget
from dsa_hw.errors import UserError
from dsa_hw.network.coupling import Coupling, find_coupling
from dsa_hw.network.masks import ChannelMasks
from dsa_hw.pipeline.pruner import DSAPruner
from dsa_hw.runs.config import PruneConfig
from dsa_hw.runs.importances import IMPORTANCES, chosen_importance
from dsa_hw.worth.importance import (
    AtomImportance,
    MemberMean,
    Wants,
    present_atoms,
    split_atoms,
)
from dsa_hw.worth.taylor import TaylorScores, taylor

IMAGE = torch.zeros(1, 3, 4, 4)
PRESENT = torch.tensor([[True, True, True], [True, False, False]])
MEMBERS = [torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), torch.tensor([3])]
SCORES = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([30.0, 20.0, 10.0]), torch.tensor([5.0])]


def test_layers_that_share_channels_have_the_mean_of_their_scores() -> None:
    found = MemberMean(MEMBERS, PRESENT)(SCORES)
    torch.testing.assert_close(found[0], torch.tensor([15.5, 11.0, 6.5]))
    assert found[1].tolist()[1:] == [1.0, 1.0]  # padding


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_thirty_orders_of_magnitude(scale: float) -> None:
    """Scores stay positive, finite and in proportion; a dead channel is a part of its group."""
    scores = [scale * torch.tensor([0.0, 1e-6, 1.0])]
    found = MemberMean([torch.tensor([0, 1, 2])], PRESENT[:1])(scores)[0]
    assert torch.isfinite(found.log()).all()
    torch.testing.assert_close(found / found[2], torch.tensor([1e-12, 1e-6, 1.0]))


def gate_effects(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> TaylorScores:
    coupling = find_coupling(model, x)
    taylor = TaylorScores(coupling, x.device)
    masks = ChannelMasks(model, coupling, x, with_gradients=True)
    masks.set(torch.ones(taylor.present.shape))
    for _ in range(steps):
        nn.functional.cross_entropy(model(x), y).backward()
        found = masks.gate_gradients()
        assert found is not None
        taylor.note(*found)
        found[1].zero_()
    masks.remove()
    return taylor


def test_taylor_is_scale_and_shift_times_their_gradients() -> None:
    """Molchanov et al. 2019: (gamma dL/dgamma + beta dL/dbeta)^2; here of a group of one layer."""
    torch.manual_seed(0)
    model = randomize_norms(Residual())
    x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    plain = copy.deepcopy(model)
    nn.functional.cross_entropy(plain(x), y).backward()
    norm = plain.get_submodule("a1bn")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    expected = (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).square().detach()
    scores = gate_effects(model, x, y, steps=1)()
    index = [g.name for g in find_coupling(plain, x).groups].index("a1")
    # the same float32 products summed in another order
    torch.testing.assert_close(scores[index, : len(expected)], expected, rtol=2e-3, atol=1e-12)


def test_taylor_of_coupled_layers_is_the_effect_of_closing_them_together() -> None:
    """Slope of the loss when one atom's channels close in all layers that share it."""
    torch.manual_seed(0)
    model = randomize_norms(Residual())
    x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    coupling = find_coupling(model, x)
    shared = next(i for i, g in enumerate(coupling.groups) if len(g.layers) > 1 and not g.frozen)
    scores = gate_effects(model, x, y, steps=1)()
    double, wide = copy.deepcopy(model).double(), x.double()
    masks = ChannelMasks(double, coupling, wide)
    for atom in range(3):
        losses = []
        for closed in (1e-4, -1e-4):
            opened = torch.ones(scores.shape, dtype=torch.float64)
            opened[shared, atom] -= closed
            masks.set(opened)
            with torch.no_grad():
                losses.append(float(nn.functional.cross_entropy(double(wide), y)))
        slope = abs(losses[0] - losses[1]) / 2e-4
        assert float(scores[shared, atom]) ** 0.5 == pytest.approx(slope, rel=1e-2)


def test_auto_is_taylor_where_training_gives_gradients() -> None:
    assert chosen_importance("auto") == "taylor"
    assert chosen_importance("auto", trains=False) == "filter_l1"
    assert chosen_importance("bn_scale") == "bn_scale"


def test_taylor_averages_over_batches_and_resumes() -> None:
    torch.manual_seed(0)
    model = randomize_norms(Residual())
    x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    taylor = gate_effects(model, x, y, steps=3)
    coupling = find_coupling(model, x)
    again = TaylorScores(coupling, x.device)
    assert (again() == 1).all()
    again.restore(taylor.state())
    assert torch.equal(again(), taylor())


def noted(gradients: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Scores after batches whose gradients are the rows, (batches, atoms)."""
    taylor = TaylorScores(find_coupling(nn.Conv2d(3, 4, 1), IMAGE), IMAGE.device)
    taylor.present = torch.ones(1, gradients.shape[1], dtype=torch.bool)
    taylor._average = torch.ones(gradients.shape[1])
    for row in gradients:
        taylor.note([torch.arange(len(row))], scale * row, scale)
    return taylor()[0]


def test_taylor_scores_add_up() -> None:
    """Two channels that are closed together cost the sum of their scores, as gradients that are
    independent from batch to batch say; sums of absolute values would say too much."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 4000, generator=generator)
    scores = noted(torch.stack([first, 2.0 * second, first + 2.0 * second], dim=1))
    # the newest 1,600 of 4,000 squares, in effect: a standard error of 1.4 / 40
    assert float(scores[2]) == pytest.approx(float(scores[0] + scores[1]), rel=0.12)


@pytest.mark.parametrize("batches", [16, 155, 4000])
def test_taylor_scores_forget_the_first_batches_of_any_search(batches: int) -> None:
    """Those at another learning rate: the first tenth weighs less than 0.1%, if it is as large."""
    gradients = torch.ones(batches, 2)
    gradients[: batches // 10, 1] = 2.0
    plain, begun_high = noted(gradients).tolist()
    assert plain == pytest.approx(1.0)
    assert begun_high == pytest.approx(1.0, abs=3e-3)


def test_taylor_scores_do_not_hang_on_the_scale_of_the_loss() -> None:
    gradients = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    # scales are powers of two: exact
    assert torch.equal(noted(gradients), noted(gradients, scale=2.0**16))


@dataclass
class LastFirst:
    """A toy importance: the later a channel's number, the more it matters."""

    present: torch.Tensor
    wants: Wants = "weights"
    noted: int = 0

    def note(
        self, layers: Sequence[torch.Tensor], gradients: torch.Tensor, loss_scale: object = 1.0
    ) -> None:
        self.noted += 1

    def __call__(self) -> torch.Tensor:
        numbers = torch.arange(1.0, self.present.shape[1] + 1).expand(self.present.shape)
        return torch.where(self.present, numbers, 1.0)

    def state(self) -> dict[str, Any] | None:
        return {"noted": self.noted}

    def restore(self, state: dict[str, Any] | None) -> None:
        assert state is not None
        self.noted = state["noted"]


def last_first(model: nn.Module, coupling: Coupling, device: torch.device) -> LastFirst:
    return LastFirst(present_atoms(coupling, device))


@pytest.mark.parametrize("wants", ["weights", "gate gradients"])
def test_an_importance_from_outside_decides_what_a_search_keeps(wants: Wants) -> None:
    """By name; it gets the training batches' gradients if it wants them, and resumes."""

    def make(*arguments: Any) -> LastFirst:
        return dataclasses.replace(last_first(*arguments), wants=wants)

    torch.manual_seed(0)
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    IMPORTANCES.register("last-first", make)
    try:
        pruner = DSAPruner(model, x, FlopsBudget(0.5), 12, importance="last-first")
        again = DSAPruner(Residual(), x, FlopsBudget(0.5), 12, importance="last-first")
    finally:
        IMPORTANCES.remove("last-first")
    for _ in range(12):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(validation_loss=lambda: model(x).square().mean())
    noted = pruner.state_dict()["importance"]["noted"]
    assert noted == (12 if wants == "gate gradients" else 0)
    again.load_state_dict(pruner.state_dict())
    assert again.state_dict()["importance"]["noted"] == noted
    kept = pruner.finish_with_report().keep
    assert any(not own.all() for own in kept)
    for own in kept:  # of every group the last ones
        assert own.tolist() == sorted(own.tolist())


def test_an_unknown_importance_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean taylor"):
        PruneConfig(target_ratio=0.5, importance="tailor")
    assert sorted(IMPORTANCES) == ["bn_scale", "filter_l1", "taylor"]
    assert IMPORTANCES["taylor"] is taylor


def test_scores_that_are_no_numbers_are_refused_with_their_group() -> None:
    """NaN in given weights, which would reach rounding."""
    model, x = Residual(), torch.zeros(1, 3, 16, 16)
    with torch.no_grad():
        model.a1.weight[3, 0, 0, 0] = torch.nan
    coupling = find_coupling(model, x)
    group = next(g for g in coupling.groups if "a1" in g.layers)
    scores = AtomImportance(model, coupling, "filter_l1")()
    with pytest.raises(UserError, match=f"atoms of {group.name}"):
        split_atoms(coupling, scores)


def test_halp_and_the_search_have_one_taylor() -> None:
    """Gates of the atoms give what the masks' gradients give, here as means of absolute values."""
    torch.manual_seed(0)
    model, x = randomize_norms(Residual()), torch.randn(4, 3, 16, 16)
    coupling = find_coupling(model, x)
    gates = TaylorGates(model, coupling, x)
    taken = []
    for _ in range(3):
        model(torch.randn_like(x)).square().mean().backward()
        assert gates._gates.grad is not None
        taken.append(gates._gates.grad.abs().clone())
        gates.note()
    expected = torch.stack(taken).mean(0).numpy()
    state = gates.state_dict()
    assert gates.importance() == pytest.approx(expected, rel=1e-5)
    assert (gates.importance() == 0).all()  # begun anew
    gates.load_state_dict(state)
    assert gates.importance() == pytest.approx(expected, rel=1e-5)
    gates.remove()


def test_taylor_without_training_is_refused() -> None:
    with pytest.raises(UserError, match="without training"):
        PruneConfig(target_ratio=0.5, importance="taylor", epochs=0)
