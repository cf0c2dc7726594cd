"""Which channels of which layers can only be removed together.

Torch-Pruning's dependency graph (Fang et al., "DepGraph", CVPR 2023, arXiv:2301.12900) says which
channel of one layer meets which channel of another. Here these pairs become *atoms* (the smallest
sets of channels that can be removed) and *groups* (atoms that share layers, hence share one keep
ratio). A grouped convolution loses whole convolution groups, so that the groups that stay keep
their width: its atoms are as many channels wide.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from dsa_hw.errors import UnsupportedModel

Side = tuple[str, str]
"""(module name, ``"in"`` or ``"out"``): one channel dimension."""

PRUNABLE_TYPES = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True, slots=True)
class Group:
    """Coupled channels that share one width.

    Args:
        name: the first layer that makes these channels.
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
    """The groups of a model, and where their channels are."""

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
    pairs, sizes = _coupled_pairs(model, example_inputs)
    offsets = dict(zip(sizes, np.cumsum([0, *sizes.values()])[:-1].tolist(), strict=True))
    atom_of = _merge_atoms(pairs, sizes, offsets, model)
    return _name_groups(model, atom_of, sizes, offsets, exclude)


def _coupled_pairs(
    model: nn.Module, example_inputs: torch.Tensor
) -> tuple[list[tuple[Side, np.ndarray, Side, np.ndarray]], dict[Side, int]]:
    """Torch-Pruning's groups as pairs of positions, and the length of every side."""
    import torch_pruning as tp

    was_training = model.training
    model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its notices about unwrapped parameters: checked below
            graph = tp.DependencyGraph().build_dependency(
                model, example_inputs=example_inputs, verbose=False
            )
        groups = list(graph.get_all_groups())
    except Exception as error:
        raise UnsupportedModel(
            f"the channels of {type(model).__name__} cannot be traced ({error}); exclude does not "
            "help here: the model must run on one image tensor and be differentiable"
        ) from error
    finally:
        model.train(was_training)
    names = {module: name for name, module in model.named_modules()}
    pairs: list[tuple[Side, np.ndarray, Side, np.ndarray]] = []
    sizes: dict[Side, int] = {}
    for group in groups:
        root_module = group[0].dep.target.module
        root: Side = (names[root_module], "out")
        sizes[root] = _channels(root_module, "out")
        for item in group:
            module = item.dep.target.module
            side = _side(graph, item.dep, module, names)
            if side is None:
                continue
            sizes[side] = _channels(module, side[1])
            pairs.append((root, np.asarray(item.root_idxs), side, np.asarray(item.idxs)))
    return pairs, sizes


def _side(graph, dependency, module: nn.Module, names: dict[nn.Module, str]) -> Side | None:
    if isinstance(module, nn.Parameter):
        raise UnsupportedModel(
            "the model has a parameter outside of convolution, linear and normalization layers "
            f"(shape {tuple(module.shape)}) that depends on prunable channels"
        )
    if module not in names:
        return None  # an operation, not a layer
    if not isinstance(module, PRUNABLE_TYPES):
        if next(module.parameters(), None) is None:
            return None
        raise UnsupportedModel(
            f"layer {names[module]} ({type(module).__name__}) depends on prunable channels, and "
            "layers of that type cannot be made smaller yet"
        )
    out = graph.is_out_channel_pruning_fn(dependency.handler)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        out = True
    return names[module], "out" if out else "in"


def _channels(module: nn.Module, side: str) -> int:
    for attribute in {
        "out": ("out_channels", "out_features", "num_features"),
        "in": ("in_channels", "in_features"),
    }[side]:
        if hasattr(module, attribute):
            return getattr(module, attribute)
    raise UnsupportedModel(f"{type(module).__name__} has no {side} channels")


def _merge_atoms(pairs, sizes: dict[Side, int], offsets: dict[Side, int], model: nn.Module):
    """(all positions,) atom number of every position of every side."""
    rows = [offsets[a] + i for a, i, _, _ in pairs]
    columns = [offsets[b] + j for _, _, b, j in pairs]
    modules = dict(model.named_modules())
    for (name, side), offset in offsets.items():
        module = modules[name]
        if side != "out" or not isinstance(module, nn.Conv2d) or module.groups == 1:
            continue
        if (name, "in") not in offsets:
            if module.groups != module.out_channels:
                raise UnsupportedModel(f"grouped convolution {name} reads channels that stay")
            continue  # depthwise: Torch-Pruning already treats input and output as one
        per_out = module.out_channels // module.groups
        per_in = module.in_channels // module.groups
        first = offset + np.arange(module.groups) * per_out
        outs = offset + np.arange(module.out_channels)
        ins = offsets[name, "in"] + np.arange(module.in_channels)
        rows += [np.repeat(first, per_out), np.repeat(first, per_in)]
        columns += [outs, ins]
    total = sum(sizes.values())
    row = np.concatenate(rows) if rows else np.zeros(0, int)
    column = np.concatenate(columns) if columns else np.zeros(0, int)
    links = coo_array((np.ones(len(row), np.int8), (row, column)), shape=(total, total))
    return connected_components(links, directed=False)[1]


def _name_groups(
    model: nn.Module,
    atom_of: np.ndarray,
    sizes: dict[Side, int],
    offsets: dict[Side, int],
    exclude: Sequence[str],
) -> Coupling:
    """Join atoms that share a layer's output into groups, in the order of the layers."""
    modules = dict(model.named_modules())
    made = [
        side for side in sizes
        if side[1] == "out" and isinstance(modules[side[0]], (nn.Conv2d, nn.Linear))
    ]  # fmt: skip
    rank = {name: index for index, name in enumerate(modules)}
    made.sort(key=lambda side: rank[side[0]])
    positions = {s: atom_of[offsets[s] : offsets[s] + sizes[s]] for s in sizes}
    group_of = _join_by_layer(atom_of, [positions[s] for s in made])
    order = list(dict.fromkeys(int(group_of[positions[s][0]]) for s in made))
    number = {component: index for index, component in enumerate(order)}
    atom_index = _atom_indices(atom_of, group_of, [positions[s] for s in made])
    maps = {
        side: ChannelMap(
            group=np.array([number.get(int(group_of[a]), -1) for a in atoms]),
            atom=atom_index[atoms],
        )
        for side, atoms in positions.items()
    }
    read = {
        g for (name, side), m in maps.items()
        if side == "in" and not _is_depthwise(modules[name]) for g in m.group.tolist()
    }  # fmt: skip
    groups = []
    for index in range(len(order)):
        layers = tuple(s[0] for s in made if index in maps[s].group)
        own = maps[layers[0], "out"].group == index
        atoms = len(np.unique(maps[layers[0], "out"].atom[own]))
        frozen = None
        if index not in read:
            frozen = "network output"
        elif excluded := [n for n in layers if any(fnmatch.fnmatch(n, p) for p in exclude)]:
            frozen = f"excluded ({excluded[0]})"
        groups.append(Group(layers[0], int(own.sum()), atoms, layers, frozen))
    return Coupling(tuple(groups), maps)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def _join_by_layer(atom_of: np.ndarray, layers: list[np.ndarray]) -> np.ndarray:
    """(atoms,) component of every atom when each layer's output joins its atoms."""
    count = int(atom_of.max()) + 1 if len(atom_of) else 0
    rows = np.concatenate([np.full(len(a), a[0]) for a in layers])
    columns = np.concatenate(layers)
    links = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(count, count))
    return connected_components(links, directed=False)[1]


def _atom_indices(
    atom_of: np.ndarray, group_of: np.ndarray, layers: list[np.ndarray]
) -> np.ndarray:
    """(atoms,) index of every atom within its group, in order of first appearance."""
    index = np.zeros(int(atom_of.max()) + 1, int)
    counts: dict[int, int] = {}
    seen: set[int] = set()
    for atoms in layers:
        for atom in atoms.tolist():
            if atom not in seen:
                seen.add(atom)
                group = int(group_of[atom])
                position = counts.get(group, 0)
                index[atom] = position
                counts[group] = position + 1
    return index
