"""Many layers as one model, and a runtime's times of it given back to the layers.

A build costs a runtime a fixed time beside that of its layers, so that many small layers built
as one network cost less than one by one. They share nothing: each keeps its inputs and outputs,
and all its names get its prefix, by which a runtime's layer names are told apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import onnx
from onnx import compose, helper

from profilers.backends.tensorrt.names import node_names, onnx_nodes

_MEMBER = re.compile(r"pack(\d+)\.")


class AmbiguousNames(ValueError):
    """A runtime's layer belongs to no layer of the pack, or to several; its name is in the text."""


def pack_models(models: Sequence[bytes]) -> bytes:
    """One serialized model of all of them, side by side.

    Args:
        models: at least one, of one opset.

    Raises:
        ValueError: they are of different opsets.
    """
    loaded = [onnx.load_from_string(model) for model in models]
    opsets = {tuple((o.domain, o.version) for o in model.opset_import) for model in loaded}
    if len(opsets) > 1:
        raise ValueError(f"models of different opsets cannot be packed: {sorted(opsets)}")
    graph = onnx.GraphProto(name="pack")
    for number, model in enumerate(loaded):
        for node, name in zip(model.graph.node, node_names(model.graph), strict=True):
            node.name = name
        own = compose.add_prefix_graph(model.graph, f"pack{number}.")
        graph.node.extend(own.node)
        graph.input.extend(own.input)
        graph.output.extend(own.output)
        graph.initializer.extend(own.initializer)
    packed = helper.make_model(graph, opset_imports=loaded[0].opset_import)
    packed.ir_version = loaded[0].ir_version
    return packed.SerializeToString()


def pack_size(packed: bytes) -> int:
    """How many models are in a pack."""
    return 1 + max(_numbers(i.name for i in onnx.load_from_string(packed).graph.input))


def split_times(
    reported_ms: Iterable[tuple[str, float]],
    members: int,
    metadata: Mapping[str, str] | None = None,
) -> list[float]:
    """Each member's ms, from a runtime's report of one run of the pack.

    Changes of layout count for the layer that they stand before or after, as they do where that
    layer is timed alone.

    Args:
        reported_ms: (the runtime's layer name, ms).
        members: models in the pack.
        metadata: by the runtime's layer name, where the runtime tells the ONNX names apart.

    Raises:
        AmbiguousNames: something cannot be given to one member, or a member got nothing.
    """
    times = [0.0] * members
    named: set[int] = set()
    for name, ms in reported_ms:
        owners = _numbers(onnx_nodes(name, (metadata or {}).get(name, "")))
        if len(owners) != 1 or max(owners) >= members:
            whose = "several layers" if owners else "no layer"
            raise AmbiguousNames(f"the runtime's layer {_brief(name)!r} belongs to {whose}")
        named |= owners
        times[owners.pop()] += ms
    if missing := set(range(members)) - named:
        raise AmbiguousNames(f"the runtime reported no time for {len(missing)} of {members} layers")
    return times


def _numbers(names: Iterable[str]) -> set[int]:
    return {int(found[1]) for name in names if (found := _MEMBER.match(name))}


def _brief(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:77]}..."
