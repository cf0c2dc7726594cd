"""A PyTorch network as ONNX, the way it is deployed."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator

import onnx
import torch
from torch import nn

from dsa_hw.errors import UnsupportedModel
from dsa_hw.network.branches.onnx import drop_repeated_activations
from dsa_hw.network.forward import Inputs, arguments_of
from dsa_hw.network.onnx_forms import linear_as_gemm

LONGEST = 200
"""Characters of another library's message."""


def captured(
    model: nn.Module, example_inputs: Inputs, training: bool = False
) -> torch.export.ExportedProgram:
    """The operations that ``model`` does on ``example_inputs``.

    Args:
        training: in training mode; else in evaluation mode.

    Raises:
        UnsupportedModel: it cannot be traced.
    """
    was_training = model.training
    model.train(training)
    try:
        with warnings.catch_warnings(), _silence():
            warnings.simplefilter("ignore")
            return torch.export.export(model, arguments_of(example_inputs), strict=False)
    except Exception as error:  # whatever the model's own code does when it is traced
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be traced ({_cause(error)}); exclude does not help "
            "here: what depends on the values of data (a detector's selection of boxes) has to be "
            "outside of the network that is pruned"
        ) from error
    finally:
        model.train(was_training)


def export_onnx(
    model: nn.Module,
    example_inputs: Inputs,
    program: torch.export.ExportedProgram | None = None,
) -> onnx.ModelProto:
    """ONNX graph of ``model`` in evaluation mode, batch-norms folded, fixed batch size.

    Args:
        example_inputs: (N, C, H, W), or a tensor for each argument; N is the deployed batch size.
            A single input is called ``input``, and a single output ``output``.
        program: its trace on the CPU, where there is one (``captured``).

    Raises:
        UnsupportedModel: PyTorch cannot export it.
    """
    plain = model
    if program is None:  # a copy: training's device and memory format leave no trace in the graph
        plain = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).eval()  # pyright: ignore
    given = arguments_of(example_inputs)
    arguments = tuple(one.detach().cpu().contiguous() for one in given)
    try:
        with warnings.catch_warnings(), _silence():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            made = torch.onnx.export(
                plain if program is None else program,
                arguments,
                dynamo=True,
                optimize=True,
                verbose=False,
                input_names=["input"] if len(arguments) == 1 else None,
            )
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be exported to ONNX ({_cause(error)})"
        ) from error
    assert made is not None
    _name_single_output(made.model_proto.graph)
    exported = onnx.shape_inference.infer_shapes(made.model_proto, data_prop=True)
    linear_as_gemm(exported, plain)
    for node in exported.graph.node:
        del node.metadata_props[:]  # stack traces, with paths of this machine
        node.doc_string = ""
    del exported.graph.value_info[:]
    drop_repeated_activations(exported.graph)
    return exported


def _name_single_output(graph: onnx.GraphProto) -> None:
    if len(graph.output) != 1 or graph.output[0].name == "output":
        return
    old = graph.output[0].name
    for node in graph.node:
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                names[at] = "output" if name == old else name
    graph.output[0].name = "output"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what the exporters print: whole graphs, where something is wrong. It is raised."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(before)


def _cause(error: BaseException) -> str:
    """The first line of what began it, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next(iter(str(error).strip().splitlines()), "")
    plain = re.sub(f"{chr(27)}{re.escape('[')}[0-9;]*m", "", line)
    return f"{type(error).__name__}: {plain[:LONGEST]}"
