"""Shared parts of the suite: small networks, and a device that exists nowhere."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.onnx._internal.exporter import _registration
from whole_way import TINY, profile_into

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


_PAINT = Figure.savefig
_EMPTY = '<svg viewBox="0 0 1 1"></svg>'


def pytest_configure() -> None:
    """What every test would pay for again: once.

    The exporter reads the sources of its 500 operators at each export, half of an export of a small
    network. And laying out and painting figures takes four fifths of a report: most tests read its
    words, and those that look at figures ask for ``painted``.
    """
    registry = _registration.ONNXRegistry
    registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))  # pyright: ignore
    Figure.savefig = _unpainted  # pyright: ignore


def _unpainted(self: Figure, fname: Any, **_: Any) -> None:
    if isinstance(fname, io.StringIO):
        fname.write(_EMPTY)
    else:
        _PAINT(self, fname)


@contextmanager
def painting() -> Iterator[None]:
    """Figures are painted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", _PAINT)
        yield


@pytest.fixture(scope="module")
def painted() -> Iterator[None]:
    """Figures are painted, for all tests of a file."""
    with painting():
        yield


class Residual(nn.Module):
    """Two residual blocks on one stream, a stride, a depthwise convolution, a linear head."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.a1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.a1bn = nn.BatchNorm2d(2 * width)
        self.a2 = nn.Conv2d(2 * width, width, 1, bias=False)
        self.a2bn = nn.BatchNorm2d(width)
        self.dw = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.dwbn = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        y = torch.relu(self.a1bn(self.a1(x)))
        x = torch.relu(x + self.a2bn(self.a2(y)))
        x = torch.relu(x + self.dwbn(self.dw(x)))
        x = torch.relu(self.down(x))
        return self.head(x.mean((2, 3)))


def randomize_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch-norms as if trained: no two channels alike, statistics far from (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.2, 2.0),
                (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
            ):
                assert isinstance(tensor, Tensor)
                tensor.copy_(torch.empty_like(tensor).uniform_(low, high, generator=generator))
    return model


@pytest.fixture
def residual() -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(Residual())


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _own_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory) -> None:
    """Tables that a test measures without saying where are none of the user's."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.getbasetemp() / "data"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def small_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measured table of the user's network for ``whole_way.TRAIN``; copy it."""
    return profile_into(tmp_path_factory.mktemp("small"), 16)


@pytest.fixture(scope="session")
def large_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for ``whole_way.PLAN``."""
    return profile_into(tmp_path_factory.mktemp("large"), 48)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's own network in it."""
    (tmp_path / "tiny_user_net.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path
