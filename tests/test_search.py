"""DSA in a user's own loop: budgets, resume, warm-up, and the end."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Residual
from fake_device import FakeDevice
from torch import Tensor, nn

import dsa_hw
from dsa_hw.cost.counted import FlopsBudget, count, flops_budget, params_budget
from dsa_hw.cost.latency.budget import LatencyBudget
from dsa_hw.cost.latency.profiling import profile_network
from dsa_hw.network.coupling import find_coupling
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.forward import outputs_of
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.pipeline.pruner import DSAPruner
from dsa_hw.search.settings import SearchSettings
from dsa_hw.worth.values import closeness
from profilers.collect import nominal_reference_ms
from profilers.table import LatencyTable

STEPS = 60
SIZE = 8
"""Of images, in pixels: a search of a hundred steps is then a few seconds of one core."""
EIGHT = torch.zeros(8, 3, SIZE, SIZE)


class Toy:
    """A task with something to learn: which of four quadrants of the image is bright."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def batch(self, size: int = 8) -> tuple[Tensor, Tensor]:
        labels, half = torch.randint(4, (size,), generator=self._generator), SIZE // 2
        x = torch.randn(size, 3, SIZE, SIZE, generator=self._generator)
        for image, label in zip(x, labels.tolist(), strict=True):
            row, column = divmod(label, 2)
            rows, columns = (slice(half * at, half * (at + 1)) for at in (row, column))
            image[:, rows, columns] += 1.0
        return x, labels


def search(
    budgets: Any, steps: int = STEPS, events: list[dict] | None = None, **options: Any
) -> tuple[nn.Module, DSAPruner]:
    """The loop of the README."""
    torch.manual_seed(0)
    model, example = Residual(), torch.zeros(1, 3, SIZE, SIZE)
    toy, criterion = Toy(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = DSAPruner(
        model, example, budgets, total_steps=steps,
        on_event=None if events is None else events.append, **options,
    )  # fmt: skip
    for _ in range(steps):
        run_step(model, optimizer, pruner, toy, criterion)
    return model, pruner


def run_step(model: nn.Module, optimizer, pruner: DSAPruner, toy: Toy, criterion) -> None:
    x, y = toy.batch()
    criterion(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    xv, yv = toy.batch()
    pruner.step(validation_loss=lambda: criterion(model(xv), yv))


@pytest.fixture(scope="module")
def graph() -> DeployedGraph:
    model, x = Residual(), torch.zeros(1, 3, SIZE, SIZE)
    return DeployedGraph(export_onnx(model, x), find_coupling(model, x))


@pytest.fixture(scope="module")
def table(graph: DeployedGraph) -> LatencyTable:
    device = FakeDevice()
    header = dict(device.provenance()) | {"reference_ms": nominal_reference_ms(device)}
    table = LatencyTable(header)
    profile_network(graph, device, table, networks=12, rounds=2)
    return table


def test_a_latency_budget_is_met(table: LatencyTable, graph: DeployedGraph) -> None:
    dense_budget, choices = LatencyBudget(table, 1.0).bind(graph)
    dense_ms = count(dense_budget, graph.dense_widths)
    budget = dsa_hw.LatencyBudget(table, target_ms=0.6 * dense_ms)
    events: list[dict] = []
    _, pruner = search(budget, events=events)
    found = pruner.finish_with_report()
    charged = found.allocation.costs["latency"]
    assert 0.5 * dense_ms < charged <= 0.6 * dense_ms
    assert all(w in c for w, c in zip(found.allocation.widths, choices.widths, strict=True))
    x = torch.randn(4, 3, SIZE, SIZE)
    assert outputs_of(found.model, x).shape == (4, 10)
    assert found.masked_vs_pruned_max_abs <= 1e-4
    steps = [e for e in events if e["event"] == "search_step"]
    assert {e["phase"] for e in steps} == {"warmup", "search"}
    # the search itself ends near the target; rounding does not have to make up for it
    assert steps[-1]["costs"]["latency"] == pytest.approx(0.6 * dense_ms, rel=0.1)


def test_finish_gives_a_smaller_module_that_still_trains(table: LatencyTable, graph) -> None:
    dense_budget, _ = LatencyBudget(table, 1.0).bind(graph)
    target = 0.6 * count(dense_budget, graph.dense_widths)
    model, pruner = search(LatencyBudget(table, target), steps=40)
    small = pruner.finish()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    small(torch.randn(4, 3, SIZE, SIZE)).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_several_budgets_at_once(graph: DeployedGraph) -> None:
    budgets = [dsa_hw.FlopsBudget(0.5), dsa_hw.ParamsBudget(0.6)]
    _, pruner = search(budgets, steps=48)
    widths = pruner.finish_with_report().allocation.widths.tolist()
    dense = graph.dense_widths
    for make, limit in ((flops_budget, 0.5), (params_budget, 0.6)):
        budget = make(graph, 1.0)
        assert count(budget, widths) <= limit * count(budget, dense)


def test_several_devices_each_with_its_table_and_target(
    table: LatencyTable, graph: DeployedGraph
) -> None:
    """One device pays for products of channels, the other for outputs; both targets hold."""
    other = FakeDevice(charge=lambda cin, cout, pixels, taps: 3e-5 * cout * pixels**0.5)
    header = dict(other.provenance()) | {"reference_ms": nominal_reference_ms(other)}
    tables = {"server": table, "phone": LatencyTable(header)}
    profile_network(graph, other, tables["phone"], networks=8, rounds=2)
    budgets = []
    for name, share in (("server", 0.7), ("phone", 0.6)):
        dense, _ = LatencyBudget(tables[name], 1.0).bind(graph)
        target = share * count(dense, graph.dense_widths)
        budgets.append(LatencyBudget(tables[name], target, name=name))
    _, pruner = search(budgets, steps=48)
    costs = pruner.finish_with_report().allocation.costs
    assert set(costs) == {"server", "phone"}
    assert all(costs[b.name] <= b.target_ms for b in budgets)
    with pytest.raises(dsa_hw.UserError, match="are called 'latency'"):
        search([LatencyBudget(table, 1.0), LatencyBudget(table, 2.0)], steps=1)


def test_the_papers_way_of_holding_the_budget() -> None:
    settings = SearchSettings(constraint="admm", validation_every=1, warmup=(0.05, 0.1))
    events: list[dict] = []
    _, pruner = search(dsa_hw.FlopsBudget(0.5), settings=settings, events=events, steps=150)
    steps = [e for e in events if e["event"] == "search_step"]
    use = steps[-1]["costs"]["flops"] / steps[-1]["targets"]["flops"]
    assert use < 1.1  # multipliers follow a target that is lowered until 90% of the search
    found = pruner.finish_with_report()
    assert found.allocation.costs["flops"] <= pruner.budgets[0].target


def test_taylor_importance_in_a_search_and_its_resume() -> None:
    _, whole = search(dsa_hw.FlopsBudget(0.5), steps=40, importance="taylor")
    state = whole.state_dict()
    again = DSAPruner(Residual(), torch.zeros(1, 3, SIZE, SIZE), dsa_hw.FlopsBudget(0.5), 40,
                      importance="taylor")  # fmt: skip
    again.load_state_dict(state)
    assert torch.equal(again._importance(), whole._importance())
    scores = whole._importance()[whole._importance.present]
    assert (scores > 0).all()
    assert len(scores.unique()) > 100  # 170 channels; each has its own
    found = whole.finish_with_report()
    assert found.masked_vs_pruned_max_abs <= 1e-4


def test_taylor_scores_follow_the_search() -> None:
    """Gradients by masks are collected after the search has begun, and not only before."""
    settings = SearchSettings(warmup=(0.0, 0.1))
    model, pruner = search(dsa_hw.FlopsBudget(0.5), settings=settings, steps=20,
                           importance="taylor")  # fmt: skip
    assert pruner.searching
    before = pruner._importance().clone()
    x, y = Toy(1).batch()
    nn.functional.cross_entropy(model(x), y).backward()
    pruner.step(lambda: nn.functional.cross_entropy(model(x), y))
    assert not torch.equal(pruner._importance(), before)


def test_a_new_target_from_a_finished_search() -> None:
    """Keep ratios go on to another budget by one factor; the model can be cut again."""
    _, pruner = search(dsa_hw.FlopsBudget(0.5), steps=60)
    first = pruner.finish_with_report()
    learned = pruner.keep_ratios.detach().clone()
    pruner.retarget(dsa_hw.FlopsBudget(0.3))
    second = pruner.finish_with_report()
    costs = [f.allocation.costs["flops"] for f in (first, second)]
    assert costs[1] <= 0.6 * costs[0] * 1.01  # 0.3 / 0.5, each within 1% of its target
    assert second.masked_vs_pruned_max_abs <= 1e-4
    free = [g.frozen is None for g in pruner.coupling.groups]
    factors = (pruner.keep_ratios.detach() / learned)[torch.tensor(free)]
    assert float(factors.max() / factors.min()) == pytest.approx(1.0, abs=1e-3)
    pruner.retarget(dsa_hw.FlopsBudget(0.5))
    assert (
        pruner.finish_with_report().allocation.widths.tolist() == first.allocation.widths.tolist()
    )


@pytest.mark.parametrize("importance", ["taylor", "filter_l1"])
@pytest.mark.parametrize("trained", [True, False])
def test_weights_stay_whole_while_keep_ratios_move(importance: Any, trained: bool) -> None:
    """Masks are on validation passes alone: the training batch after a move sees none."""
    _, pruner = search(dsa_hw.FlopsBudget(0.5), steps=60, trained=trained, importance=importance)
    assert pruner.searching
    assert float(pruner.keep_ratios.detach().min()) < 0.8
    flat = pruner._masks.store.flat
    assert flat is None if importance == "filter_l1" else bool((flat == 1).all())
    found = pruner.finish_with_report()
    assert found.masked_vs_pruned_max_abs <= 1e-4


@pytest.mark.parametrize("trained", [True, False])
def test_weights_under_masks_are_an_option(trained: bool) -> None:
    settings = SearchSettings(mask_training=True)
    _, pruner = search(dsa_hw.FlopsBudget(0.5), steps=60, trained=trained, settings=settings)
    flat = pruner._masks.store.flat
    assert flat is not None
    assert float(flat.min()) < 0.5
    learned = pruner.learned_widths()
    near = closeness(pruner.choices, learned)
    for mine, nearest in zip(pruner.rounding_values(pruner.choices, learned), near, strict=True):
        assert mine.tolist() == nearest.tolist()


def test_sampled_masks_are_an_option(graph: DeployedGraph) -> None:
    settings = SearchSettings(masks="sampled")
    _, pruner = search(dsa_hw.FlopsBudget(0.5), settings=settings, steps=60)
    widths = pruner.finish_with_report().allocation.widths.tolist()
    budget = flops_budget(graph, 1.0)
    assert count(budget, widths) <= 0.5 * count(budget, graph.dense_widths)


def test_masks_wait_for_the_loss_to_fall() -> None:
    events: list[dict] = []
    settings = SearchSettings(fallen=0.0)  # it never has fallen far enough
    search(dsa_hw.FlopsBudget(0.5), events=events, settings=settings, steps=60)
    phases = [e["phase"] for e in events if e["event"] == "search_step"]
    assert phases.index("search") >= 2  # half of 60 steps, logged every tenth
    warnings = [e["message"] for e in events if e["event"] == "warning"]
    assert any("has not started to fall" in w for w in warnings)


def test_trained_weights_are_not_waited_for() -> None:
    """Their loss has little to fall, and rises first where the learning rate starts anew."""
    events: list[dict] = []
    settings = SearchSettings(fallen=0.0)
    search(dsa_hw.FlopsBudget(0.5), events=events, settings=settings, steps=60, trained=True)
    begun = next(e["step"] for e in events if e.get("phase") == "search")
    assert begun == 10  # a tenth of 60 steps, logged every tenth
    assert not [e for e in events if e["event"] == "warning"]


@pytest.mark.parametrize(
    ("steps", "trained", "cadence", "first_step"),
    [(60, False, 2, 0.1), (600, False, 4, 5 / 90), (374, True, 4, 5 / 84), (10_000, True, 8, 0.04)],
)
def test_a_short_search_moves_more_often_and_further(
    steps: int,
    trained: bool,
    cadence: int,
    first_step: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, example = Residual(), torch.zeros(1, 3, SIZE, SIZE)
    pruner = DSAPruner(model, example, dsa_hw.FlopsBudget(0.5), steps, trained=trained)
    assert pruner.cadence == cadence
    moved: list[float] = []
    monkeypatch.setattr(pruner._mover, "move", lambda g, v, step: moved.append(step))
    begin = round(steps * (0.1 if trained else 0.4))
    pruner._search_from = pruner._steps = begin
    while not moved:
        pruner.step(lambda: model(example).sum())
    assert moved[0] == pytest.approx(first_step * (1 - 0.9 * pruner.progress), rel=0.01)


def test_too_short_a_search_is_told() -> None:
    events: list[dict] = []
    _, pruner = search(dsa_hw.FlopsBudget(0.5), events=events, steps=1)
    pruner.finish()
    assert any("never began" in e.get("message", "") for e in events)


def test_resume_continues_bit_for_bit() -> None:
    whole_model, whole = search(dsa_hw.FlopsBudget(0.5), steps=40)
    torch.manual_seed(0)
    model, toy, criterion = Residual(), Toy(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    example = torch.zeros(1, 3, SIZE, SIZE)
    first = DSAPruner(model, example, dsa_hw.FlopsBudget(0.5), total_steps=40)
    for _ in range(25):
        run_step(model, optimizer, first, toy, criterion)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), first.state_dict()))
    again = Residual()
    second = DSAPruner(again, example, dsa_hw.FlopsBudget(0.5), total_steps=40)
    again.load_state_dict(saved[0])
    new_optimizer = torch.optim.SGD(again.parameters(), lr=0.05, momentum=0.9)
    new_optimizer.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    for _ in range(15):
        run_step(again, new_optimizer, second, toy, criterion)
    assert torch.equal(second.keep_ratios, whole.keep_ratios)
    for name, value in whole_model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_excluded_groups_keep_all(graph: DeployedGraph) -> None:
    _, pruner = search(dsa_hw.FlopsBudget(0.6), steps=60, exclude=["a1"])
    found = pruner.finish_with_report()
    index = [g.name for g in pruner.coupling.groups].index("a1")
    assert found.allocation.widths[index] == graph.dense_widths[index]
    assert found.keep_ratios[index] == 1.0


def test_validation_batches_leave_running_statistics_alone() -> None:
    settings = SearchSettings(validation_every=1, warmup=(0.0, 0.0))
    torch.manual_seed(0)
    model, example = Residual(), torch.zeros(1, 3, SIZE, SIZE)
    pruner = DSAPruner(model, example, dsa_hw.FlopsBudget(0.5), 10, settings=settings)
    before = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    x, y = Toy().batch()
    for _ in range(4):
        pruner.step(lambda: nn.functional.cross_entropy(model(x), y))
    for name, value in model.named_buffers():
        if name in before:
            assert torch.equal(value, before[name])


def test_infeasible_targets_say_the_least(table: LatencyTable) -> None:
    with pytest.raises(dsa_hw.InfeasibleBudget, match="the least this network can have"):
        search(LatencyBudget(table, 1e-6), steps=4)


def test_a_refused_budget_leaves_model_and_pruner_as_they_were(table: LatencyTable) -> None:
    model = Residual()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(dsa_hw.InfeasibleBudget):
        DSAPruner(model, EIGHT[:1], FlopsBudget(1e-6, 8), 10)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    pruner = DSAPruner(model, EIGHT[:1], FlopsBudget(0.5, 8), 10)
    budgets = pruner.budgets
    with pytest.raises(dsa_hw.InfeasibleBudget):
        pruner.retarget(FlopsBudget(1e-6, 8))
    assert pruner.budgets is budgets


def test_one_bad_batch_does_not_end_a_search() -> None:
    """A validation loss that is not finite moves nothing, and is told."""
    events: list[dict] = []
    model = Residual()
    settings = SearchSettings(warmup=(0.0, 0.0), validation_every=1)
    pruner = DSAPruner(model, EIGHT[:1], FlopsBudget(0.5, 8), 20, settings=settings,
                       on_event=events.append)  # fmt: skip
    for step in range(20):
        bad = float("nan") if step == 7 else 1.0
        pruner.step(lambda bad=bad: bad * model(EIGHT + 1.0).square().mean())
    assert torch.isfinite(pruner.keep_ratios).all()
    assert (pruner.keep_ratios < 1.0).any()
    told = [e["message"] for e in events if e["event"] == "warning"]
    assert any(m.startswith("1 gradients") for m in told), told


def moved_by(factor: float, half: bool, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What reaches the mover of a loss times ``factor``, at float32 or under float16 autocast."""
    torch.manual_seed(0)
    model, (x, y) = Residual(), Toy().batch()
    settings = SearchSettings(warmup=(0.0, 0.0), validation_every=1)
    pruner = DSAPruner(model, EIGHT[:1], FlopsBudget(0.5, 8), 100, settings=settings)
    with torch.no_grad():
        pruner.keep_ratios.mul_(0.7)
    seen: list[Tensor] = []
    monkeypatch.setattr(pruner._mover, "move", lambda g, v, step: seen.append(g.clone()))

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=half):
            return factor * nn.functional.cross_entropy(model(x).float(), y)

    while len(seen) < 9:  # up to seven without a move, until the scale fits
        pruner.step(loss)
    return seen[-1]


@pytest.mark.parametrize("factor", [1e-5, 1.0, 1e5])
def test_a_half_precision_gradient_is_that_of_float32(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients that float16 cannot hold (below 6e-8, above 65,504) are scaled into its range."""
    exact = moved_by(factor, False, monkeypatch)
    found = moved_by(factor, True, monkeypatch)
    assert float(exact.abs().max()) > 0
    # float16 has three digits; sums of thousands of such products keep two of them
    assert float((found - exact).norm() / exact.norm()) < 0.05


def test_hard_masks_in_a_search(graph: DeployedGraph) -> None:
    settings = SearchSettings(masks="hard", mask_training=True)
    _, pruner = search(dsa_hw.FlopsBudget(0.5), settings=settings, steps=60)
    flat = pruner._masks.store.flat
    assert flat is not None
    assert set(flat.unique().tolist()) == {0.0, 1.0}
    widths = pruner.finish_with_report().allocation.widths.tolist()
    budget = flops_budget(graph, 1.0)
    assert count(budget, widths) <= 0.5 * count(budget, graph.dense_widths)


def test_warnings_reach_a_loop_without_a_history() -> None:
    model = Residual()
    pruner = DSAPruner(model, EIGHT[:1], FlopsBudget(0.5, 8), 16)

    def steps() -> None:
        for _ in range(16):
            pruner.step(lambda: model(EIGHT).square().mean() * 0.0 + 1.0)

    with pytest.warns(dsa_hw.SearchWarning, match="has not started to fall"):
        steps()


def test_keep_ratios_stay_within_what_the_device_allows(table: LatencyTable, graph) -> None:
    dense_budget, choices = LatencyBudget(table, 1.0).bind(graph)
    least, dense = (count(dense_budget, w) for w in (choices.least.tolist(), graph.dense_widths))
    _, pruner = search(LatencyBudget(table, least + 0.05 * (dense - least)))
    ratios = pruner.keep_ratios.detach().numpy()
    assert (ratios <= 1.0).all()
    assert (ratios >= choices.least / choices.dense - 1e-6).all()
    assert np.isfinite(ratios).all()
