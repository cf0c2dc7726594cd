"""Residual branches in PyTorch modules: where a gate belongs, and the module without them.

The module whose forward adds is traced by ``torch.fx`` (modules without layers of their own are
taken as they are, so that dropout or stochastic depth keep to training). Cut, it becomes an
``fx.GraphModule`` without the branch: the rest of the model stays the user's own classes, and
names of parameters stay what they were.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from dsa_hw.errors import UnsupportedModel
from dsa_hw.network.branches.branch import Branch
from dsa_hw.network.layer_modules import layer_types, prunable_types

ADDITIONS = (operator.add, operator.iadd, torch.add)
PASSING_MODULES = (nn.Identity, nn.ReLU, nn.Dropout, nn.Dropout2d)
PASSING_FUNCTIONS = (operator.mul, operator.imul, torch.mul, torch.relu, F.relu, F.dropout)
"""A factor >= 0 on an input is the same factor on the output."""
REASON_LENGTH = 200
OUT_OF_PLACE: Mapping[Any, Callable[..., Any]] = {
    operator.iadd: operator.add, operator.imul: operator.mul, torch.relu_: torch.relu,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Located:
    """What ``locate_branches`` found.

    Args:
        places: owner and end (see ``Branch``), by a branch's layers.
        obstacles: why a branch has none, by its layers.
    """

    places: Mapping[frozenset[str], tuple[str, str]]
    obstacles: Mapping[frozenset[str], str]


def locate_branches(model: nn.Module, wanted: Collection[frozenset[str]]) -> Located:
    """Owner and end of branches given by their layers.

    The innermost module whose forward holds the branch and the add is the owner. A module that
    cannot be traced is passed over, and what it said is the obstacle of the branches in it.
    """
    found: dict[frozenset[str], tuple[str, str]] = {}
    obstacles = dict.fromkeys(wanted, "no module of its own ends it")
    for owner, module in _innermost_first(model):
        prefix = f"{owner}." if owner else ""
        here = [w for w in wanted if w not in found and all(n.startswith(prefix) for n in w)]
        if not here:
            continue
        graph = _traced(module)
        if isinstance(graph, str):
            obstacles |= dict.fromkeys(here, f"{owner or 'the model'} {graph}")
            continue
        for junction in _junctions(module, graph):
            layers = frozenset(prefix + name for name in junction.layers)
            if layers in here and (end := _gated_module(module, graph, junction)) is not None:
                found[layers] = (owner, prefix + end)
                obstacles.pop(layers, None)  # gone already where a module is called twice
    return Located(found, obstacles)


def cut_branches(model: nn.Module, branches: Sequence[Branch]) -> nn.Module:
    """``model`` without these branches, changed in place; an owner that is the model is replaced.

    Raises:
        UnsupportedModel: a branch is not there.
    """
    for owner in dict.fromkeys(b.owner for b in branches):
        prefix = f"{owner}." if owner else ""
        gone = [
            frozenset(n.removeprefix(prefix) for n in b.layers)
            for b in branches
            if b.owner == owner
        ]
        try:
            module = model.get_submodule(owner)
        except AttributeError as error:
            raise UnsupportedModel(
                f"{type(model).__name__} has no module {owner!r} that a branch could be removed of"
            ) from error
        smaller = _without(module, gone, owner)
        if not owner:
            return smaller
        parent, _, name = owner.rpartition(".")
        setattr(model.get_submodule(parent), name, smaller)
    return model


@dataclass(frozen=True, slots=True)
class _Junction:
    """An add in a traced module, with the branch and the shortcut that meet there."""

    add: fx.Node
    shortcut: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]
    layers: frozenset[str]


class _LayerTracer(fx.Tracer):
    """Steps into modules that hold layers, and takes all others as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, prunable_types()) or not _holds_layers(m)


def _holds_layers(module: nn.Module) -> bool:
    prunable = prunable_types()
    return any(isinstance(m, prunable) for m in module.modules())


def _innermost_first(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold layers and have a forward of their own, the deepest first."""
    named = [
        (name, module)
        for name, module in model.named_modules()
        if not isinstance(module, (nn.Sequential, nn.ModuleList, *prunable_types()))
        and _holds_layers(module)
    ]
    yield from sorted(named, key=lambda item: -len(item[0].split(".")) if item[0] else 1)


def _traced(module: nn.Module) -> fx.Graph | str:
    """The graph, or what went wrong: the module's own code runs on proxies, and may raise anything
    that it raises on what is no tensor."""
    try:
        return _LayerTracer().trace(module)
    except Exception as error:
        reason = " ".join(str(error).split())[:REASON_LENGTH]
        return f"does not run under torch.fx ({type(error).__name__}: {reason})"


def _junctions(module: nn.Module, graph: fx.Graph) -> list[_Junction]:
    found = []
    for node in graph.nodes:
        if not _is_addition(node):
            continue
        for end, other in (node.args, reversed(node.args)):
            shortcut = _plain(module, other)
            nodes = _between(node, end, shortcut)
            if nodes is not None:
                layers = frozenset(
                    str(n.target) for n in nodes
                    if n.op == "call_module"
                    and isinstance(module.get_submodule(str(n.target)), layer_types())
                )  # fmt: skip
                found.append(_Junction(node, shortcut, end, nodes, layers))
    return found


def _is_addition(node: fx.Node) -> bool:
    adds = (node.op == "call_function" and node.target in ADDITIONS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    plain = len(node.args) == 2 and not node.kwargs
    return adds and plain and all(isinstance(a, fx.Node) for a in node.args)


def _plain(module: nn.Module, node: fx.Node) -> fx.Node:
    """The node behind identity modules."""
    while node.op == "call_module" and isinstance(
        module.get_submodule(str(node.target)), nn.Identity
    ):
        node = node.all_input_nodes[0]
    return node


def _between(add: fx.Node, end: fx.Node, shortcut: fx.Node) -> tuple[fx.Node, ...] | None:
    """Nodes from ``shortcut`` to ``end``, in order; None if that is no branch of its own."""
    inside: dict[fx.Node, None] = {}
    waiting, reached = [end], False
    while waiting:
        node = waiting.pop()
        if node is shortcut:
            reached = True
        elif node.op == "placeholder":
            return None
        elif node not in inside:
            inside[node] = None
            waiting += node.all_input_nodes
    closed = all(user in inside or user is add for node in inside for user in node.users)
    if not reached or not inside or not closed:
        return None
    return tuple(node for node in add.graph.nodes if node in inside)


def _gated_module(module: nn.Module, graph: fx.Graph, junction: _Junction) -> str | None:
    """The last module of the branch whose output can be gated in place of the branch's."""
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1

    def found(node: fx.Node) -> str | None:
        if node not in junction.nodes:
            return None
        if node.op == "call_module":
            target = str(node.target)
            if not isinstance(module.get_submodule(target), PASSING_MODULES):
                return target if calls[target] == 1 else None
            return found(node.all_input_nodes[0])
        if node.op == "call_function" and node.target in PASSING_FUNCTIONS:
            return next((end for n in node.all_input_nodes if (end := found(n))), None)
        return None

    return found(junction.end)


def _without(module: nn.Module, gone: Sequence[frozenset[str]], name: str) -> fx.GraphModule:
    graph = _traced(module)
    if isinstance(graph, str):
        raise UnsupportedModel(f"{name or type(module).__name__} {graph}")
    for layers in gone:
        # Found anew each time: the shortcut of the next branch may be the add of this one.
        found = {j.layers: j for j in _junctions(module, graph)}
        if layers not in found:
            raise UnsupportedModel(
                f"{name or type(module).__name__} has no residual branch of the layers "
                f"{', '.join(sorted(layers))} that could be removed"
            )
        _cut(module, graph, found[layers])
    smaller = fx.GraphModule(module, graph, class_name=type(module).__name__)
    smaller.graph.eliminate_dead_code()  # identities that led to the add
    smaller.delete_all_unused_submodules()
    smaller.recompile()
    return smaller


def _cut(module: nn.Module, graph: fx.Graph, junction: _Junction) -> None:
    users = list(junction.add.users)
    junction.add.replace_all_uses_with(junction.shortcut)
    for node in (junction.add, *reversed(junction.nodes)):
        graph.erase_node(node)
    for user in users:
        _make_out_of_place(module, user)


def _make_out_of_place(module: nn.Module, node: fx.Node) -> None:
    """What wrote over the sum must not write over the shortcut, which others may have kept."""
    if node.op == "call_module":
        target = module.get_submodule(str(node.target))
        if getattr(target, "inplace", False):
            setattr(target, "inplace", False)  # noqa: B010 - activations declare no type for it
    elif node.op == "call_function" and node.kwargs.get("inplace"):
        node.kwargs = dict(node.kwargs) | {"inplace": False}
    elif node.op == "call_function" and node.target in OUT_OF_PLACE:
        node.target = OUT_OF_PLACE[node.target]
    elif node.op == "call_method" and str(node.target).endswith("_"):
        node.target = str(node.target).removesuffix("_")
