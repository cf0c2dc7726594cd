"""TensorRT-RTX builds engines ahead of time, with no card here, from pruned networks."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import Residual, randomize_norms
from onnx import TensorProto

from dsa_hw.coupling import find_coupling
from dsa_hw.deployed import DeployedGraph, export_onnx
from profilers.backends.tensorrt_build import EngineBuilder, load_tensorrt, supported_layers
from profilers.errors import BackendUnavailable
from profilers.onnx_layers import layer_model
from profilers.precision import at_precision
from profilers.spec import LayerSpec

CONV = LayerSpec.parse("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 14x14 b1 fp32 +relu")


@pytest.fixture(scope="module")
def graph() -> DeployedGraph:
    model, x = randomize_norms(Residual()), torch.zeros(1, 3, 16, 16)
    return DeployedGraph(export_onnx(model, x), find_coupling(model, x))


@pytest.fixture(scope="module")
def pruned(graph: DeployedGraph) -> bytes:
    """The network at about half of its widths."""
    widths = [
        g.dense_width if g.frozen else max(8, g.dense_width // 2 // 8 * 8)
        for g in graph.coupling.groups
    ]
    assert tuple(widths) != graph.dense_widths
    return graph.resized(widths)


def builder(precision: str, capability: int) -> EngineBuilder:
    pytest.importorskip("tensorrt_rtx", reason="pip install dsa-hw[tensorrt-rtx]")
    return EngineBuilder("tensorrt-rtx", precision, compute_capability=capability)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("capability", [86, 89])
def test_pruned_networks_build(pruned: bytes, precision: str, capability: int) -> None:
    built = builder(precision, capability).build(pruned)
    assert len(built) > 10_000  # an engine holds the weights; the network has 15,000 of them


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_single_layers_build_with_free_layouts(precision: str) -> None:
    make = builder(precision, 86)
    assert make.build(layer_model(CONV, 32, 48), layer=True)
    gemm = LayerSpec.parse("gemm k1x1 s1x1 p0.0.0.0 d1x1 gdense 1x1 b1 fp32")
    assert make.build(layer_model(gemm, 64, 32), layer=True)


def test_the_builder_tells_of_its_progress(pruned: bytes) -> None:
    pytest.importorskip("tensorrt_rtx")
    seen: list[tuple[str, int, int]] = []
    make = EngineBuilder("tensorrt-rtx", "fp16", compute_capability=86,
                         on_progress=lambda *step: seen.append(step))  # fmt: skip
    make.build(pruned)
    assert all(0 < done <= planned for _, done, planned in seen)
    assert seen


def test_a_refused_model_is_told_with_tensorrts_reason() -> None:
    node = onnx.helper.make_node("NoSuchOperator", ["input"], ["output"], domain="nowhere")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "g", [info("input", TensorProto.FLOAT, (1, 4))],
        [info("output", TensorProto.FLOAT, (1, 4))],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("nowhere", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 9
    with pytest.raises(BackendUnavailable, match="NoSuchOperator"):
        builder("fp32", 86).build(model.SerializeToString())


def test_an_unknown_card_is_named_with_those_that_are_known() -> None:
    with pytest.raises(BackendUnavailable, match=r"cannot build for sm_50; it builds for .*SM86"):
        builder("fp32", 50)


def test_missing_libraries_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailable, match=r"pip install dsa-hw\[tensorrt\]"):
        load_tensorrt("tensorrt")


def test_type_stubs_alone_are_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(BackendUnavailable, match="tensorrt is not installed"):
        load_tensorrt("tensorrt")


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(Builder=object, __version__="8.6.1")
    monkeypatch.setitem(sys.modules, "tensorrt", old)  # pyright: ignore[reportArgumentType]
    with pytest.raises(BackendUnavailable, match=r"8\.6\.1 is too old; 10\.0"):
        load_tensorrt("tensorrt")


# -- precision -------------------------------------------------------------------------------


def float_types(model: bytes) -> set[int]:
    loaded = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
    values = [*loaded.graph.input, *loaded.graph.output, *loaded.graph.value_info]
    return {v.type.tensor_type.elem_type for v in values}


def test_fp16_is_in_the_types(pruned: bytes) -> None:
    assert float_types(at_precision(pruned, "fp16")) == {TensorProto.FLOAT16}
    assert at_precision(pruned, "fp32") == pruned


def test_int8_surrounds_every_layer_with_pairs(pruned: bytes) -> None:
    loaded = onnx.load_from_string(at_precision(pruned, "int8"))
    onnx.checker.check_model(loaded, full_check=True)
    makers = {name: n.op_type for n in loaded.graph.node for name in n.output}
    layers = [n for n in loaded.graph.node if n.op_type in ("Conv", "Gemm")]
    assert len(layers) == len(supported_layers(pruned))
    for node in layers:
        assert [makers[name] for name in node.input[:2]] == ["DequantizeLinear"] * 2
    again = at_precision(loaded.SerializeToString(), "int8")
    assert again == loaded.SerializeToString()  # a quantized model stays as it is


def test_int8_weights_are_within_half_a_level() -> None:
    model = onnx.load_from_string(layer_model(CONV, 16, 24))
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0])
    quantized = onnx.load_from_string(at_precision(model.SerializeToString(), "int8"))
    found = {i.name: onnx.numpy_helper.to_array(i) for i in quantized.graph.initializer}
    scale = found["weight@scale"].astype(np.float32)
    back = found["weight"].astype(np.float32) * scale[:, None, None, None]
    # half a level, and float16's rounding of the scale (2^-11 relative, over up to 127 levels)
    limit = (0.5 + 127 * 2**-11) * scale[:, None, None, None]
    assert np.all(np.abs(back - weight) <= limit)


def test_an_unknown_precision_is_refused(pruned: bytes) -> None:
    with pytest.raises(BackendUnavailable, match="fp17"):
        at_precision(pruned, "fp17")
