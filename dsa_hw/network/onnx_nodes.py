"""Nodes of an exported graph: which are layers, and whose weights they have."""

from __future__ import annotations

import onnx
from onnx import helper

from profilers.layers.kinds.kind import Attributes, LayerKind
from profilers.layers.kinds.registry import LAYER_KINDS


def is_layer(node: onnx.NodeProto) -> bool:
    """Whether its operator is a layer kind's."""
    return LAYER_KINDS.of_operator(node.op_type) is not None


def kind_of(node: onnx.NodeProto) -> LayerKind:
    """The layer kind of its operator."""
    kind = LAYER_KINDS.of_operator(node.op_type)
    assert kind is not None, node.op_type
    return kind


def attributes(node: onnx.NodeProto) -> Attributes:
    """Its attributes by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


SCALING = ("Mul", "Add", "Sub", "Div")
"""Operators by which a frozen norm's numbers, one a channel, come in."""
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that multiply with weights."""
SECOND_USE = "@"
"""Between a tensor's name and where it is used, if that is not its first use."""


def plain_name(tensor: str) -> str:
    """The name without the mark of a second use."""
    return tensor.partition(SECOND_USE)[0]


def module_name(weight: str) -> str:
    """The module that a weight is of."""
    return plain_name(weight).removesuffix(".weight")


def unshare_weights(graph: onnx.GraphProto) -> None:
    """Give every node tensors of its own: the exporter stores equal ones (zero biases) once, and a
    module that is called twice has one weight."""
    tensors = {i.name: i for i in graph.initializer}
    used: set[str] = set()
    for node in graph.node:
        if not is_layer(node) and node.op_type not in ("BatchNormalization", *SCALING):
            continue
        for index, name in enumerate(node.input):
            if name not in tensors:
                continue
            if node.op_type in SCALING and all(size == 1 for size in tensors[name].dims):
                continue  # a single number is every node's
            if name in used:
                copy = graph.initializer.add()
                copy.CopyFrom(tensors[name])
                copy.name = f"{name}{SECOND_USE}{node.output[0]}.{index}"
                node.input[index] = copy.name
            used.add(name)
