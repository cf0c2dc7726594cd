"""A latency device that exists nowhere: deterministic times by formula, for tests.

It implements the backend protocol by reading an ONNX model's layers and charging each by its
channels rounded up to a step. No clock is involved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from profilers.layers.kinds.registry import LAYER_KINDS
from profilers.timing import Runner

STEP = 8
INSTANT_MS = 1e-9
"""What a call by itself is charged: as good as nothing, and still a time."""
Charge = Callable[[int, int, int, int], float]


def conv_ms(cin: int, cout: int, pixels: int, taps: int) -> float:
    """Staircase time of one layer, ms."""
    up = [math.ceil(c / STEP) * STEP for c in (cin, cout)]
    return 0.002 + 2e-8 * up[0] * up[1] * pixels * taps + 1e-7 * up[1] * pixels


class FakeRunner(Runner):
    """Takes the same time at every run."""

    def __init__(self, ms: float) -> None:
        self._ms = ms

    def elapsed_ms(self, loops: int) -> float:
        return self._ms * loops


class FakeDevice:
    """FAKE DEVICE (test): batch 1, no noise; ``slowdown`` scales whole networks only.

    ``charge`` is a layer's time from its channels, pixels and taps; ``inside`` the same within a
    whole network, where it is another.
    """

    name = "fake"
    layers_pay_call = True

    def __init__(
        self, slowdown: float = 1.0, charge: Charge = conv_ms, inside: Charge | None = None
    ) -> None:
        self.slowdown, self.charge, self.inside = slowdown, charge, inside or charge
        self.call_ms = 0.01
        self.opened = 0
        self.renewed = 0

    def provenance(self) -> dict[str, str | int]:
        return {
            "device": "FAKE DEVICE (test)", "cpu_features": "none", "driver": "none",
            "runtime": "fake", "runtime_version": "0", "provider": "none",
            "precision": "fp32", "batch_size": 1, "threads": 1,
        }  # fmt: skip

    def renew(self) -> None:
        self.renewed += 1

    def notes(self) -> tuple[str, ...]:
        return ()

    def observations(self) -> tuple[str, ...]:
        return ()

    @contextmanager
    def open(self, model: bytes | Path) -> Iterator[Runner]:
        self.opened += 1
        yield FakeRunner(self.call_ms + self.slowdown * network_ms(model, self.inside))

    @contextmanager
    def open_layer(self, model: bytes) -> Iterator[Runner]:
        self.opened += 1
        yield FakeRunner(network_ms(model, self.charge) or INSTANT_MS)

    def outputs(self, model: bytes | Path, inputs: np.ndarray) -> np.ndarray:
        raise NotImplementedError("the fake device computes nothing")


class FakeRuntime(FakeDevice):
    """The fake device's times, with real outputs."""

    def outputs(self, model: bytes | Path, inputs: np.ndarray) -> np.ndarray:
        source = model if isinstance(model, bytes) else str(model)
        session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"input": inputs})[0])


def network_ms(model: bytes | Path, charge: Charge = conv_ms) -> float:
    """Sum over the layers of a model."""
    loaded = onnx.load(model) if isinstance(model, Path) else onnx.load_from_string(model)
    loaded = onnx.shape_inference.infer_shapes(loaded)
    graph = loaded.graph
    values = [*graph.value_info, *graph.output]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    weights = {i.name: i.dims for i in graph.initializer}
    total = 0.0
    for node in graph.node:
        kind = LAYER_KINDS.of_operator(node.op_type)
        if kind is None:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        axes, dims = kind.weight_axes(attributes), weights[node.input[1]]
        pixels = math.prod(shapes[node.output[0]][2:])
        total += charge(dims[axes.into], dims[axes.out], pixels, math.prod(dims[2:]))
    return total
