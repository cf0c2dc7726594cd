"""How much each atom matters: base importances of the pruning process and of rounding."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dsa_hw.coupling import Coupling

Importance = Literal["bn_scale", "filter_l1"]
IMPORTANCES: tuple[Importance, ...] = ("bn_scale", "filter_l1")
FLOOR = 1e-12


class AtomImportance:
    """Scores of all atoms of a model, batched over its groups.

    A group's members (layers that share its channels) are combined by their mean.

    Args:
        model: its parameters are read at each call, so the scores follow training.
        kind: ``bn_scale`` (|gamma|; groups without a batch-norm use their filters) or
            ``filter_l1`` (a filter's L1 norm, relative to its layer's mean).
    """

    def __init__(self, model: nn.Module, coupling: Coupling, kind: Importance) -> None:
        self._modules = dict(model.named_modules())
        self._groups = len(coupling.groups)
        self._size = max(g.atoms for g in coupling.groups)
        device = next(model.parameters()).device
        self.present = torch.zeros(self._groups, self._size, dtype=torch.bool, device=device)
        for index, group in enumerate(coupling.groups):
            self.present[index, : group.atoms] = True
        self._members = self._choose(coupling, kind, device)

    def __call__(self) -> Tensor:
        """(groups, atoms) positive scores, detached; 1 where padded."""
        total = torch.zeros(self._groups * self._size, device=self.present.device)
        count = torch.zeros_like(total)
        for name, positions, atoms in self._members:
            scores = self._scores(self._modules[name])[positions]
            total.index_add_(0, atoms, scores.to(total.dtype))
            count.index_add_(0, atoms, torch.ones_like(scores, dtype=total.dtype))
        scores = (total / count.clamp_min(1)).view(self._groups, self._size)
        return torch.where(self.present, scores.clamp_min(FLOOR), 1.0)

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
