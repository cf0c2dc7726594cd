"""Training that no target changes: done once a seed, and taken up by every run that begins with it.

The runs of a seed have the same weights, batches and order to begin with, so that a method's dense
network is the same at every target, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from dsa_hw.runs.checkpoint_files import read_checkpoint, write_checkpoint
from dsa_hw.runs.folder import Stopwatch

SHARED_FOLDER = "shared"
SHARED = "shared"
WAITING = "waiting"
"""Parts of a run's seconds: what the shared training took (whoever did it), and waiting for it."""


class SharedTraining:
    """States that the runs of one seed have in common, a file each.

    Args:
        sweep: the sweep's folder.
        watch: of the run that asks.
    """

    def __init__(self, sweep: Path, seed: int, watch: Stopwatch) -> None:
        self._folder, self._seed, self._watch = sweep / SHARED_FOLDER, seed, watch

    def __call__(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The state of that name; made by the first run that asks, while the others wait.

        Args:
            name: the same for the same training only.
            make: tensors and plain values.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{name}-seed{self._seed}.pt"
        with self._watch.measure(WAITING), FileLock(f"{path}.lock"):
            if not path.is_file():
                with self._watch.measure(SHARED):
                    state = make()
                seconds = self._watch.seconds[SHARED]
                write_checkpoint(path, {"state": state, "seconds": seconds})
            found = read_checkpoint(path)
        self._watch.put(SHARED, found["seconds"])
        return found["state"]
