"""One layer as the runtime deploys it, as an ONNX model of its own."""

from __future__ import annotations

import functools

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from profilers.layers.kinds.registry import LAYER_KINDS
from profilers.layers.spec import LayerSpec

OPSET = 18
IR_VERSION = 9
NOISE = 2**20
REFERENCE = LayerSpec.parse("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 28x28 b1 fp32 +relu")
REFERENCE_CHANNELS = 128
"""A millisecond on two cores: waking the threads takes a twentieth of it. At half of the channels a
reading says little (see ``speed.COMPUTE_SLOW`` for what this one says)."""
CHECKED_BYTES = 2**26
"""Of weights, up to which a layer's model is checked; larger ones differ in nothing but size."""


def random_weight(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """He-scaled noise: activations neither vanish (slow denormals) nor overflow.

    Large weights repeat a stretch of noise: drawing a hundred million numbers takes longer than
    timing the layer.
    """
    size, fan_in = int(np.prod(shape)), max(1, int(np.prod(shape[1:])))
    noise = rng.standard_normal(min(size, NOISE), dtype=np.float32)
    return np.resize(noise * np.float32(np.sqrt(2.0 / fan_in)), shape)


def layer_model(spec: LayerSpec, cin: int, cout: int, seed: int = 0) -> bytes:
    """Serialized ONNX model of ``spec`` at the given channels, with its fused tail.

    Raises:
        ValueError: a tied layer with different input and output channels.
    """
    if spec.tied and cin != cout:
        raise ValueError(f"{spec} has equal input and output channels, not {cin} and {cout}")
    rng = np.random.default_rng(seed)
    kind = LAYER_KINDS[spec.op]
    shapes = kind.shapes(spec, cin, cout)
    weight = random_weight(shapes.weight, rng)
    initializers = [numpy_helper.from_array(np.full(cout, 0.01, np.float32), "bias")]
    inputs = [_value("input", shapes.input)]
    tensors = ["input", "weight", "bias"]
    nodes = [helper.make_node(kind.operator, tensors, ["layer"], **kind.attributes(spec, cin))]
    value = "layer"
    for index, op in enumerate(spec.tail):
        result = f"tail{index}"
        if op == "add":
            inputs.append(_value("residual", shapes.output))
            nodes.append(helper.make_node("Add", [value, "residual"], [result]))
        elif op == "relu":
            nodes.append(helper.make_node("Relu", [value], [result]))
        elif op == "clip":
            bounds = [np.array(0.0, np.float32), np.array(6.0, np.float32)]
            names = ("low", "high")
            initializers += [
                numpy_helper.from_array(b, n) for b, n in zip(bounds, names, strict=True)
            ]
            nodes.append(helper.make_node("Clip", [value, "low", "high"], [result]))
        else:
            raise ValueError(f"cannot build the tail {op!r} of {spec}")
        value = result
    nodes[-1].output[0] = "output"
    outputs = [_value("output", shapes.output)]
    graph = helper.make_graph(nodes, "layer", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    # in place: three more copies of a gigabyte are what takes long about the largest layers
    model.graph.initializer.add(
        name="weight", data_type=TensorProto.FLOAT, dims=weight.shape, raw_data=weight.tobytes()
    )
    if weight.nbytes <= CHECKED_BYTES:
        onnx.checker.check_model(model)
    return model.SerializeToString()


@functools.cache
def reference_model() -> bytes:
    """Serialized model of the kernel whose time says how fast the machine computes."""
    return layer_model(REFERENCE, REFERENCE_CHANNELS, REFERENCE_CHANNELS)


def tiny_model() -> bytes:
    """Serialized model of an activation of 16 numbers: the cost of a call and nothing else."""
    return _activation((1, 16))


def _activation(shape: tuple[int, ...]) -> bytes:
    values = [_value(name, shape) for name in ("input", "output")]
    node = helper.make_node("Relu", ["input"], ["output"])
    graph = helper.make_graph([node], "activation", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    return model.SerializeToString()


def _value(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
