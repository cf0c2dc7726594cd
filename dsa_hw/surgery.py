"""Really remove channels, and rebuild a pruned network from its run folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from dsa_hw.branch_surgery import cut_branches
from dsa_hw.branches import Branch, removed_branches
from dsa_hw.coupling import Coupling, find_coupling
from dsa_hw.durable_files import replace_file
from dsa_hw.errors import RunFolderError, UnsupportedModel, UserError
from dsa_hw.saved_widths import kept_atoms, network_digest, read_widths

WIDTHS_FILE = "widths.json"
WEIGHTS_FILE = "weights.safetensors"

Keep = Sequence[np.ndarray]
"""Per group a (atoms,) boolean array: which atoms stay."""


def keep_most_important(
    coupling: Coupling, widths: Sequence[int] | np.ndarray, importance: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Keep the atoms of the highest importance, as many as each group's width holds."""
    keep = []
    for group, width, scores in zip(coupling.groups, widths, importance, strict=True):
        kept = np.zeros(group.atoms, bool)
        order = np.argsort(-np.asarray(scores), kind="stable")
        kept[order[: int(width) // group.atom_channels]] = True
        keep.append(kept)
    return keep


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
        out = coupling.maps.get((name, "out"))
        into = coupling.maps.get((name, "in"))
        _shrink(
            modules[name],
            None if out is None else out.kept(keep),
            None if into is None else into.kept(keep),
        )
    return small


def _shrink(module: nn.Module, out: np.ndarray | None, into: np.ndarray | None) -> None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        assert out is not None
        for name in ("weight", "bias", "running_mean", "running_var"):
            _select(module, name, 0, out)
        module.num_features = len(out)
    elif isinstance(module, nn.Linear):
        _shrink_ends(module, out, into)
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d) and module.groups > 1:
        assert out is not None
        per_group = module.weight.shape[1]
        _shrink_ends(module, out, None)
        wide = module.out_channels // module.groups
        module.groups = len(out) // wide
        module.out_channels, module.in_channels = len(out), module.groups * per_group
    elif isinstance(module, nn.Conv2d):
        _shrink_ends(module, out, into)
        module.out_channels, module.in_channels = module.weight.shape[:2]
    else:
        raise TypeError(f"cannot remove channels of {type(module).__name__}")


def _shrink_ends(module: nn.Module, out: np.ndarray | None, into: np.ndarray | None) -> None:
    if out is not None:
        _select(module, "weight", 0, out)
        _select(module, "bias", 0, out)
    if into is not None:
        _select(module, "weight", 1, into)


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


def save_pruned(
    run_dir: Path,
    small: nn.Module,
    coupling: Coupling,
    keep: Keep,
    example_inputs: torch.Tensor,
    exclude: Sequence[str] = (),
    branches: Sequence[Branch] = (),
) -> None:
    """Write ``widths.json`` and ``weights.safetensors``: what ``load_pruned`` needs.

    Args:
        branches: that might have been removed; the file names those that were.
    """
    gone = removed_branches(branches, kept_widths(coupling, keep))
    groups = [
        {
            "name": group.name,
            "dense_width": group.dense_width,
            "width": int(kept.sum()) * group.atom_channels,
            "kept": np.flatnonzero(np.repeat(kept, group.atom_channels)).tolist(),
        }
        for group, kept in zip(coupling.groups, keep, strict=True)
    ]
    content = {
        "version": 1,
        "network": network_digest(coupling),
        "input_shape": list(example_inputs.shape),
        "exclude": list(exclude),
        "groups": groups,
        "removed_branches": [asdict(branch) for branch in gone],
    }
    replace_file(run_dir / WIDTHS_FILE, (json.dumps(content, indent=1) + "\n").encode())
    weights = {n: t.detach().cpu().contiguous() for n, t in small.state_dict().items()}
    replace_file(run_dir / WEIGHTS_FILE, save(weights))


def load_pruned(model: nn.Module, run_dir: str | Path) -> nn.Module:
    """The pruned network of a run, from a fresh dense one.

    Args:
        model: of the class that was pruned, any weights; it is not changed.
        run_dir: holds ``widths.json`` and ``weights.safetensors``.

    Raises:
        RunFolderError: files are missing or damaged, or belong to another network.
    """
    run_dir = Path(run_dir)
    for name in (WIDTHS_FILE, WEIGHTS_FILE):
        if not (run_dir / name).is_file():
            raise RunFolderError(f"{run_dir} holds no pruned network ({name} is missing)")
    saved = read_widths(run_dir / WIDTHS_FILE)
    parameter = next(model.parameters())
    example = torch.zeros(saved.traced_shape, device=parameter.device, dtype=parameter.dtype)
    try:
        coupling = find_coupling(model, example, saved.exclude)
    except UnsupportedModel as error:
        raise RunFolderError(
            f"{run_dir / WIDTHS_FILE} says that inputs are of shape {list(saved.input_shape)}, and "
            f"this {type(model).__name__} does not run on them: {error}"
        ) from error
    keep = kept_atoms(saved, coupling, f"{run_dir} was made from another network")
    try:
        small = remove_channels(model, coupling, keep, saved.removed_branches)
        small.load_state_dict(load_file(run_dir / WEIGHTS_FILE))
    except (UnsupportedModel, ValueError, RuntimeError, SafetensorError) as error:
        raise RunFolderError(
            f"{run_dir} cannot be loaded into this {type(model).__name__}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    refuse_not_finite(small, str(run_dir / WEIGHTS_FILE))
    return small


def refuse_not_finite(model: nn.Module, source: str) -> None:
    """See that all weights and statistics are numbers.

    Args:
        source: where they come from, for the message.

    Raises:
        UserError: one is infinite or none; names the tensor.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            wrong = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"{source}: {wrong} of the {tensor.numel()} values of {name} are NaN or infinite; "
                "importance and widths cannot be told from them"
            )
