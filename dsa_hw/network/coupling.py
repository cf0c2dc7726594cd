"""Which channels of which layers can only be removed together.

``channel_flow`` says which channel of one layer meets which channel of another. Here these pairs
become *atoms* (the smallest sets of channels that can be removed) and *groups* (atoms that have the
same number of channels in the same layers, hence share one keep ratio). Every layer's channels are
therefore a sum of widths of groups, exactly: a layer whose output meets a concatenation is in one
group for each part of it. A grouped convolution loses whole convolution groups, so that the groups
that stay keep their width: its atoms are as many channels wide.

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
from torch import nn

from dsa_hw.errors import UnsupportedModel
from dsa_hw.network.channel_flow import follow_channels
from dsa_hw.network.channel_links import ChannelLinks, Side
from dsa_hw.network.exported import captured
from dsa_hw.network.forward import Inputs
from dsa_hw.network.layer_modules import (
    channel_attribute,
    group_count,
    layer_types,
    norm_types,
    prunable_types,
)


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
    """The groups of a model, and where their channels are in the modules that can be cut.

    Args:
        training_only: modules that do not run in evaluation mode (auxiliary heads); they are cut
            with the layers that they read.
    """

    groups: tuple[Group, ...]
    maps: dict[Side, ChannelMap]
    training_only: tuple[str, ...] = ()

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
        return Coupling(tuple(groups), self.maps, self.training_only)


def find_coupling(
    model: nn.Module,
    example_inputs: Inputs,
    exclude: Sequence[str] = (),
    program: torch.export.ExportedProgram | None = None,
) -> Coupling:
    """Trace ``model`` and find its coupled groups.

    Args:
        example_inputs: (N, C, H, W), or a tensor for each argument, on the model's device.
        exclude: patterns (``fnmatch``) of module names whose output channels must all stay.
        program: its trace, where there is one (``captured``).

    Raises:
        UnsupportedModel: the network cannot be traced.
    """
    links = follow_channels(model, program or captured(model, example_inputs))
    deployed = {name for name, _ in links.sizes}
    absent = [n for n, m in model.named_modules()
              if isinstance(m, layer_types()) and n not in deployed]  # fmt: skip
    if absent:
        try:
            follow_channels(model, captured(model, example_inputs, training=True), links)
        except UnsupportedModel as error:
            warnings.warn(
                f"{', '.join(absent)} do not run in evaluation mode, and what they read in "
                f"training is not known: they are not cut with it ({error})",
                stacklevel=2,
            )
    added = dict.fromkeys(name for name, _ in links.sizes if name not in deployed)
    return _name_groups(model, links, exclude, tuple(added))


def _name_groups(
    model: nn.Module, flow: ChannelLinks, exclude: Sequence[str], training_only: tuple[str, ...]
) -> Coupling:
    """Make groups of the atoms that are in the same sides, in the order of the layers."""
    modules = dict(model.named_modules())
    sizes, atom_of = flow.sizes, flow.atoms()
    made = [
        side for side in sizes
        if side[1] == "out" and isinstance(modules[side[0]], layer_types())
    ]  # fmt: skip
    rank = {name: index for index, name in enumerate(modules)}
    made.sort(key=lambda side: rank[side[0]])
    positions = {side: atom_of[flow.positions(side, size)] for side, size in sizes.items()}
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
    stays = [(number[kind_of[atom_of[where]]], reason) for where, reason in flow.stays]
    reasons = _reasons(groups, maps, modules, stays, exclude)
    for index, group in enumerate(groups):
        if set(group.layers) <= set(training_only):
            reasons.setdefault(index, "they are made in training alone")
    kept = {s: m for s, m in maps.items() if isinstance(modules[s[0]], prunable_types())}
    return Coupling(groups, kept, training_only).frozen(reasons)


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
    stays: Sequence[tuple[np.ndarray, str]],
    exclude: Sequence[str],
) -> dict[int, str]:
    """Why groups must keep their width, by index.

    Args:
        stays: groups that must, and why.
    """
    read: set[int] = set()
    normed: dict[int, list[str]] = {}
    for (name, side), mapping in maps.items():
        if side == "in" and not _is_depthwise(modules[name]):
            read.update(mapping.group.tolist())
        elif isinstance(modules[name], norm_types()):
            for index in set(mapping.group.tolist()):
                normed.setdefault(index, []).append(name)
    reasons: dict[int, str] = {}
    for index, group in enumerate(groups):
        members = [*group.layers, *normed.get(index, ())]
        excluded = [n for n in members if any(fnmatch.fnmatch(n, p) for p in exclude)]
        if excluded:
            reasons[index] = f"excluded ({excluded[0]})"
    for found, reason in stays:
        for index in set(found.tolist()) - {-1}:
            reasons.setdefault(index, reason)
    for index in set(range(len(groups))) - read:
        reasons.setdefault(index, "no layer that reads them could be traced")
    return reasons


def _is_depthwise(module: nn.Module) -> bool:
    attribute = channel_attribute(module, "in")
    return attribute is not None and 1 < group_count(module) == getattr(module, attribute)


def _atom_indices(kind_of: np.ndarray, layers: Sequence[np.ndarray]) -> np.ndarray:
    """(atoms,) index of every atom within its group, in order of first appearance in layers."""
    index = np.zeros(len(kind_of), int)
    counts: Counter[int] = Counter()
    for atom in dict.fromkeys(a for atoms in layers for a in atoms.tolist()):
        kind = int(kind_of[atom])
        index[atom] = counts[kind]
        counts[kind] += 1
    return index
