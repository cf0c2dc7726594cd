"""Masks on a live model, placed so that a masked channel is as good as removed.

Behind a batch-norm, since a zero in front of one comes out as its bias. There the mask scales the
norm's weight and bias, which is the same product without touching the activations. Outputs of
layers that no batch-norm follows are multiplied.

A branch without inner channels still gives a constant (the bias of its last batch-norm). A gate on
the output of its last module takes that away: 1 where the branch is there, 0 where it is removed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dsa_hw.network.branches.branch import Branch
from dsa_hw.network.coupling import Coupling
from dsa_hw.network.forward import Inputs, arguments_of, device_of, map_inputs, tensors_of
from dsa_hw.network.layer_modules import channel_axis, prunable_types


class MaskStore:
    """The current masks; shared by everything that applies them.

    Args:
        one: groups * atoms, the position in ``flat`` of the constant 1.
        branches: how many have gates.

    Attributes:
        flat: (groups * atoms + 1 + branches,) masks, a constant 1 for channels that stay, and
            the gates of branches; or None while nothing is masked.
        gates: (channels of all masked layers,) the same masks laid out by layer; a leaf that
            collects gradients where ``with_gradients``.
    """

    def __init__(self, one: int, branches: int = 0, with_gradients: bool = False) -> None:
        self._one, self._branches = one, branches
        self.flat: Tensor | None = None
        self.gates: Tensor | None = None
        self._with_gradients = with_gradients
        self._indices: list[Tensor] = []
        self._gate_of: list[int | None] = []
        self._all: Tensor | None = None
        self._all_gates: Tensor | None = None
        self._by_layer: tuple[Tensor, ...] = ()
        self._constant: Tensor | None = None

    @property
    def indices(self) -> list[Tensor]:
        """For every masked layer, (channels,) positions in ``flat``."""
        return self._indices

    def add(self, index: Tensor, gate: int | None = None) -> int:
        """Reserve a place for a layer of these positions in ``flat``; returns its number.

        Args:
            gate: position of what multiplies all of the layer's masks, if anything does.
        """
        self._indices.append(index)
        self._gate_of.append(gate)
        self._all = None
        return len(self._indices) - 1

    def of(self, layer: int) -> Tensor | None:
        """(channels,) masks of a layer, None while nothing is masked."""
        return None if self.flat is None else self._by_layer[layer]

    def set(self, masks: Tensor | None, branch_gates: Tensor | None = None) -> None:
        """Use ``masks`` (groups, atoms) and ``branch_gates`` (branches,), all open if None, from
        the next forward pass on; without masks, nothing is masked any more."""
        if masks is None:
            self.set_flat(None)
            return
        gates = masks.new_ones(self._branches) if branch_gates is None else branch_gates
        self.set_flat(torch.cat([masks.flatten(), masks.new_ones(1), gates]))

    def set_flat(self, flat: Tensor | None) -> None:
        """The same, in the form of ``flat``. Laid out for all layers at once: a gather, not many"""
        self.flat, self.gates = flat, None
        if flat is None or not self._indices:
            return
        if self._all is None:
            self._all = torch.cat(self._indices)
            self._all_gates = self._gate_positions(self._all.device)
        laid_out = flat[self._all]
        if self._all_gates is not None:
            laid_out = laid_out * flat[self._all_gates]
        if not laid_out.requires_grad:
            laid_out = self._in_place(laid_out)
            self.gates = laid_out if self._with_gradients else None
        with torch.set_grad_enabled(laid_out.requires_grad):  # masks are set under no_grad, too
            self._by_layer = laid_out.split([len(index) for index in self._indices])

    def _in_place(self, masks: Tensor) -> Tensor:
        """``masks``, where the constant ones before them were: a training step that was captured
        as a CUDA graph knows them, and what collects their gradients, by address."""
        held = self._constant
        if held is None or held.shape != masks.shape or held.device != masks.device:
            held = self._constant = masks.detach().requires_grad_(self._with_gradients)
        else:
            with torch.no_grad():
                held.copy_(masks)
        return held

    def _gate_positions(self, device: torch.device) -> Tensor | None:
        """(channels of all layers,) where their gates are in ``flat``; None if there are none."""
        if all(gate is None for gate in self._gate_of):
            return None
        return torch.cat(
            [
                torch.full((len(index),), self._one if gate is None else gate, device=device)
                for index, gate in zip(self._indices, self._gate_of, strict=True)
            ]
        )


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
        example_inputs: (N, C, H, W), or a tensor for each argument, to see which layers batch-norms
            alone follow.
        with_gradients: collect the loss's gradient by mask (``gate_gradients``) while training.
        branches: that have gates.
    """

    def __init__(
        self,
        model: nn.Module,
        coupling: Coupling,
        example_inputs: Inputs,
        with_gradients: bool = False,
        branches: Sequence[Branch] = (),
    ) -> None:
        self._size = max(g.atoms for g in coupling.groups)
        last = len(coupling.groups) * self._size
        self.store = MaskStore(last, len(branches), with_gradients)
        self._norms: list[nn.Module] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._plain_names: list[torch.utils.hooks.RemovableHandle] = []
        gates = {branch.end: last + 1 + number for number, branch in enumerate(branches)}
        modules = dict(model.named_modules())
        followed, device = _followed_by_norm(model, example_inputs), device_of(example_inputs)
        for (name, side), mapping in coupling.maps.items():
            module = modules[name]
            shrinks = [coupling.groups[g].frozen is None for g in set(mapping.group) if g >= 0]
            if side != "out" or not any(shrinks):
                continue
            index = torch.as_tensor(mapping.group * self._size + mapping.atom)
            index = torch.where(torch.as_tensor(mapping.group) >= 0, index, last)
            gate = gates.pop(name) if name in gates and _scales_outputs(module) else None
            self._attach(module, index.to(device), name in followed, gate)
        for name, gate in gates.items():
            index = torch.tensor([last], device=device)
            self._hook(modules[name], index, gate)

    def set(self, masks: Tensor | None, branch_gates: Tensor | None = None) -> None:
        """Use ``masks`` (groups, atoms) and ``branch_gates`` (branches,) from now on; None lets
        everything through."""
        self.store.set(masks, branch_gates)

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
        for hook in self._hooks + self._plain_names:
            hook.remove()
        self._norms, self._hooks, self._plain_names = [], [], []

    def _attach(self, module: nn.Module, index: Tensor, followed: bool, gate: int | None) -> None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                layer = self.store.add(index, gate)
                for name in ("weight", "bias"):
                    masked = _MaskedParameter(self.store, layer)
                    parametrize.register_parametrization(module, name, masked, unsafe=True)
                self._norms.append(module)
                self._plain_names.append(module.register_state_dict_post_hook(_to_plain_names))
                self._plain_names.append(
                    module.register_load_state_dict_pre_hook(_from_plain_names)
                )
                return
        elif followed:
            return
        self._hook(module, index, gate)

    def _hook(self, module: nn.Module, index: Tensor, gate: int | None) -> None:
        hook = _masking_hook(self.store, self.store.add(index, gate))
        self._hooks.append(module.register_forward_hook(hook))


MASKED = "parametrizations.{}.original"
"""What PyTorch calls a parameter that is computed from one of this name."""


def _to_plain_names(
    module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object
) -> None:
    """A checkpoint that is written under masks loads into the plain network."""
    for name in ("weight", "bias"):
        masked = prefix + MASKED.format(name)
        if masked in state:
            state[prefix + name] = state.pop(masked)


def _from_plain_names(
    module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: object
) -> None:
    """And the other way round."""
    for name in ("weight", "bias"):
        if prefix + name in state:
            state[prefix + MASKED.format(name)] = state.pop(prefix + name)


def _scales_outputs(module: nn.Module) -> bool:
    """Whether a factor on an affine norm's weight and bias is one on its output: PyTorch's own
    norms, and not those that bring an activation along."""
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return type(module) in plain and bool(module.affine)


def hard_masks(
    coupling: Coupling, branches: Sequence[Branch], keep: Sequence[np.ndarray]
) -> tuple[Tensor, Tensor]:
    """Masks (groups, atoms) and gates (branches,) of the atoms that ``keep`` keeps: 0 and 1."""
    masks = torch.zeros(len(keep), max(g.atoms for g in coupling.groups))
    for row, kept in zip(masks, keep, strict=True):
        row[: len(kept)] = torch.as_tensor(kept)
    gates = [float(any(keep[g].any() for g in branch.groups)) for branch in branches]
    return masks, torch.tensor(gates)


def _masking_hook(store: MaskStore, layer: int):
    def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        mask = store.of(layer)
        if mask is None:
            return output
        shape = [1] * output.dim()
        shape[channel_axis(module)] = -1
        return output * mask.to(output.dtype).view(shape)

    return hook


def _followed_by_norm(model: nn.Module, example_inputs: Inputs) -> set[str]:
    """Names of the layers whose outputs batch-norms take as they are, and nothing else takes.

    Who takes an output is read off the gradients' graph.
    """
    made: dict[int, tuple[str, Tensor]] = {}
    takers: Counter[int] = Counter()

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                takers[id(inputs[0])] += id(inputs[0]) in made
            else:
                made[id(output)] = (name, output)
                nodes[id(output)] = output.grad_fn

        return hook

    nodes: dict[int, torch.autograd.graph.Node | None] = {}
    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, prunable_types())
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            outputs = model(*arguments_of(map_inputs(_leaf, example_inputs)))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    readers = _readers(outputs)
    alone: dict[str, bool] = {}
    for key, (name, _) in made.items():
        normed = takers[key] > 0 and readers[nodes[key]] == takers[key]
        alone[name] = alone.get(name, True) and normed
    return {name for name, normed in alone.items() if normed}


def _leaf(tensor: Tensor) -> Tensor:
    """A copy that gradients reach, where they can."""
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def _readers(outputs: object) -> Counter[torch.autograd.graph.Node | None]:
    """How often the result of every node of the gradients' graph is read, by a node or as an
    output."""
    waiting = [t.grad_fn for t in tensors_of(outputs) if t.grad_fn is not None]
    readers: Counter[torch.autograd.graph.Node | None] = Counter(waiting)
    seen = set(waiting)
    while waiting:
        for source, _ in waiting.pop().next_functions:
            if source is None:
                continue
            readers[source] += 1
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return readers
