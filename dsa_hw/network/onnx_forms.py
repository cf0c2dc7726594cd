"""Forms of an exported graph in which it can be given other numbers of channels.

Linear layers on more dimensions than (N, C) become ``Gemm`` nodes, as those on two are: one kind of
layer for both, with its bias. And shapes that were written down as numbers take the number of
channels from the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import nn

Shape = tuple[int, ...]
SECOND_AXIS = {
    "Conv", "ConvTranspose", "BatchNormalization", "MaxPool", "AveragePool", "GlobalAveragePool",
    "GlobalMaxPool", "InstanceNormalization", "GroupNormalization", "Gemm", "LpPool",
}  # fmt: skip
"""Operators whose outputs have their channels on the second axis."""
LAST = np.iinfo(np.int64).max


def value_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Shapes of all values that are known."""
    graph = model.graph
    return {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
        for v in [*graph.input, *graph.output, *graph.value_info]
    }


def linear_as_gemm(model: onnx.ModelProto, module: nn.Module) -> None:
    """Turn ``MatMul`` with a linear layer's weight, and the ``Add`` of its bias, into ``Gemm``.

    Args:
        model: changed in place; with the shapes of its values.
        module: what was exported: it says whose weight a transposed constant is.
    """
    graph = model.graph
    shapes = value_shapes(model)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    names = _names_by_content(module)
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    nodes, gone = [], set()
    for node in list(graph.node):
        if id(node) in gone:
            continue
        weight = tensors.get(node.input[1]) if node.op_type == "MatMul" else None
        given = shapes.get(node.input[0]) if weight is not None else None
        name = None if weight is None or given is None else names.get(_content(weight))
        if weight is None or given is None or name is None or len(given) < 3:
            nodes.append(node)
            continue
        bias, result = None, node.output[0]
        taken = consumers.get(result, [])
        if len(taken) == 1 and taken[0].op_type == "Add" and result not in outputs:
            other = next(n for n in taken[0].input if n != result)
            if other in tensors and tuple(tensors[other].dims) == (weight.dims[1],):
                bias, result = other, taken[0].output[0]
        if bias is not None:
            gone.add(id(taken[0]))
        if name not in tensors:
            value = np.ascontiguousarray(numpy_helper.to_array(weight).T)
            tensors[name] = graph.initializer.add()
            tensors[name].CopyFrom(numpy_helper.from_array(value, name))
        nodes += _gemm(graph, node.input[0], name, bias, result, given)
    order = _in_order(nodes, graph)
    del graph.node[:]
    graph.node.extend(order)
    _drop_unused(graph)


def _gemm(
    graph: onnx.GraphProto, given: str, weight: str, bias: str | None, result: str, shape: Shape
) -> list[onnx.NodeProto]:
    """Nodes for ``result`` = ``given`` times the weight, as rows of a matrix."""
    rows = int(np.prod(shape[:-1]))
    ends = {"rows": [rows, -1], "back": [*shape[:-1], -1]}
    for end, value in ends.items():
        constant = numpy_helper.from_array(np.array(value, np.int64), f"{result}_{end}_shape")
        graph.initializer.append(constant)
    inputs = [f"{result}_rows", weight, *([bias] if bias else [])]
    return [
        helper.make_node("Reshape", [given, f"{result}_rows_shape"], [f"{result}_rows"]),
        helper.make_node("Gemm", inputs, [f"{result}_gemm"], transB=1),
        helper.make_node("Reshape", [f"{result}_gemm", f"{result}_back_shape"], [result]),
    ]


def _names_by_content(module: nn.Module) -> dict[bytes, str]:
    """Names of the linear layers' weights by their transposed content."""
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            value = layer.weight.detach().float().cpu().numpy().T
            found.setdefault(_digest(value), f"{name}.weight")
    return found


def _content(tensor: onnx.TensorProto) -> bytes:
    return _digest(numpy_helper.to_array(tensor))


def _digest(value: np.ndarray) -> bytes:
    shape = np.array(value.shape, np.int64).tobytes()
    return hashlib.sha256(shape + np.ascontiguousarray(value, np.float32).tobytes()).digest()


def _in_order(nodes: Sequence[onnx.NodeProto], graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes so that each follows what it reads: a bias may be made later than the product."""
    there = {value.name for value in graph.input} | {t.name for t in graph.initializer} | {""}
    waiting, order = list(nodes), []
    while waiting:
        left = []
        for node in waiting:
            if all(name in there for name in node.input):
                there.update(node.output)
                order.append(node)
            else:
                left.append(node)
        if len(left) == len(waiting):
            return [*order, *left]  # subgraphs' own names: as they were
        waiting = left
    return order


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    used |= {value.name for value in graph.output}
    for tensor in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(tensor)


def free_channel_numbers(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Let shapes take the number of channels from the data.

    Args:
        model: changed in place.
        shapes: of its values.

    Returns:
        The axis of the channels, of every value whose channels could be followed.
    """
    freeing = _Freeing(model.graph, shapes)
    freeing.run()
    return freeing.axis


class _Freeing:
    """Follows the axis of the channels through a graph, and frees the numbers on it."""

    def __init__(self, graph: onnx.GraphProto, shapes: Mapping[str, Shape]) -> None:
        self._graph = graph
        self._shapes = {t.name: tuple(t.dims) for t in graph.initializer} | dict(shapes)
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.axis: dict[str, int] = {}

    def run(self) -> None:
        for node in self._graph.node:
            free = getattr(self, f"_{node.op_type.lower()}", None)
            axis = free(node) if free is not None else self._other(node)
            if axis is None:
                continue
            for name in node.output:
                if name in self._shapes and axis < len(self._shapes[name]):
                    self.axis[name] = axis

    # -- operators ---------------------------------------------------------------------------

    def _other(self, node: onnx.NodeProto) -> int | None:
        """Element by element, or along other axes: the same axis, counted from the last."""
        if node.op_type in SECOND_AXIS:
            return 1
        made = self._shapes.get(node.output[0])
        for name in node.input:
            if made is not None and name in self.axis:
                axis = self.axis[name] + len(made) - len(self._shapes[name])
                if 0 <= axis < len(made) and self._shapes[name][self.axis[name]] == made[axis]:
                    return axis
        return None

    def _transpose(self, node: onnx.NodeProto) -> int | None:
        axis = self.axis.get(node.input[0])
        order = list(_attribute(node, "perm") or [])
        return order.index(axis) if axis in order else None

    def _concat(self, node: onnx.NodeProto) -> int | None:
        return next((self.axis[n] for n in node.input if n in self.axis), None)

    def _matmul(self, node: onnx.NodeProto) -> int | None:
        made = len(self._shapes.get(node.output[0], ()))
        left, right = (self._from_last(name) for name in node.input)
        if right == 1:
            return made - 1
        return made - left if left is not None and left > 1 else None

    def _from_last(self, name: str) -> int | None:
        return len(self._shapes[name]) - self.axis[name] if name in self.axis else None

    def _reshape(self, node: onnx.NodeProto) -> int | None:
        axis = self._regrouped(node)
        if axis is None:
            return None
        wanted = list(self._shapes[node.output[0]])
        wanted[axis] = -1
        self._set(node, 1, wanted)
        return axis

    def _regrouped(self, node: onnx.NodeProto) -> int | None:
        axis = self.axis.get(node.input[0])
        if axis is None or node.output[0] not in self._shapes:
            return None
        return regrouped_axis(self._shapes[node.input[0]], self._shapes[node.output[0]], axis)

    _flatten = _squeeze = _unsqueeze = _regrouped

    def _expand(self, node: onnx.NodeProto) -> int | None:
        axis = self._other(node)
        wanted, given = list(self._shapes[node.output[0]]), self._shapes[node.input[0]]
        for at in range(1, len(given) + 1):
            if given[-at] == wanted[-at]:
                wanted[-at] = 1  # as the data has it
        self._set(node, 1, wanted)
        return axis

    def _resize(self, node: onnx.NodeProto) -> int | None:
        sizes = self._constant(node.input[3]) if len(node.input) > 3 else None
        if sizes is not None and len(sizes) > 2 and _attribute(node, "axes") is None:
            self._set(node, 3, sizes[2:].tolist())
            node.attribute.append(helper.make_attribute("axes", list(range(2, len(sizes)))))
        return 1

    def _split(self, node: onnx.NodeProto) -> int | None:
        axis = self.axis.get(node.input[0])
        along = _attribute(node, "axis") or 0
        rank = len(self._shapes[node.input[0]])
        sizes = self._constant(node.input[1]) if len(node.input) > 1 else None
        equal = sizes is not None and len(set(sizes.tolist())) == 1
        if equal and axis is not None and along % rank == axis:
            del node.input[1:]
            node.attribute.append(helper.make_attribute("num_outputs", len(node.output)))
        return axis

    def _slice(self, node: onnx.NodeProto) -> int | None:
        axis = self.axis.get(node.input[0])
        given = self._shapes[node.input[0]]
        ends = self._constant(node.input[2])
        along = self._constant(node.input[3]) if len(node.input) > 3 else None
        if axis is not None and ends is not None and along is not None:
            numbers = [
                LAST if a % len(given) == axis and e >= given[axis] else e
                for a, e in zip(along.tolist(), ends.tolist(), strict=True)
            ]
            if numbers != ends.tolist():
                self._set(node, 2, numbers)
        return axis

    def _reduced(self, node: onnx.NodeProto) -> int | None:
        axis = self.axis.get(node.input[0])
        if axis is None or node.output[0] not in self._shapes:
            return None
        given, made = self._shapes[node.input[0]], self._shapes[node.output[0]]
        if len(made) == len(given):
            return axis if made[axis] == given[axis] else None
        over = self._constant(node.input[1]) if len(node.input) > 1 else None
        if over is None:
            return None
        gone = {int(a) % len(given) for a in over.tolist()}
        return None if axis in gone else axis - sum(a < axis for a in gone)

    _reducemean = _reducesum = _reducemax = _reducemin = _reducel2 = _reduced

    # -- constants ---------------------------------------------------------------------------

    def _constant(self, name: str) -> np.ndarray | None:
        return numpy_helper.to_array(self._tensors[name]) if name in self._tensors else None

    def _set(self, node: onnx.NodeProto, at: int, numbers: Iterable[int]) -> None:
        """Give a node a constant of its own: the exporter stores equal ones once."""
        if node.input[at] not in self._tensors:
            return
        name = f"{node.output[0]}_{at}_numbers"
        value = numpy_helper.from_array(np.array(list(numbers), np.int64), name)
        self._tensors[name] = self._graph.initializer.add()
        self._tensors[name].CopyFrom(value)
        node.input[at] = name


def regrouped_axis(given: Shape, made: Shape, axis: int) -> int | None:
    """Where an axis is after a reshape: of several that it becomes, the largest.

    None where it is merged with others and divided again.
    """
    i = j = 0
    while i < len(given) and j < len(made):
        ends = [i + 1, j + 1]
        products = [given[i], made[j]]
        while products[0] != products[1]:
            smaller = int(products[1] < products[0])
            source = (given, made)[smaller]
            if ends[smaller] == len(source):
                return None
            products[smaller] *= source[ends[smaller]]
            ends[smaller] += 1
        if i <= axis < ends[0]:
            several = [a for a in range(j, ends[1]) if made[a] > 1] or [j]
            whole = [a for a in range(i, ends[0]) if given[a] > 1]
            if len(several) > 1 and len(whole) > 1:
                return None
            return max(several, key=lambda a: (made[a], a))
        i, j = ends
    return None


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    found = next((a for a in node.attribute if a.name == name), None)
    return None if found is None else helper.get_attribute_value(found)
