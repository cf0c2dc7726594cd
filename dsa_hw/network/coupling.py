"""Which channels of which layers can only be removed together.

Torch-Pruning's dependency graph (Fang et al., "DepGraph", CVPR 2023, arXiv:2301.12900) says which
channel of one layer meets which channel of another. Here these pairs become *atoms* (the smallest
sets of channels that can be removed) and *groups* (atoms that have the same number of channels in
the same layers, hence share one keep ratio). Every layer's channels are therefore a sum of widths
of groups, exactly: a layer whose output meets a concatenation is in one group for each part of it.
A grouped convolution loses whole convolution groups, so that the groups that stay keep their
width: its atoms are as many channels wide.

A group that must keep its width is *frozen* and says why.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from dsa_hw.errors import UnsupportedModel
from dsa_hw.network.layer_modules import (
    channel_attribute,
    group_count,
    layer_types,
    prunable_types,
)

Side = tuple[str, str]
"""(module name, ``"in"`` or ``"out"``): one channel dimension."""

NETWORK_OUTPUT = "network output"
"""Why the channels of an output stay."""

Pair = tuple[Side, np.ndarray, Side, np.ndarray]
"""Channels of one side and, as many, those of another that go with them."""
Stay = tuple[Side, np.ndarray, str]
"""Channels of one side that must stay, and why."""


@dataclass(frozen=True, slots=True)
class Group:
    """Coupled channels that share one width.

    Args:
        name: the first layer whose output these channels are, or are a part of; unique.
        dense_width: channels of that layer in the dense network.
        atoms: the smallest removable sets in it; ``dense_width / atoms`` channels each.
        layers: all layers (conv, linear) that make these channels.
        frozen: why it must keep its width; None when it may shrink.
    """

    name: str
    dense_width: int
    atoms: int
    layers: tuple[str, ...]
    frozen: str | None = None

    @property
    def atom_channels(self) -> int:
        """Channels that are removed together in the naming layer."""
        return self.dense_width // self.atoms


@dataclass(frozen=True, slots=True)
class ChannelMap:
    """Group and atom of every channel along one dimension of one module.

    Args:
        group: (C,) index of the group, -1 for channels that stay.
        atom: (C,) index of the atom within its group.
    """

    group: np.ndarray
    atom: np.ndarray

    def kept(self, keep: Sequence[np.ndarray]) -> np.ndarray:
        """Channel indices that stay when of group g the atoms with ``keep[g]`` true stay."""
        stays = np.ones(len(self.group), bool)
        for index in np.unique(self.group[self.group >= 0]):
            mine = self.group == index
            stays[mine] = keep[index][self.atom[mine]]
        return np.flatnonzero(stays)


@dataclass(frozen=True, slots=True)
class Coupling:
    """The groups of a model, and where their channels are in the modules that can be cut."""

    groups: tuple[Group, ...]
    maps: dict[Side, ChannelMap]

    def widths_to_linear(self, side: Side, channels: int) -> tuple[np.ndarray, float]:
        """Channels of ``side`` as ``coefficients @ widths + constant``.

        Args:
            channels: the side's channels in the dense network (for a side that never shrinks).
        """
        coefficients = np.zeros(len(self.groups))
        if side not in self.maps:
            return coefficients, float(channels)
        for index in self.maps[side].group:
            if index >= 0:
                coefficients[index] += 1.0 / self.groups[index].dense_width
        return coefficients, float(np.count_nonzero(self.maps[side].group < 0))

    def groups_of(self, module: str) -> set[int]:
        """Indices of the groups that have channels on either side of a module."""
        found: set[int] = set()
        for side in ("in", "out"):
            if (module, side) in self.maps:
                found.update(self.maps[module, side].group.tolist())
        return found - {-1}

    def frozen(self, reasons: Mapping[int, str]) -> Coupling:
        """The same coupling with more groups frozen.

        Args:
            reasons: by index of the group; a reason that a group has already stays.
        """
        groups = [
            replace(group, frozen=group.frozen or reasons.get(index))
            for index, group in enumerate(self.groups)
        ]
        return Coupling(tuple(groups), self.maps)


def find_coupling(
    model: nn.Module, example_inputs: torch.Tensor, exclude: Sequence[str] = ()
) -> Coupling:
    """Trace ``model`` and find its coupled groups.

    Args:
        example_inputs: (N, C, H, W), on the model's device.
        exclude: patterns (``fnmatch``) of module names whose output channels must all stay.

    Raises:
        UnsupportedModel: the channels cannot be traced.
    """
    trace = _trace(model, example_inputs)
    offsets = dict(
        zip(trace.sizes, np.cumsum([0, *trace.sizes.values()])[:-1].tolist(), strict=True)
    )
    _tie_grouped_convolutions(trace, model)
    atom_of = _merge_atoms(trace, offsets)
    return _name_groups(model, atom_of, trace, offsets, exclude)


@dataclass
class _Trace:
    """What Torch-Pruning says of a model.

    Args:
        sizes: channels of every side.
        pairs: channels that go together.
        stays: channels that must stay, and why.
    """

    sizes: dict[Side, int]
    pairs: list[Pair]
    stays: list[Stay]


def _trace(model: nn.Module, example_inputs: torch.Tensor) -> _Trace:
    """Torch-Pruning's groups as pairs of positions, and the length of every side."""
    graph, groups = _dependency_groups(model, example_inputs)
    names = {module: name for name, module in model.named_modules()}
    trace = _Trace({}, [], [])
    for group in groups:
        root_module = group[0].dep.target.module
        root: Side = (names[root_module], "out")
        whole = np.arange(_channels(root_module, "out"))
        trace.sizes[root] = len(whole)
        if not graph.module2node[root_module].outputs:
            trace.stays.append((root, whole, NETWORK_OUTPUT))
        for item in group:
            _read_item(trace, graph, item, root, names)
    return trace


def _dependency_groups(model: nn.Module, example_inputs: torch.Tensor):
    import torch_pruning as tp

    was_training = model.training
    model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its notices about unwrapped parameters: checked below
            graph = tp.DependencyGraph().build_dependency(
                model, example_inputs=example_inputs, verbose=False
            )
        return graph, list(graph.get_all_groups())
    except Exception as error:
        raise UnsupportedModel(
            f"the channels of {type(model).__name__} cannot be traced ({error}); exclude does not "
            "help here: the model must run on one image tensor and be differentiable"
        ) from error
    finally:
        model.train(was_training)


def _read_item(trace: _Trace, graph, item, root: Side, names: dict[nn.Module, str]) -> None:
    """Add what one item of a Torch-Pruning group says of the root's channels."""
    module = item.dep.target.module
    whole = np.arange(trace.sizes[root])
    at_root = whole if item.root_idxs is None else np.asarray(item.root_idxs, int)
    here = np.asarray(item.idxs, int)
    reason = _why_it_stays(module, names)
    if reason is not None:
        trace.stays.append((root, at_root, reason))
        return
    if module not in names or not isinstance(module, prunable_types()):
        return  # an operation, or a module without parameters
    out = graph.is_out_channel_pruning_fn(item.dep.handler)
    is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    side: Side = (names[module], "out" if out or is_norm else "in")
    size = trace.sizes[side] = _channels(module, side[1])
    if item.root_idxs is None or len(at_root) != len(here) or (here >= size).any():
        reason = f"which of its channels meet which of {names[module]} cannot be traced"
        trace.stays += [(root, whole, reason), (side, np.arange(size), reason)]
        return
    trace.pairs.append((root, at_root, side, here))


def _why_it_stays(module: nn.Module, names: Mapping[nn.Module, str]) -> str | None:
    """What is in the way of removing channels that meet ``module``; None if nothing is."""
    from torch_pruning import ops

    if isinstance(module, nn.Parameter):
        return (
            "they meet a parameter outside of convolution, linear and normalization layers "
            f"(shape {tuple(module.shape)})"
        )
    if isinstance(module, ops._OutputOp):
        return NETWORK_OUTPUT
    if isinstance(module, (ops._SplitOp, ops._UnbindOp)):
        return "the network splits them into parts of fixed size"
    if isinstance(module, ops._SliceOp) and not _takes_all(module):
        return "the network takes a slice of fixed size of them"
    if module in names and not isinstance(module, prunable_types()):
        if next(module.parameters(), None) is not None:
            kind = type(module).__name__
            return f"{names[module]} ({kind}) takes them, and a {kind} cannot be made smaller yet"
    return None


def _takes_all(slice_op) -> bool:
    """Whether a slice is of another dimension than the channels', or begins at their first and
    has no end before their last."""
    sizes = slice_op.grad_fn._saved_self_sym_sizes
    dimension = slice_op.dim
    if dimension >= len(sizes):  # negative dimensions are saved as unsigned numbers
        dimension = dimension - 2**64 + len(sizes)
    if len(sizes) < 2 or dimension != 1:
        return True
    return slice_op.step == 1 and slice_op.start == 0 and slice_op.end >= sizes[1]


def _channels(module: nn.Module, side: str) -> int:
    if (attribute := channel_attribute(module, side)) is None:
        raise UnsupportedModel(f"{type(module).__name__} has no {side} channels")
    return getattr(module, attribute)


def _tie_grouped_convolutions(trace: _Trace, model: nn.Module) -> None:
    """A grouped convolution loses whole groups: the channels of each go together."""
    modules = dict(model.named_modules())
    for name, side in list(trace.sizes):
        module = modules[name]
        count = group_count(module)
        if side != "out" or count == 1:
            continue
        outs, ins = (np.arange(_channels(module, end)) for end in ("out", "in"))
        if (name, "in") not in trace.sizes:
            if count != len(outs):
                reason = f"{name} is a grouped convolution whose inputs stay"
                trace.stays.append(((name, "out"), outs, reason))
            continue  # depthwise: Torch-Pruning already treats input and output as one
        per_out, per_in = len(outs) // count, len(ins) // count
        first = np.arange(count) * per_out
        trace.pairs += [
            ((name, "out"), np.repeat(first, per_out), (name, "out"), outs),
            ((name, "out"), np.repeat(first, per_in), (name, "in"), ins),
        ]


def _merge_atoms(trace: _Trace, offsets: Mapping[Side, int]) -> np.ndarray:
    """(all positions,) atom number of every position of every side."""
    rows = [offsets[a] + i for a, i, _, _ in trace.pairs]
    columns = [offsets[b] + j for _, _, b, j in trace.pairs]
    total = sum(trace.sizes.values())
    row = np.concatenate(rows) if rows else np.zeros(0, int)
    column = np.concatenate(columns) if columns else np.zeros(0, int)
    links = coo_array((np.ones(len(row), np.int8), (row, column)), shape=(total, total))
    return connected_components(links, directed=False)[1]


def _name_groups(
    model: nn.Module,
    atom_of: np.ndarray,
    trace: _Trace,
    offsets: Mapping[Side, int],
    exclude: Sequence[str],
) -> Coupling:
    """Make groups of the atoms that are in the same sides, in the order of the layers."""
    modules = dict(model.named_modules())
    sizes = trace.sizes
    made = [
        side for side in sizes
        if side[1] == "out" and isinstance(modules[side[0]], layer_types())
    ]  # fmt: skip
    rank = {name: index for index, name in enumerate(modules)}
    made.sort(key=lambda side: rank[side[0]])
    positions = {s: atom_of[offsets[s] : offsets[s] + sizes[s]] for s in sizes}
    kind_of = _kinds_of_atoms(atom_of, np.repeat(np.arange(len(sizes)), list(sizes.values())))
    order = list(dict.fromkeys(kind for s in made for kind in kind_of[positions[s]].tolist()))
    number = np.full(int(kind_of.max(initial=-1)) + 1, -1)
    number[order] = np.arange(len(order))
    atom_index = _atom_indices(kind_of, [positions[s] for s in made])
    maps = {
        side: ChannelMap(group=number[kind_of[atoms]], atom=atom_index[atoms])
        for side, atoms in positions.items()
    }
    groups = _groups(made, maps)
    reasons = _reasons(groups, maps, modules, trace.stays, exclude)
    kept = {s: m for s, m in maps.items() if isinstance(modules[s[0]], prunable_types())}
    return Coupling(groups, kept).frozen(reasons)


def _kinds_of_atoms(atom_of: np.ndarray, side_of: np.ndarray) -> np.ndarray:
    """(atoms,) equal numbers for atoms that have equally many channels in the same sides.

    Args:
        side_of: (all positions,) number of the side.
    """
    count = int(atom_of.max(initial=-1)) + 1
    sides = int(side_of.max(initial=0)) + 1
    entries, times = np.unique(atom_of.astype(np.int64) * sides + side_of, return_counts=True)
    where: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for entry, number in zip(entries.tolist(), times.tolist(), strict=True):
        where[entry // sides].append((entry % sides, number))
    kinds: dict[tuple[tuple[int, int], ...], int] = {}
    return np.array([kinds.setdefault(tuple(w), len(kinds)) for w in where], int)


def _groups(made: Sequence[Side], maps: Mapping[Side, ChannelMap]) -> tuple[Group, ...]:
    """The groups without reasons; named after a layer that they are the whole output of, if any."""
    layers: dict[int, list[Side]] = {}
    for side in made:
        for index in dict.fromkeys(maps[side].group.tolist()):
            layers.setdefault(index, []).append(side)
    taken: Counter[str] = Counter()
    groups = []
    for index in sorted(layers):
        whole = [s for s in layers[index] if (maps[s].group == index).all()]
        naming = (whole or layers[index])[0]
        own = maps[naming].group == index
        atoms = len(np.unique(maps[naming].atom[own]))
        name = naming[0]
        taken[name] += 1
        unique = name if taken[name] == 1 else f"{name}#{taken[name]}"
        members = tuple(s[0] for s in layers[index])
        groups.append(Group(unique, int(own.sum()), atoms, members))
    return tuple(groups)


def _reasons(
    groups: Sequence[Group],
    maps: Mapping[Side, ChannelMap],
    modules: Mapping[str, nn.Module],
    stays: Sequence[Stay],
    exclude: Sequence[str],
) -> dict[int, str]:
    """Why groups must keep their width, by index."""
    read: set[int] = set()
    normed: dict[int, list[str]] = {}
    for (name, side), mapping in maps.items():
        if side == "in" and not _is_depthwise(modules[name]):
            read.update(mapping.group.tolist())
        elif isinstance(modules[name], nn.modules.batchnorm._BatchNorm):
            for index in set(mapping.group.tolist()):
                normed.setdefault(index, []).append(name)
    reasons: dict[int, str] = {}
    for index, group in enumerate(groups):
        members = [*group.layers, *normed.get(index, ())]
        excluded = [n for n in members if any(fnmatch.fnmatch(n, p) for p in exclude)]
        if excluded:
            reasons[index] = f"excluded ({excluded[0]})"
    for side, channels, reason in stays:
        for index in set(maps[side].group[channels].tolist()) - {-1}:
            reasons.setdefault(index, reason)
    for index in set(range(len(groups))) - read:
        reasons.setdefault(index, "no layer that reads them could be traced")
    return reasons


def _is_depthwise(module: nn.Module) -> bool:
    return 1 < group_count(module) == _channels(module, "in")


def _atom_indices(kind_of: np.ndarray, layers: Sequence[np.ndarray]) -> np.ndarray:
    """(atoms,) index of every atom within its group, in order of first appearance in layers."""
    index = np.zeros(len(kind_of), int)
    counts: Counter[int] = Counter()
    for atom in dict.fromkeys(a for atoms in layers for a in atoms.tolist()):
        kind = int(kind_of[atom])
        index[atom] = counts[kind]
        counts[kind] += 1
    return index
