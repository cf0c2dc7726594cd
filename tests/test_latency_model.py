"""The latency model: exact at knots, differentiable between them, calibrated, never silent."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Residual
from fake_device import STEP, FakeDevice, FakeRunner, conv_ms, network_ms
from torch import Tensor, nn

from dsa_hw.cost.choices import width_choices
from dsa_hw.cost.counted import count, flops_budget, params_budget
from dsa_hw.cost.latency.budget import LatencyBudget, ModelledLatency
from dsa_hw.cost.latency.calibration import LEAST_SCALE, calibrate
from dsa_hw.cost.latency.coefficients import WEIGHTS, Coefficients, sized_kind
from dsa_hw.cost.latency.model import LatencyModel
from dsa_hw.cost.latency.profiling import (
    GOOD_PCT,
    ProfiledNetwork,
    latency_model,
    profile_network,
)
from dsa_hw.errors import UserError
from dsa_hw.network.coupling import find_coupling
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.pipeline.opening import unknown_operations_warning
from profilers.errors import MissingMeasurement
from profilers.steps import canonical_layers, sweep_keys
from profilers.table import LatencyTable, LayerKey, TableRound
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
    """Whether scales or the rate of the weights say so is open: both grow with cin * cout."""
    found = profile_network(
        graph, FakeDevice(slowdown=1.3), reference_table(), networks=32, rounds=2
    )
    for seed in range(20):
        widths = widths_on_steps(found, 1000 + seed)
        truth = 0.01 + 1.3 * network_ms(graph.resized(widths))
        predicted = float(found.latency.model.staircase_ms(torch.tensor(widths).float()))
        assert predicted == pytest.approx(truth, rel=0.02)  # the ridge pulls toward 1
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
    scales = [coefficients.scale(layer) for layer in graph.layers]
    assert min(scales) == pytest.approx(LEAST_SCALE)


def _slower(taken: TableRound, by: float) -> TableRound:
    one = taken.taken
    times = {name: by * getattr(one, name) for name in ("median_ms", "p10_ms", "p90_ms")}
    return dataclasses.replace(taken, taken=dataclasses.replace(one, **times))


def test_rescaling_all_times_rescales_predictions(profiled, graph: DeployedGraph) -> None:
    found, table = profiled
    doubled = LatencyTable(dict(table.provenance))
    for key, rounds in table.rounds.items():
        doubled.rounds[key] = [_slower(taken, 2.0) for taken in rounds]
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


def test_a_budget_fits_its_table_once(graph: DeployedGraph) -> None:
    """What another process appends in the middle of a run must not change the run's model."""
    table = reference_table()
    found = profile_network(graph, FakeDevice(), table, networks=12, rounds=2)
    budget = LatencyBudget(table, 1.0)
    given = LatencyBudget(table, 1.0, latency=found.latency)
    before = [count(b.bind(graph)[0], graph.dense_widths) for b in (budget, given)]
    for key in list(table.networks()):
        for taken in [_slower(old, 0.3) for old in table.rounds[key]] * 2:
            table.append(key, taken.taken, taken.reference_ms)
    assert [count(b.bind(graph)[0], graph.dense_widths) for b in (budget, given)] == before
    bound, _ = given.bind(graph)
    assert isinstance(bound, ModelledLatency)
    assert bound.model is found.latency.model
    later = count(LatencyBudget(table, 1.0).bind(graph)[0], graph.dense_widths)
    assert later < 0.7 * before[0]


def test_a_model_of_another_network_is_refused(graph: DeployedGraph, profiled) -> None:
    wide, x = Residual(48), torch.randn(1, 3, 16, 16)
    other = DeployedGraph(export_onnx(wide, x), find_coupling(wide, x))
    with pytest.raises(UserError, match="of another network"):
        LatencyBudget(profiled[1], 1.0, latency=profiled[0].latency).bind(other)


def test_calibration_reports_errors_of_networks_left_out(profiled, graph: DeployedGraph) -> None:
    found, table = profiled
    keys = [key for key in table.networks() if found.latency.choices.allow(key.widths)]
    points = calibrate(found.latency.model, table, list(table.networks())).points
    assert [p.measured_ms for p in points] == [table.measurement(k).median_ms for k in keys]
    assert found.latency.calibration.heldout_mape_pct < 1.0


def test_no_network_has_a_say_in_its_own_prediction(graph: DeployedGraph) -> None:
    """Neither in the fit nor in the choice of the ridge and of the scales."""
    table = reference_table()
    found = profile_network(graph, Restless(), table, networks=12, rounds=2).latency
    networks = [key for key in table.networks() if key.network == graph.digest]
    before = calibrate(found.model, table, networks).points
    for index, key in enumerate(networks):
        changed = LatencyTable(dict(table.provenance), rounds=dict(table.rounds))
        changed.rounds[key] = [_slower(taken, 1.3) for taken in table.rounds[key]]
        after = calibrate(found.model, changed, networks).points[index]
        assert after.measured_ms == pytest.approx(1.3 * before[index].measured_ms)
        assert after.predicted_ms == before[index].predicted_ms


def test_a_calibration_reads_the_table_of_layers_once(
    graph: DeployedGraph, profiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, table = profiled
    reads = []
    monkeypatch.setattr(table, "layer_ms", lambda key: reads.append(key) or 1.0)
    fit = calibrate(found.latency.model, table, list(table.networks()))
    found.latency.model.with_coefficients(fit.coefficients)
    assert not reads


def test_what_weights_cost_is_exact_at_every_width(profiled, graph: DeployedGraph) -> None:
    model = profiled[0].latency.model
    plain = model.coefficients
    rates = {**plain.rates_ms, WEIGHTS: plain.rates_ms[WEIGHTS] + 1e-3}
    dearer = model.with_coefficients(dataclasses.replace(plain, rates_ms=rates))
    networks = [model.choices.random(np.random.default_rng(seed), 0.0) for seed in range(20)]
    for widths in [tuple(model.choices.least.tolist()), *networks]:
        there = torch.tensor(widths).float()
        weights = sum(layer.weights(widths) for layer in graph.layers)
        for form in ("predict_ms", "staircase_ms"):
            added = getattr(dearer, form)(there) - getattr(model, form)(there)
            # both are float32: a difference of theirs is good to a few 1e-5
            assert float(added) == pytest.approx(1e-3 * weights, rel=1e-4)


def test_latency_is_the_features_times_the_coefficients(profiled, graph: DeployedGraph) -> None:
    model = profiled[0].latency.model
    rng = np.random.default_rng(3)
    rates = {kind: float(rng.uniform(0, 1e-6)) for kind in model.coefficients.rates_ms}
    scales = {sized_kind(x.spec): float(rng.uniform(0.5, 2)) for x in graph.layers}
    layers = {graph.layers[2].name: 1.7}
    model = model.with_coefficients(Coefficients(0.3, scales, rates, layers))
    networks = [model.choices.random(rng) for _ in range(10)]
    features = model.features(networks)
    factors = np.array([model.coefficients.scale(layer) for layer in graph.layers])
    expected = 0.3 + features.layers @ factors
    expected += sum(rates[kind] * elements for kind, elements in features.rates.items())
    found = model.staircase_ms(torch.tensor(networks).float()).double().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32


def test_weights_that_come_from_memory_are_learned(graph: DeployedGraph) -> None:
    """Their cost is a product of two widths: seen far below the dense network too."""
    rate = 2e-5

    def inside(cin: int, cout: int, pixels: int, taps: int) -> float:
        blocks = [math.ceil(c / STEP) * STEP for c in (cin, cout)]
        padded = blocks[0] if cin > 3 else cin
        return conv_ms(cin, cout, pixels, taps) + rate * taps * padded * cout

    found = profile_network(
        graph, FakeDevice(inside=inside), reference_table(), networks=32, rounds=2
    )
    least = found.latency.choices.least
    truth = 0.01 + network_ms(graph.resized(least), inside)
    guess = float(found.latency.model.staircase_ms(torch.as_tensor(least).float()))
    assert guess == pytest.approx(truth, rel=0.05)
    assert found.latency.calibration.heldout_mape_pct < 1.0


def test_steps_that_do_not_divide_each_other_do_not_multiply(graph: DeployedGraph) -> None:
    """12 and 16 must not leave multiples of 48."""
    steps = dict.fromkeys({layer.spec.kind for layer in graph.layers}, 16)
    choices = width_choices(graph, {**steps, "gemm": 12})
    for group, own in zip(graph.coupling.groups, choices.widths, strict=True):
        if not group.frozen:
            assert own == (*range(16, group.dense_width, 16), group.dense_width)


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


class Restless(FakeDevice):
    """FAKE DEVICE (test): a round of a whole network is slowed down by a fifth on average, as
    waiting times are distributed; layers' are not."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    @contextmanager
    def open(self, model: bytes | Path) -> Iterator[Runner]:
        with super().open(model) as runner:
            yield FakeRunner(runner.elapsed_ms(1) * (1.0 + self.rng.exponential(0.2)))


def test_rounds_go_to_layers_that_count(
    graph: DeployedGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsa_hw.cost.latency.profiling.COUNTS", 0.1)
    table = reference_table()
    latency = profile_network(graph, FakeDevice(), table, networks=12, rounds=6).latency
    dense_ms = float(latency.model.layer_ms(torch.tensor(latency.choices.dense).float()).sum())
    uses = Counter(layer.spec for layer in graph.layers)
    swept = {key for spec in canonical_layers(uses).values() for key in sweep_keys(spec)}
    taken = {
        key: (table.layer_ms(key) * uses[key.spec] / dense_ms, len(table.rounds[key]))
        for key in table.layers()
        if key.spec in uses and key not in swept
    }
    assert {rounds for share, rounds in taken.values() if share > 0.11} == {6}
    assert {rounds for share, rounds in taken.values() if share < 0.09} == {2}
    assert {len(table.rounds[key]) for key in table.networks()} == {6}


def test_the_networks_own_noise_is_told_and_asks_for_no_knots(graph: DeployedGraph) -> None:
    noisy, quiet = reference_table(), reference_table()
    calibration = profile_network(
        graph, Restless(), noisy, networks=48, rounds=4
    ).latency.calibration
    profile_network(graph, FakeDevice(), quiet, networks=48, rounds=4)
    assert set(noisy.layers()) == set(quiet.layers())
    assert calibration.heldout_mape_pct > GOOD_PCT > calibration.excess_mape_pct
    # the lowest of four is above the floor by a fifth / 4, and off that by 0.74 of it on average
    assert 3.0 < calibration.noise_mape_pct < 4.4
