"""Tensors of labels: how they differ along axes, and how they are laid out on others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def varies(labels: Tensor, axis: int) -> bool:
    """Whether labels differ along an axis."""
    if labels.dim() == 0 or labels.shape[axis] < 2:
        return False
    return bool((labels != labels.narrow(axis, 0, 1)).any())


def varying_axes(labels: Tensor) -> list[int]:
    """The axes along which labels differ."""
    return [axis for axis in range(labels.dim()) if varies(labels, axis)]


def labels_along(labels: Tensor, axis: int) -> Tensor | None:
    """(size,) labels along an axis, where they are the same everywhere else; else None."""
    read = labels.movedim(axis, 0).flatten(1)[:, 0]
    return read if torch.equal(spread(read, axis, labels.shape), labels) else None


def spread(read: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """Labels along an axis of a shape."""
    view = [1] * len(shape)
    view[axis] = len(read)
    return read.view(view).expand(tuple(shape))


def extended(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """The same labels on a larger or smaller map: they do not differ where the sizes do."""
    for axis, size in enumerate(shape):
        if labels.shape[axis] != size:
            sizes = list(labels.shape)
            sizes[axis] = size
            labels = labels.narrow(axis, 0, 1).expand(sizes)
    return labels


def fits(labels: Tensor, shape: Sequence[int]) -> bool:
    """Whether they can be broadcast to a shape."""
    try:
        return torch.broadcast_shapes(labels.shape, tuple(shape)) == tuple(shape)
    except RuntimeError:
        return False
