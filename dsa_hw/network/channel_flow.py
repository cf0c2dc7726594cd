"""Where every channel of every layer goes: a traced network run on the names of its channels.

``torch.export`` gives the network as a list of ATen operations. Each layer's output channels get
numbers (*labels*), and the operations run on tensors of labels in place of values: what moves data
(views, permutations, slices, concatenations, shuffles, windows) is executed as it is, what works
element by element says which labels meet, and layers read labels where they have input channels.
So no rule is needed for how a layout comes about. What nobody here knows makes the labels that it
takes *stay*, and says so.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_map

from dsa_hw.network.aten_names import (
    AXIS_AT,
    CUTS,
    ELEMENTWISE,
    MOVES,
    OVER_AXIS,
    PRODUCTS,
    REDUCES,
    SAME,
    SPATIAL,
)
from dsa_hw.network.channel_labels import extended, labels_along, spread, varies
from dsa_hw.network.channel_links import FIXED, ChannelLinks
from dsa_hw.network.channel_meetings import Fixed, Meetings
from dsa_hw.network.layer_modules import group_count, layer_types, norm_types, prunable_types

NETWORK_OUTPUT = "network output"
"""Why the channels of an output stay."""


def follow_channels(
    model: nn.Module, program: torch.export.ExportedProgram, links: ChannelLinks | None = None
) -> ChannelLinks:
    """Run ``program`` on labels.

    Args:
        model: what was exported.
        links: what another trace of it has found, to which this one adds.
    """
    links = links or ChannelLinks()
    _Run(model, program, links).run(program)
    return links


@dataclass(frozen=True, slots=True)
class _Call:
    """An operation with values in place of nodes.

    Args:
        name: of the operation, without namespace, overload and the mark of working in place.
        first: labels of its first argument, where that has any.
        made: what it makes, as the trace has it.
        where: the module that it is in.
    """

    node: fx.Node
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    first: Tensor | None
    made: Any
    where: str

    @property
    def operands(self) -> list[Tensor | Fixed]:
        """Its tensors."""
        flat = tree_flatten((self.args, self.kwargs))[0]
        return [one for one in flat if isinstance(one, (Tensor, Fixed))]

    def argument(self, at: int, name: str, default: Any = None) -> Any:
        """One that may be given by its name."""
        return self.args[at] if len(self.args) > at else self.kwargs.get(name, default)

    def like(self, make: Callable[[Tensor], Any]) -> Any:
        """The structure of what it makes, with ``make`` of its tensors."""
        return tree_map(lambda one: make(one) if isinstance(one, Tensor) else one, self.made)


class _Run:
    def __init__(
        self, model: nn.Module, program: torch.export.ExportedProgram, links: ChannelLinks
    ) -> None:
        self._links, self._meet = links, Meetings(links)
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._names = {module: name for name, module in model.named_modules()}
        self._parameters = dict(program.graph_signature.inputs_to_parameters)
        self._buffers = dict(program.graph_signature.inputs_to_buffers)
        self._values: dict[fx.Node, Any] = {}

    def run(self, program: torch.export.ExportedProgram) -> None:
        inputs = set(program.graph_signature.user_inputs)
        outputs = set(program.graph_signature.user_outputs)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._given(node, node.name in inputs)
            elif node.op == "call_function":
                self._values[node] = self._called(node)
            elif node.op == "output":
                for one in tree_flatten(node.args)[0]:
                    if isinstance(one, fx.Node) and one.name in outputs:
                        self._meet.stay(self._values[one], NETWORK_OUTPUT)

    def _given(self, node: fx.Node, is_input: bool) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        if is_input:
            return torch.full(value.shape, FIXED)
        parameter, shape = self._parameters.get(node.name), tuple(value.shape)
        what = f"a constant of shape {shape}"
        if parameter is not None:
            what = (
                "a parameter outside of convolution, linear and normalization layers "
                f"({parameter}, shape {shape})"
            )
        return Fixed(shape, what, parameter, self._frozen_norm(self._buffers.get(node.name)))

    def _frozen_norm(self, buffer: str | None) -> str | None:
        """The name of the norm that a buffer is of, if it has nothing but buffers."""
        path = "" if buffer is None else buffer.rpartition(".")[0]
        module = self._modules.get(path)
        frozen = isinstance(module, norm_types()) and not list(module.parameters(recurse=False))
        return self._names[module] if module is not None and frozen else None

    def _called(self, node: fx.Node) -> Any:
        args: Any = map_arg(node.args, lambda n: self._values[n])
        kwargs: Any = map_arg(node.kwargs, lambda n: self._values[n])
        if node.target is operator.getitem:
            return args[0][args[1]]
        labels = args[0] if args and isinstance(args[0], Tensor) else None
        call = _Call(
            node,
            _name_of(node),
            args,
            kwargs,
            None if labels is None else self._links.rooted(labels),
            node.meta.get("val"),
            _module_path(node),
        )
        if not any(isinstance(one, Tensor) for one in call.operands):
            return self._constant(call)
        return self._handler(call)(call)

    def _handler(self, call: _Call) -> Callable[[_Call], Any]:
        """What knows the operation."""
        name = call.name
        if name.startswith(("conv", "linear")) or name in ("addmm", "_convolution"):
            return self._layer
        if name in MOVES:
            return self._moved
        if name in PRODUCTS:
            return self._product
        if torch.Tag.pointwise in getattr(call.node.target, "tags", ()) or name in ELEMENTWISE:
            return self._elementwise
        if call.first is None:
            return self._unknown
        by_name: dict[str, Callable[[_Call], Any]] = {
            "batch_norm": self._batch_norm,
            "_native_batch_norm_legit_no_training": self._batch_norm,
            "instance_norm": self._instance_norm,
            "layer_norm": self._layer_norm,
            "native_layer_norm": self._layer_norm,
            "group_norm": self._group_norm,
            "native_group_norm": self._group_norm,
            "pad": self._padded,
            "constant_pad_nd": self._padded,
            "glu": self._glu,
            "scaled_dot_product_attention": self._attention,
        }
        if name in by_name:
            return by_name[name]
        for names, handler in (
            (SAME, self._same),
            (SPATIAL, self._spatial),
            (REDUCES, self._reduced),
            (OVER_AXIS, self._over_axis),
        ):
            if name in names:
                return handler
        return self._unknown

    def _constant(self, call: _Call) -> Any:
        """What is made of constants alone."""
        one = call.operands[0] if len(call.operands) == 1 else None
        what = one.what if isinstance(one, Fixed) else "a constant"
        parameter = one.parameter if isinstance(one, Fixed) else None
        owners = {o.owner for o in call.operands if isinstance(o, Fixed)}
        owner = owners.pop() if len(owners) == 1 else None
        return call.like(lambda t: Fixed(tuple(t.shape), what, parameter, owner))

    def _unknown(self, call: _Call) -> Any:
        self._meet.stay(call.operands, f"{call.where} takes them ({call.name})")
        return _without_labels(call)

    # -- layers and norms ----------------------------------------------------------------------

    def _layer(self, call: _Call) -> Any:
        args = call.args[1:] if call.name == "addmm" else call.args
        given, weight = args[0], args[1] if len(args) > 1 else call.kwargs.get("weight")
        axis = -1 if call.name in ("linear", "addmm") else 1
        name, module = self._module_of(weight)
        if not isinstance(given, Tensor) or module is None:
            self._meet.stay(given, f"{call.where} computes the weights that they meet")
            return _without_labels(call)
        if not isinstance(module, layer_types()):
            self._meet.stay(given, _cannot_shrink(name, module))
            return _without_labels(call)
        shape = call.made.shape
        out = self._links.positions((name, "out"), shape[axis])
        read = labels_along(self._links.rooted(given), axis)
        if read is None:
            reason = f"which channels {name} reads where cannot be told"
            self._meet.stay(given, reason)
            self._links.stay(out, reason)
        else:
            self._reads(name, group_count(module), read.numpy(), out)
        return spread(torch.from_numpy(out), axis, shape)

    def _reads(self, name: str, groups: int, read: np.ndarray, out: np.ndarray) -> None:
        """A layer's input channels are those that it reads."""
        there = read >= 0
        if groups > 1 and groups == len(read):  # depthwise: what it makes is what it reads
            if len(out) != len(read) or not there.all():
                reason = f"{name} is a grouped convolution whose inputs stay"
                if len(out) != len(read):
                    reason = f"{name} makes several channels of each of its inputs"
                for stays in (out, read):
                    self._links.stay(stays, reason)
            else:
                self._links.link(read, out)
            return
        into = self._links.positions((name, "in"), len(read))
        self._links.link(read[there], into[there])
        if groups == 1:
            self._links.stay(into[~there], "they are read by number")
            return
        if not there.all():
            for stays in (out, read):
                self._links.stay(stays, f"{name} is a grouped convolution whose inputs stay")
        per_out, per_in = len(out) // groups, len(read) // groups
        first = out[np.arange(groups) * per_out]
        self._links.link(np.repeat(first, per_out), out)  # it loses whole groups
        self._links.link(np.repeat(first, per_in), into)

    def _module_of(self, weight: Any) -> tuple[str, nn.Module | None]:
        """The module whose parameter a weight is, or is made of."""
        if not isinstance(weight, Fixed) or weight.parameter is None:
            return "", None
        path = weight.parameter.rpartition(".")[0].partition(".parametrizations")[0]
        module = self._modules[path]
        return self._names[module], module

    def _batch_norm(self, call: _Call) -> Any:
        labels = call.first
        assert labels is not None
        weight = next((a for a in call.args[1:5] if isinstance(a, Fixed) and a.parameter), None)
        module = self._modules.get(call.where) if weight is None else self._module_of(weight)[1]
        read = labels_along(labels, 1)
        if read is None or module is None or not isinstance(module, prunable_types()):
            self._meet.stay_along(labels, [1], _cannot_shrink(call.where, module))
        else:
            there = (read >= 0).numpy()
            out = self._links.positions((self._names[module], "out"), len(read))
            self._links.link(read.numpy()[there], out[there])
            self._links.stay(out[~there], "they are made by number")
        return call.like(lambda t: labels if t.shape == labels.shape else _no_labels(t))

    def _instance_norm(self, call: _Call) -> Any:
        assert call.first is not None
        if any(isinstance(a, Fixed) for a in call.args[1:5]):
            self._meet.stay_along(call.first, [1], f"{call.where} has a weight for each")
        return call.first

    def _layer_norm(self, call: _Call) -> Any:
        axes = range(-len(call.args[1]), 0)
        return self._normed(call, axes, "(layer-norm) computes over all of them")

    def _group_norm(self, call: _Call) -> Any:
        return self._normed(call, [1], "(group-norm) computes over groups of them")

    def _normed(self, call: _Call, axes: Sequence[int] | range, how: str) -> Any:
        labels = call.first
        assert labels is not None
        self._meet.stay_along(labels, axes, f"{call.where} {how}")
        return call.like(lambda t: labels if t.shape == labels.shape else _no_labels(t))

    # -- what moves data -----------------------------------------------------------------------

    def _moved(self, call: _Call) -> Any:
        args, kwargs = (tree_map(self._as_labels, part) for part in (call.args, call.kwargs))
        first = args[0]
        axis = call.argument(AXIS_AT[call.name], "dim", 0) if call.name in AXIS_AT else 0
        if isinstance(first, Tensor) and call.name in AXIS_AT and varies(first, axis):
            if call.name == "chunk":
                self._meet.link_parts(first.chunk(args[1], axis))
            elif not _takes_all(call, first.shape[axis]):
                self._meet.stay(first, f"{call.where} {CUTS[call.name]}")
        if isinstance(first, Tensor) and call.name == "pixel_shuffle":
            self._meet.link_pixels(first, args[1])
            args = (self._links.rooted(first), *args[1:])
        made = _executed(call, args, kwargs)
        if made is None:
            return self._unknown(call)
        if isinstance(made, Tensor) and call.name not in CUTS:
            self._meet.link_factors(made)
        return made

    def _as_labels(self, value: Any) -> Any:
        if isinstance(value, Fixed):
            return torch.full(value.shape, FIXED)
        return self._links.rooted(value) if isinstance(value, Tensor) else value

    def _same(self, call: _Call) -> Any:
        return call.like(lambda t: call.first)

    def _padded(self, call: _Call) -> Tensor:
        labels, padding = call.first, list(call.args[1])
        assert labels is not None
        for axis in range(len(padding) // 2):
            at = labels.dim() - 1 - axis
            if any(padding[2 * axis : 2 * axis + 2]) and varies(labels, at):
                self._meet.stay(labels, f"{call.where} pads them with a fixed number")
                return nn.functional.pad(labels, padding, value=FIXED)
        return extended(labels, call.made.shape)

    def _spatial(self, call: _Call) -> Any:
        assert call.first is not None
        read = labels_along(call.first, 1)
        if read is None:
            return self._unknown(call)
        return call.like(lambda t: spread(read, 1, t.shape))

    # -- what computes -------------------------------------------------------------------------

    def _reduced(self, call: _Call) -> Any:
        labels = call.first
        assert labels is not None
        at = 2 if call.name in ("norm", "linalg_vector_norm") else 1
        given = call.argument(at, "dim")
        axes = [given] if isinstance(given, int) else list(given or range(labels.dim()))
        self._meet.stay_along(labels, axes, f"{call.where} computes over all of them ({call.name})")
        kept = labels if not any(varies(labels, axis) for axis in axes) else _no_labels(labels)
        for axis in axes:
            kept = kept.narrow(axis, 0, 1)
        return call.like(lambda t: kept.reshape(t.shape))

    def _over_axis(self, call: _Call) -> Any:
        labels, axis = call.first, call.argument(1, "dim", -1)
        assert labels is not None
        axis = axis if isinstance(axis, int) else -1
        self._meet.stay_along(labels, [axis], f"{call.where} computes over all of them")
        return call.like(lambda t: labels if t.shape == labels.shape else _no_labels(t))

    def _glu(self, call: _Call) -> Any:
        """Half of the channels times a gate of the other half."""
        assert call.first is not None
        halves = call.first.chunk(2, call.argument(1, "dim", -1))
        self._meet.link_parts(halves)
        return self._links.rooted(halves[0])

    def _product(self, call: _Call) -> Any:
        left, right = (self._as_labels(one) for one in call.args[:2])
        if left.dim() < 2 or right.dim() < 2 or not all(
            isinstance(one, Tensor) for one in call.args[:2]
        ):  # fmt: skip
            return self._unknown(call)
        return self._meet.product(left, right, call.made.shape, call.where)

    def _attention(self, call: _Call) -> Any:
        """softmax(q k^T) v: q and k meet in a sum, v goes on as it is."""
        query, key, value = (self._as_labels(one) for one in call.args[:3])
        sums = (labels_along(query, -1), labels_along(key, -1))
        self._meet.link_sums(*sums, (query, key), call.where)
        if varies(value, -2):
            self._meet.stay(value, f"{call.where} multiplies them with each other")
            return _without_labels(call)
        return self._links.rooted(value.narrow(-2, 0, 1).expand(call.made.shape))

    def _elementwise(self, call: _Call) -> Any:
        if not isinstance(call.made, Tensor):
            return self._unknown(call)
        return self._meet.combined(call.operands, call.made.shape)


def _name_of(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    name = str(node.target) if schema is None else schema.name.rpartition("::")[2]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _module_path(node: fx.Node) -> str:
    """The module that an operation is in; the network itself has no name."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return (stack[-1][0] if stack else "") or "the network"


def _cannot_shrink(name: str, module: nn.Module | None) -> str:
    kind = "layer" if module is None else type(module).__name__
    return f"{name} ({kind}) takes them, and a {kind} cannot be made smaller yet"


def _no_labels(like: Tensor) -> Tensor:
    return torch.full(like.shape, FIXED)


def _without_labels(call: _Call) -> Any:
    return call.like(_no_labels)


def _executed(call: _Call, args: Any, kwargs: Any) -> Any:
    """The operation itself, on labels; None where it takes no whole numbers, nor others."""
    target: Any = call.node.target
    try:
        return target(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        pass
    try:
        made = target(*tree_map(_as_real, args), **tree_map(_as_real, kwargs))
    except (RuntimeError, NotImplementedError):
        return None
    return tree_map(lambda one: one.round().long() if isinstance(one, Tensor) else one, made)


def _as_real(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def _takes_all(call: _Call, size: int) -> bool:
    """Whether a slice along an axis of this size leaves nothing out."""
    start, end, step = (call.argument(at, name) for at, name in
                        ((2, "start"), (3, "end"), (4, "step")))  # fmt: skip
    everything = not start and (end is None or end >= size) and step in (None, 1)
    return call.name == "slice" and everything
