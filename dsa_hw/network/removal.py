"""Taking channels out of a network: every layer that makes or reads them shrinks."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dsa_hw.network.branches.branch import Branch, removed_branches
from dsa_hw.network.branches.torch import cut_branches
from dsa_hw.network.coupling import ChannelMap, Coupling
from dsa_hw.network.layer_modules import (
    channel_attribute,
    group_count,
    layer_types,
    norm_types,
    weight_axes,
)

Keep = Sequence[np.ndarray]
"""Per group a (atoms,) boolean array: which atoms stay."""


def kept_widths(coupling: Coupling, keep: Keep) -> list[int]:
    """(groups,) widths that ``keep`` leaves."""
    return [int(k.sum()) * g.atom_channels for g, k in zip(coupling.groups, keep, strict=True)]


def remove_channels(
    model: nn.Module, coupling: Coupling, keep: Keep, branches: Sequence[Branch] = ()
) -> nn.Module:
    """A copy of ``model`` without the atoms that ``keep`` leaves out.

    The copy computes what ``model`` computes when those channels are zero everywhere, and with
    them the outputs of branches that have none left.

    Args:
        branches: that may be removed; those whose internal groups are all gone are.
    """
    gone = removed_branches(branches, kept_widths(coupling, keep))
    small = cut_branches(copy.deepcopy(model), gone)
    modules = dict(small.named_modules())
    names = dict.fromkeys(name for name, _ in coupling.maps)
    for name in names:
        if name not in modules:
            continue  # it went with its branch
        out, into = (_kept(coupling.maps.get((name, side)), keep) for side in ("out", "in"))
        if out is not None or into is not None:
            _shrink(modules[name], out, into)
    return small


def _kept(channels: ChannelMap | None, keep: Keep) -> np.ndarray | None:
    """Indices that stay; None where all do."""
    kept = None if channels is None else channels.kept(keep)
    return None if kept is None or len(kept) == len(channels.group) else kept  # pyright: ignore


def _shrink(module: nn.Module, out: np.ndarray | None, into: np.ndarray | None) -> None:
    if isinstance(module, norm_types()):
        assert out is not None
        for name in ("weight", "bias", "running_mean", "running_var"):
            _select(module, name, 0, out)
        if hasattr(module, "num_features"):
            setattr(module, "num_features", len(out))  # noqa: B010 - as below
    elif isinstance(module, layer_types()):
        _shrink_layer(module, out, into)
    else:
        raise TypeError(f"cannot remove channels of {type(module).__name__}")


def _shrink_layer(module: nn.Module, out: np.ndarray | None, into: np.ndarray | None) -> None:
    axes, groups = weight_axes(module), group_count(module)
    dense_outs = _weight(module).shape[axes.out]
    if out is not None:
        _select(module, "weight", axes.out, out)
        _select(module, "bias", 0, out)
    if groups > 1:
        assert out is not None
        groups = groups * len(out) // dense_outs
        setattr(module, "groups", groups)  # noqa: B010 - nn.Module declares no type for it
    elif into is not None:
        _select(module, "weight", axes.into, into)
    shape = _weight(module).shape
    for side, channels in (("out", shape[axes.out]), ("in", groups * shape[axes.into])):
        if (attribute := channel_attribute(module, side)) is not None:
            setattr(module, attribute, channels)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _select(module: nn.Module, name: str, dimension: int, indices: np.ndarray) -> None:
    tensor = getattr(module, name)
    if tensor is None:
        return
    index = torch.as_tensor(indices, device=tensor.device)
    selected = tensor.detach().index_select(dimension, index).clone()
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, nn.Parameter(selected, requires_grad=tensor.requires_grad))
    else:
        setattr(module, name, selected)
