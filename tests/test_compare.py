"""Comparisons: every method comes to the target, and a sweep does each run once."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from fake_device import FakeDevice
from filelock import FileLock
from torch import Tensor, nn

from dsa_hw import compare
from dsa_hw.baselines import find_method
from dsa_hw.baselines.halp import choose
from dsa_hw.baselines.mdp import WidthProgram, kept_values
from dsa_hw.baselines.netadapt import shrunken
from dsa_hw.baselines.torch_pruning import copy_with_gradients
from dsa_hw.cli import parse
from dsa_hw.comparison import sweep
from dsa_hw.comparison.cells import plan
from dsa_hw.config import CompareConfig

METHODS = ("dsa-latency", "dsa-flops", "uniform", "magnitude", "taylor", "halp", "mdp", "netadapt")


class FakeRuntime(FakeDevice):
    """The fake device's times, with real outputs."""

    def outputs(self, model: bytes | Path, inputs: np.ndarray) -> np.ndarray:
        source = model if isinstance(model, bytes) else str(model)
        session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"input": inputs})[0])


class Small(nn.Module):
    """A stem, a residual block with a depthwise convolution, a head."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3, stride=2, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(48)
        self.a = nn.Conv2d(48, 64, 1, bias=False)
        self.a_bn = nn.BatchNorm2d(64)
        self.dw = nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False)
        self.dw_bn = nn.BatchNorm2d(64)
        self.b = nn.Conv2d(64, 48, 3, padding=1, bias=False)
        self.b_bn = nn.BatchNorm2d(48)
        self.head = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_bn(self.stem(x)))
        y = torch.relu(self.a_bn(self.a(x)))
        y = torch.relu(self.dw_bn(self.dw(y)))
        x = torch.relu(x + self.b_bn(self.b(y)))
        return self.head(x.mean((2, 3)))


def small(num_classes: int = 10) -> nn.Module:
    """As ``--model test_compare:small``."""
    return Small(num_classes)


def arguments(out: Path) -> list[str]:
    return [
        "--model", "test_compare:small", "--data", "digits", "--input-shape", "3", "16", "16",
        "--train-size", "256", "--test-size", "128", "--train-batch-size", "32", "--epochs", "3",
        "--finetune-epochs", "1", "--calibration-networks", "8", "--rounds", "2", "--lr", "0.05",
        "--table", str(out.parent / "fake.jsonl"), "--target-ratios", "0.6", "--seeds", "0",
        "--out", str(out),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished sweep of all methods on the fake device."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "configured_backend", lambda config: FakeRuntime())
        out = tmp_path_factory.mktemp("compare") / "sweep"
        assert compare.main(arguments(out)) == 0
        import shutil

        shutil.rmtree("/tmp/cmp_sweep", ignore_errors=True)
        shutil.copytree(out, "/tmp/cmp_sweep")
        yield out


def test_every_method_ends_at_the_target(swept: Path) -> None:
    result = json.loads((swept / "result.json").read_text())
    assert [c["method"] for c in result["cells"]] == list(METHODS)
    print(
        [
            (c["method"], c["ratio"], c["accuracy"], c["minutes"] * 60, c["infeasible"])
            for c in result["cells"]
        ]
    )
