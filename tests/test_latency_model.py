"""The latency model: exact at knots, differentiable between them, calibrated, never silent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Residual
from fake_device import STEP, FakeDevice, FakeRunner, conv_ms, network_ms
from torch import Tensor, nn

from dsa_hw.budgets import LatencyBudget, ModelledLatency, count, flops_budget, params_budget
from dsa_hw.calibration import LEAST_SCALE, calibrate
from dsa_hw.choices import random_off_steps
from dsa_hw.coupling import find_coupling
from dsa_hw.deployed import DeployedGraph, export_onnx
from dsa_hw.errors import UserError
from dsa_hw.latency_model import LatencyModel
from dsa_hw.pipeline import unknown_operations_warning
from dsa_hw.profiling import ProfiledNetwork, latency_model, profile_network
from profilers.errors import MissingMeasurement
from profilers.table import LatencyTable, LayerKey
from profilers.timing import Runner


@pytest.fixture(scope="module")
def graph() -> DeployedGraph:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(1, 3, 16, 16)
    return DeployedGraph(export_onnx(model, x), find_coupling(model, x))


def fresh_table() -> LatencyTable:
    return LatencyTable(dict(FakeDevice().provenance()) | {"reference_ms": 1.0})


def reference_table() -> LatencyTable:
    """Reference time of the fake device, so that drift is exactly 1."""
    device, table = FakeDevice(), fresh_table()
    from profilers.collect import nominal_reference_ms

    table.provenance["reference_ms"] = nominal_reference_ms(device)
    return table


@pytest.fixture(scope="module")
def profiled(graph: DeployedGraph) -> tuple[ProfiledNetwork, LatencyTable]:
    table = reference_table()
    return profile_network(graph, FakeDevice(), table, networks=12, rounds=2), table


def widths_on_steps(profiled: ProfiledNetwork, seed: int) -> tuple[int, ...]:
    return profiled.latency.choices.random(np.random.default_rng(seed))


def test_steps_are_found(profiled) -> None:
    found, _ = profiled
    assert found.latency.steps["conv"] == STEP
    assert found.latency.steps["pointwise"] == STEP


def test_prediction_of_networks_it_has_not_seen(profiled, graph: DeployedGraph) -> None:
    found, _ = profiled
    for seed in range(20):
        widths = widths_on_steps(found, 1000 + seed)
        truth = 0.01 + network_ms(graph.resized(widths))
        predicted = float(found.latency.model.staircase_ms(torch.tensor(widths).float()))
        # the fake device charges every layer by a bilinear function; only the ridge is in the way
        assert predicted == pytest.approx(truth, rel=0.01)


def test_prediction_is_exact_at_knots(profiled, graph: DeployedGraph) -> None:
    found, table = profiled
    model = LatencyModel(graph, table, found.latency.choices, found.latency.steps)
    dense = torch.tensor(graph.dense_widths).float()
    per_layer = model.layer_ms(dense)
    for layer, ms in zip(graph.layers, per_layer.tolist(), strict=True):
        key = LayerKey(
            layer.spec,
            round(layer.cin(graph.dense_widths)),
            round(layer.cout(graph.dense_widths)),
        )
        assert ms == pytest.approx(table.measurement(key).median_ms, rel=1e-5)


def test_gradient_matches_finite_differences(profiled, graph: DeployedGraph) -> None:
    found, _ = profiled
    model = found.latency.model
    start = torch.tensor(graph.dense_widths).float() * 0.83 + 0.37  # between knots
    widths = start.clone().requires_grad_()
    model.predict_ms(widths).backward()
    for group in range(len(start)):
        step = torch.zeros_like(start)
        step[group] = 0.25
        slope = (model.predict_ms(start + step) - model.predict_ms(start - step)) / 0.5
        assert widths.grad is not None
        # float32 latencies of about 0.1 ms differ by 1e-8 at the least: 1e-5 relative to slopes
        assert float(widths.grad[group]) == pytest.approx(float(slope), rel=0.02, abs=1e-6)


def test_batch_equals_one_by_one(profiled) -> None:
    found, _ = profiled
    model = found.latency.model
    many = torch.tensor([widths_on_steps(found, s) for s in range(16)]).float()
    single = torch.stack([model.staircase_ms(w) for w in many])
    torch.testing.assert_close(model.staircase_ms(many), single)


def test_widths_between_steps_cost_the_next_step(profiled, graph: DeployedGraph) -> None:
    model = profiled[0].latency.model
    dense = torch.tensor(graph.dense_widths).float()
    on, below = dense.clone(), dense.clone()
    on[0], below[0] = 24.0, 19.0
    layers = [model.layer_ms(w, staircase=True) for w in (on, below)]
    torch.testing.assert_close(layers[0], layers[1])


def test_slower_networks_than_layers_are_learned_by_calibration(graph: DeployedGraph) -> None:
    table = reference_table()
    found = profile_network(graph, FakeDevice(slowdown=1.3), table, networks=16, rounds=2)
    coefficients = found.latency.calibration.coefficients
    for layer in graph.layers:
        if layer.spec.kind == "conv":  # the ridge pulls toward 1
            assert coefficients.scale(layer.spec) == pytest.approx(1.3, rel=0.1)
    assert found.latency.calibration.heldout_mape_pct < 2.0


def test_large_maps_that_are_slower_in_networks_get_their_own_scales(graph: DeployedGraph) -> None:
    def inside(cin: int, cout: int, pixels: int, taps: int) -> float:
        return conv_ms(cin, cout, pixels, taps) * (1.5 if pixels > 64 else 1.0)

    found = profile_network(
        graph, FakeDevice(inside=inside), reference_table(), networks=32, rounds=2
    )
    for seed in range(20):
        widths = widths_on_steps(found, 1000 + seed)
        truth = 0.01 + network_ms(graph.resized(widths), inside)
        predicted = float(found.latency.model.staircase_ms(torch.tensor(widths).float()))
        assert predicted == pytest.approx(truth, rel=0.01)


def test_no_kind_of_layer_is_priced_away(graph: DeployedGraph) -> None:
    def inside(cin: int, cout: int, pixels: int, taps: int) -> float:
        return conv_ms(cin, cout, pixels, taps) if pixels > 64 else 0.0

    found = profile_network(
        graph, FakeDevice(inside=inside), reference_table(), networks=32, rounds=2
    )
    coefficients = found.latency.calibration.coefficients
    scales = [coefficients.scale(layer.spec) for layer in graph.layers]
    assert min(scales) == pytest.approx(LEAST_SCALE)


def test_below_the_first_step_less_may_cost_less() -> None:
    """Inputs below one block are not padded; the outputs then have to be laid out anew."""

    def alone(cin: int, cout: int, pixels: int, taps: int) -> float:
        blocks = [
            cin if cin < STEP else math.ceil(cin / STEP) * STEP,
            math.ceil(cout / STEP) * STEP,
        ]
        return 0.002 + 2e-8 * blocks[0] * blocks[1] * pixels * taps

    def inside(cin: int, cout: int, pixels: int, taps: int) -> float:
        return alone(cin, cout, pixels, taps) + (2e-7 * STEP * pixels if cout < STEP else 0.0)

    torch.manual_seed(0)
    model, x = Residual(2 * STEP), torch.randn(1, 3, 16, 16)
    narrow = DeployedGraph(export_onnx(model, x), find_coupling(model, x))
    device = FakeDevice(charge=alone, inside=inside)
    found = profile_network(narrow, device, reference_table(), networks=32, rounds=2)
    assert found.latency.steps["conv"] == STEP
    rng = np.random.default_rng(7)
    for _ in range(20):
        widths = random_off_steps(narrow, found.latency.choices, rng)
        truth = 0.01 + network_ms(narrow.resized(widths), inside)
        predicted = float(found.latency.model.staircase_ms(torch.tensor(widths).float()))
        assert predicted == pytest.approx(truth, rel=0.05)
    coefficients = found.latency.calibration.coefficients
    assert coefficients.below_step_ms == pytest.approx(2e-7, rel=0.25)


TIMES = ("median_ms", "p10_ms", "p90_ms")


def test_rescaling_all_times_rescales_predictions(profiled, graph: DeployedGraph) -> None:
    found, table = profiled
    doubled = LatencyTable(dict(table.provenance))
    for key, rounds in table.rounds.items():
        doubled.rounds[key] = [
            dataclasses.replace(
                r, taken=dataclasses.replace(r.taken, median_ms=2 * r.taken.median_ms)
            )
            for r in rounds
        ]
    again = latency_model(graph, doubled).model
    widths = torch.tensor(widths_on_steps(found, 5)).float()
    expected = 2 * found.latency.model.predict_ms(widths)
    torch.testing.assert_close(again.predict_ms(widths), expected, rtol=1e-4, atol=0)


def test_missing_measurements_are_named(profiled, graph: DeployedGraph) -> None:
    found, table = profiled
    key = next(k for k in table.layers() if k.spec == graph.layers[0].spec)
    lacking = LatencyTable(dict(table.provenance))
    lacking.rounds = {k: v for k, v in table.rounds.items() if k != key}
    with pytest.raises(MissingMeasurement, match=r"no measurement of conv .* python -m dsa_hw"):
        LatencyModel(graph, lacking, found.latency.choices, found.latency.steps)
    with pytest.raises(MissingMeasurement, match="python -m dsa_hw"):
        LatencyBudget(fresh_table(), 1.0).bind(graph)


def test_the_least_network_pays_at_least_its_layers(graph: DeployedGraph) -> None:
    """Also where networks get slower with their weights faster than any form of the model: a
    target below that of the least network has to be refused, not met by a negative prediction."""

    def inside(cin: int, cout: int, pixels: int, taps: int) -> float:
        return conv_ms(cin, cout, pixels, taps) + 3e-9 * taps * (cin * cout) ** 2

    found = profile_network(
        graph, FakeDevice(inside=inside), reference_table(), networks=32, rounds=2
    )
    model = found.latency.model
    least = torch.as_tensor(found.latency.choices.least).float()
    layers = float(model.layer_ms(least, staircase=True).sum())
    assert 0.0 < layers <= float(model.staircase_ms(least)) + 1e-9


def test_a_budget_fits_its_table_once(graph: DeployedGraph) -> None:
    """What another process appends in the middle of a run must not change the run's model."""
    table = reference_table()
    found = profile_network(graph, FakeDevice(), table, networks=12, rounds=2)
    budget = LatencyBudget(table, 1.0)
    given = LatencyBudget(table, 1.0, latency=found.latency)
    before = [count(b.bind(graph)[0], graph.dense_widths) for b in (budget, given)]
    for key in table.networks():
        table.rounds[key] = [
            (dataclasses.replace(taken, median_ms=2 * taken.median_ms), reference)
            for taken, reference in table.rounds[key]
        ]
    assert [count(b.bind(graph)[0], graph.dense_widths) for b in (budget, given)] == before
    bound, _ = given.bind(graph)
    assert isinstance(bound, ModelledLatency)
    assert bound.model is found.latency.model
    later = count(LatencyBudget(table, 1.0).bind(graph)[0], graph.dense_widths)
    assert later > 1.3 * before[0]


def test_a_model_of_another_network_is_refused(graph: DeployedGraph, profiled) -> None:
    wide, x = Residual(48), torch.randn(1, 3, 16, 16)
    other = DeployedGraph(export_onnx(wide, x), find_coupling(wide, x))
    with pytest.raises(UserError, match="of another network"):
        LatencyBudget(profiled[1], 1.0, latency=profiled[0].latency).bind(other)


def test_calibration_reports_errors_of_networks_left_out(profiled, graph: DeployedGraph) -> None:
    found, table = profiled
    every = list(table.networks())
    points = calibrate(found.latency.model, table, every).points
    keys = [key for key in every if found.latency.choices.allow(key.widths)]
    assert 4 <= len(keys) < len(every)
    assert [p.measured_ms for p in points] == [table.measurement(k).median_ms for k in keys]
    assert found.latency.calibration.heldout_mape_pct < 1.0


def test_counts_match_torch(graph: DeployedGraph) -> None:
    model = Residual()
    layers = (nn.Conv2d, nn.Linear)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, layers))
    assert count(params_budget(graph, 1.0), graph.dense_widths) == weights
    operations = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module.weight, Tensor)
        operations.append(2 * output[0, 0].numel() * module.weight.numel())

    for module in model.modules():
        if isinstance(module, layers):
            module.register_forward_hook(record)
    model(torch.zeros(1, 3, 16, 16))
    assert count(flops_budget(graph, 1.0), graph.dense_widths) == sum(operations)


def test_profiling_again_measures_nothing(graph: DeployedGraph, profiled) -> None:
    _, table = profiled
    device = FakeDevice()
    again = profile_network(graph, device, table, networks=12, rounds=2)
    assert again.collected.measured == 0
    assert again.collected.reused > 50
    assert device.opened == 0


class Wavy(nn.Module):
    """A network with an operation that no deployed vision network has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sin(self.conv(x)).mean((2, 3)))


def test_unknown_operations_are_named() -> None:
    torch.manual_seed(0)
    model, x = Wavy(), torch.randn(1, 3, 8, 8)
    graph = DeployedGraph(export_onnx(model, x), find_coupling(model, x))
    assert graph.unknown_operations == ("Sin",)
    assert "Sin" in unknown_operations_warning(graph)[0]
    assert {o.kind for o in graph.operations} >= {"other"}


def test_widths_between_steps_may_cost_more_inside_a_network(graph: DeployedGraph) -> None:
    extra = 1.2

    def network_charge(cin: int, cout: int, pixels: int, taps: int) -> float:
        return conv_ms(cin, cout, pixels, taps) * (extra if cout % STEP and cout > 10 else 1.0)

    class Reordering(FakeDevice):
        """Layers alone do not pay for it."""

        @contextmanager
        def open(self, model: bytes | Path) -> Iterator[Runner]:
            yield FakeRunner(0.01 + network_ms(model, network_charge))

    table = reference_table()
    found = profile_network(graph, Reordering(), table, networks=24, rounds=2)
    fitted = found.latency.calibration.coefficients.off_step
    assert fitted == pytest.approx(extra - 1.0, rel=0.15)
    assert found.latency.calibration.heldout_mape_pct < 1.0  # on steps, as before
    assert len(found.latency.calibration.points) <= 24


class Restless(FakeDevice):
    """FAKE DEVICE (test): a round of a whole network is off by a tenth either way; layers' are
    not."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    @contextmanager
    def open(self, model: bytes | Path) -> Iterator[Runner]:
        with super().open(model) as runner:
            yield FakeRunner(runner.elapsed_ms(1) * float(np.exp(self.rng.normal(0.0, 0.1))))


def test_networks_with_wide_intervals_get_more_rounds(graph: DeployedGraph, profiled) -> None:
    quiet, noisy = profiled[1], reference_table()
    profile_network(graph, Restless(), noisy, networks=12, rounds=2)
    networks = [key for key in noisy.networks() if graph.digest == key.network]
    assert all(len(quiet.rounds[key]) == 4 for key in networks)
    assert sum(len(noisy.rounds[key]) >= 12 for key in networks) > len(networks) / 2
