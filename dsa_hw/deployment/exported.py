"""The exported network: checked against PyTorch, and the shapes of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from dsa_hw.errors import UserError
from dsa_hw.network.agreement import AGREEMENT, disagreement, random_batches
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.forward import arguments_of, output_tensors
from profilers.backends import Backend
from profilers.layers.kinds.registry import LAYER_KINDS


def export_checked(model: nn.Module, example_inputs: Tensor, path: Path, backend: Backend) -> float:
    """Write ``model`` as ONNX and compare the runtime with PyTorch, at the first output.

    Args:
        example_inputs: (N, C, H, W).

    Returns:
        The largest absolute difference of the outputs on random inputs, over their standard
        deviation.

    Raises:
        UserError: they differ by more than ``AGREEMENT`` of it: what was exported is not the
            network. At int8 there is no limit: the scales are placeholders until calibrated.
    """
    exported = export_onnx(model, example_inputs)
    partial = path.with_name(f".{path.name}.new")
    onnx.save(exported, partial)
    batches = random_batches(example_inputs.float())
    expected = [output_tensors(model, batch)[0].float() for batch in batches]
    numbers = [arguments_of(batch)[0].cpu().numpy() for batch in batches]
    got = [torch.from_numpy(backend.outputs(partial, batch)) for batch in numbers]
    difference = disagreement(expected, got)
    limit = _agreement(backend.provenance())
    if limit is not None and not difference <= limit:
        raise UserError(
            f"the exported network does not compute what PyTorch computes: outputs differ by "
            f"{difference:.3g} standard deviations of them ({path})"
        )
    partial.replace(path)
    return difference


def _agreement(provenance: Mapping[str, str | int]) -> float | None:
    precision = str(provenance["precision"])
    on_cuda = provenance["driver"] != "none"
    return AGREEMENT.get("fp16" if precision == "fp32" and on_cuda else precision)


def conv_shapes(model: onnx.ModelProto) -> list[tuple[int, ...]]:
    """Shapes of the weights of all layers, sorted."""
    shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
    nodes = [n for n in model.graph.node if LAYER_KINDS.of_operator(n.op_type) is not None]
    return sorted(shapes[n.input[1]] for n in nodes)
