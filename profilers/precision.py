"""The same ONNX network at another precision: in current TensorRT the types *are* the precision.

TensorRT 11 and TensorRT-RTX networks are strongly typed, so a float32 graph runs at float32
whatever the builder is told: fp16 means a graph of float16 tensors, int8 a graph with
QuantizeLinear / DequantizeLinear pairs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from profilers.errors import BackendUnavailable
from profilers.layers.kinds.registry import LAYER_KINDS

PRECISIONS = ("fp32", "fp16", "int8")
CHANNEL_STEPS = {"fp32": 4, "fp16": 8, "int8": 32}
"""Channels that NVIDIA's matrix units take at a time (16 bytes at fp32 and fp16; 32 channels is
TensorRT's int8 vector format): where steps are to be expected; they are measured all the same."""

FLOAT16_QDQ_OPSET = 19
ACTIVATION_RANGE = 8.0
"""Placeholder: latency does not depend on scales. Accuracy at int8 needs calibrated ones."""


def at_precision(model: bytes, precision: str) -> bytes:
    """Serialized copy of a float32 model at ``precision``; a model with Q/DQ pairs stays as it is.

    Raises:
        BackendUnavailable: no such precision.
    """
    if precision not in PRECISIONS:
        raise BackendUnavailable(
            f"unknown precision {precision!r}; there is: {', '.join(PRECISIONS)}"
        )
    if precision == "fp32":
        return model
    loaded = onnx.load_from_string(model)
    if any(n.op_type == "QuantizeLinear" for n in loaded.graph.node):
        return model
    loaded = _to_float16(loaded)
    if precision == "int8":
        _quantize(loaded)
    return loaded.SerializeToString()


def _to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    if _is_float16(model):
        return model
    del model.graph.value_info[:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights below float16's range: no matter for latency
        return convert_float_to_float16(model, disable_shape_infer=True, keep_io_types=False)


def _is_float16(model: onnx.ModelProto) -> bool:
    return all(i.type.tensor_type.elem_type == TensorProto.FLOAT16 for i in model.graph.input)


@dataclass
class _Pairs:
    """Q/DQ pairs as they are added to a graph: one for each activation, one for each weight."""

    graph: onnx.GraphProto
    nodes: list[onnx.NodeProto]
    made: dict[str, str]

    def of_activation(self, name: str) -> str:
        """Name of the dequantized activation."""
        if name not in self.made:
            scale = self._constant(f"{name}@scale", np.array(ACTIVATION_RANGE / 127, np.float16))
            zero = self._constant(f"{name}@zero", np.array(0, np.int8))
            quantized, result = f"{name}@int8", f"{name}@dq"
            self.nodes += [
                helper.make_node("QuantizeLinear", [name, scale, zero], [quantized], f"{name}@Q"),
                helper.make_node("DequantizeLinear", [quantized, scale, zero], [result],
                                 f"{name}@DQ"),
            ]  # fmt: skip
            self.made[name] = result
        return self.made[name]

    def of_weight(self, tensor: TensorProto, axis: int) -> str:
        """Name of the dequantized weight, quantized by its output channels' largest magnitude."""
        weight = numpy_helper.to_array(tensor).astype(np.float32)
        others = tuple(a for a in range(weight.ndim) if a != axis)
        scale = np.maximum(np.abs(weight).max(axis=others) / 127, 1e-4).astype(np.float16)
        shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
        levels = np.clip(np.rint(weight / scale.astype(np.float32).reshape(shape)), -127, 127)
        name, result = tensor.name, f"{tensor.name}@dq"
        tensor.CopyFrom(numpy_helper.from_array(levels.astype(np.int8), name))
        inputs = [
            name,
            self._constant(f"{name}@scale", scale),
            self._constant(f"{name}@zero", np.zeros(len(scale), np.int8)),
        ]
        self.nodes.append(
            helper.make_node("DequantizeLinear", inputs, [result], f"{name}@DQ", axis=axis)
        )
        return result

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name


def _quantize(model: onnx.ModelProto) -> None:
    """Q/DQ around what layers read, and on residual branches.

    The residual pair lets TensorRT fold the add into an int8 convolution.
    """
    graph = model.graph
    tensors = {i.name: i for i in graph.initializer}
    pairs = _Pairs(graph, [], {})
    makers = {name: n.op_type for n in graph.node for name in n.output}
    for node in list(graph.node):
        kind = LAYER_KINDS.of_operator(node.op_type)
        if kind is not None and node.input[1] in tensors:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            axis = kind.weight_axes(attributes).out
            node.input[0] = pairs.of_activation(node.input[0])
            node.input[1] = pairs.of_weight(tensors[node.input[1]], axis)
        elif node.op_type == "Add":
            convolved = [makers.get(name) == "Conv" for name in node.input]
            if any(convolved) and not all(name in tensors for name in node.input):
                index = convolved.index(False) if False in convolved else 1
                if node.input[index] not in tensors:
                    node.input[index] = pairs.of_activation(node.input[index])
        pairs.nodes.append(node)
    del graph.node[:]
    graph.node.extend(pairs.nodes)
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, FLOAT16_QDQ_OPSET)
