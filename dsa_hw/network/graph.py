"""The dense network as it is deployed: its ONNX graph, and that graph at other widths.

Latency does not depend on the weights, so a network of any widths is timed without training,
surgery or export: the dense graph with its initializers resized is the same network to the runtime.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference

from dsa_hw.network.branches.branch import Branch, removed_branches
from dsa_hw.network.branches.onnx import Region, cut_regions, residual_regions
from dsa_hw.network.channel_links import Side
from dsa_hw.network.coupling import Coupling
from dsa_hw.network.elements import FREE_OPS, KINDS, Layer, Linear, Operation, Widths, add_linear
from dsa_hw.network.onnx_forms import free_channel_numbers, value_shapes
from dsa_hw.network.onnx_nodes import (
    SCALING,
    WEIGHTED,
    attributes,
    is_layer,
    kind_of,
    module_name,
    plain_name,
    unshare_weights,
)
from profilers.layers.kinds.kind import LayerNode, WeightAxes
from profilers.layers.kinds.registry import LAYER_KINDS
from profilers.layers.models import random_weight
from profilers.layers.spec import FUSED_ACTIVATIONS, LayerSpec


class DeployedGraph:
    """The dense network's ONNX graph with the coupling of its channels.

    Attributes:
        layers: in the graph's order.
        operations: what else moves data, summed up by kind.
        unknown_operations: ONNX names of those without a kind of their own, priced as ``other``.
        branches: that may be removed; none unless asked for.
        fixed_branches: those that could not be made removable, and why; see ``FoundBranches``.
        branch_operations: of ``operations``, what goes with each branch.
        elements: of every value between the nodes.
        precision: of weights and activations.
        unread: layers that no row of a table can be of, by module, and why: their channels stay.
        digest: identifies the graph and its coupling, not its weights.
    """

    def __init__(
        self,
        exported: onnx.ModelProto,
        coupling: Coupling,
        precision: str = "fp32",
        branches: Sequence[Branch] = (),
        fixed_branches: Sequence[str] = (),
    ) -> None:
        unshare_weights(exported.graph)
        self.model = shape_inference.infer_shapes(exported, strict_mode=True, data_prop=True)
        self.coupling = coupling
        self.precision = precision
        self._weights = {i.name: i for i in self.model.graph.initializer}
        self._shapes = value_shapes(self.model)
        self._axis = free_channel_numbers(self.model, self._shapes)
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)
        self.unread: dict[str, str] = {}
        self._module_of = self._read_layers()
        self._scales = self._read_scales()
        self.layers = tuple(self._layer(node) for node in self._layer_nodes())
        self.elements = {i.name: self._dense(i.name) for i in self.model.graph.input}
        self.unknown_operations: tuple[str, ...] = ()
        self.branches, self.fixed_branches = tuple(branches), tuple(fixed_branches)
        self._regions = self._regions_of(self.branches)
        self.branch_of = {
            name: index for index, region in enumerate(self._regions) for name in region.nodes
        }
        self.operations, self.branch_operations = self._operations()
        self.digest = self._digest()

    @property
    def dense_widths(self) -> tuple[int, ...]:
        """Width of every group in the dense network."""
        return tuple(g.dense_width for g in self.coupling.groups)

    def at_precision(self, precision: str) -> DeployedGraph:
        """The same network with its layers' keys at another precision (the graph stays float32;
        backends convert it)."""
        if precision == self.precision:
            return self
        return self._again(precision, self.branches, self.fixed_branches)

    def with_branches(
        self, branches: Sequence[Branch], fixed_branches: Sequence[str] = ()
    ) -> DeployedGraph:
        """The same network, these branches of which may be removed."""
        return self._again(self.precision, branches, fixed_branches)

    def _again(
        self, precision: str, branches: Sequence[Branch], fixed_branches: Sequence[str]
    ) -> DeployedGraph:
        exported = onnx.ModelProto()
        exported.CopyFrom(self.model)
        del exported.graph.value_info[:]
        return DeployedGraph(exported, self.coupling, precision, branches, fixed_branches)

    def regions(self) -> tuple[Region, ...]:
        """All residual branches with an identity shortcut, removable or not."""
        return residual_regions(self.model.graph, self._shapes)

    def can_have(self, widths: Sequence[int]) -> bool:
        """Whether zeros among ``widths`` are whole branches that may be removed."""
        try:
            removed_branches(self.branches, widths)
        except ValueError:
            return False
        return True

    def operation_elements(self, widths: Widths) -> dict[str, float]:
        """Elements moved by operations beside the layers, by kind."""
        found = {o.kind: o.elements(widths) for o in self.operations}
        for branch in removed_branches(self.branches, [float(w) for w in widths]):
            for operation in self.branch_operations[self.branches.index(branch)]:
                found[operation.kind] -= operation.elements(widths)
        return found

    def resized(self, widths: Widths, seed: int = 0) -> bytes:
        """Serialized network of these widths, with random weights.

        Args:
            widths: channels of each group, multiples of its ``atom_channels``; a branch whose
                internal groups have none is not in the network.

        Raises:
            ValueError: a group has width zero without its branch.
        """
        rng = np.random.default_rng(seed)
        model = onnx.ModelProto()
        model.CopyFrom(self._hollow)
        graph = model.graph
        gone = removed_branches(self.branches, [float(w) for w in widths])
        cut_regions(graph, [self._regions[self.branches.index(b)] for b in gone])
        sizes = self._resized_shapes(graph, widths)
        for tensor in graph.initializer:
            if tensor.name in sizes:
                shape = sizes[tensor.name]
                value = random_weight(shape, rng) if len(shape) > 1 else np.full(shape, 0.1)
                tensor.ClearField("float_data")
                tensor.dims[:] = shape
                tensor.raw_data = value.astype(np.float32, copy=False).tobytes()
        for node in graph.node:
            self._fix_attributes(node, widths)
        return model.SerializeToString()

    def fixed_counts(self) -> tuple[float, float]:
        """FLOPs and weights of layers that are in no row of a table; their channels stay."""
        flops = weights = 0.0
        for node in self.model.graph.node:
            weighted = node.op_type in WEIGHTED and node.input[1] in self._weights
            if not weighted or node.output[0] in self._module_of:
                continue
            count = float(np.prod(self._weights[node.input[1]].dims))
            made = self._shapes[node.output[0]]
            if node.op_type == "MatMul":
                positions = made[:-1]
            else:
                where = self._shapes[node.input[0]] if node.op_type == "ConvTranspose" else made
                positions = (where[0], *where[2:])
            weights += count
            flops += 2.0 * count * float(np.prod(positions))
        return flops, weights

    def layer_shapes(self, widths: Widths) -> list[tuple[int, ...]]:
        """Shape that every layer's weight has in ``resized(widths)``, in the order of ``layers``.

        Raises:
            ValueError: a grouped convolution cannot have these widths.
        """
        sizes = self._resized_shapes(self.model.graph, widths)
        return [sizes[node.input[1]] for node in self._layer_nodes()]

    def cut(self, keep: Sequence[np.ndarray]) -> bytes:
        """Serialized network without the atoms that ``keep`` leaves out, its weights selected.

        Args:
            keep: for each group (atoms,) which of them stay; no branch goes.

        Raises:
            ValueError: a grouped convolution cannot have these widths.
        """
        widths = [
            int(kept.sum()) * group.atom_channels
            for kept, group in zip(keep, self.coupling.groups, strict=True)
        ]
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        graph = model.graph
        del graph.value_info[:]
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            for name, axes in self._kept_by_axis(node, keep).items():
                value = numpy_helper.to_array(tensors[name])
                for axis, kept in axes.items():
                    value = value.take(kept, axis)
                tensors[name].CopyFrom(numpy_helper.from_array(value, name))
            self._fix_attributes(node, widths)
        return model.SerializeToString()

    def _kept_by_axis(
        self, node: onnx.NodeProto, keep: Sequence[np.ndarray]
    ) -> dict[str, dict[int, np.ndarray]]:
        """Indices that stay along the axes of a node's weights, by the weights' names."""
        maps = self.coupling.maps
        if node.op_type == "BatchNormalization":
            side = (module_name(node.input[1]), "out")
            kept = {0: maps[side].kept(keep)} if side in maps else {}
            return {name: kept for name in node.input[1:]}
        if node.output[0] in self._scales:
            name, axis, side = self._scales[node.output[0]]
            return {name: {axis: maps[side].kept(keep)}} if side in maps else {}
        if node.output[0] not in self._module_of:
            return {}
        layer, at = self._layer_of(node), self._weight_axes(node)
        axes: dict[int, np.ndarray] = {}
        if (layer.name, "out") in maps:
            axes[at.out] = maps[layer.name, "out"].kept(keep)
        if (layer.name, "in") in maps and not layer.spec.tied:
            axes[at.into] = maps[layer.name, "in"].kept(keep)
        found = {node.input[1]: axes}
        if len(node.input) > 2:
            found[node.input[2]] = {0: axes[at.out]} if at.out in axes else {}
        return found

    @functools.cached_property
    def _hollow(self) -> onnx.ModelProto:
        """The graph with its layers' weights left out: what is copied for every other width."""
        hollow = onnx.ModelProto()
        hollow.CopyFrom(self.model)
        del hollow.graph.value_info[:]
        weights = {node.input[1] for node in self._layer_nodes()}
        for tensor in hollow.graph.initializer:
            if tensor.name in weights:
                tensor.ClearField("raw_data")
                tensor.ClearField("float_data")
        return hollow

    # -- reading the graph ------------------------------------------------------------------

    def _layer_nodes(self) -> list[onnx.NodeProto]:
        return [n for n in self.model.graph.node if n.output[0] in self._module_of]

    def _read_layers(self) -> dict[str, str]:
        """The layers' modules, by the outputs of their nodes; what cannot be read is none."""
        found = {}
        for node in self.model.graph.node:
            if not is_layer(node):
                continue
            name = node.input[1]
            module = module_name(name)
            if name not in self._weights or not plain_name(name).endswith(".weight"):
                continue  # its weight is computed
            try:
                self._read(node)
            except ValueError as error:
                self.unread[module] = str(error)
            else:
                found[node.output[0]] = module
        return found

    def _read_scales(self) -> dict[str, tuple[str, int, Side]]:
        """Constants with a number for each channel (a frozen norm's), by their nodes' outputs.

        Each with its name, the axis of the channels, and the side whose channels they are.
        """
        sides: dict[str, Side] = {}
        found = {}
        for node in self.model.graph.node:
            made = node.output[0]
            if made in self._module_of:
                sides[made] = (self._module_of[made], "out")
                continue
            source = next((name for name in node.input if name in sides), None)
            if source is None or node.op_type in ("Concat", "Split", "Slice"):
                continue
            if made in self._axis and self._channels(made) == self._channels(source):
                sides[made] = sides[source]
            if node.op_type in SCALING and made in self._axis:
                other = next((n for n in node.input if n in self._weights), None)
                dims = () if other is None else tuple(self._weights[other].dims)
                axis = self._axis[made] - len(self._shapes[made]) + len(dims)
                if other is not None and 0 <= axis and dims[axis] == self._channels(made) > 1:
                    found[made] = (other, axis, sides[source])
        return found

    def _channels(self, value: str) -> int:
        return self._shapes[value][self._axis[value]] if value in self._axis else 0

    def _read(self, node: onnx.NodeProto) -> tuple[LayerSpec, int, int]:
        shape, weight = self._shapes[node.input[0]], tuple(self._weights[node.input[1]].dims)
        return kind_of(node).read(LayerNode(attributes(node), shape, weight))

    def _layer_of(self, node: onnx.NodeProto) -> Layer:
        return self.layers[list(self._module_of).index(node.output[0])]

    def _weight_axes(self, node: onnx.NodeProto) -> WeightAxes:
        return kind_of(node).weight_axes(attributes(node))

    def _layer(self, node: onnx.NodeProto) -> Layer:
        module = self._module_of[node.output[0]]
        kind = kind_of(node)
        spec, ins, outs = self._read(node)
        tail = self._tail(node) if kind.fuses_activation else ()
        spec = replace(spec, dtype=self.precision, tail=tail)
        cin = Linear(*self.coupling.widths_to_linear((module, "in"), ins))
        cout = Linear(*self.coupling.widths_to_linear((module, "out"), outs))
        if spec.groups == "depthwise":
            cin = cout
        return Layer(module, spec, cin, cout)

    def _tail(self, node: onnx.NodeProto) -> tuple[str, ...]:
        """The activation that the runtime folds in (a fused residual add costs by elements)."""
        consumers = self._consumers.get(node.output[0], [])
        if len(consumers) == 1 and consumers[0].op_type.lower() in FUSED_ACTIVATIONS:
            return (consumers[0].op_type.lower(),)
        return ()

    def _regions_of(self, branches: Sequence[Branch]) -> tuple[Region, ...]:
        """Where the branches are in the graph."""
        if not branches:
            return ()
        by_layers = {frozenset(region.layers): region for region in self.regions()}
        return tuple(by_layers[frozenset(branch.layers)] for branch in branches)

    def _operations(self) -> tuple[tuple[Operation, ...], tuple[tuple[Operation, ...], ...]]:
        """What moves data beside the layers: in all, and within each branch."""
        sums: dict[str, Linear] = {}
        within: list[dict[str, Linear]] = [{} for _ in self.branches]
        unknown: set[str] = set()
        elements = self.elements
        layers = dict(zip(self._module_of, self.layers, strict=True))
        for node in self.model.graph.node:
            kind = KINDS.get(node.op_type, "other")
            if node.output[0] in layers:
                layer = layers[node.output[0]]
                size = float(np.prod(layer.spec.output_size) * layer.spec.batch)
                elements[node.output[0]] = layer.cout.scaled(size)
                continue
            moved = self._follow(node, elements)
            if node.op_type in FREE_OPS or self._is_fused(node) or moved is None:
                continue
            add_linear(sums, kind, moved)
            self._add_within(within, node, kind, moved)
            if kind == "other":
                unknown.add(node.op_type)
        self.unknown_operations = tuple(sorted(unknown))
        return _as_operations(sums), tuple(_as_operations(own) for own in within)

    def _add_within(
        self, within: list[dict[str, Linear]], node: onnx.NodeProto, kind: str, moved: Linear
    ) -> None:
        if node.output[0] in self.branch_of:
            add_linear(within[self.branch_of[node.output[0]]], kind, moved)

    def _follow(self, node: onnx.NodeProto, elements: dict[str, Linear]) -> Linear | None:
        """Record the outputs' elements; return what the node moves (the larger side)."""
        known = [elements[n] for n in node.input if n in elements]
        if not known:
            return None
        if node.op_type == "Concat":
            source = Linear(
                np.sum([k.coefficients for k in known], axis=0), sum(k.constant for k in known)
            )
        else:
            source = max(known, key=lambda k: k(self.dense_widths))
        total = source(self.dense_widths)
        for name in node.output:
            if name in self._shapes:
                factor = float(np.prod(self._shapes[name])) / total
                elements[name] = source.scaled(factor)
        produced = [elements[n] for n in node.output if n in elements]
        return max([source, *produced], key=lambda k: k(self.dense_widths))

    def _is_fused(self, node: onnx.NodeProto) -> bool:
        if node.op_type.lower() not in FUSED_ACTIVATIONS:
            return False
        maker = next((n for n in self.model.graph.node if node.input[0] in n.output), None)
        if maker is None or len(self._consumers[node.input[0]]) > 1:
            return False
        kind = LAYER_KINDS.of_operator(maker.op_type)
        if kind is None:
            return maker.op_type == "Add"  # an add behind a convolution takes it along
        return kind.fuses_activation

    def _dense(self, name: str) -> Linear:
        return Linear(np.zeros(len(self.coupling.groups)), float(np.prod(self._shapes[name])))

    # -- writing resized graphs -------------------------------------------------------------

    def _resized_shapes(self, graph: onnx.GraphProto, widths: Widths) -> dict[str, tuple[int, ...]]:
        """New shapes of the initializers of ``graph`` that depend on the widths."""
        shapes: dict[str, tuple[int, ...]] = {}
        layers = dict(zip(self._module_of, self.layers, strict=True))
        for node in graph.node:
            if node.output[0] in layers:
                layer, axes = layers[node.output[0]], self._weight_axes(node)
                cin, cout = round(layer.cin(widths)), round(layer.cout(widths))
                shape = list(self._weights[node.input[1]].dims)
                shape[axes.out], shape[axes.into] = cout, cin // layer.spec.group_count(cin)
                shapes[node.input[1]] = tuple(shape)
                if len(node.input) > 2:
                    shapes[node.input[2]] = (cout,)
            elif node.output[0] in self._scales:
                name, axis, side = self._scales[node.output[0]]
                shape = list(self._weights[name].dims)
                linear = Linear(*self.coupling.widths_to_linear(side, shape[axis]))
                shape[axis] = round(linear(widths))
                shapes[name] = tuple(shape)
            elif node.op_type == "BatchNormalization":
                elements = self.elements[node.input[0]](widths)
                shape = self._shapes[node.input[0]]
                channels = round(elements * shape[1] / np.prod(shape))
                shapes.update({name: (channels,) for name in node.input[1:]})
        return shapes

    def _fix_attributes(self, node: onnx.NodeProto, widths: Widths) -> None:
        if node.output[0] not in self._module_of:
            return
        layer = self._layer_of(node)
        if layer.spec.tied:
            for attribute in node.attribute:
                if attribute.name == "group":
                    attribute.i = layer.spec.group_count(round(layer.cin(widths)))

    def _digest(self) -> str:
        parts = [n.op_type for n in self.model.graph.node]
        parts += [f"{layer.spec} {layer.name}" for layer in self.layers]
        parts += [f"{g.name} {g.dense_width} {g.atoms}" for g in self.coupling.groups]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _as_operations(sums: Mapping[str, Linear]) -> tuple[Operation, ...]:
    return tuple(Operation(kind, value) for kind, value in sorted(sums.items()))
