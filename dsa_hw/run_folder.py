"""The folder of a run: what it holds, whether it may be used, what has been done in it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from dsa_hw.cli import to_yaml
from dsa_hw.errors import RunFolderError

CONFIG_FILE = "config.yaml"
RESULT_FILE = "result.json"
LOG_FILE = "log.jsonl"
ONNX_FILE = "model.onnx"


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
        if not folder.path.is_dir() or not any(folder.path.iterdir()):
            return folder
        if not (folder.path / CONFIG_FILE).is_file():
            raise RunFolderError(f"{path} holds files that are not a run's; choose another --out")
        before = yaml.safe_load((folder.path / CONFIG_FILE).read_text(encoding="utf-8"))
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
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / CONFIG_FILE).exists():
            self.write_text(CONFIG_FILE, to_yaml(config))

    def write_text(self, name: str, text: str) -> None:
        """Replace a file as a whole."""
        partial = self.path / f".{name}.new"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path / name)

    def read_json(self, name: str) -> Any | None:
        """Content of a JSON file, None if there is none."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write_json(self, name: str, content: Any) -> None:
        """Replace a JSON file as a whole."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    # -- checkpoints -----------------------------------------------------------------------

    def save_checkpoint(self, name: str, state: dict[str, Any]) -> None:
        """Keep a stage's state; the log's length goes with it."""
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        partial = folder / f".{name}.new"
        torch.save(state | {"log_bytes": self.log_bytes()}, partial)
        os.replace(partial, folder / f"{name}.pt")

    def load_checkpoint(self, name: str) -> dict[str, Any] | None:
        """A stage's last state, or None. Tensors and plain values only: nothing is executed."""
        path = self.path / "checkpoints" / f"{name}.pt"
        if not path.is_file():
            return None
        return torch.load(path, map_location="cpu", weights_only=True)

    # -- the log ---------------------------------------------------------------------------

    def log(self, event: dict[str, Any]) -> None:
        """Append an event to ``log.jsonl``."""
        with open(self.path / LOG_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def log_bytes(self) -> int:
        """Length of the log."""
        path = self.path / LOG_FILE
        return path.stat().st_size if path.exists() else 0

    def begin_stage(self, name: str) -> None:
        """Remember where a stage's events begin; begun again without a checkpoint, forget them."""
        starts = self.read_json("stages.json") or {}
        if name not in starts:
            self.write_json("stages.json", starts | {name: self.log_bytes()})
        elif not (self.path / "checkpoints" / f"{name}.pt").is_file():
            self._rewind_log(starts[name])

    def resume_stage(self, name: str, log_bytes: int) -> None:
        """Forget events that came after a stage's checkpoint, unless a later stage has begun."""
        starts = self.read_json("stages.json") or {}
        if not any(start >= log_bytes for other, start in starts.items() if other != name):
            self._rewind_log(log_bytes)

    def _rewind_log(self, length: int) -> None:
        if self.log_bytes() > length:
            os.truncate(self.path / LOG_FILE, length)


class Stopwatch:
    """Seconds spent in each part of a run, kept across interruptions.

    A part that is measured inside another one is not counted in that one: parts add up to the
    whole.
    """

    def __init__(self, folder: RunFolder, clock: Callable[[], float] = time.perf_counter) -> None:
        self._folder, self._clock = folder, clock
        self._inside = 0.0
        self.seconds: dict[str, float] = folder.read_json("seconds.json") or {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block to ``part`` (also when it is interrupted)."""
        start, others = self._clock(), self._inside
        self._inside = 0.0
        try:
            yield
        finally:
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
