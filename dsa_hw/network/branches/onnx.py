"""Residual branches in an ONNX graph: where they begin and end, and the graph without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from profilers.layers.kinds.registry import LAYER_KINDS


@dataclass(frozen=True, slots=True)
class Region:
    """A branch from a value to the add that brings the value itself back in.

    Args:
        total: output of the add.
        shortcut: the value; the branch reads nothing else.
        nodes: outputs of the branch's nodes and of the add; nothing outside reads them but
            ``total``.
        layers: names of the modules whose weights the branch has.
    """

    total: str
    shortcut: str
    nodes: frozenset[str]
    layers: tuple[str, ...]


def residual_regions(
    graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Region, ...]:
    """All branches with an identity shortcut, nested ones too, in the graph's order.

    Args:
        shapes: of every value; an add that changes the shortcut's shape is none of ours.
    """
    reader = _Reader(graph)
    found = []
    for node in graph.node:
        if node.op_type != "Add" or node.output[0] in reader.ends:
            continue
        for end, shortcut in (node.input, reversed(node.input)):
            if shapes.get(shortcut) != shapes[node.output[0]]:
                continue
            if (region := reader.region(node, end, shortcut)) is not None:
                found.append(region)
    return tuple(found)


class _Reader:
    """Who makes and who reads each value of a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.constants = {i.name for i in graph.initializer} | {""}
        self.ends = {o.name for o in graph.output}
        self.place: dict[str, int] = {}
        self.nodes = list(graph.node)
        self.readers: dict[str, list[str]] = {}
        for index, node in enumerate(self.nodes):
            self.place.update(dict.fromkeys(node.output, index))
            if all(name in self.constants for name in node.input):
                self.constants.update(node.output)
            for name in node.input:
                self.readers.setdefault(name, []).append(node.output[0])

    def region(self, add: onnx.NodeProto, end: str, shortcut: str) -> Region | None:
        """What lies between ``shortcut`` and ``end``; None if it is no branch of its own."""
        if shortcut in self.constants:
            return None
        first = self.place.get(shortcut, -1)
        inside: dict[int, None] = {}
        waiting, reached = [end], False
        while waiting:
            name = waiting.pop()
            if name in self.constants:
                continue
            if name == shortcut:
                reached = True
                continue
            index = self.place.get(name, -1)
            if index <= first:
                return None  # it reads something that was made before the shortcut
            if index not in inside:
                inside[index] = None
                waiting += self.nodes[index].input
        nodes = {self.nodes[i].output[0] for i in inside} | {add.output[0]}
        if not reached or not inside or not self._closed(inside, nodes):
            return None
        layers = tuple(
            self.nodes[i].input[1].partition("@")[0].removesuffix(".weight")
            for i in sorted(inside)
            if LAYER_KINDS.of_operator(self.nodes[i].op_type) is not None
        )
        return Region(add.output[0], shortcut, frozenset(nodes), layers)

    def _closed(self, inside: Mapping[int, None], nodes: set[str]) -> bool:
        """Whether nobody outside reads what is made inside."""
        made = [name for i in inside for name in self.nodes[i].output]
        read_outside = any(r not in nodes for name in made for r in self.readers.get(name, ()))
        return not read_outside and not self.ends.intersection(made)


def cut_regions(graph: onnx.GraphProto, regions: Sequence[Region]) -> None:
    """Take branches out in place: their sums become the shortcuts, and what only they used goes."""
    if not regions:
        return
    gone = {name for region in regions for name in region.nodes}
    kept = [node for node in graph.node if node.output[0] not in gone]
    _replace(graph, kept, {region.total: region.shortcut for region in regions})
    drop_repeated_activations(graph)
    used = {name for node in graph.node for name in node.input}
    initializers = [i for i in graph.initializer if i.name in used]
    del graph.initializer[:]
    graph.initializer.extend(initializers)


def drop_repeated_activations(graph: onnx.GraphProto) -> None:
    """Drop a ReLU of what is the output of a ReLU already, also through a max-pooling, in place.

    It is what a residual block leaves when its branch goes: the activation behind the add.
    """
    makers = {name: node for node in graph.node for name in node.output}
    ends = {o.name for o in graph.output}
    repeated = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Relu" and node.output[0] not in ends and _is_rectified(node, makers)
    }
    if repeated:
        kept = [node for node in graph.node if node.output[0] not in repeated]
        _replace(graph, kept, repeated)


def _is_rectified(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> bool:
    maker = makers.get(node.input[0])
    while maker is not None and maker.op_type == "MaxPool":
        maker = makers.get(maker.input[0])
    return maker is not None and maker.op_type == "Relu"


def _replace(
    graph: onnx.GraphProto, kept: Sequence[onnx.NodeProto], values: Mapping[str, str]
) -> None:
    """Keep these nodes only, reading other values (a value's replacement may have its own)."""
    nodes = []
    for node in kept:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for index, name in enumerate(copy.input):
            while name in values:
                name = values[name]
            copy.input[index] = name
        nodes.append(copy)
    del graph.node[:]
    graph.node.extend(nodes)
