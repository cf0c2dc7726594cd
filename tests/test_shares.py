"""Shares of the milliseconds and of the FLOPs, on devices whose charges are known."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import Residual
from fake_device import STEP, Charge, FakeDevice, network_ms
from test_latency_model import reference_table

from dsa_hw import profile
from dsa_hw.cost.latency.profiling import CalibratedModel, profile_network
from dsa_hw.cost.latency.shares import GroupShare, group_shares
from dsa_hw.network.coupling import find_coupling
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.pipeline import opening


@pytest.fixture(scope="module")
def graph() -> DeployedGraph:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(1, 3, 16, 16)
    return DeployedGraph(export_onnx(model, x), find_coupling(model, x))


def by_flops(cin: int, cout: int, pixels: int, taps: int) -> float:
    """A device on which FLOPs decide, on steps."""
    up = [math.ceil(c / STEP) * STEP if c > 3 else c for c in (cin, cout)]
    return 1e-7 * up[0] * up[1] * pixels * taps


def latency_of(graph: DeployedGraph, charge: Charge) -> CalibratedModel:
    device = FakeDevice(charge=charge)
    return profile_network(graph, device, reference_table(), networks=12, rounds=2).latency


def ratios(shares: list[GroupShare]) -> list[float]:
    return [s.ms_over_flops for s in shares]


def test_where_flops_decide_all_ratios_are_one(graph: DeployedGraph) -> None:
    shares = group_shares(graph, latency_of(graph, by_flops))
    assert len(shares) > 2
    assert sum(s.ms for s in shares) == pytest.approx(1)
    assert sum(s.flops for s in shares) == pytest.approx(1)
    assert ratios(shares) == pytest.approx([1] * len(shares), rel=0.03)


def test_shares_are_what_the_device_charges(graph: DeployedGraph) -> None:
    """Large feature maps cost three times what their FLOPs say; the sums are done here again."""

    def charge(cin: int, cout: int, pixels: int, taps: int) -> float:
        return by_flops(cin, cout, pixels, taps) * (3 if pixels == 256 else 1)

    latency = latency_of(graph, charge)
    found = {s.name: s for s in group_shares(graph, latency)}
    assert min(ratios(list(found.values()))) < 0.6
    saved = {}
    for index, group in enumerate(graph.coupling.groups):
        if group.name in found:
            own = latency.choices.widths[index]
            ends = [nearest(own, 0.4), nearest(own, 0.8)]
            networks = [[nearest(w, 0.6) for w in latency.choices.widths] for _ in ends]
            for network, width in zip(networks, ends, strict=True):
                network[index] = width
            narrow, wide = (network_ms(graph.resized(n), charge) for n in networks)
            saved[group.name] = (wide - narrow) / (ends[1] - ends[0]) * own[-1]
    for name, ms in saved.items():
        assert found[name].ms == pytest.approx(ms / sum(saved.values()), rel=0.03)


def nearest(widths: tuple[int, ...], part: float) -> int:
    return min(widths, key=lambda w: abs(w - part * widths[-1]))


def test_groups_of_two_widths_and_of_one(graph: DeployedGraph) -> None:
    latency = latency_of(graph, by_flops)
    widths = [own if len(own) == 1 else own[-2:] for own in latency.choices.widths]
    widths[0] = widths[0][-1:]
    few = dataclasses.replace(latency.choices, widths=tuple(widths))
    shares = group_shares(graph, dataclasses.replace(latency, choices=few))
    assert [s.name for s in shares] == [
        g.name for g, own in zip(graph.coupling.groups, widths, strict=True) if len(own) > 1
    ]
    assert all(s.ms > 0 and s.flops > 0 for s in shares)


def test_profile_ends_with_the_widest_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "configured_backend", lambda config: FakeDevice())
    argv = ["--model", "test_compare:small", "--input-shape", "3", "16", "16", "--rounds", "2"]
    argv += ["--table", str(tmp_path / "t.jsonl"), "--calibration-networks", "8"]
    assert profile.main(argv) == 0
    out = capsys.readouterr().out
    found = re.search(r"by group of channels: (\S+) \((\w+)\) to (\S+) \((\w+)\);", out)
    assert found is not None
    low, low_name, high, high_name = found.groups()
    assert float(low) < 1 < float(high)
    assert {low_name, high_name} <= {"stem", "a"}
