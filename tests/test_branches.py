"""Whole residual branches: masked, cut, exported, priced, rounded, and loaded again."""

from __future__ import annotations

import copy
import functools
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torchvision
from conftest import Residual, randomize_norms
from fake_device import FakeDevice
from torch import Tensor, nn

import dsa_hw
from dsa_hw.allocation.allocate import allocate
from dsa_hw.allocation.rounding import Constraint, round_widths
from dsa_hw.cost.choices import WidthChoices, width_choices
from dsa_hw.cost.counted import count, flops_budget, params_budget, uniform_choices
from dsa_hw.cost.latency.budget import LatencyBudget, ModelledLatency
from dsa_hw.cost.latency.coefficients import Coefficients
from dsa_hw.cost.latency.model import LatencyModel
from dsa_hw.cost.latency.profiling import calibration_networks, latency_model, profile_network
from dsa_hw.cost.latency.surfaces import table_requests
from dsa_hw.cost.memory import PeakMemory
from dsa_hw.deployment.exported import conv_shapes
from dsa_hw.models.cifar import CifarMobileNetV2, CifarResNet
from dsa_hw.network.branches.branch import removed_branches
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.forward import outputs_of
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.network.inventory import take_inventory
from dsa_hw.network.removal import remove_channels
from dsa_hw.pipeline.proof import masked_difference
from dsa_hw.pipeline.pruner import DSAPruner
from dsa_hw.search.holding import ConstraintMethod
from dsa_hw.search.settings import MaskKind, SearchSettings
from dsa_hw.surgery.saved import load_pruned, save_pruned
from dsa_hw.worth.values import REMOVED, closeness, kept_importance
from profilers.collect import nominal_reference_ms
from profilers.table import LatencyTable, LayerKey
from profilers.timing import Round


def cifar_resnet() -> nn.Module:
    return CifarResNet((2, 2), (16, 32), 10)


def cifar_mobilenet() -> nn.Module:
    return CifarMobileNetV2(10, ((4, 16, 3, 1), (4, 24, 2, 2)), last_width=32)


def resnet_of(block: type, *blocks: int) -> nn.Module:
    return torchvision.models.ResNet(block, list(blocks), num_classes=10)


def bottlenecks() -> nn.Module:
    return resnet_of(torchvision.models.resnet.Bottleneck, 3, 1, 1, 1)


def basic_blocks() -> nn.Module:
    return resnet_of(torchvision.models.resnet.BasicBlock, 2, 1, 1, 1)


def squeezed() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    settings = [MBConvConfig(4, 3, 1, 16, 16, 2, 1.0, 1.0)]
    return EfficientNet(settings, dropout=0.0, stochastic_depth_prob=0.2, num_classes=10)


def inverted() -> nn.Module:
    settings = [[4, 16, 3, 1], [4, 24, 2, 2]]
    return torchvision.models.MobileNetV2(10, inverted_residual_setting=settings)


def regnet() -> nn.Module:
    """regnetx_002's blocks, fewer of them."""
    regnet = pytest.importorskip("timm.models.regnet", reason="timm is an optional extra")
    config = regnet.RegNetCfg(w0=24, wa=16.0, wm=1.5, group_size=8, depth=5)
    return regnet.RegNet(config, num_classes=10)


class Spatial(nn.Module):
    """A branch that begins with a depthwise layer on the stream itself, and one without inner
    channels, which nothing can remove."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.dw = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up = nn.Conv2d(16, 48, 1)
        self.down = nn.Conv2d(48, 16, 1)
        self.scale = nn.Parameter(torch.full((1, 16, 1, 1), 0.5))
        self.other = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(torch.relu(self.up(self.dw(x))))
        x = torch.relu_(x)
        x = x + self.other(x)
        return self.head(x.mean((2, 3)))


MODELS = {
    "cifar_resnet": (cifar_resnet, 16),
    "cifar_mobilenet": (cifar_mobilenet, 16),
    "bottlenecks": (bottlenecks, 32),
    "basic_blocks": (basic_blocks, 32),
    "squeezed": (squeezed, 32),
    "mobilenet_v2": (inverted, 32),
    "regnetx": (regnet, 32),
    "flat": (Residual, 16),
    "spatial": (Spatial, 16),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    build, size = MODELS[name]
    torch.manual_seed(0)
    model = randomize_norms(build()).eval()
    return model, torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


@functools.cache
def inventory(name: str) -> DeployedGraph:
    """With branches that may be removed; its models must not be changed."""
    model, x = built(name)
    return take_inventory(model, x, remove_branches=True)


def without(graph: DeployedGraph, *names: str) -> list[int]:
    """Dense widths, but for these branches."""
    widths = list(graph.dense_widths)
    for branch in graph.branches:
        if branch.name in names:
            for group in branch.groups:
                widths[group] = 0
    return widths


def keep_of(graph: DeployedGraph, widths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    keep = []
    for group, width in zip(graph.coupling.groups, widths, strict=True):
        kept = np.zeros(group.atoms, bool)
        kept[rng.permutation(group.atoms)[: width // group.atom_channels]] = True
        keep.append(kept)
    return keep


@pytest.mark.parametrize("name", MODELS)
def test_removal_equals_masking_and_leaves_nothing_in_the_graph(name: str) -> None:
    """Every second branch goes, and half of the channels of all else."""
    model, x = built(name)
    graph = inventory(name)
    assert graph.branches
    assert not graph.fixed_branches
    gone = [branch for branch in graph.branches][:: 2 if len(graph.branches) > 1 else 1]
    widths = without(graph, *(b.name for b in gone))
    for index, group in enumerate(graph.coupling.groups):
        if widths[index] and not group.frozen and group.atoms > 1:
            widths[index] = group.atoms // 2 * group.atom_channels
    keep = keep_of(graph, widths)
    before = outputs_of(model, x)
    small = remove_channels(model, graph.coupling, keep, graph.branches)
    scale = max(1.0, float(outputs_of(small, x).abs().max()))
    assert masked_difference(model, small, graph, keep, x) <= 1e-4 * scale
    torch.testing.assert_close(outputs_of(model, x), before)  # masks and gates left no trace
    assert float((outputs_of(small, x) - before).abs().max()) > 1e-3 * scale

    exported = export_onnx(small, x)
    layers = {n.input[1].removesuffix(".weight") for n in exported.graph.node
              if n.op_type in ("Conv", "Gemm")}  # fmt: skip
    inside = {layer for branch in gone for layer in branch.layers}
    assert layers == {layer.name for layer in graph.layers} - inside
    adds = [sum(n.op_type == "Add" for n in g.graph.node) for g in (graph.model, exported)]
    assert adds[0] - adds[1] == len(gone)
    session = ort.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    got = torch.as_tensor(np.asarray(session.run(None, {"input": x.numpy()})[0]))
    assert float((got - outputs_of(small, x)).abs().max()) <= 1e-4 * scale

    resized = onnx.load_from_string(graph.resized(widths))
    assert conv_shapes(resized) == conv_shapes(exported)
    assert [n.op_type for n in resized.graph.node] == [n.op_type for n in exported.graph.node]
    used = {name for node in resized.graph.node for name in node.input}
    assert {i.name for i in resized.graph.initializer} <= used


@pytest.mark.parametrize("name", ["cifar_resnet", "basic_blocks", "cifar_mobilenet", "flat"])
def test_what_is_left_trains_on(name: str) -> None:
    """In-place activations behind a removed add must not write over what others have kept."""
    model, x = built(name)
    graph = inventory(name)
    widths = without(graph, *(b.name for b in graph.branches))
    small = remove_channels(model, graph.coupling, keep_of(graph, widths), graph.branches).train()
    small(x.expand(4, -1, -1, -1)).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    names = set(dict(model.named_parameters()))
    assert set(dict(small.named_parameters())) < names
    assert copy.deepcopy(small).training


def test_branches_that_must_stay() -> None:
    model, x = built("cifar_resnet")
    names = [b.name for b in inventory("cifar_resnet").branches]
    assert names == ["stages.0.0", "stages.0.1", "stages.1.1"]  # stages.1.0 projects its shortcut
    left = take_inventory(model, x, exclude=["stages.0.1.conv2"], remove_branches=True)
    assert [b.name for b in left.branches] == ["stages.0.0", "stages.1.1"]
    assert take_inventory(model, x).branches == ()
    # the second branch is depthwise on the stream, and has no channels of its own
    assert [b.layers for b in inventory("flat").branches] == [("a1", "a2")]


def test_a_branch_that_cannot_be_traced_is_named() -> None:
    class Dynamic(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() < 1e9 else -x)

    torch.manual_seed(0)
    model = Dynamic()
    graph = inventory("flat")
    from dsa_hw.network.inventory import find_branches, fixed_branches_warning

    found = find_branches(model, graph.coupling, graph.regions())
    assert found.removable == ()
    (warning,) = fixed_branches_warning(graph.with_branches((), found.fixed))
    assert "a1" in warning
    assert "the model does not run under torch.fx (TraceError: symbolically traced" in warning


def test_groups_of_a_branch_are_zero_together() -> None:
    graph = inventory("bottlenecks")
    first = graph.branches[0]
    assert len(first.groups) == 2
    widths = list(graph.dense_widths)
    widths[first.groups[1]] = 0
    with pytest.raises(ValueError, match="zero together"):
        graph.resized(widths)
    assert not graph.can_have(widths)
    assert graph.can_have(without(graph, first.name))
    assert not graph.with_branches(()).can_have(without(graph, first.name))


# -- costs -------------------------------------------------------------------------------------

STEP = 8


def formula_table(*graphs: DeployedGraph) -> tuple[LatencyTable, dict[str, int]]:
    """Times by formula for everything that these graphs' models read."""
    table = LatencyTable({"reference_ms": 1.0})
    steps = {layer.spec.kind: STEP for graph in graphs for layer in graph.layers}
    for graph in graphs:
        for request in table_requests(graph, width_choices(graph, steps), steps):
            key = request.key
            assert isinstance(key, LayerKey)
            if key not in table:
                ms = 0.01 + key.spec.flops(key.cin, key.cout) / 1e8
                table.append(key, Round(ms, ms, ms, 1, 1), 1.0)
    return table, steps


def formula_model(graph: DeployedGraph, *others: DeployedGraph) -> LatencyModel:
    table, steps = formula_table(graph, *others)
    kinds = {o.kind for g in (graph, *others) for o in g.operations}
    rates = {kind: 1e-6 * (1 + i) for i, kind in enumerate(sorted(kinds))} | {"weights": 1e-8}
    scales = {kind: 1.1 for kind in steps}
    choices = width_choices(graph, steps)
    return LatencyModel(graph, table, choices, steps, Coefficients(0.05, scales, rates))


@pytest.mark.parametrize("name", ["cifar_resnet", "bottlenecks", "cifar_mobilenet", "spatial"])
def test_costs_at_width_zero_are_those_of_the_smaller_network(name: str) -> None:
    model, x = built(name)
    graph = inventory(name)
    widths = without(graph, graph.branches[0].name)
    keep = keep_of(graph, widths)
    small = remove_channels(model, graph.coupling, keep, graph.branches)
    smaller = take_inventory(small, x)
    latency = formula_model(graph, smaller)
    truth = formula_model(smaller, graph)
    here, there = torch.tensor(widths).float(), torch.tensor(smaller.dense_widths).float()
    for predict in ("predict_ms", "staircase_ms"):
        found = getattr(latency, predict)(here)
        torch.testing.assert_close(found, getattr(truth, predict)(there), rtol=1e-5, atol=0)
    assert latency.layer_ms(here).count_nonzero() == len(smaller.layers)
    for make in (flops_budget, params_budget, PeakMemory):
        ours, theirs = make(graph, 1.0), make(smaller, 1.0)
        assert count(ours, widths) == count(theirs, smaller.dense_widths)
        smooth = ours.cost(here)
        torch.testing.assert_close(smooth, ours.charged(here))


@pytest.mark.parametrize("name", ["cifar_resnet", "bottlenecks", "spatial"])
def test_costs_without_removal_are_what_they_are_without_the_option(name: str) -> None:
    """At widths on steps gates are 1; counts agree bit for bit, latencies as float32 does."""
    on = inventory(name)
    off = on.with_branches(())
    assert off.digest == on.digest
    assert off.branches == off.branch_operations == ()
    plain, gated = formula_model(off), formula_model(on)
    rng = np.random.default_rng(0)
    widths = [plain.choices.random(rng) for _ in range(16)]
    many = torch.tensor(widths).float()
    for predict in ("predict_ms", "staircase_ms"):
        torch.testing.assert_close(
            getattr(plain, predict)(many), getattr(gated, predict)(many), rtol=1e-6, atol=0
        )
    assert gated.choices.without_removal().widths == plain.choices.widths
    for make in (flops_budget, params_budget, PeakMemory):
        assert torch.equal(make(off, 1.0).charged(many), make(on, 1.0).charged(many))


def test_prediction_is_linear_between_nothing_and_the_narrowest_branch() -> None:
    graph = inventory("bottlenecks")
    latency = formula_model(graph)
    branch = graph.branches[0]
    widths = torch.tensor(graph.dense_widths).float()
    parts = torch.linspace(0, 1, 9)
    rows = widths.repeat(9, 1)
    for group in branch.groups:
        rows[:, group] = parts * float(latency.choices.narrowest[group])
    ms = latency.predict_ms(rows)
    line = torch.lerp(ms[0], ms[-1], parts)
    torch.testing.assert_close(ms, line, rtol=1e-5, atol=0)
    assert ms[-1] > ms[0]
    torch.testing.assert_close(ms[[0, -1]], latency.staircase_ms(rows[[0, -1]]), rtol=1e-5, atol=0)
    # the gradient pulls on both internal groups, from nothing as from half a branch
    for row in (rows[0], rows[4]):
        at = row.clone().requires_grad_()
        (slope,) = torch.autograd.grad(latency.predict_ms(at), at)
        assert (slope[list(branch.groups)] > 0).all()


def test_some_calibration_networks_have_lost_branches() -> None:
    on = inventory("cifar_resnet")
    off = on.with_branches(())
    steps = {layer.spec.kind: STEP for layer in on.layers}
    networks = [calibration_networks(g, width_choices(g, steps), 40, 0) for g in (on, off)]
    lost = [key for key in networks[0] if 0 in key.widths]
    assert len(lost) >= 5
    assert all(on.can_have(key.widths) for key in networks[0])
    assert not any(0 in key.widths for key in networks[1])
    # what was measured without the option is used with it
    assert len(set(networks[0]) & set(networks[1])) >= 15


@pytest.fixture(scope="module")
def profiled() -> tuple[DeployedGraph, LatencyTable]:
    """The small residual network on the fake device, with networks that have lost branches."""
    graph = inventory("cifar_resnet")
    device = FakeDevice()
    header = dict(device.provenance()) | {"reference_ms": nominal_reference_ms(device)}
    table = LatencyTable(header)
    profile_network(graph, device, table, networks=12, rounds=2)
    return graph, table


def test_a_table_with_removed_branches_serves_a_network_that_keeps_them(profiled) -> None:
    graph, table = profiled
    off = graph.with_branches(())
    found = latency_model(off, table)
    networks = {p.widths for p in found.calibration.points}
    whole = {k.widths for k in table.networks() if 0 not in k.widths}
    assert networks == {widths for widths in whole if found.choices.allow(widths)}
    assert len(networks) < len(list(table.networks()))


# -- rounding ----------------------------------------------------------------------------------


def block_choices(*together: tuple[int, ...]) -> WidthChoices:
    inner = {g for groups in together for g in groups}
    widths = tuple((0, 16, 32, 48) if g in inner else (16, 32, 48) for g in range(5))
    return WidthChoices(widths, (16,) * 5, together)


def block_cost(launch: float):
    """A stream (group 0), a block of two internal groups (1, 2) and one of one (3), and group 4.
    A layer that is there costs ``launch``."""

    def cost(w: np.ndarray) -> np.ndarray:
        w = w.astype(float)
        pairs = ((0, 1), (1, 2), (2, 0), (0, 3), (3, 0), (0, 4))
        layers = [(launch + w[:, a] * w[:, b]) * (w[:, a] > 0) * (w[:, b] > 0) for a, b in pairs]
        return np.sum(layers, axis=0)

    return cost


TOGETHER = ((1, 2), (3,))


@pytest.mark.parametrize("solver", [10.0, 0.0])
@pytest.mark.parametrize("seed", range(6))
def test_rounding_finds_the_best_of_all_allocations(seed: int, solver: float) -> None:
    """Exhaustive search over what is allowed; the local search alone too, on so few groups."""
    rng = np.random.default_rng(seed)
    choices = block_choices(*TOGETHER)
    cost = block_cost(float(rng.uniform(0, 3000)))
    values = closeness(choices, choices.dense * rng.uniform(0.05, 1.0, 5))
    target = float(rng.uniform(0.15, 0.8)) * float(cost(choices.dense[None])[0])
    found = round_widths(choices, values, [Constraint("c", "u", cost, target)], exact=solver > 0)
    rows = np.array(list(itertools.product(*choices.widths)))
    index = np.array(list(itertools.product(*(range(len(w)) for w in choices.widths))))
    agree = (rows[:, 1] == 0) == (rows[:, 2] == 0)
    totals = np.sum([v[i] for v, i in zip(values, index.T, strict=True)], axis=0)
    best = totals[agree & (cost(rows) <= target)].max()
    assert found.value == pytest.approx(best, abs=1e-6)
    assert (found.widths[1] == 0) == (found.widths[2] == 0)
    assert found.costs[0] <= target


def test_a_branch_goes_when_its_latency_is_worth_more_than_its_value() -> None:
    """The same learned widths: what a branch's layers cost to launch decides."""
    choices = block_choices((1, 2))
    values = closeness(choices, np.array([48.0, 16.0, 16.0, 48.0, 48.0]))
    kept = {}
    for launch in (0.0, 4000.0):
        cost = block_cost(launch)
        target = 0.6 * float(cost(choices.dense[None])[0])
        limit = Constraint("c", "u", cost, target)
        kept[launch] = round_widths(choices, values, [limit]).widths.tolist()
    assert kept[0.0][1:3] == [16, 16]
    assert kept[4000.0][1:3] == [0, 0]


def test_values_of_removal() -> None:
    choices = WidthChoices(((0, 16, 32), (16, 32)), (16, 16), ((0,),))
    even = closeness(choices, np.array([16 * REMOVED**0.5, 32.0]))[0]
    assert even[0] == pytest.approx(even[1])  # the gate is half closed there
    assert closeness(choices, np.array([0.0, 32.0]))[0].argmax() == 0
    assert all(np.isfinite(v).all() for v in closeness(choices, np.zeros(2)))
    importance = kept_importance(choices, [np.ones(32), np.ones(32)], [2, 1])
    np.testing.assert_allclose(importance[0], 2 * np.log([REMOVED * 0.5, 0.5, 1.0]), rtol=1e-6)


@pytest.mark.parametrize("name", ["bottlenecks", "squeezed", "spatial"])
def test_the_integer_program_takes_gated_costs(name: str) -> None:
    """Costs stay sums over pairs of groups, so that the program proves its allocation."""
    graph = inventory(name)
    steps = {layer.spec.kind: 32 for layer in graph.layers}
    latency = formula_model(graph)
    choices = width_choices(graph, steps)
    dense = float(latency.staircase_ms(torch.tensor(graph.dense_widths).float()))
    least = float(latency.staircase_ms(torch.tensor(choices.least).float()))
    values = closeness(choices, 0.3 * choices.dense)
    limit = ModelledLatency(latency, 0.5 * (least + dense))

    def charged(widths: np.ndarray) -> np.ndarray:
        return limit.charged(torch.as_tensor(widths).float()).double().numpy()

    found = round_widths(choices, values, [Constraint("c", "ms", charged, limit.target)])
    assert found.bound is not None
    assert found.bound == pytest.approx(found.score, abs=1e-3)
    removed_branches(graph.branches, found.widths.tolist())  # or it raises


# -- the search --------------------------------------------------------------------------------


def steps_of(pruner: DSAPruner, model: nn.Module, optimizer, count: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(8, 3, 16, 16, generator=generator)
        y = torch.randint(10, (8,), generator=generator)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y))


EAGER = SearchSettings(warmup=(0.0, 0.1), validation_every=1, keep_ratio_lr=0.1, budget_ramp=0.2)


def searched(budget, steps: int = 16, settings: SearchSettings = EAGER, **options):
    torch.manual_seed(0)
    model = cifar_resnet()
    pruner = DSAPruner(model, torch.zeros(1, 3, 16, 16), budget, steps, settings=settings,
                       **options)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    steps_of(pruner, model, optimizer, steps)
    return model, pruner


@pytest.mark.parametrize(
    ("constraint", "masks"),
    [("projection", "soft"), ("admm", "sampled"), ("projection", "hard")],
)
def test_a_search_can_take_branches_to_zero(
    profiled, constraint: ConstraintMethod, masks: MaskKind
) -> None:
    """Far below what the narrowest widths cost, so that branches have to go."""
    graph, table = profiled
    budget, choices = LatencyBudget(table, 1.0).bind(graph)
    narrowest = count(budget, choices.narrowest.tolist())
    least = count(budget, choices.least.tolist())
    target = least + 0.4 * (narrowest - least)
    settings = SearchSettings(
        warmup=(0.0, 0.1), validation_every=1, keep_ratio_lr=0.1, budget_ramp=0.2,
        constraint=constraint, masks=masks, log_every=1,
    )  # fmt: skip
    events: list[dict] = []
    _, pruner = searched(
        LatencyBudget(table, target), settings=settings, remove_branches=True,
        on_event=events.append,
    )  # fmt: skip
    assert torch.isfinite(pruner.keep_ratios).all()
    gates = [e["branch_gates"] for e in events if e["event"] == "search_step"][-1]
    assert min(gates.values()) < 1.0
    found = pruner.finish_with_report()
    assert found.allocation.costs["latency"] <= target
    assert found.removed
    assert found.masked_vs_pruned_max_abs <= 1e-4
    assert found.model(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


def test_without_the_option_a_search_is_what_it_was(profiled) -> None:
    """The gates of branches that stay open change nothing, and off there are none."""
    _, off = searched(dsa_hw.FlopsBudget(0.7, 8), steps=10)
    assert off._gates is None
    assert off._masks.store._all_gates is None
    assert (off._least > 0).all()
    _, on = searched(dsa_hw.FlopsBudget(0.7, 8), steps=10, remove_branches=True)
    # nothing came near its narrowest width here, so both searches moved alike
    assert (on._branch_gates() == 1).all()
    torch.testing.assert_close(on.keep_ratios, off.keep_ratios, rtol=1e-4, atol=1e-5)


def test_resume_continues_bit_for_bit(profiled) -> None:
    graph, table = profiled
    budget, choices = LatencyBudget(table, 1.0).bind(graph)
    target = LatencyBudget(table, count(budget, choices.narrowest.tolist()))
    example = torch.zeros(1, 3, 16, 16)

    def fresh() -> tuple[nn.Module, DSAPruner, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = cifar_resnet()
        pruner = DSAPruner(model, example, target, 20, settings=EAGER, importance="taylor",
                           remove_branches=True)  # fmt: skip
        return model, pruner, torch.optim.SGD(model.parameters(), 0.05)

    model, whole, optimizer = fresh()
    steps_of(whole, model, optimizer, 12)
    saved = copy.deepcopy((model.state_dict(), whole.state_dict()))
    steps_of(whole, model, optimizer, 8, seed=1)
    again, second, new_optimizer = fresh()
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    steps_of(second, again, new_optimizer, 8, seed=1)
    assert torch.equal(second.keep_ratios, whole.keep_ratios)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_closed_loop_measures_networks_without_branches(profiled) -> None:
    graph, table = profiled
    budget, choices = LatencyBudget(table, 1.0).bind(graph)
    assert isinstance(budget, ModelledLatency)
    target = 1.05 * count(budget, choices.least.tolist())
    limit = ModelledLatency(budget.model, target)
    found = allocate(choices, closeness(choices, 0.5 * choices.dense), [limit])
    gone = removed_branches(graph.branches, found.widths.tolist())
    assert len(gone) == len(graph.branches)
    with FakeDevice().open(graph.resized(found.widths)) as runner:
        assert runner.elapsed_ms(1) == pytest.approx(found.costs["latency"], rel=0.02)


# -- loading again -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flat"])
def test_load_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    model, x = built(name)
    graph = inventory(name)
    keep = keep_of(graph, without(graph, graph.branches[0].name))
    small = remove_channels(model, graph.coupling, keep, graph.branches)
    save_pruned(tmp_path, small, graph.coupling, keep, x, branches=graph.branches)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch, dsa_hw\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_branches\n"
        f"model = test_branches.MODELS[{name!r}][0]()\n"
        f"net = dsa_hw.load_pruned(model, {str(tmp_path)!r}).eval()\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r})\n"
        f"torch.save(net(x).detach(), {str(tmp_path / 'y.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(torch.load(tmp_path / "y.pt"), outputs_of(small, x))
    plain = load_pruned(MODELS[name][0](), tmp_path)
    assert torch.equal(outputs_of(plain, x), outputs_of(small, x))


def test_uniform_choices_offer_zero_to_removable_branches_only() -> None:
    graph = inventory("cifar_resnet")
    choices = uniform_choices(graph, 8)
    zero = {g for g, widths in enumerate(choices.widths) if 0 in widths}
    assert zero == {g for branch in graph.branches for g in branch.groups}
    assert choices.together == tuple(branch.groups for branch in graph.branches)
