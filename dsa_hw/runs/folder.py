"""The folder of a run: what it holds, whether it may be used, what has been done in it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dsa_hw.errors import RunFolderError
from dsa_hw.runs.checkpoint_files import read_checkpoint, write_checkpoint
from dsa_hw.runs.durable_files import append_line, naming, replace_file
from dsa_hw.runs.lock import HOLDER_FILE, LOCK_FILE
from dsa_hw.runs.options import to_yaml
from dsa_hw.runs.yaml_files import read_mapping

CONFIG_FILE = "config.yaml"
RESULT_FILE = "result.json"
LOG_FILE = "log.jsonl"
ONNX_FILE = "model.onnx"
LOCK_FILES = frozenset({LOCK_FILE, HOLDER_FILE})


class RunFolder:
    """One run's files. Everything is written whole or not at all, except the append-only log."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def check(
        cls, path: str | Path, config: Any, may_differ: frozenset[str] = frozenset()
    ) -> RunFolder:
        """See that ``path`` can take this run, without writing.

        Args:
            may_differ: options that the run already there may have otherwise.

        Raises:
            RunFolderError: it holds something else, or cannot be written.
        """
        folder = cls(Path(path))
        if folder.path.exists() and not folder.path.is_dir():
            raise RunFolderError(f"{path} is a file; choose another --out")
        existing = folder.path
        while not existing.exists():
            existing = existing.parent
        if not os.access(existing, os.W_OK | os.X_OK) or not _really_writable(existing):
            raise RunFolderError(f"cannot write to {existing}; choose another --out")
        if not folder.path.is_dir() or not {p.name for p in folder.path.iterdir()} - LOCK_FILES:
            return folder
        if not (folder.path / CONFIG_FILE).is_file():
            raise RunFolderError(f"{path} holds files that are not a run's; choose another --out")
        before = read_mapping(folder.path / CONFIG_FILE)
        now = yaml.safe_load(to_yaml(config))
        ignored = {"out"} | may_differ
        differing = [k for k in now if k not in ignored and before.get(k) != now[k]]
        if differing:
            key = differing[0]
            raise RunFolderError(
                f"{path} already holds another run ({key}: {before.get(key)!r} there, "
                f"{now[key]!r} now); choose another --out, or delete it"
            )
        return folder

    def start(self, config: Any) -> None:
        """Make the folder and write the resolved configuration."""
        with naming(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / CONFIG_FILE).exists():
            self.write_text(CONFIG_FILE, to_yaml(config))

    def write_text(self, name: str, text: str) -> None:
        """Replace a file as a whole.

        Raises:
            RunFolderError: it cannot be written; what was there is as it was.
        """
        replace_file(self.path / name, text.encode("utf-8"))

    def read_json(self, name: str) -> Any | None:
        """Content of a JSON file, None if there is none.

        Raises:
            RunFolderError: it cannot be read, or is not JSON.
        """
        path = self.path / name
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RunFolderError(
                f"{path} cannot be read ({_first_line(error)}); put back a copy of it, or choose "
                "another --out"
            ) from error

    def write_json(self, name: str, content: Any) -> None:
        """Replace a JSON file as a whole."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def _read_numbers(self, name: str) -> dict[str, Any]:
        """A JSON file of numbers by name; empty where there is none.

        Raises:
            RunFolderError: it holds something else.
        """
        content = self.read_json(name)
        if content is None:
            return {}
        numbers = isinstance(content, dict) and all(
            isinstance(n, (int, float)) and not isinstance(n, bool) and 0 <= n < 1e15
            for n in content.values()
        )
        if not numbers:
            raise RunFolderError(
                f"{self.path / name} does not hold numbers by name; put back a copy of it, or "
                "choose another --out"
            )
        return content

    def read_seconds(self) -> dict[str, float]:
        """What each part of the run has taken so far."""
        return self._read_numbers("seconds.json")

    # -- checkpoints -----------------------------------------------------------------------

    def save_checkpoint(self, name: str, state: dict[str, Any]) -> None:
        """Keep a stage's state and the one before it; the log's length goes with it.

        Raises:
            RunFolderError: it cannot be written; the states that were there are as they were.
        """
        folder = self.path / "checkpoints"
        with naming(folder):
            folder.mkdir(exist_ok=True)
        latest, earlier = self._checkpoints(name)
        write_checkpoint(latest, state | {"log_bytes": self.log_bytes()}, keep_as=earlier)

    def load_checkpoint(self, name: str) -> dict[str, Any] | None:
        """A stage's last state, or None. Tensors and plain values only: nothing is executed.

        A state that is damaged is passed over for the one before it.

        Raises:
            RunFolderError: all that there is of it is damaged.
        """
        problems = []
        for path in self._checkpoints(name):
            if not path.is_file():
                continue
            try:
                return read_checkpoint(path)
            except RunFolderError as error:
                problems.append(str(error))
        if problems:
            raise RunFolderError("; ".join(problems))
        return None

    def _checkpoints(self, name: str) -> tuple[Path, Path]:
        """Where a stage's last state is, and the one before it."""
        folder = self.path / "checkpoints"
        return folder / f"{name}.pt", folder / f"{name}.earlier.pt"

    # -- the log ---------------------------------------------------------------------------

    def log(self, event: dict[str, Any]) -> None:
        """Append an event to ``log.jsonl``."""
        append_line(self.path / LOG_FILE, json.dumps(event))

    def log_bytes(self) -> int:
        """Length of the log."""
        path = self.path / LOG_FILE
        return path.stat().st_size if path.exists() else 0

    def begin_stage(self, name: str) -> None:
        """Remember where a stage's events begin; begun again without a checkpoint, forget them."""
        starts = self._read_numbers("stages.json")
        if name not in starts:
            self.write_json("stages.json", starts | {name: self.log_bytes()})
        elif not any(path.is_file() for path in self._checkpoints(name)):
            self._rewind_log(starts[name])

    def resume_stage(self, name: str, log_bytes: int) -> None:
        """Forget events that came after a stage's checkpoint, unless a later stage has begun."""
        starts = self._read_numbers("stages.json")
        if not any(start >= log_bytes for other, start in starts.items() if other != name):
            self._rewind_log(log_bytes)

    def _rewind_log(self, length: int) -> None:
        if self.log_bytes() > length:
            with naming(self.path / LOG_FILE):
                os.truncate(self.path / LOG_FILE, length)


class Stopwatch:
    """Seconds spent in each part of a run, kept across interruptions.

    A part that is measured inside another one is not counted in that one: parts add up to the
    whole.
    """

    def __init__(self, folder: RunFolder, clock: Callable[[], float] = time.perf_counter) -> None:
        self._folder, self._clock = folder, clock
        self._inside = 0.0
        self.seconds: dict[str, float] = folder.read_seconds()

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block to ``part`` (also when it is interrupted)."""
        start, others = self._clock(), self._inside
        self._inside = 0.0
        try:
            yield
        except BaseException:
            with contextlib.suppress(RunFolderError):  # what failed first is what counts
                self._add(part, start, others)
            raise
        self._add(part, start, others)

    def _add(self, part: str, start: float, others: float) -> None:
        whole = self._clock() - start
        spent = self.seconds.get(part, 0.0) + whole - self._inside
        self._inside = others + whole
        self.put(part, spent)

    def put(self, part: str, seconds: float) -> None:
        """Set what ``part`` took, where it was measured elsewhere."""
        self.seconds[part] = round(seconds, 2)
        self._folder.write_json("seconds.json", self.seconds)


def _really_writable(folder: Path) -> bool:
    """root passes ``os.access`` on read-only places: try it, leaving nothing behind."""
    probe = folder / f".dsa_hw_probe_{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
