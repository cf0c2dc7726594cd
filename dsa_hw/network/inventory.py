"""What a network consists of: layers, coupled groups, and branches that can be removed."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dsa_hw.network.branches.branch import Branch
from dsa_hw.network.branches.onnx import Region
from dsa_hw.network.branches.torch import locate_branches
from dsa_hw.network.channel_flow import NETWORK_OUTPUT
from dsa_hw.network.coupling import Coupling, find_coupling
from dsa_hw.network.dry_cut import DryCut, frozen_summary, make_probe
from dsa_hw.network.exported import captured, export_onnx
from dsa_hw.network.forward import Inputs, as_float, map_inputs
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.network.layer_modules import layer_types


def take_inventory(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    exclude: Sequence[str] = (),
    precision: str = "fp32",
    remove_branches: bool = False,
) -> DeployedGraph:
    """The deployed graph of ``model`` with the coupling of its channels.

    The network is cut at random, in a copy with random weights, to see that it can be: groups that
    cannot be cut are frozen, and say why (``frozen_note``).

    Args:
        example_inputs: (N, C, H, W), or a tensor for each argument, on the model's device; N is the
            deployed batch size.
        exclude: patterns of module names whose channels all stay.
        remove_branches: also look for residual branches that can be removed; without it there are
            none in the graph.

    Raises:
        UnsupportedModel: the model cannot be traced, exported, or cut.
    """
    probe = make_probe(model, example_inputs)
    example = as_float(map_inputs(lambda t: t.detach().cpu().contiguous(), example_inputs))
    program = captured(probe, example)
    coupling = find_coupling(probe, example, exclude, program=program)
    graph = DeployedGraph(export_onnx(probe, example, program), coupling, precision)
    graph.coupling = coupling.frozen(_without_layers(graph, probe))
    graph.coupling = DryCut(probe, graph, example).checked()
    if not remove_branches:
        return graph
    uses = Counter(layer.name for layer in graph.layers)
    regions = [r for r in graph.regions() if all(uses[name] == 1 for name in r.layers)]
    found = find_branches(model, graph.coupling, regions, exclude)
    return graph.with_branches(found.removable, found.fixed)


def _without_layers(graph: DeployedGraph, model: nn.Module) -> dict[int, str]:
    """Groups with channels in layers that the deployed graph has as something else, and why they
    are frozen: what such a layer costs is not known at other widths."""
    deployed = {layer.name for layer in graph.layers}
    reasons: dict[int, str] = {}
    for name, _ in graph.coupling.maps:
        if name in deployed or not isinstance(model.get_submodule(name), layer_types()):
            continue
        if name in graph.coupling.training_only:
            continue
        for index in graph.coupling.groups_of(name):
            why = graph.unread.get(name, "it is something else in the exported graph")
            reasons.setdefault(index, f"{name} makes or takes them: {why}")
    return reasons


def prunable_parameters(model: nn.Module, coupling: Coupling) -> int:
    """How many parameters are in layers that can lose channels."""
    free = {index for index, group in enumerate(coupling.groups) if group.frozen is None}
    return sum(
        parameter.numel()
        for name, module in model.named_modules()
        if isinstance(module, layer_types()) and coupling.groups_of(name) & free
        for parameter in module.parameters(recurse=False)
    )


def frozen_note(graph: DeployedGraph) -> list[str]:
    """What a user should know of channels that keep their number, apart from the outputs."""
    coupling = graph.coupling
    expected = Coupling(
        tuple(g for g in coupling.groups if g.frozen != NETWORK_OUTPUT), coupling.maps
    )
    frozen = sum(g.frozen is not None for g in expected.groups)
    if not frozen:
        return []
    return [
        f"{frozen} of {len(coupling.groups)} groups of channels keep their width: "
        f"{frozen_summary(expected)}"
    ]


@dataclass(frozen=True, slots=True)
class FoundBranches:
    """Branches of a model.

    Args:
        removable: can be masked and cut.
        fixed: those that could go by their channels, each with what is in the way (its module
            cannot be traced, or has no place for a gate).
    """

    removable: tuple[Branch, ...]
    fixed: tuple[str, ...] = ()


def find_branches(
    model: nn.Module, coupling: Coupling, regions: Sequence[Region], exclude: Sequence[str] = ()
) -> FoundBranches:
    """The branches of ``regions`` that can be removed; of nested ones the inner.

    Args:
        exclude: patterns of layer names; a branch with such a layer stays.
    """
    candidates: dict[frozenset[str], tuple[Region, tuple[int, ...]]] = {}
    for region in regions:
        groups = _internal_groups(coupling, region)
        excluded = any(fnmatch.fnmatch(n, p) for n in region.layers for p in exclude)
        if groups and not excluded:
            candidates[frozenset(region.layers)] = (region, groups)
    located = locate_branches(model, candidates)
    places = located.places
    owners = [owner for owner, _ in places.values()]
    removable, fixed = [], []
    for layers, (region, groups) in candidates.items():
        if any(other < layers for other in places):
            continue  # it holds another one
        if layers not in places:
            fixed.append(f"{_common_name(region.layers)}: {located.obstacles[layers]}")
            continue
        owner, end = places[layers]
        alone = owner and owners.count(owner) == 1
        name = owner if alone else _common_name(region.layers)
        removable.append(Branch(name, region.layers, groups, owner, end))
    return FoundBranches(tuple(removable), tuple(fixed))


def fixed_branches_warning(graph: DeployedGraph) -> list[str]:
    """What a user should know of branches that were asked to be removable and are not."""
    if not graph.fixed_branches:
        return []
    return [f"residual branches that cannot be removed: {'; '.join(graph.fixed_branches)}"]


def _internal_groups(coupling: Coupling, region: Region) -> tuple[int, ...]:
    """Groups whose channels are made in the region only; none if one of them must stay."""
    inside = set(region.layers)
    found = [g for g, group in enumerate(coupling.groups) if inside.issuperset(group.layers)]
    if any(coupling.groups[g].frozen for g in found):
        return ()
    return tuple(found)


def _common_name(layers: Sequence[str]) -> str:
    """The module that holds all layers; of several in the model itself, their names."""
    parts = [name.split(".")[:-1] for name in layers]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common) or "+".join(layers)
