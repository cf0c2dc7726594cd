"""Temporary folders that do not outlive their process for long, however it ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from filelock import FileLock, Timeout

PREFIX = "dsa_hw_"
LOCK = ".lock"
YOUNG_S = 60.0
"""A folder younger than this may not be locked by its owner yet."""


class Scratch:
    """A folder for this process alone, with a lock that ends with it.

    Making one removes the folders of processes that were killed.
    """

    def __init__(self) -> None:
        remove_abandoned(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = FileLock(self.path / LOCK)
        self._lock.acquire(timeout=0)

    def remove(self) -> None:
        """Remove the folder and what is in it."""
        self._lock.release()
        shutil.rmtree(self.path, ignore_errors=True)


def remove_abandoned(parent: Path) -> list[Path]:
    """Remove the folders in ``parent`` whose process is dead; returns them.

    Only folders of this user are looked at, and only those that had a lock.
    """
    gone: list[Path] = []
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another process may be removing it just now
            if not _may_be_abandoned(folder):
                continue
            lock = FileLock(folder / LOCK)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)
            gone.append(folder)
    return gone


def _may_be_abandoned(folder: Path) -> bool:
    state = folder.lstat()
    own = not hasattr(os, "getuid") or state.st_uid == os.getuid()
    old = time.time() - state.st_mtime > YOUNG_S
    return own and old and not folder.is_symlink() and (folder / LOCK).is_file()
