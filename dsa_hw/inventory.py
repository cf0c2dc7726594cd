"""What a network consists of: layers, coupled groups, and branches that can be removed."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dsa_hw.branch_surgery import locate_branches
from dsa_hw.branches import Branch
from dsa_hw.coupling import Coupling, find_coupling
from dsa_hw.deployed import DeployedGraph, export_onnx
from dsa_hw.onnx_branches import Region


def take_inventory(
    model: nn.Module,
    example_inputs: torch.Tensor,
    *,
    exclude: Sequence[str] = (),
    precision: str = "fp32",
    remove_branches: bool = False,
) -> DeployedGraph:
    """The deployed graph of ``model`` with the coupling of its channels.

    Args:
        example_inputs: (N, C, H, W), on the model's device; N is the deployed batch size.
        exclude: patterns of module names whose channels all stay.
        remove_branches: also look for residual branches that can be removed; without it there are
            none in the graph.

    Raises:
        UnsupportedModel: the model cannot be traced or exported.
    """
    coupling = find_coupling(model, example_inputs, exclude)
    graph = DeployedGraph(export_onnx(model, example_inputs), coupling, precision)
    if not remove_branches:
        return graph
    found = find_branches(model, coupling, graph.regions(), exclude)
    return graph.with_branches(found.removable, found.fixed)


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
