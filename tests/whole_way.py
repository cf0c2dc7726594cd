"""A user's own network, and the commands that take it the whole way in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

TINY = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(64)
        self.a = nn.Conv2d(64, 96, 3, padding=1, bias=False)
        self.a_bn = nn.BatchNorm2d(96)
        self.b = nn.Conv2d(96, 64, 3, padding=1, bias=False)
        self.b_bn = nn.BatchNorm2d(64)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        x = torch.relu(self.stem_bn(self.stem(x)))
        x = torch.relu(x + self.b_bn(self.b(torch.relu(self.a_bn(self.a(x))))))
        return self.head(x.mean((2, 3)))

def tiny(num_classes=10):
    return Tiny(num_classes)
"""


MEASURED = [
    "--model", "tiny_user_net:tiny", "--table", "table.jsonl", "--calibration-networks", "6",
    "--rounds", "2", "--threads", "1",
]  # fmt: skip
COMMON = [*MEASURED, "--measure-seconds", "0.5"]
PLAN = [*COMMON, "--epochs", "0", "--target-ratio", "0.6", "--input-shape", "3", "48", "48"]
TRAIN = [
    *COMMON, "--data", "digits", "--input-shape", "3", "16", "16", "--epochs", "3",
    "--finetune-epochs", "1", "--target-ratio", "0.6", "--train-batch-size", "32",
]  # fmt: skip


def profile_into(folder: Path, size: int) -> Path:
    """Measure the network's latency table at ``size`` x ``size``, as ``PLAN`` or ``TRAIN`` would.

    Args:
        folder: gets the network and ``table.jsonl``.
    """
    (folder / "tiny_user_net.py").write_text(TINY)
    shape = ["--input-shape", "3", str(size), str(size)]
    command = [sys.executable, "-m", "dsa_hw.profile", *MEASURED, *shape]
    subprocess.run(
        command, cwd=folder, check=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
    )  # fmt: skip
    return folder / "table.jsonl"


def result_of(folder: str) -> dict:
    return json.loads(Path(folder, "result.json").read_text())
