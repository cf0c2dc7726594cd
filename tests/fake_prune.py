"""``python -m dsa_hw.prune`` on the fake device, as a program that ``accelerate launch`` can start.

``FAIL_AT=STAGE`` in the environment fills the disk after that stage's first checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from colours import coloured
from fake_device import FakeRuntime
from torch import nn

from dsa_hw import prune
from dsa_hw.data import DataSplits
from dsa_hw.errors import UserError
from dsa_hw.pipeline import opening
from dsa_hw.runs.folder import RunFolder

FULL = "no space left on the disk of this test"


def plain(num_classes: int = 4) -> nn.Module:
    """Without batch-norms, whose statistics would be those of each process's part of a batch."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(),
        nn.Conv2d(48, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, num_classes),
    )  # fmt: skip


def normed(num_classes: int = 4) -> nn.Module:
    """With batch-norms."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, num_classes),
    )  # fmt: skip


def colours(root: Path | None = None) -> DataSplits:
    """Four colours under noise, 12x12, shifted by up to a pixel in training."""
    return coloured(4, 12, 330, 101, max_shift=1)


def failing_after(stage: str) -> Callable[[RunFolder, str, dict[str, Any]], None]:
    """A ``RunFolder.save_checkpoint`` that fails after the first checkpoint of ``stage``."""
    save = RunFolder.save_checkpoint

    def save_and_fail(self: RunFolder, name: str, state: dict[str, Any]) -> None:
        save(self, name, state)
        if name == stage:
            raise UserError(FULL)

    return save_and_fail


if __name__ == "__main__":
    torch.set_num_threads(1)
    opening.configured_backend = lambda config: FakeRuntime()
    if "FAIL_AT" in os.environ:
        setattr(RunFolder, "save_checkpoint", failing_after(os.environ["FAIL_AT"]))  # noqa: B010
    sys.exit(prune.main())
