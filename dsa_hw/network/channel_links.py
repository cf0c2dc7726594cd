"""Which channels of a network go together, and which must stay: what following them gathers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

Side = tuple[str, str]
"""(module name, ``"in"`` or ``"out"``): one channel dimension."""

FIXED = -1
"""Label of an element that belongs to no channel that can go."""


@dataclass
class ChannelLinks:
    """What was found of a network's channels.

    Attributes:
        sizes: channels of every side; sides lie one after the other in this order.
        links: pairs of positions that go together.
        stays: positions that must stay, and why.
    """

    sizes: dict[Side, int] = field(default_factory=dict)
    links: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    stays: list[tuple[np.ndarray, str]] = field(default_factory=list)
    _start: dict[Side, int] = field(default_factory=dict)
    _roots: np.ndarray | None = None

    @property
    def total(self) -> int:
        """Positions of all sides."""
        return sum(self.sizes.values())

    def positions(self, side: Side, size: int) -> np.ndarray:
        """(size,) the positions of a side, which are made where there are none yet."""
        if side not in self.sizes:
            self._start[side] = self.total
            self.sizes[side] = size
            self._roots = None
        return self._start[side] + np.arange(self.sizes[side])

    def link(self, one: np.ndarray, other: np.ndarray) -> None:
        """These go together, pair by pair."""
        differ = one != other
        if differ.any():
            self.links.append((one[differ], other[differ]))
            self._roots = None

    def stay(self, positions: np.ndarray, reason: str) -> None:
        """These must stay; negative positions are none."""
        there = np.unique(positions[positions >= 0])
        if len(there):
            self.stays.append((there, reason))

    def atoms(self) -> np.ndarray:
        """(total,) equal numbers for positions that go together."""
        pairs = self.links or [(np.zeros(0, int), np.zeros(0, int))]
        row, column = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
        links = coo_array((np.ones(len(row), np.int8), (row, column)), shape=(self.total,) * 2)
        return connected_components(links, directed=False)[1]

    def rooted(self, labels: Tensor) -> Tensor:
        """The same labels with one number for all that go together."""
        if self._roots is None:
            atoms = self.atoms()
            first = np.full(int(atoms.max(initial=-1)) + 1, self.total)
            np.minimum.at(first, atoms, np.arange(self.total))
            self._roots = np.append(first[atoms], FIXED)  # the last is what FIXED reads
        return torch.from_numpy(self._roots)[labels]
