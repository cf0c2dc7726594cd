"""TensorRT's names of fused layers, mapped back to the layers of the ONNX graph.

TensorRT joins the names of what it fused: ``a + b + c`` for a chain, ``PWN(a, b)`` for pointwise
work, ``a || b`` for convolutions that run as one, ``{ForeignNode[a...b]}`` for a whole region,
``Reformatting CopyNode for Input Tensor 0 to a + b`` for a change of layout before ``a + b``.
TensorRT 10 and later put the ONNX node's name behind ``[ONNX Layer: a]`` in metadata.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_REFORMAT = re.compile(r"^(?:Reformatting CopyNode|reformatted|__myl_Move_myl)")
_METADATA = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_WRAPPERS = re.compile(r"^(?:PWN|fusedPointwiseNode|CudnnPwn|\{ForeignNode)[(\[]|[)\]}]+$")


class UnknownLayerName(ValueError):
    """A runtime's layer name in which no layer of the graph was found."""


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
    parts = re.split(r"\s*(?:\+|\|\||,(?!\d)|\.\.\.)\s*", name)
    cleaned = []
    for part in parts:
        previous = None
        while previous != part:
            previous, part = part, _WRAPPERS.sub("", part.strip())
        cleaned.append(part)
    return tuple(dict.fromkeys(p for p in cleaned if p))


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
