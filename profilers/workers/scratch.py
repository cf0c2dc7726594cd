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
MEMORY_FOLDER = Path("/dev/shm")
ROOM = 2**31
"""Bytes that must be free there: a model on its way is some 100 MB, and a few are kept."""


class Scratch:
    """A folder for this process alone, with a lock that ends with it.

    Making one removes the folders of processes that were killed.
    """

    def __init__(self) -> None:
        folder = scratch_folder()
        remove_abandoned(folder)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        self._lock = FileLock(self.path / LOCK)
        self._lock.acquire(timeout=0)

    def remove(self) -> None:
        """Remove the folder and what is in it."""
        self._lock.release()
        shutil.rmtree(self.path, ignore_errors=True)


def scratch_folder() -> Path:
    """Where models on their way to a worker lie: in memory where there is room, else on a disk.

    A disk that is written to takes a processor now and then, in the middle of a round.
    """
    with contextlib.suppress(OSError):
        if "TMPDIR" not in os.environ and shutil.disk_usage(MEMORY_FOLDER).free >= ROOM:
            if os.access(MEMORY_FOLDER, os.W_OK | os.X_OK):
                return MEMORY_FOLDER
    return Path(tempfile.gettempdir())


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
