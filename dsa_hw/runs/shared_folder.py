"""A run's folder when several processes have the run: the main one's, whose content all are told.

The other processes may be on machines that do not see the folder at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsa_hw.runs.folder import RunFolder
from dsa_hw.runs.lock import RunLock
from dsa_hw.runs.processes import Processes


class SharedRunFolder(RunFolder):
    """Written and read by the main process; what is read is told to the others.

    Reading has to happen in all processes at once. Whatever writes does nothing in the others.
    """

    def __init__(self, path: Path, processes: Processes) -> None:
        super().__init__(path)
        self._own = RunFolder(path)
        self._processes = processes

    @classmethod
    def check_for(cls, path: str | Path, config: Any, processes: Processes) -> SharedRunFolder:
        """See that ``path`` can take this run, without writing; see ``RunFolder.check``."""
        return cls(processes.from_main(lambda: RunFolder.check(path, config).path), processes)

    @contextmanager
    def locked(self, config: Any) -> Iterator[None]:
        """Have the folder to this run, in its main process, for as long as the block lasts.

        Raises:
            RunFolderError: another command works in it; or it has changed since it was checked.
        """
        lock = RunLock(self.path)

        def take() -> None:
            lock.acquire()
            RunFolder.check(self.path, config)

        try:
            self._processes.from_main(take)
            yield
        finally:
            if self._processes.is_main:
                lock.release()

    def start(self, config: Any) -> None:
        """Make the folder and write the resolved configuration."""
        self._processes.from_main(lambda: self._own.start(config))

    def read_json(self, name: str) -> Any | None:
        """Content of a JSON file, None if there is none."""
        return self._processes.from_main(lambda: self._own.read_json(name))

    def read_seconds(self) -> dict[str, float]:
        """What each part of the run has taken so far."""
        return self._processes.from_main(self._own.read_seconds)

    def load_checkpoint(self, name: str) -> dict[str, Any] | None:
        """A stage's last state, or None."""
        return self._processes.from_main(lambda: self._own.load_checkpoint(name))

    def write_text(self, name: str, text: str) -> None:
        """Replace a file as a whole."""
        if self._processes.is_main:
            self._own.write_text(name, text)

    def save_checkpoint(self, name: str, state: dict[str, Any]) -> None:
        """Keep a stage's state; the log's length goes with it."""
        if self._processes.is_main:
            self._own.save_checkpoint(name, state)

    def log(self, event: dict[str, Any]) -> None:
        """Append an event to ``log.jsonl``."""
        if self._processes.is_main:
            self._own.log(event)

    def begin_stage(self, name: str) -> None:
        """Remember where a stage's events begin; begun again without a checkpoint, forget them."""
        if self._processes.is_main:
            self._own.begin_stage(name)

    def resume_stage(self, name: str, log_bytes: int) -> None:
        """Forget events that came after a stage's checkpoint, unless a later stage has begun."""
        if self._processes.is_main:
            self._own.resume_stage(name, log_bytes)
