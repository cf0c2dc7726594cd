"""Read ``widths.json`` of a run folder, which may be damaged, or somebody else's."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsa_hw.errors import RunFolderError
from dsa_hw.network.branches.branch import Branch
from dsa_hw.network.coupling import Coupling, Group

LARGEST_IMAGE = 2**24
"""Elements of one input, at most: an image of 2,300 by 2,300 pixels in three colours. A network
runs on it once, and its first layers take 20 times as much memory."""


@dataclass(frozen=True, slots=True)
class SavedGroup:
    """A group of channels as it was kept.

    Args:
        kept: channels of the naming layer that stay, ascending.
    """

    name: str
    dense_width: int
    kept: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SavedWidths:
    """The content of ``widths.json``.

    Args:
        network: digest of the groups of the network (``network_digest``); None in files of
            earlier versions.
        input_shape: (N, C, H, W) of the first input.
        more_inputs: shapes of the others, and whether they are real numbers.
        exclude: patterns of names of layers.
    """

    network: str | None
    input_shape: tuple[int, ...]
    exclude: tuple[str, ...]
    groups: tuple[SavedGroup, ...]
    removed_branches: tuple[Branch, ...]
    more_inputs: tuple[tuple[tuple[int, ...], bool], ...] = ()

    @property
    def traced_shape(self) -> tuple[int, ...]:
        """Shape of an input to trace the network with: fewer samples where a batch is large."""
        fits = math.prod(self.input_shape) <= LARGEST_IMAGE
        return self.input_shape if fits else (1, *self.input_shape[1:])


def network_digest(coupling: Coupling) -> str:
    """Identifies a network by its groups: names, channels, atoms and layers."""
    parts = [f"{g.name} {g.dense_width} {g.atoms} {g.layers}" for g in coupling.groups]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def read_widths(path: Path) -> SavedWidths:
    """The content of ``path``, with every value checked.

    Raises:
        RunFolderError: it is no ``widths.json``, or a value in it is out of range.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from error
    read = _Reader(path)
    fields = read.mapping(content, "the file")
    shape = read.shape(fields, "input_shape", "the file")
    others = read.items({"more_inputs": [], **fields}, "more_inputs", "the file")
    groups = [read.group(g, i) for i, g in enumerate(read.items(fields, "groups", "the file"))]
    branches = read.items({"removed_branches": [], **fields}, "removed_branches", "the file")
    network = fields.get("network")
    if network is not None and not isinstance(network, str):
        raise read.wrong(f"network is {network!r}; expected a text")
    return SavedWidths(
        network=network,
        input_shape=shape,
        exclude=read.texts(fields, "exclude", "the file"),
        groups=tuple(groups),
        removed_branches=tuple(read.branch(b, i, len(groups)) for i, b in enumerate(branches)),
        more_inputs=tuple(read.input(one, i) for i, one in enumerate(others)),
    )


def kept_atoms(saved: SavedWidths, coupling: Coupling, foreign: str) -> list[np.ndarray]:
    """For each group (atoms,) which of them stay.

    Args:
        foreign: begins the message where the file is of another network.

    Raises:
        RunFolderError: the file is of another network, or keeps parts of atoms.
    """
    if len(coupling.groups) != len(saved.groups):
        raise RunFolderError(
            f"{foreign}: it has {len(saved.groups)} groups of channels, and this one has "
            f"{len(coupling.groups)}"
        )
    for group, other in zip(coupling.groups, saved.groups, strict=True):
        if (group.name, group.dense_width) != (other.name, other.dense_width):
            raise RunFolderError(
                f"{foreign}: its group {other.name} has {other.dense_width} channels, where this "
                f"one has {group.name} with {group.dense_width}"
            )
    if saved.network not in (None, network_digest(coupling)):
        raise RunFolderError(f"{foreign}: its groups of channels are made by other layers")
    closed = {index for branch in saved.removed_branches for index in branch.groups}
    return [
        _kept(group, other, foreign, may_be_empty=index in closed)
        for index, (group, other) in enumerate(zip(coupling.groups, saved.groups, strict=True))
    ]


def _kept(group: Group, saved: SavedGroup, foreign: str, may_be_empty: bool) -> np.ndarray:
    if not saved.kept and not may_be_empty:
        raise RunFolderError(f"{foreign}: its group {saved.name} keeps no channel")
    channels = np.zeros(group.dense_width, bool)
    channels[list(saved.kept)] = True
    atoms = channels.reshape(group.atoms, group.atom_channels)
    if (atoms.any(1) != atoms.all(1)).any():
        raise RunFolderError(
            f"{foreign}: its group {saved.name} keeps channels singly that can only be removed "
            f"{group.atom_channels} together"
        )
    return np.asarray(atoms.all(1))


class _Reader:
    """Takes values of known types out of JSON."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def wrong(self, what: str) -> RunFolderError:
        return RunFolderError(f"{self._path} is damaged: {what}")

    def mapping(self, value: object, where: str) -> Mapping[str, object]:
        if not isinstance(value, dict):
            raise self.wrong(f"{where} is a {type(value).__name__}; expected an object")
        return value

    def get(self, fields: Mapping[str, object], name: str, where: str) -> object:
        if name not in fields:
            raise self.wrong(f"{where} has no {name}")
        return fields[name]

    def items(self, fields: Mapping[str, object], name: str, where: str) -> list[object]:
        value = self.get(fields, name, where)
        if not isinstance(value, list):
            raise self.wrong(f"{name} of {where} is a {type(value).__name__}; expected a list")
        return value

    def integer(self, fields: Mapping[str, object], name: str, where: str) -> int:
        value = self.get(fields, name, where)
        if type(value) is not int:
            raise self.wrong(f"{name} of {where} is {value!r}; expected a whole number")
        return value

    def integers(self, fields: Mapping[str, object], name: str, where: str) -> list[int]:
        found: list[int] = []
        for value in self.items(fields, name, where):
            if type(value) is not int:
                raise self.wrong(f"{name} of {where} has {value!r}; expected whole numbers")
            found.append(value)
        return found

    def shape(self, fields: Mapping[str, object], name: str, where: str) -> tuple[int, ...]:
        shape = tuple(self.integers(fields, name, where))
        if not 1 <= len(shape) <= 5 or min(shape) < 1 or math.prod(shape[1:]) > LARGEST_IMAGE:
            raise self.wrong(
                f"{name} is {list(shape)}; expected (N, C, H, W) with at most {LARGEST_IMAGE} "
                "values in an image"
            )
        return shape

    def input(self, value: object, index: int) -> tuple[tuple[int, ...], bool]:
        where = f"input {index + 1}"
        fields = self.mapping(value, where)
        real = self.get(fields, "real", where)
        if type(real) is not bool:
            raise self.wrong(f"real of {where} is {real!r}; expected true or false")
        return self.shape(fields, "shape", where), real

    def text(self, fields: Mapping[str, object], name: str, where: str) -> str:
        value = self.get(fields, name, where)
        if not isinstance(value, str):
            raise self.wrong(f"{name} of {where} is {value!r}; expected a text")
        return value

    def texts(self, fields: Mapping[str, object], name: str, where: str) -> tuple[str, ...]:
        found: list[str] = []
        for value in self.items(fields, name, where):
            if not isinstance(value, str):
                raise self.wrong(f"{name} of {where} has {value!r}; expected texts")
            found.append(value)
        return tuple(found)

    def group(self, value: object, index: int) -> SavedGroup:
        where = f"group {index}"
        fields = self.mapping(value, where)
        dense = self.integer(fields, "dense_width", where)
        kept = self.integers(fields, "kept", where)
        if any(not 0 <= channel < dense for channel in kept):
            raise self.wrong(f"{where} keeps channels outside of 0 to {dense - 1}")
        if any(a >= b for a, b in itertools.pairwise(kept)):
            raise self.wrong(f"{where} keeps channels that do not ascend, or one twice")
        return SavedGroup(self.text(fields, "name", where), dense, tuple(kept))

    def branch(self, value: object, index: int, groups: int) -> Branch:
        where = f"removed branch {index}"
        fields = self.mapping(value, where)
        inside = self.integers(fields, "groups", where)
        if any(not 0 <= group < groups for group in inside):
            raise self.wrong(f"{where} has groups outside of 0 to {groups - 1}")
        return Branch(
            name=self.text(fields, "name", where),
            layers=self.texts(fields, "layers", where),
            groups=tuple(inside),
            owner=self.text(fields, "owner", where),
            end=self.text(fields, "end", where),
        )
