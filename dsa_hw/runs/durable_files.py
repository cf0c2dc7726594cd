"""Files that are written whole or not at all, also when the disk is full or the power goes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsa_hw.errors import RunFolderError


def replace_file(path: Path, content: bytes | memoryview, keep_as: Path | None = None) -> None:
    """Replace ``path`` as a whole: afterwards it has the old content or the new one.

    Content and name reach the disk before this returns, so a power cut cannot leave an empty file.

    Args:
        keep_as: the file that was there is kept under this name.

    Raises:
        RunFolderError: the disk is full, or the file may not be written; the old one is as it was.
    """
    partial = path.with_name(f".{path.name}.new")
    with naming(path):
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # what failed is raised below; this frees the space
                partial.unlink()
            raise
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(partial, path)
        sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append a line; an unfinished one that a killed process left is ended first.

    Raises:
        RunFolderError: it could not be written whole; the file is as long as before.
    """
    with naming(path), open(path, "ab+") as file:
        length = file.seek(0, os.SEEK_END)
        torn = False
        if length:
            file.seek(length - 1)
            torn = file.read(1) != b"\n"
        try:
            file.write((b"\n" if torn else b"") + line.encode("utf-8") + b"\n")
            file.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, length)
            raise


def sync_folder(folder: Path) -> None:
    """Let the names in ``folder`` reach the disk, where the operating system can do that."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals in this block into an error that names ``path``.

    Raises:
        RunFolderError: instead of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"cannot write {path}: {error.strerror or error}; what was there is unharmed. Free "
            "some space or mend the permissions, then the same command goes on from its last "
            "checkpoint"
        ) from error
