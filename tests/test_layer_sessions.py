"""Layers on ONNX Runtime's CPU provider: what is prepared once, and what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu
from profilers.layers.models import layer_model, tiny_model
from profilers.layers.spec import LayerSpec
from profilers.timing import SamplePlan

SPEC = LayerSpec.parse("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 8x8 b1 fp32 +relu")
PLAN = SamplePlan(sample_ms=0.1, samples=1, warmup_ms=0.1)


@pytest.fixture
def optimized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the models that were optimized."""
    really: Callable[..., Any] = OnnxRuntimeCpu._optimized
    seen: list[int] = []

    def counted(self: OnnxRuntimeCpu, model: bytes) -> Any:
        seen.append(len(model))
        return really(self, model)

    monkeypatch.setattr(OnnxRuntimeCpu, "_optimized", counted)
    return seen


def rounds(backend: OnnxRuntimeCpu, *models: bytes) -> None:
    for model in models:
        with backend.open_layer(model) as runner:
            assert runner.take_round(PLAN).median_ms > 0


def test_a_layer_is_optimized_once_for_all_its_rounds(optimized: list[int]) -> None:
    backend = OnnxRuntimeCpu(threads=1)
    first, second = layer_model(SPEC, 8, 16), layer_model(SPEC, 16, 16)
    rounds(backend, first, second, first, second, first)
    assert optimized == [len(first), len(second)]


def test_no_more_is_kept_than_fits(optimized: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    models = [layer_model(SPEC, 16, width) for width in (16, 24, 32)]
    monkeypatch.setattr("profilers.backends.onnxruntime_cpu.KEPT_BYTES", 2 * len(models[2]))
    backend = OnnxRuntimeCpu(threads=1)
    rounds(backend, *models, *models)
    kept = sum(map(len, backend._layers.values()))
    assert kept <= 2 * len(models[2])
    assert len(optimized) > len(models)


def test_a_call_is_timed_like_a_layer() -> None:
    """It takes less than a layer of some size, on every machine."""
    backend = OnnxRuntimeCpu(threads=1)
    times = []
    for model in (tiny_model(), layer_model(SPEC, 512, 512)):
        with backend.open_layer(model) as runner:
            times.append(runner.take_round(PLAN).median_ms)
    assert times[1] > 5 * times[0]
