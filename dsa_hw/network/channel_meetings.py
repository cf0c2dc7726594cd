"""Labels that meet in one operation: which go together then, and which must stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from dsa_hw.network.channel_labels import fits, labels_along, varies, varying_axes
from dsa_hw.network.channel_links import FIXED, ChannelLinks

FIXED_NUMBER = "channels of a fixed number"


@dataclass(frozen=True, slots=True)
class Fixed:
    """A parameter, a buffer or another constant: it has its size, whatever goes.

    Args:
        shape: of it.
        what: in words.
        parameter: its name, where it is a parameter or made of one alone.
        owner: name of the frozen norm whose buffers it is made of, if it is.
    """

    shape: tuple[int, ...]
    what: str
    parameter: str | None = None
    owner: str | None = None


class Meetings:
    """Writes into ``links`` what operations on labels say.

    Labels that are given back have one number for all that go together.
    """

    def __init__(self, links: ChannelLinks) -> None:
        self.links = links

    def stay(self, value: object, reason: str) -> None:
        """All labels in a value stay."""
        for one in tree_flatten(value)[0]:
            if isinstance(one, Tensor):
                self.links.stay(torch.unique(one).numpy(), reason)

    def stay_along(self, labels: Tensor, axes: Iterable[int], reason: str) -> None:
        """Labels stay if they differ along one of these axes."""
        if any(varies(labels, axis) for axis in axes):
            self.stay(labels, reason)

    def link(self, one: Tensor, other: Tensor) -> None:
        """Labels at the same places go together; those that meet none stay."""
        pairs = torch.unique(torch.stack([one.flatten(), other.flatten()]), dim=1).numpy()
        a, b = pairs
        both = (a >= 0) & (b >= 0)
        self.links.link(a[both], b[both])
        self.links.stay(np.maximum(a, b)[~both], f"they meet {FIXED_NUMBER}")

    def link_parts(self, parts: Sequence[Tensor]) -> None:
        """Parts of one size lose equally many: the first of each go together, and so on."""
        if len({part.shape for part in parts}) > 1:
            self.stay(parts, "the network splits them into parts of unequal size")
            return
        for part in parts[1:]:
            self.link(parts[0], part)

    def link_pixels(self, labels: Tensor, factor: int) -> None:
        """Channels that become a square of pixels of one channel go together: (..., C, H, W)."""
        *lead, channels, height, width = labels.shape
        squares = labels.reshape(*lead, channels // factor**2, factor**2, height, width)
        self.link(squares.narrow(-3, 0, 1).expand_as(squares), squares)

    def link_factors(self, made: Tensor) -> None:
        """Where channels became several axes, the largest of these shrinks.

        The others are numbers of heads, of parts that are shuffled, or of pixels.
        """
        made = self.links.rooted(made)
        axes = varying_axes(made)
        if len(axes) < 2:
            return
        largest = max(axes, key=lambda axis: (made.shape[axis], axis))
        first = made
        for axis in axes:
            if axis != largest:
                first = first.narrow(axis, 0, 1)
        self.link(first.expand_as(made), made)

    def combined(self, operands: Sequence[Tensor | Fixed], shape: Sequence[int]) -> Tensor:
        """Labels of what is computed of operands element by element.

        An operand that is broadcast along an axis says nothing of what differs along it; one that
        has a size of its own there, and no labels, keeps what it meets.
        """
        tensors = [self.links.rooted(o) for o in operands if isinstance(o, Tensor)]
        if not all(fits(t, shape) for t in tensors):
            self.stay(tensors, "they meet in a way that is not element by element")
            return torch.full(tuple(shape), FIXED)
        tensors = [t.expand(tuple(shape)) for t in tensors]
        several = [t for t in tensors if varying_axes(t)]
        if not several:  # at most single channels, which are not taken away
            return tensors[0].clone() if tensors else torch.full(tuple(shape), FIXED)
        result = several[0]
        for other in several[1:]:
            if not torch.equal(result, other):
                self.link(result, other)
                result = torch.maximum(self.links.rooted(result), self.links.rooted(other))
        for operand in operands:
            if isinstance(operand, Fixed):
                if operand.owner is None or not self._scales(result, operand):
                    self._stay_beside(result, operand.shape, operand.what)
            elif not varying_axes(self.links.rooted(operand)):
                self._stay_beside(result, operand.shape, FIXED_NUMBER)
        return self.links.rooted(result)

    def _scales(self, labels: Tensor, norm: Fixed) -> bool:
        """Whether a norm's constant has a number for each channel, which goes with it."""
        shift = labels.dim() - len(norm.shape)
        axes = [axis + shift for axis, size in enumerate(norm.shape) if size > 1]
        read = labels_along(labels, axes[0]) if len(axes) == 1 else None
        if read is None or bool((read < 0).any()):
            return False
        assert norm.owner is not None
        self.links.link(read.numpy(), self.links.positions((norm.owner, "out"), len(read)))
        return True

    def _stay_beside(self, labels: Tensor, shape: Sequence[int], what: str) -> None:
        """Labels stay that differ along an axis along which something else has its size."""
        shift = labels.dim() - len(shape)
        axes = [axis + shift for axis, size in enumerate(shape) if size > 1]
        self.stay_along(labels, axes, f"they meet {what}")

    def product(self, left: Tensor, right: Tensor, shape: Sequence[int], where: str) -> Tensor:
        """(..., i, k) times (..., k, j): what meets in the sum over k goes together.

        Args:
            shape: of the product.
            where: the operation, for reasons.
        """
        left, right = self.links.rooted(left), self.links.rooted(right)
        if varies(left, -1) or varies(right, -2):
            self.link_sums(labels_along(left, -1), labels_along(right, -2), (left, right), where)
            return torch.full(tuple(shape), FIXED)
        rows = left.narrow(-1, 0, 1).expand(*left.shape[:-1], shape[-1])
        columns = right.narrow(-2, 0, 1).expand(*right.shape[:-2], shape[-2], right.shape[-1])
        return self.combined([rows, columns], shape)

    def link_sums(
        self, one: Tensor | None, other: Tensor | None, whole: Sequence[Tensor], where: str
    ) -> None:
        """Factors of a sum's terms go together.

        Args:
            one, other: (k,) labels of the factors; None where they are not the same everywhere.
            whole: what stays then.
        """
        if one is None or other is None or len(one) != len(other):
            self.stay(whole, f"{where} multiplies them with each other")
        else:
            self.link(one, other)
