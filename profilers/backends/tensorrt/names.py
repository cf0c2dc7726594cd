"""TensorRT's names of fused layers, mapped back to the layers of the ONNX graph.

TensorRT joins the names of what it fused: ``a + b + c`` for a chain, ``PWN(a, b)`` for pointwise
work, ``a || b`` for convolutions that run as one, ``{ForeignNode[a...b]}`` for a whole region,
``Reformatting CopyNode for Input Tensor 0 to a + b`` for a change of layout before ``a + b``,
``t copy`` for a copy of tensor t. Kernels inside a region are called ``a_myl0_3`` after a node or
``__myl_MulAdd_myl0_3`` after what they compute; TensorRT 10 and later put the ONNX nodes behind
``[ONNX Layer: a]`` in the layer's metadata. A node without a name is ``node_of_`` its output.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx

_COPY = re.compile(r"^Reformatting CopyNode for (?:Input|Output) Tensor \d+ to ")
_REFORMAT = re.compile(r"^(?:Reformatting CopyNode|reformatted|__myl_Move_myl)|^\S+ copy$")
_METADATA = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_UNNAMED = re.compile(r"\(Unnamed Layer\* \d+\) \[\w+\]")
_OPENING = re.compile(r"^(?:PWN|fusedPointwiseNode|CudnnPwn|\{ForeignNode)[(\[]")
_CLOSING = re.compile(r"[)\]}]+$")
_KERNEL = re.compile(r"_myl\d+(?:_\d+)?$")
_JOINTS = re.compile(r"\s*(?:\+|\|\||,(?!\d)|\.\.\.)\s*")


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """What a runtime's profiler reported, ms a run.

    Args:
        by_node: to each ONNX node; a fused layer's time goes to its convolution or linear layer.
        reformat_ms: changes of layout between layers.
        other_ms: layers in which no node of the graph was found, by the runtime's name.
    """

    by_node: Mapping[str, float]
    reformat_ms: float
    other_ms: Mapping[str, float]


def is_reformat(name: str) -> bool:
    """Whether a runtime's layer only changes a tensor's layout."""
    return _REFORMAT.match(name) is not None


def onnx_nodes(name: str, metadata: str = "") -> tuple[str, ...]:
    """ONNX node names inside a runtime's layer name, in order; a region gives its two ends.

    Example:
        >>> onnx_nodes("node_conv2d + node_relu")
        ('node_conv2d', 'node_relu')
    """
    if found := _METADATA.findall(metadata):
        return tuple(dict.fromkeys(found))
    cleaned = []
    for part in _JOINTS.split(_COPY.sub("", name)):
        while (opened := _OPENING.sub("", part.strip())) != part:
            part = opened
        unnamed = _UNNAMED.match(part)
        part = unnamed[0] if unnamed else _CLOSING.sub("", part)
        cleaned.append(part if part.startswith("__myl_") else _KERNEL.sub("", part))
    return tuple(dict.fromkeys(p for p in cleaned if p))


def node_names(graph: onnx.GraphProto) -> list[str]:
    """TensorRT's names of a graph's nodes, in order."""
    return [node.name or f"node_of_{node.output[0]}" for node in graph.node]


def attribute(
    reported_ms: Iterable[tuple[str, float]],
    nodes: Sequence[str],
    layers: Sequence[str],
    metadata: Mapping[str, str] | None = None,
) -> LayerTimes:
    """Give each reported time to the ONNX nodes that it was spent on.

    Args:
        reported_ms: (the runtime's layer name, ms).
        nodes: names of the graph's nodes, in the graph's order.
        layers: those of them that are convolutions and linear layers. A fused layer with several
            of them (branches that run as one, a region) is shared equally among them.
        metadata: by the runtime's layer name, where the runtime tells the ONNX names apart.
    """
    order = {name: index for index, name in enumerate(nodes)}
    by_node: dict[str, float] = {}
    other: dict[str, float] = {}
    reformat = 0.0
    for name, ms in reported_ms:
        if is_reformat(name):
            reformat += ms
            continue
        inside = _inside(name, (metadata or {}).get(name, ""), order)
        owners = [n for n in inside if n in set(layers)] or inside[:1]
        if not owners:
            other[name] = other.get(name, 0.0) + ms
        for owner in owners:
            by_node[owner] = by_node.get(owner, 0.0) + ms / len(owners)
    return LayerTimes(by_node, reformat, other)


def _inside(name: str, metadata: str, order: Mapping[str, int]) -> list[str]:
    """Nodes of the graph in a runtime's layer, with what lies between a region's ends."""
    found = [n for n in onnx_nodes(name, metadata) if n in order]
    if "ForeignNode" in name and len(found) == 2:
        first, last = sorted(order[n] for n in found)
        ordered = list(order)
        return ordered[first : last + 1]
    return found
