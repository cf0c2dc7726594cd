"""States of training in files that say themselves whether they are whole."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from dsa_hw.errors import RunFolderError
from dsa_hw.runs.durable_files import replace_file

SEALED = b"dsa_hw checkpoint sha256 "
"""Stands at a checkpoint's end, before the digest of all that comes before it."""


def write_checkpoint(path: Path, state: dict[str, Any], keep_as: Path | None = None) -> None:
    """Replace a checkpoint as a whole.

    Args:
        keep_as: the one that was there is kept under this name.

    Raises:
        RunFolderError: it cannot be written; what was there is as it was.
    """
    content = io.BytesIO()
    torch.save(state, content)
    content.write(SEALED + hashlib.sha256(content.getbuffer()).digest())
    replace_file(path, content.getbuffer(), keep_as)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's state: tensors and plain values only, nothing is executed.

    One that was written before checkpoints were sealed is believed.

    Raises:
        RunFolderError: it cannot be read, or is not what was written.
    """
    try:
        return _state(path.read_bytes())
    except (OSError, ValueError, EOFError, RuntimeError, UnpicklingError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunFolderError(
            f"{path} cannot be read ({said}). Put back a copy, or delete it: that part of the run "
            "is then done again"
        ) from error


def _state(content: bytes) -> dict[str, Any]:
    seal = len(SEALED) + hashlib.sha256().digest_size
    if content[-seal:].startswith(SEALED):
        content, digest = content[:-seal], content[-seal + len(SEALED) :]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("it does not agree with its checksum")
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__} instead of a state")
    return state
