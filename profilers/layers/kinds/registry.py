"""Every kind of layer that can be measured and pruned.

A kind of one's own is one more entry, ``LAYER_KINDS.register(MyKind(...))``, in the process that
reads the network. The measuring process is sent one-layer models and need not know it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping

from profilers.layers.kinds.kind import LayerKind

_NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)


class LayerKinds(Mapping[str, LayerKind]):
    """The kinds of layers by name; those named as text are imported on first use.

    Args:
        entries: ``package.module:KIND``, by the kinds' names.
    """

    def __init__(self, entries: Mapping[str, str]) -> None:
        self._entries: dict[str, LayerKind | str] = dict(entries)

    def register(self, kind: LayerKind) -> None:
        """Add a kind.

        Raises:
            ValueError: its name or its operator is taken, or the table files cannot have its name.
        """
        if _NAME.fullmatch(kind.name) is None:
            raise ValueError(
                f"a layer kind cannot be called {kind.name!r}: use lower-case letters, digits and _"
            )
        if kind.name in self._entries:
            raise ValueError(f"a layer kind is called {kind.name!r} already; choose another name")
        if (other := self.of_operator(kind.operator)) is not None:
            raise ValueError(f"the operator {kind.operator} is the layer kind {other.name!r}")
        self._entries[kind.name] = kind

    def remove(self, name: str) -> None:
        """Take a kind out again.

        Raises:
            KeyError: there is none of this name.
        """
        del self._entries[name]

    def of_operator(self, operator: str) -> LayerKind | None:
        """The kind whose layers are this ONNX operator; None where they are no layers."""
        return next((kind for kind in self.values() if kind.operator == operator), None)

    def __getitem__(self, name: str) -> LayerKind:
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), attribute)
            assert isinstance(entry, LayerKind)
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # without importing it: its module may be asking

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


LAYER_KINDS = LayerKinds(
    {
        "conv": "profilers.layers.kinds.conv:CONV",
        "gemm": "profilers.layers.kinds.gemm:GEMM",
    }
)
"""The kinds that this package comes with, and what was registered since."""
