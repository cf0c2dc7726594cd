"""The small network's files: widths and weights, and the way back from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from dsa_hw.errors import RunFolderError, UnsupportedModel, UserError
from dsa_hw.network.branches.branch import Branch, removed_branches
from dsa_hw.network.coupling import Coupling, find_coupling
from dsa_hw.network.forward import Inputs, arguments_of
from dsa_hw.network.removal import Keep, kept_widths, remove_channels
from dsa_hw.runs.durable_files import replace_file
from dsa_hw.surgery.saved_widths import kept_atoms, network_digest, read_widths

WIDTHS_FILE = "widths.json"
WEIGHTS_FILE = "weights.safetensors"


def save_pruned(
    run_dir: Path,
    small: nn.Module,
    coupling: Coupling,
    keep: Keep,
    example_inputs: Inputs,
    exclude: Sequence[str] = (),
    branches: Sequence[Branch] = (),
) -> None:
    """Write ``widths.json`` and ``weights.safetensors``: what ``load_pruned`` needs.

    Args:
        branches: that might have been removed; the file names those that were.
    """
    gone = removed_branches(branches, kept_widths(coupling, keep))
    given = arguments_of(example_inputs)
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
        "input_shape": list(given[0].shape),
        **({"more_inputs": [_described(one) for one in given[1:]]} if len(given) > 1 else {}),
        "exclude": list(exclude),
        "groups": groups,
        "removed_branches": [asdict(branch) for branch in gone],
    }
    replace_file(run_dir / WIDTHS_FILE, (json.dumps(content, indent=1) + "\n").encode())
    weights = {n: t.detach().cpu().contiguous() for n, t in small.state_dict().items()}
    replace_file(run_dir / WEIGHTS_FILE, save(weights))


def _described(tensor: torch.Tensor) -> dict[str, object]:
    return {"shape": list(tensor.shape), "real": tensor.is_floating_point()}


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
    others = [
        torch.zeros(shape, device=parameter.device, dtype=parameter.dtype if real else torch.long)
        for shape, real in saved.more_inputs
    ]
    try:
        coupling = find_coupling(model, (example, *others), saved.exclude)
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
