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

    Attributes:
        flat: (groups * atoms + 1,) with a constant 1 at the end for channels that stay, or None
            while nothing is masked.
        gates: (channels of all masked layers,) the same masks laid out by layer; a leaf that
            collects gradients where ``with_gradients``.
    """

    def __init__(self, with_gradients: bool = False) -> None:
        self.flat: Tensor | None = None
        self.gates: Tensor | None = None
        self._with_gradients = with_gradients
        self._indices: list[Tensor] = []
        self._all: Tensor | None = None
        self._by_layer: tuple[Tensor, ...] = ()

    @property
    def indices(self) -> list[Tensor]:
        """For every masked layer, (channels,) positions in ``flat``."""
        return self._indices

    def add(self, index: Tensor) -> int:
        """Reserve a place for a layer of these positions in ``flat``; returns its number."""
        self._indices.append(index)
        self._all = None
        return len(self._indices) - 1

    def of(self, layer: int) -> Tensor | None:
        """(channels,) masks of a layer, None while nothing is masked."""
        return None if self.flat is None else self._by_layer[layer]

    def set(self, masks: Tensor | None) -> None:
        """Use ``masks`` (groups, atoms) from the next forward pass on; None removes them."""
        self.set_flat(None if masks is None else torch.cat([masks.flatten(), masks.new_ones(1)]))

    def set_flat(self, flat: Tensor | None) -> None:
        """The same, in the form of ``flat``. Laid out for all layers at once: a gather, not many"""
        self.flat, self.gates = flat, None
        if flat is None or not self._indices:
            return
        if self._all is None:
            self._all = torch.cat(self._indices)
        laid_out = flat[self._all]
        if self._with_gradients and not laid_out.requires_grad:
            self.gates = laid_out = laid_out.requires_grad_()
        with torch.set_grad_enabled(laid_out.requires_grad):  # masks are set under no_grad, too
            self._by_layer = laid_out.split([len(index) for index in self._indices])


class _MaskedParameter(nn.Module):
    """Scales a (C,) parameter by its channels' masks."""

    def __init__(self, store: MaskStore, layer: int) -> None:
        super().__init__()
        self._store, self._layer = store, layer

    def forward(self, parameter: Tensor) -> Tensor:
        mask = self._store.of(self._layer)
        if mask is None:
            return parameter
        return parameter * (mask if mask.dtype == parameter.dtype else mask.to(parameter.dtype))


class ChannelMasks:
    """Puts masks on a model's layers and takes them off again.

    Args:
        model: changed in place, until ``remove``.
        example_inputs: (N, C, H, W), to see which layers a batch-norm follows.
        with_gradients: collect the loss's gradient by mask (``gate_gradients``) while training.
    """

    def __init__(
        self,
        model: nn.Module,
        coupling: Coupling,
        example_inputs: Tensor,
        with_gradients: bool = False,
    ) -> None:
        self.store = MaskStore(with_gradients)
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

    def gate_gradients(self) -> tuple[list[Tensor], Tensor] | None:
        """What the backward passes left since the masks were set, None if nothing did.

        Returns:
            For every masked layer the positions of its channels in the flat masks, and the
            gradients by the masks, (channels of all layers,).
        """
        gates = self.store.gates
        if gates is None or gates.grad is None:
            return None
        return self.store.indices, gates.grad

    @property
    def removed(self) -> bool:
        """Whether the model has been given back."""
        return not self._norms and not self._hooks

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
                layer = self.store.add(index)
                for name in ("weight", "bias"):
                    masked = _MaskedParameter(self.store, layer)
                    parametrize.register_parametrization(module, name, masked, unsafe=True)
                self._norms.append(module)
                return
        elif followed:
            return
        hook = _masking_hook(self.store, self.store.add(index))
        self._hooks.append(module.register_forward_hook(hook))


def _masking_hook(store: MaskStore, layer: int):
    def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        mask = store.of(layer)
        if mask is None:
            return output
        return output * mask.to(output.dtype).view(1, -1, *[1] * (output.dim() - 2))

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
