"""Outputs are compared relative to their spread, on several inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import Residual
from fake_device import FakeRuntime
from onnx import numpy_helper
from torch import Tensor, nn

from dsa_hw.deployment.exported import export_checked
from dsa_hw.errors import UnsupportedModel, UserError
from dsa_hw.network.agreement import disagreement, masked_and_cut_difference, random_batches
from dsa_hw.network.forward import arguments_of, outputs_of


class Softmax(nn.Module):
    """Scores of 1,000 classes, all about 1e-3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.head(torch.relu(self.conv(x)).mean((2, 3))), 1)


class WrongWeight(FakeRuntime):
    """Computes with one weight of the last layer changed in sign."""

    def outputs(self, model: bytes | Path, inputs: np.ndarray) -> np.ndarray:
        assert isinstance(model, Path)
        loaded = onnx.load(model)
        tensor = next(t for t in loaded.graph.initializer if tuple(t.dims) == (1000, 16))
        value = numpy_helper.to_array(tensor).copy()
        value[3, 5] *= -1.0
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        return super().outputs(loaded.SerializeToString(), inputs)


def test_a_wrong_weight_is_refused_though_outputs_are_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, example = Softmax().eval(), torch.zeros(1, 3, 8, 8)
    assert export_checked(model, example, tmp_path / "right.onnx", FakeRuntime()) <= 1e-4
    with pytest.raises(UserError, match="standard deviations"):
        export_checked(model, example, tmp_path / "wrong.onnx", WrongWeight())
    assert not (tmp_path / "wrong.onnx").exists()


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_at_least_four_inputs_are_compared(batch: int) -> None:
    batches = random_batches(torch.zeros(batch, 3, 4, 4))
    inputs = torch.cat([one for batch in batches for one in arguments_of(batch)])
    assert len(inputs) >= 4
    assert len(torch.unique(inputs.flatten(1), dim=0)) == len(inputs)
    assert len(inputs) == batch * len(batches)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_disagreement_does_not_depend_on_the_outputs_unit(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(4, 10, generator=generator).double()
    other = one + 0.01 * torch.randn(4, 10, generator=generator).double()
    scaled = disagreement([factor * one + 3 * factor], [factor * other + 3 * factor])
    assert scaled == pytest.approx(disagreement([one], [other]), rel=1e-9)  # rounding of the shift


def test_a_cut_that_is_not_the_mask_is_an_error() -> None:
    torch.manual_seed(0)
    model = Residual()
    outputs = [outputs_of(model, x) for x in random_batches(torch.zeros(1, 3, 16, 16))]
    assert masked_and_cut_difference(outputs, [o + 1e-6 for o in outputs]) == pytest.approx(
        1e-6, rel=0.5
    )  # float32
    with pytest.raises(UnsupportedModel, match="--exclude"):
        masked_and_cut_difference(outputs, [o.roll(1, 1) for o in outputs])


def test_a_network_that_diverged_is_not_blamed_on_the_cut() -> None:
    outputs = [torch.full((1, 4), float("nan"))]
    with pytest.raises(UserError, match="diverged"):
        masked_and_cut_difference(outputs, outputs)
