"""How much each atom matters: base importances of the pruning process and of rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dsa_hw.coupling import Coupling
from dsa_hw.errors import UserError

Importance = Literal["bn_scale", "filter_l1", "taylor"]
IMPORTANCES: tuple[Importance, ...] = ("bn_scale", "filter_l1", "taylor")
ImportanceChoice = Literal["auto", "bn_scale", "filter_l1", "taylor"]
FLOOR = 1e-12
"""Least score, as a part of its group's greatest: dead channels must not set the spread."""
LEAST = 1e-30
DECAY = 3.0
"""The n-th training batch weighs about n**DECAY in the Taylor scores.

The newest quarter of the batches then has 68% of the weight and the first tenth 0.01%, in a search
of a hundred steps as in one of a hundred thousand: nothing is left of batches at another learning
rate. (Shamir and Zhang, ICML 2013, arXiv:1212.1824, section 4, average iterates like this.)
"""


class Scores(Protocol):
    """Scores of all atoms of a model."""

    @property
    def present(self) -> Tensor:
        """(groups, atoms) bool, false where padded."""
        ...

    def __call__(self) -> Tensor:
        """(groups, atoms) positive scores, detached; 1 where padded."""
        ...


def chosen_importance(choice: ImportanceChoice, trains: bool = True) -> Importance:
    """What ``auto`` stands for: ``taylor`` where training gives gradients, else ``filter_l1``.

    What a channel's removal does to the loss says more than its size about a network that is used
    to all its channels.
    """
    if choice != "auto":
        return choice
    return "taylor" if trains else "filter_l1"


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
        return _positive(total / count.clamp_min(1), self._present)


def _positive(scores: Tensor, present: Tensor) -> Tensor:
    """(groups * atoms,) -> (groups, atoms), no score below the group's floor, 1 where padded."""
    found = scores.view_as(present).masked_fill(~present, 0.0)
    floor = (FLOOR * found.amax(-1, keepdim=True)).clamp_min(LEAST)
    return torch.where(present, torch.maximum(found, floor), 1.0)


def present_atoms(coupling: Coupling, device: torch.device) -> Tensor:
    """(groups, atoms) bool, false where a group has fewer atoms than the largest."""
    size = max(g.atoms for g in coupling.groups)
    atoms = torch.tensor([g.atoms for g in coupling.groups], device=device)
    return torch.arange(size, device=device) < atoms[:, None]


class TaylorScores:
    """Squared first-order effect of removing an atom on the training loss.

    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019,
    arXiv:1906.10771, section 3.1 (equation 8) and 3.2: the square of the sum of parameter times
    gradient over a channel's scale and shift, which is the gradient by a gate of value 1 on the
    channel, averaged over batches. The masks are the gates. Squares add up, to a diagonal of the
    Fisher information; near a minimum, where the mean gradient is zero, an average of absolute
    values would measure its noise instead, in another unit for each batch size.

    Where this differs from the paper: an atom's channels open and close together in all layers that
    share it, so their gradients are added before they are squared; the average is weighted towards
    the newest batches (``DECAY``); and the gradient is taken at the mask's own value and not
    multiplied by it, so that a channel that is nearly closed can still come back.
    """

    def __init__(self, coupling: Coupling, device: torch.device) -> None:
        self.present = present_atoms(coupling, device)
        self._average = torch.ones(self.present.numel(), device=device)
        self._batches = 0
        self._positions: Tensor | None = None

    def note(
        self, layers: Sequence[Tensor], gradients: Tensor, loss_scale: Tensor | float = 1.0
    ) -> None:
        """Take in one training batch.

        Args:
            layers: for every masked layer, the positions of its channels in the flat masks.
            gradients: (channels of all layers,) of the loss by the masks.
            loss_scale: that the loss was multiplied by before it was differentiated.
        """
        if self._positions is None:
            self._positions = torch.cat(list(layers))
        atoms = self.present.numel()
        unscaled = gradients.detach().float() / loss_scale
        finite = torch.nan_to_num(unscaled, posinf=0.0, neginf=0.0)
        total = finite.new_zeros(atoms + 1)  # the last for channels that no atom has
        effects = total.index_add_(0, self._positions, finite)[:atoms].square()
        self._batches += 1
        self._average.lerp_(effects, (1.0 + DECAY) / (self._batches + DECAY))

    def __call__(self) -> Tensor:
        """(groups, atoms); all 1 before the first batch."""
        return _positive(self._average, self.present)

    def state(self) -> dict[str, Any]:
        """What to keep for an exact resume."""
        return {"average": self._average.clone(), "batches": self._batches}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            UserError: it is of a search with the scores of an earlier version.
        """
        if not isinstance(state, dict):
            raise UserError(
                "this search was saved by an earlier version, whose Taylor scores were not "
                "squared; search again in another folder"
            )
        self._average.copy_(state["average"])
        self._batches = state["batches"]


class AtomImportance:
    """Scores from the weights as they are, batched over groups.

    Args:
        model: its parameters are read at each call, so the scores follow training.
        kind: ``bn_scale`` (|gamma|; groups without a batch-norm use their filters) or
            ``filter_l1`` (a filter's L1 norm, relative to its layer's mean). Layers that share
            channels have the mean of theirs.
    """

    def __init__(self, model: nn.Module, coupling: Coupling, kind: Importance) -> None:
        if kind == "taylor":
            raise UserError(
                "taylor importance comes from gradients of training; without training use "
                "bn_scale or filter_l1"
            )
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

    def _choose(self, coupling: Coupling, kind: Importance, device: torch.device):
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
        norms = weight.detach().float().abs().flatten(1).sum(1)
        return norms / norms.mean().clamp_min(FLOOR)


def original_parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter as the optimizer sees it, without the mask that may be on it."""
    parametrizations = getattr(module, "parametrizations", None)
    if parametrizations is not None and name in parametrizations:
        return parametrizations[name].original
    return getattr(module, name)
