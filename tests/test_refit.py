"""Calibrating again near an allocation: nothing new changes nothing, a local error is found."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import Residual
from fake_device import FakeDevice, conv_ms, network_ms

from dsa_hw.cost.latency.around_allocation import refine_around
from dsa_hw.cost.latency.profiling import CalibratedModel, neighbours, profile_network, refit
from dsa_hw.network.coupling import find_coupling
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.graph import DeployedGraph
from profilers.collect import Request, collect, nominal_reference_ms
from profilers.table import LatencyTable, NetworkKey

CALL_MS = 0.01
"""What calling the fake device costs, ms."""


@pytest.fixture(scope="module")
def graph() -> DeployedGraph:
    torch.manual_seed(0)
    model, x = Residual(96), torch.randn(1, 3, 16, 16)
    return DeployedGraph(export_onnx(model, x), find_coupling(model, x))


def locally_dear_ms(cin: int, cout: int, pixels: int, taps: int) -> float:
    """One layer, inside networks alone, costs twice as much at some of its widths."""
    local = taps == 9 and cin > 3 and 60 < cout < 130
    return conv_ms(cin, cout, pixels, taps) * (2.0 if local else 1.0)


DEAR = FakeDevice(inside=locally_dear_ms)
Profiled = tuple[CalibratedModel, LatencyTable]


def profiled(graph: DeployedGraph, device: FakeDevice) -> Profiled:
    table = LatencyTable(dict(device.provenance()) | {"reference_ms": nominal_reference_ms(device)})
    return profile_network(graph, device, table, networks=24, rounds=2).latency, table


@pytest.fixture(scope="module")
def plain(graph: DeployedGraph) -> CalibratedModel:
    return profiled(graph, FakeDevice())[0]


@pytest.fixture(scope="module")
def dear_once(graph: DeployedGraph) -> Profiled:
    return profiled(graph, DEAR)


@pytest.fixture
def dear(dear_once: Profiled) -> Profiled:
    """The table is a copy: a test may measure more."""
    latency, table = dear_once
    rounds = {key: list(taken) for key, taken in table.rounds.items()}
    return latency, dataclasses.replace(table, rounds=rounds)


def time_them(graph: DeployedGraph, table: LatencyTable, networks: list[tuple[int, ...]]) -> None:
    requests = [
        Request(NetworkKey(graph.digest, w), lambda w=w: graph.resized(w)) for w in networks
    ]
    collect(table, DEAR, requests, rounds=2)


def allocation(latency: CalibratedModel) -> tuple[int, ...]:
    """About half of every group's width."""
    return tuple(min(own, key=lambda w: abs(w - 0.5 * own[-1])) for own in latency.choices.widths)


def predicted(latency: CalibratedModel, networks: list[tuple[int, ...]]) -> np.ndarray:
    widths = torch.tensor(networks, dtype=torch.float32)
    return latency.model.staircase_ms(widths).double().numpy()


def test_neighbours_are_one_step_away(plain: CalibratedModel) -> None:
    latency = plain
    start = allocation(latency)
    found = neighbours(latency, start, 6, seed=1)
    assert found[0] == start
    assert len(set(found)) == len(found) == 6
    for widths in found:
        assert latency.choices.allow(widths)
        for width, own, allowed in zip(widths, start, latency.choices.widths, strict=True):
            assert abs(allowed.index(width) - allowed.index(own)) <= 1
    assert neighbours(latency, start, 6, seed=1) == found
    assert neighbours(latency, start, 6, seed=2) != found


def test_groups_that_hardly_matter_stay(plain: CalibratedModel) -> None:
    latency = plain
    start = allocation(latency)
    found = neighbours(latency, start, 16)
    changes = []
    for group, allowed in enumerate(latency.choices.widths):
        place = allowed.index(start[group])
        near = allowed[max(0, place - 1) : place + 2]
        rows = [[*start[:group], w, *start[group + 1 :]] for w in (near[0], near[-1])]
        low, high = predicted(latency, [tuple(row) for row in rows])
        changes.append((high - low) / max(1, len(near) - 1))
    moved = [len({w[group] for w in found}) > 1 for group in range(len(start))]
    least_moved = min(c for c, m in zip(changes, moved, strict=True) if m)
    most_left = max((c for c, m in zip(changes, moved, strict=True) if not m), default=0.0)
    assert most_left < least_moved


def test_nothing_new_changes_nothing(graph: DeployedGraph, dear: Profiled) -> None:
    latency, table = dear
    around = allocation(latency)
    assert refit(latency, table, around) is latency
    time_them(graph, table, neighbours(latency, around, 8))
    once = refit(latency, table, around)
    again = refit(once, table, around)
    assert again.calibration == once.calibration


def test_a_local_error_is_corrected_by_a_refit_and_not_by_one_scale(
    graph: DeployedGraph, dear: Profiled
) -> None:
    latency, table = dear
    around = allocation(latency)
    near = neighbours(latency, around, 5, seed=0)
    time_them(graph, table, near)
    fitted = refit(latency, table, around)
    unseen = [w for w in neighbours(latency, around, 40, seed=1) if w not in near]
    truth = np.array([CALL_MS + network_ms(graph.resized(w), locally_dear_ms) for w in unseen])
    before = predicted(latency, unseen)
    scale = CALL_MS + network_ms(graph.resized(around), locally_dear_ms)
    scaled = before * scale / predicted(latency, [around])[0]
    errors = [np.abs(p / truth - 1.0).mean() for p in (before, scaled, predicted(fitted, unseen))]
    # The dear widths begin within a step of the allocation, where no scale of a layer is right on
    # both sides: what is left is the model's form, and it is less than what one scale leaves.
    assert errors[2] < errors[1] < errors[0], errors


def test_the_error_that_a_refit_reports_is_of_networks_near_the_allocation(
    graph: DeployedGraph, dear: Profiled
) -> None:
    latency, table = dear
    around = allocation(latency)
    near = neighbours(latency, around, 9)
    time_them(graph, table, near)
    points = [point.widths for point in refit(latency, table, around).calibration.points]
    assert around in points
    assert 4 <= len(points) < len(list(table.networks()))

    def away(widths: tuple[int, ...]) -> float:
        shares = np.abs(np.array(widths) - around) / graph.dense_widths
        return float(shares.max())

    assert max(map(away, points)) < 0.25


def test_a_refit_keeps_the_choices_and_the_steps(graph: DeployedGraph, dear: Profiled) -> None:
    latency, table = dear
    around = allocation(latency)
    time_them(graph, table, neighbours(latency, around, 6))
    fitted = refit(latency, table, around)
    same = {field.name for field in dataclasses.fields(CalibratedModel)} - {"model", "calibration"}
    for name in same:
        assert getattr(fitted, name) == getattr(latency, name)


def test_a_refined_model_is_measured_once(graph: DeployedGraph, dear: Profiled) -> None:
    """The networks are in the table: a run that is resumed has them, and ends with the same model.
    It errs less at the allocation than the model that had not been there."""
    latency, table = dear
    before = len(list(table.networks()))
    widths = np.array(allocation(latency))
    first = refine_around(graph, DEAR, table, latency, widths, rounds=2)
    entries = sum(map(len, table.rounds.values()))
    assert len(list(table.networks())) > before
    again = refine_around(graph, DEAR, table, latency, widths, rounds=2)
    assert sum(map(len, table.rounds.values())) == entries
    assert again.latency.calibration.coefficients == first.latency.calibration.coefficients
    true_ms = CALL_MS + network_ms(graph.resized(widths), locally_dear_ms)
    start = [allocation(latency)]
    error = abs(predicted(first.latency, start)[0] / true_ms - 1.0)
    assert error < abs(predicted(latency, start)[0] / true_ms - 1.0)
    assert first.scatter is not None
