"""A PyTorch network as ONNX, the way it is deployed."""

from __future__ import annotations

import copy
import logging
import warnings

import onnx
import torch
from torch import nn

from dsa_hw.errors import UnsupportedModel
from dsa_hw.network.branches.onnx import drop_repeated_activations


def export_onnx(model: nn.Module, example_inputs: torch.Tensor) -> onnx.ModelProto:
    """ONNX graph of ``model`` in evaluation mode, batch-norms folded, fixed batch size.

    Args:
        example_inputs: (N, C, H, W); N is the deployed batch size.

    Raises:
        UnsupportedModel: PyTorch cannot export it.
    """
    # A copy, so that training's device and memory format leave no trace in the graph.
    plain = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).eval()  # pyright: ignore
    example = example_inputs.detach().cpu().contiguous()
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            program = torch.onnx.export(
                plain,
                (example,),
                dynamo=True,
                optimize=True,
                verbose=False,
                input_names=["input"],
                output_names=["output"],
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be exported to ONNX ({type(error).__name__}: {reason})"
        ) from error
    assert program is not None
    exported = program.model_proto
    for node in exported.graph.node:
        del node.metadata_props[:]  # stack traces, with paths of this machine
        node.doc_string = ""
    del exported.graph.value_info[:]
    drop_repeated_activations(exported.graph)
    return exported
