"""What is read off a network: its layers, their weights, what keeps its width, and why."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from conftest import Residual
from torch import nn

from dsa_hw.network.coupling import find_coupling
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.graph import DeployedGraph


class Grouped(nn.Module):
    """A plain, a grouped and a depthwise convolution, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3)
        self.wide = nn.Conv2d(24, 24, 3, groups=6)
        self.deep = nn.Conv2d(24, 24, 3, groups=24)
        self.point = nn.Conv2d(24, 40, 1)
        self.head = nn.Linear(40, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.wide(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.point(torch.relu(self.deep(x)))).mean((2, 3)))


@pytest.mark.parametrize("build", [Residual, Grouped])
def test_weights_are_counted_exactly_at_every_width(build, rng: np.random.Generator) -> None:
    """The bilinear count is the size of the resized graph's weights, far below dense too."""
    torch.manual_seed(0)
    model, x = build(), torch.randn(1, 3, 16, 16)
    coupling = find_coupling(model, x)
    graph = DeployedGraph(export_onnx(model, x), coupling)
    for _ in range(5):
        widths = [
            g.dense_width if g.frozen else g.atom_channels * int(rng.integers(1, g.atoms + 1))
            for g in coupling.groups
        ]
        resized = onnx.load_from_string(graph.resized(widths)).graph
        sizes = {i.name: int(np.prod(i.dims)) for i in resized.initializer}
        nodes = [n for n in resized.node if n.op_type in ("Conv", "Gemm")]
        counted = [layer.weights(widths) for layer in graph.layers]
        # sums of channels / width in floating point: exact but for rounding
        np.testing.assert_allclose(counted, [sizes[n.input[1]] for n in nodes], rtol=1e-12)
