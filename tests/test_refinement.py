"""Knots are added where a surface bends, nowhere else, and only once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Residual
from fake_device import Charge, FakeDevice, conv_ms, network_ms

from dsa_hw.cost.latency import profiling
from dsa_hw.cost.latency.profiling import ProfiledNetwork, profile_network
from dsa_hw.network.coupling import find_coupling
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.graph import DeployedGraph
from profilers.collect import nominal_reference_ms
from profilers.grid import Grid, first_grid, refined_grid
from profilers.layers.spec import LayerSpec
from profilers.table import LatencyTable

SPEC = LayerSpec.parse("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 28x28 b1 fp32 +relu")
KINK = 100


def bent_ms(cin: int, cout: int, pixels: int, taps: int) -> float:
    """Beyond so many channels the weights leave a cache, and all costs three times as much."""
    straight = conv_ms(cin, cout, pixels, taps)
    return straight * (1.0 + 2.0 * max(0, cout - KINK) / KINK)


@pytest.fixture(scope="module")
def graph() -> DeployedGraph:
    torch.manual_seed(0)
    model, x = Residual(width=96), torch.randn(1, 3, 16, 16)
    return DeployedGraph(export_onnx(model, x), find_coupling(model, x))


def profiled_with(graph: DeployedGraph, charge: Charge) -> tuple[ProfiledNetwork, LatencyTable]:
    device = FakeDevice(charge=charge)
    table = LatencyTable(dict(device.provenance()) | {"reference_ms": nominal_reference_ms(device)})
    return profile_network(graph, device, table, networks=16, rounds=2), table


def worst_error_pct(found: ProfiledNetwork, graph: DeployedGraph, charge: Charge) -> float:
    errors = []
    for seed in range(20):
        widths = found.latency.choices.random(np.random.default_rng(1000 + seed))
        truth = 0.01 + network_ms(graph.resized(widths), charge)
        guess = float(found.latency.model.staircase_ms(torch.tensor(widths).float()))
        errors.append(100.0 * abs(guess / truth - 1.0))
    return max(errors)


def test_a_bend_is_found_and_followed(
    graph: DeployedGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    refined, table = profiled_with(graph, bent_ms)
    monkeypatch.setattr(profiling, "REFINEMENTS", 0)
    coarse, _ = profiled_with(graph, bent_ms)
    errors = [worst_error_pct(found, graph, bent_ms) for found in (coarse, refined)]
    assert errors[1] < 0.5 * errors[0]
    assert refined.collected.measured > coarse.collected.measured

    monkeypatch.undo()
    device = FakeDevice(charge=bent_ms)
    again = profile_network(graph, device, table, networks=16, rounds=2)
    assert again.collected.measured == 0
    assert device.opened == 0


def test_a_straight_surface_gets_no_more_knots(
    graph: DeployedGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "GOOD_PCT", -1.0)  # probe whatever the error is
    found, _ = profiled_with(graph, conv_ms)
    model = found.latency.model
    monkeypatch.setattr(profiling, "REFINEMENTS", 0)
    unprobed, _ = profiled_with(graph, conv_ms)
    assert model.grids == unprobed.latency.model.grids
    assert found.collected.measured > unprobed.collected.measured  # it did look


def test_a_knot_counts_when_its_whole_row_is_measured() -> None:
    first = first_grid(SPEC, (16, 128), (16, 128), 16)
    row = [(i, 96) for i in first.ins]
    measured = {*first.pairs(), *row}
    assert refined_grid(first, measured, 16).outs == (16, 32, 64, 96, 128)
    assert refined_grid(first, measured - {row[1]}, 16) == first
    assert refined_grid(first, measured, 64) == first  # 96 is on no step of 64
    column = [(96, o) for o in (*first.outs, 96)]
    both = refined_grid(first, {*measured, *column}, 16)
    assert both == Grid((16, 32, 64, 96, 128), (16, 32, 64, 96, 128))


def test_gaps_are_halved_to_a_depth() -> None:
    first = first_grid(SPEC, (512, 512), (16, 512), 16)
    grid, turns = first, 0
    while gaps := list(grid.gaps(16, first)):
        turns += 1
        for gap in gaps:
            assert gap.low < gap.middle < gap.high
            grid = grid.with_knot(gap.side, gap.middle)
    assert turns == 2
    assert {256, 320, 384, 448, 512} <= set(grid.outs)
    assert all(width % 16 == 0 for width in grid.outs)
