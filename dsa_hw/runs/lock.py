"""One process works in a run folder at a time; a second one is told which."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from dsa_hw.errors import RunFolderError

LOCK_FILE = ".lock"
HOLDER_FILE = ".lock.json"
LONGEST_COMMAND = 300
"""Characters of a command that a message shows."""


class RunLock:
    """The operating system's lock on ``FOLDER/.lock``, and beside it who holds it.

    The lock ends with its process, so one that was killed does not block. It holds among the
    processes of one machine; network file systems need not pass it on.

    Example:
        >>> with RunLock(Path("runs/prune")):   # doctest: +SKIP
        ...     ...
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = FileLock(folder / LOCK_FILE)
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take the lock, making the folder where there is none.

        Raises:
            RunFolderError: another process has it, named with its command; or the folder cannot be
                written.
        """
        try:
            self._make_folder()
            self._lock.acquire(timeout=0)
            holder = {"pid": os.getpid(), "host": platform.node(), "command": _command()}
            (self._folder / HOLDER_FILE).write_text(json.dumps(holder) + "\n", encoding="utf-8")
        except Timeout:
            raise RunFolderError(
                f"{_named(self._folder / HOLDER_FILE)} works in {self._folder} at this moment; "
                "wait until it has ended, or choose another --out"
            ) from None
        except OSError as error:
            self.release()
            raise RunFolderError(
                f"cannot write to {self._folder}: {error.strerror or error}; choose another --out"
            ) from error

    def release(self) -> None:
        """Let go of it, and of a folder that nothing was written to."""
        if not self._lock.is_locked:
            return
        with contextlib.suppress(OSError):  # a full or read-only disk must not hide what failed
            (self._folder / HOLDER_FILE).unlink(missing_ok=True)
            if self._made and [p.name for p in self._folder.iterdir()] == [LOCK_FILE]:
                (self._folder / LOCK_FILE).unlink()
                for folder in self._made:
                    folder.rmdir()
        self._lock.release()

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self.release()

    def _make_folder(self) -> None:
        missing, folder = [], self._folder
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        self._folder.mkdir(parents=True, exist_ok=True)
        self._made = missing


def _command() -> str:
    words = shlex.join(sys.orig_argv)
    return words if len(words) <= LONGEST_COMMAND else words[: LONGEST_COMMAND - 3] + "..."


def _named(holder: Path) -> str:
    """Who ``holder`` says has the lock: process, machine and command."""
    try:
        said = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {said['pid']} on {said['host']} ({said['command']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has not written it yet
        return "another process"
