"""Models on their way to a worker: files named by their content, so that nothing is done twice."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from pathlib import Path

KEPT = 4
"""A large network is some 100 MB; those that are compared with each other are a few."""


class ModelFiles:
    """Writes models into a folder, and keeps the last few of them.

    The same bytes object is hashed once, however often it is asked for.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: OrderedDict[bytes, Path] = OrderedDict()

    def path(self, model: bytes | Path) -> Path:
        """A file with the model in it."""
        if isinstance(model, Path):
            return model.absolute()
        if model not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)[1].unlink()
            path = self._folder / f"{hashlib.sha256(model).hexdigest()}.onnx"
            path.write_bytes(model)
            self._kept[model] = path
        self._kept.move_to_end(model)
        return self._kept[model]


def model_key(model: bytes | Path) -> str:
    """Equal for equal models; a file named by its content is not read for it."""
    if isinstance(model, bytes):
        return hashlib.sha256(model).hexdigest()
    if re.fullmatch(r"[0-9a-f]{64}", model.stem):
        return model.stem
    return hashlib.sha256(model.read_bytes()).hexdigest()
