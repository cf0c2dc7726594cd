"""Running a network for its outputs alone, without touching its statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

Inputs = Tensor | Sequence[Tensor]
"""What a network is called with: one tensor, or one for each of its arguments. Their first axis is
the batch."""


def arguments_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """One tensor for each argument."""
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def map_inputs(change: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The same inputs with ``change`` made to each tensor."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    return tuple(change(one) for one in inputs)


def as_float(inputs: Inputs) -> Inputs:
    """At float32; whole numbers (tokens, positions) stay what they are."""
    return map_inputs(lambda t: t.float() if t.is_floating_point() else t, inputs)


def batch_of(inputs: Inputs) -> int:
    """Samples in them."""
    return arguments_of(inputs)[0].shape[0]


def device_of(inputs: Inputs) -> torch.device:
    """Where they are."""
    return arguments_of(inputs)[0].device


def noise_like(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """Noise of unit variance, of the same shapes and types; whole numbers stay what they are."""
    return map_inputs(
        lambda t: torch.randn(t.shape, generator=generator).to(t) if t.is_floating_point() else t,
        inputs,
    )


def tensors_of(outputs: object) -> tuple[Tensor, ...]:
    """All tensors of what a network gives: of a tuple, a list, a dictionary or a data class."""
    if isinstance(outputs, dict) and not isinstance(outputs, (list, tuple)):
        outputs = list(outputs.values())  # Transformers' outputs are dictionaries of a class
    flat: list[Any] = tree_flatten(outputs)[0]
    found: list[Tensor] = []
    for one in flat:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, dict):
            found.extend(tensors_of(one))
    return tuple(found)


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Inputs) -> Any:
    """Outputs in evaluation mode; the model's mode is kept."""
    was_training = model.training
    model.eval()
    try:
        return model(*arguments_of(inputs))
    finally:
        model.train(was_training)


def output_tensors(model: nn.Module, inputs: Inputs) -> tuple[Tensor, ...]:
    """All tensors of the outputs in evaluation mode."""
    return tensors_of(outputs_of(model, inputs))


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Validation batches must not move the batch-norms' running statistics."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, tracks in zip(norms, kept, strict=True):
            norm.track_running_stats = tracks
