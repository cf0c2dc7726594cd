"""How much each atom matters: base importances of the pruning process and of rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dsa_hw.errors import UserError
from dsa_hw.network.coupling import Coupling
from dsa_hw.network.layer_modules import weight_axes

Wants = Literal["weights", "gate gradients"]
"""What an importance is computed from: the weights as they are, or gradients by the masks."""
WeightImportance = Literal["bn_scale", "filter_l1"]
FLOOR = 1e-12
"""Least score, as a part of its group's greatest: dead channels must not set the spread."""
LEAST = 1e-30


class Importance(Protocol):
    """Scores of all atoms of a model."""

    @property
    def wants(self) -> Wants:
        """Whether ``note`` has to be given the training batches' gradients by the masks."""
        ...

    @property
    def present(self) -> Tensor:
        """(groups, atoms) bool, false where padded."""
        ...

    def note(
        self, layers: Sequence[Tensor], gradients: Tensor, loss_scale: Tensor | float = 1.0
    ) -> None:
        """Take in one training batch; called only where ``wants`` asks for it.

        Args:
            layers: for every masked layer, the positions of its channels in the flat masks.
            gradients: (channels of all layers,) of the loss by the masks.
            loss_scale: that the loss was multiplied by before it was differentiated.
        """
        ...

    def __call__(self) -> Tensor:
        """(groups, atoms) positive scores, detached; 1 where padded."""
        ...

    def state(self) -> dict[str, Any] | None:
        """What to keep for an exact resume; None where the model says it all."""
        ...

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from ``state``."""
        ...


def bn_scale(model: nn.Module, coupling: Coupling, device: torch.device) -> AtomImportance:
    """``--importance bn_scale``: what batch-norms multiply the channels by."""
    return AtomImportance(model, coupling, "bn_scale")


def filter_l1(model: nn.Module, coupling: Coupling, device: torch.device) -> AtomImportance:
    """``--importance filter_l1``: the size of the filters that make the channels."""
    return AtomImportance(model, coupling, "filter_l1")


def split_atoms(coupling: Coupling, scores: Tensor) -> list[np.ndarray]:
    """(groups, atoms) padded scores -> one (atoms,) array a group.

    Raises:
        UserError: a score is not finite; names its group.
    """
    rows = scores.detach().cpu().numpy()
    found = [row[: group.atoms] for row, group in zip(rows, coupling.groups, strict=True)]
    for group, atoms in zip(coupling.groups, found, strict=True):
        if broken := int((~np.isfinite(atoms)).sum()):
            raise UserError(
                f"the importance of {broken} of the {len(atoms)} atoms of {group.name} is not a "
                "finite number: see that the network's weights are"
            )
    return found


class MemberMean:
    """One score an atom: the mean over its channels in the layers that share it.

    Args:
        members: (channels,) flat atom (group * atoms + atom) of every channel of each member.
        present: (groups, atoms) bool, false where padded.
    """

    def __init__(self, members: Sequence[Tensor], present: Tensor) -> None:
        self._members, self._present = members, present

    def __call__(self, scores: Sequence[Tensor]) -> Tensor:
        """(channels,) scores of each member -> (groups, atoms), positive, 1 where padded."""
        total = torch.zeros(self._present.numel(), device=self._present.device)
        count = torch.zeros_like(total)
        for atoms, scored in zip(self._members, scores, strict=True):
            scored = scored.to(total.dtype)
            total.index_add_(0, atoms, scored)
            count.index_add_(0, atoms, torch.ones_like(scored))
        return positive(total / count.clamp_min(1), self._present)


def positive(scores: Tensor, present: Tensor) -> Tensor:
    """(groups * atoms,) -> (groups, atoms), no score below the group's floor, 1 where padded."""
    found = scores.view_as(present).masked_fill(~present, 0.0)
    floor = (FLOOR * found.amax(-1, keepdim=True)).clamp_min(LEAST)
    return torch.where(present, torch.maximum(found, floor), 1.0)


def present_atoms(coupling: Coupling, device: torch.device) -> Tensor:
    """(groups, atoms) bool, false where a group has fewer atoms than the largest."""
    size = max(g.atoms for g in coupling.groups)
    atoms = torch.tensor([g.atoms for g in coupling.groups], device=device)
    return torch.arange(size, device=device) < atoms[:, None]


class AtomImportance:
    """Scores from the weights as they are, batched over groups.

    Args:
        model: its parameters are read at each call, so the scores follow training.
        kind: ``bn_scale`` (|gamma|; groups without a batch-norm use their filters) or
            ``filter_l1`` (a filter's L1 norm, relative to its layer's mean). Layers that share
            channels have the mean of theirs.
    """

    wants: Wants = "weights"

    def __init__(self, model: nn.Module, coupling: Coupling, kind: WeightImportance) -> None:
        self._modules = dict(model.named_modules())
        device = next(model.parameters()).device
        self.present = present_atoms(coupling, device)
        self._size = self.present.shape[1]
        self._members = self._choose(coupling, kind, device)
        atoms = [atoms for _, _, atoms in self._members]
        self._combine = MemberMean(atoms, self.present)

    def __call__(self) -> Tensor:
        """(groups, atoms) positive scores, detached; 1 where padded."""
        return self._combine(
            [self._scores(self._modules[name])[where] for name, where, _ in self._members]
        )

    def note(
        self, layers: Sequence[Tensor], gradients: Tensor, loss_scale: Tensor | float = 1.0
    ) -> None:
        """Do nothing: gradients say nothing of these scores."""

    def state(self) -> None:
        """Return nothing: the model says it all."""

    def restore(self, state: dict[str, Any] | None) -> None:
        """Do nothing: the model has it all."""

    def _choose(self, coupling: Coupling, kind: WeightImportance, device: torch.device):
        """(module name, positions that count, their atoms) of every member."""
        norms, filters = [], []
        for (name, side), mapping in coupling.maps.items():
            if side != "out":
                continue
            module = self._modules[name]
            kept = torch.as_tensor(mapping.group >= 0, device=device)
            flat = torch.as_tensor(mapping.group * self._size + mapping.atom, device=device)
            member = (name, kept.nonzero()[:, 0], flat[kept])
            is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            (norms if is_norm and module.weight is not None else filters).append(member)
        if kind == "filter_l1":
            return filters
        covered = {int(a) // self._size for _, _, atoms in norms for a in atoms.tolist()}
        bare = [
            m for m in filters
            if not {a // self._size for a in m[2].tolist()} & covered
        ]  # fmt: skip
        return norms + bare

    @torch.no_grad()
    def _scores(self, module: nn.Module) -> Tensor:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return original_parameter(module, "weight").detach().abs().float()
        weight = module.weight
        assert isinstance(weight, Tensor)
        filters = weight.detach().float().abs().movedim(weight_axes(module).out, 0)
        norms = filters.flatten(1).sum(1)
        return norms / norms.mean().clamp_min(FLOOR)


def original_parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter as the optimizer sees it, without the mask that may be on it."""
    parametrizations = getattr(module, "parametrizations", None)
    if parametrizations is not None and name in parametrizations:
        return parametrizations[name].original
    return getattr(module, name)
