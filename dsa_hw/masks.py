"""Masks on a live model, placed so that a masked channel is as good as removed.

Behind a batch-norm, since a zero in front of one comes out as its bias. There the mask scales the
norm's weight and bias, which is the same product without touching the activations. Outputs of
layers that no batch-norm follows are multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dsa_hw.coupling import Coupling


class MaskStore:
    """The current masks; shared by everything that applies them.

    ``flat`` is (groups * atoms + 1,) with a constant 1 at the end for channels that stay, or None
    while nothing is masked.
    """

    def __init__(self) -> None:
        self.flat: Tensor | None = None

    def set(self, masks: Tensor | None) -> None:
        """Use ``masks`` (groups, atoms) from the next forward pass on; None removes them."""
        self.flat = None if masks is None else torch.cat([masks.flatten(), masks.new_ones(1)])


class _MaskedParameter(nn.Module):
    """Scales a (C,) parameter by its channels' masks."""

    def __init__(self, store: MaskStore, index: Tensor) -> None:
        super().__init__()
        self._store = store
        self.index: Tensor
        self.register_buffer("index", index, persistent=False)

    def forward(self, parameter: Tensor) -> Tensor:
        if self._store.flat is None:
            return parameter
        return parameter * self._store.flat[self.index].to(parameter.dtype)


class ChannelMasks:
    """Puts masks on a model's layers and takes them off again.

    Args:
        model: changed in place, until ``remove``.
        example_inputs: (N, C, H, W), to see which layers a batch-norm follows.
    """

    def __init__(self, model: nn.Module, coupling: Coupling, example_inputs: Tensor) -> None:
        self.store = MaskStore()
        self._norms: list[nn.Module] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._size = max(g.atoms for g in coupling.groups)
        modules = dict(model.named_modules())
        followed = _followed_by_norm(model, example_inputs)
        for (name, side), mapping in coupling.maps.items():
            module = modules[name]
            shrinks = [coupling.groups[g].frozen is None for g in set(mapping.group) if g >= 0]
            if side != "out" or not any(shrinks):
                continue
            last = len(coupling.groups) * self._size
            index = torch.as_tensor(mapping.group * self._size + mapping.atom)
            index = torch.where(torch.as_tensor(mapping.group) >= 0, index, last)
            self._attach(module, index.to(example_inputs.device), name in followed)

    def set(self, masks: Tensor | None) -> None:
        """Use ``masks`` (groups, atoms) from now on; None lets everything through."""
        self.store.set(masks)

    def remove(self) -> None:
        """Give the model back as it was, with its trained parameters."""
        self.store.set(None)
        for norm in self._norms:
            for name in ("weight", "bias"):
                parametrize.remove_parametrizations(norm, name, leave_parametrized=False)
        for hook in self._hooks:
            hook.remove()
        self._norms, self._hooks = [], []

    def _attach(self, module: nn.Module, index: Tensor, followed: bool) -> None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                for name in ("weight", "bias"):
                    masked = _MaskedParameter(self.store, index)
                    parametrize.register_parametrization(module, name, masked, unsafe=True)
                self._norms.append(module)
                return
        elif followed:
            return
        self._hooks.append(module.register_forward_hook(_masking_hook(self.store, index)))


def _masking_hook(store: MaskStore, index: Tensor):
    def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        if store.flat is None:
            return output
        mask = store.flat[index].to(output.dtype)
        return output * mask.view(1, -1, *[1] * (output.dim() - 2))

    return hook


@torch.no_grad()
def _followed_by_norm(model: nn.Module, example_inputs: Tensor) -> set[str]:
    """Names of the layers whose output a batch-norm takes as it is."""
    made: dict[int, tuple[str, Tensor]] = {}
    followed: set[str] = set()

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                source = made.get(id(inputs[0]))
                if source is not None:
                    followed.add(source[0])
            else:
                made[id(output)] = (name, output)

        return hook

    kinds = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    was_training = model.training
    model.eval()
    try:
        model(example_inputs)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return followed
