"""What a deployed graph consists of: layers, operations, and what widths make of their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from profilers.layers.spec import LayerSpec

Widths = Sequence[int] | Sequence[float] | np.ndarray
"""(groups,) channels of every group."""

FREE_OPS = ("Constant", "Shape", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity",
            "Dropout")  # fmt: skip
KINDS = {
    "MaxPool": "pool", "AveragePool": "pool", "GlobalAveragePool": "reduce",
    "GlobalMaxPool": "reduce", "ReduceMean": "reduce", "ReduceMax": "reduce",
    "ReduceSum": "reduce", "Concat": "concat", "BatchNormalization": "batchnorm",
    "InstanceNormalization": "instancenorm", "GroupNormalization": "groupnorm",
    "LayerNormalization": "layernorm", "Softmax": "softmax", "MatMul": "matmul",
    "Transpose": "transpose", "DepthToSpace": "transpose", "SpaceToDepth": "transpose",
    "Resize": "resize", "Split": "split", "Slice": "split", "Gather": "split", "Pad": "pad",
    "Expand": "expand", "Add": "add", "Sub": "add", "Mul": "mul", "Div": "mul",
    "Relu": "activation", "Clip": "activation", "Sigmoid": "activation", "HardSwish": "activation",
    "HardSigmoid": "activation", "Gelu": "activation", "Erf": "activation", "Tanh": "activation",
    "LeakyRelu": "activation", "Elu": "activation", "Softplus": "activation", "Mish": "activation",
    "PRelu": "activation",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Linear:
    """A quantity that is linear in the widths: ``coefficients @ widths + constant``."""

    coefficients: np.ndarray
    constant: float

    def __call__(self, widths: Widths) -> float:
        return float(self.coefficients @ np.asarray(widths, float) + self.constant)

    def scaled(self, factor: float) -> Linear:
        """The quantity times ``factor``."""
        return Linear(self.coefficients * factor, self.constant * factor)


@dataclass(frozen=True, slots=True)
class WeightCount:
    """How many weights a layer has: ``taps * cin(widths) * cout(widths)``, exactly.

    Args:
        taps: weights of one input channel in one output channel.
        cin: input channels that every output channel reads; None where that number does not
            depend on the widths (depthwise and grouped layers: it is part of ``taps``).
        cout: output channels.
    """

    taps: float
    cin: Linear | None
    cout: Linear

    def __call__(self, widths: Widths) -> float:
        ins = 1.0 if self.cin is None else self.cin(widths)
        return self.taps * ins * self.cout(widths)


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that has weights and a row of the table: its cost is ``T_spec(cin, cout)``."""

    name: str
    spec: LayerSpec
    cin: Linear
    cout: Linear

    @property
    def weights(self) -> WeightCount:
        """The layer's weights, without its bias: bilinear in its channels."""
        taps = float(np.prod(self.spec.kernel))
        if self.spec.tied:
            return WeightCount(taps * self.spec.group_width, None, self.cout)
        return WeightCount(taps, self.cin, self.cout)


@dataclass(frozen=True, slots=True)
class Operation:
    """What costs time beside the layers, in proportion to the elements it moves."""

    kind: str
    elements: Linear


def add_linear(sums: dict[str, Linear], kind: str, value: Linear) -> None:
    if kind in sums:
        old = sums[kind]
        value = Linear(old.coefficients + value.coefficients, old.constant + value.constant)
    sums[kind] = value
