"""A deployed ONNX graph as a PyTorch module: the operators that pruned networks are made of.

Only static shapes, and only what this project exports: an operator that is not here is an error
by its name. (onnx2torch, which does more, has had no release since 2024.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn

from profilers.errors import BackendUnavailable

Attributes = dict[str, Any]
Values = Sequence[Any]
"""A node's inputs: tensors, lists of integers (shapes, axes), None where one is left out."""


class OnnxModule(nn.Module):
    """Runs an ONNX graph.

    Args:
        model: batch-norms folded or not; every input of a fixed shape.
        dtype: of all floating-point weights.
        device: where they lie.
        channels_last: memory format of the convolutions' weights.

    Raises:
        BackendUnavailable: an operator that this module does not know.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        graph = model.graph
        unknown = sorted({n.op_type for n in graph.node} - set(OPERATORS))
        if unknown:
            raise BackendUnavailable(
                f"the torch backend does not know the ONNX operators {', '.join(unknown)}; "
                "use --backend onnxruntime or tensorrt"
            )
        self.input_shapes = {
            i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in graph.input
        }
        self._outputs = [o.name for o in graph.output]
        self._constants: dict[str, Tensor | list[int]] = {}
        for tensor in graph.initializer:
            self._add(tensor.name, tensor, dtype, device, channels_last)
        self._steps: list[tuple[Callable[..., Tensor], list[str], str, Attributes]] = []
        for node in graph.node:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Constant":
                self._add(node.output[0], attributes["value"], dtype, device, channels_last)
                continue
            step = (OPERATORS[node.op_type], list(node.input), node.output[0], attributes)
            self._steps.append(step)

    def forward(self, *inputs: Tensor) -> Tensor:
        """First output, from the inputs in the graph's order."""
        values: dict[str, Any] = dict(self._constants)
        values.update(zip(self.input_shapes, inputs, strict=True))
        for function, names, result, attributes in self._steps:
            arguments = [values[name] if name else None for name in names]
            values[result] = function(arguments, attributes)
        return values[self._outputs[0]]

    def _add(
        self,
        name: str,
        proto: onnx.TensorProto,
        dtype: torch.dtype,
        device: torch.device | str,
        channels_last: bool,
    ) -> None:
        found = numpy_helper.to_array(proto)
        if not np.issubdtype(found.dtype, np.floating):  # shapes and axes: numbers of the host
            self._constants[name] = [int(n) for n in found.reshape(-1)]
            return
        value = torch.from_numpy(found.copy()).to(device, dtype)
        if value.dim() == 4 and channels_last:
            value = value.contiguous(memory_format=torch.channels_last)
        self._constants[name] = value


def _conv(values: Values, at: Attributes) -> Tensor:
    x, pads = _padded(values[0], at)
    bias = values[2] if len(values) > 2 else None
    return F.conv2d(
        x, values[1], bias, at.get("strides", 1), pads, at.get("dilations", 1), at.get("group", 1)
    )


def _padded(x: Tensor, at: Attributes, value: float = 0.0) -> tuple[Tensor, list[int]]:
    """The input and symmetric pads; other pads are applied to the input here."""
    pads = list(at.get("pads", (0, 0, 0, 0)))
    if pads[:2] == pads[2:]:
        return x, pads[:2]
    top, left, bottom, right = pads
    return F.pad(x, (left, right, top, bottom), value=value), [0, 0]


def _gemm(values: Values, at: Attributes) -> Tensor:
    weight = values[1] if at.get("transB", 0) else values[1].t()
    return F.linear(values[0], weight, values[2] if len(values) > 2 else None)


def _clip(values: Values, at: Attributes) -> Tensor:
    low, high = ([*values[1:], None, None])[:2]
    if low is None and high is None:
        return values[0]
    return torch.clamp(values[0], low, high)


def _max_pool(values: Values, at: Attributes) -> Tensor:
    x, pads = _padded(values[0], at, float("-inf"))
    return F.max_pool2d(
        x, at["kernel_shape"], at.get("strides", 1), pads, at.get("dilations", 1),
        bool(at.get("ceil_mode", 0)),
    )  # fmt: skip


def _average_pool(values: Values, at: Attributes) -> Tensor:
    pads = list(at.get("pads", (0, 0, 0, 0)))
    if pads[:2] != pads[2:]:
        raise BackendUnavailable("the torch backend knows no AveragePool with uneven pads")
    counted = bool(at.get("count_include_pad", 0))
    return F.avg_pool2d(
        values[0], at["kernel_shape"], at.get("strides", 1), pads[:2],
        bool(at.get("ceil_mode", 0)), counted,
    )  # fmt: skip


def _reduce_mean(values: Values, at: Attributes) -> Tensor:
    axes = values[1] if len(values) > 1 else list(at["axes"])
    return values[0].mean(axes, keepdim=bool(at.get("keepdims", 1)))


def _reshape(values: Values, at: Attributes) -> Tensor:
    sizes = [values[0].shape[i] if s == 0 else s for i, s in enumerate(values[1])]
    return values[0].reshape(sizes)


def _squeeze(values: Values, at: Attributes) -> Tensor:
    return values[0].squeeze(tuple(values[1]) if len(values) > 1 else ())


def _unsqueeze(values: Values, at: Attributes) -> Tensor:
    result = values[0]
    for axis in sorted(values[1]):
        result = result.unsqueeze(axis)
    return result


def _batch_norm(values: Values, at: Attributes) -> Tensor:
    x, weight, bias, mean, variance = values
    return F.batch_norm(x, mean, variance, weight, bias, eps=at.get("epsilon", 1e-5))


def _flatten(values: Values, at: Attributes) -> Tensor:
    x, axis = values[0], at.get("axis", 1)
    return x.reshape(int(torch.Size(x.shape[:axis]).numel()), -1)


def _hard_sigmoid(values: Values, at: Attributes) -> Tensor:
    return torch.clamp(values[0] * at.get("alpha", 0.2) + at.get("beta", 0.5), 0.0, 1.0)


def _unchanged(values: Values, at: Attributes) -> Tensor:
    return values[0]


OPERATORS: dict[str, Callable[[Values, Attributes], Tensor]] = {
    "Add": lambda v, at: v[0] + v[1],
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": lambda v, at: torch.cat(list(v), at["axis"]),
    "Constant": _unchanged,
    "Conv": _conv,
    "Div": lambda v, at: v[0] / v[1],
    "Dropout": _unchanged,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda v, at: v[0].mean((2, 3), keepdim=True),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda v, at: F.hardswish(v[0]),
    "Identity": _unchanged,
    "MatMul": lambda v, at: v[0] @ v[1],
    "MaxPool": _max_pool,
    "Mul": lambda v, at: v[0] * v[1],
    "ReduceMean": _reduce_mean,
    "Relu": lambda v, at: torch.relu(v[0]),
    "Reshape": _reshape,
    "Sigmoid": lambda v, at: torch.sigmoid(v[0]),
    "Softmax": lambda v, at: torch.softmax(v[0], at.get("axis", -1)),
    "Squeeze": _squeeze,
    "Sub": lambda v, at: v[0] - v[1],
    "Unsqueeze": _unsqueeze,
}
