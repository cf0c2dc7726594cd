"""TensorRT-RTX builds engines ahead of time, with no card here, from pruned networks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import Residual, randomize_norms
from onnx import TensorProto

from dsa_hw.network.coupling import find_coupling
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.network.removal import remove_channels
from dsa_hw.surgery.channels import keep_most_important
from profilers.backends.tensorrt import build as tensorrt_build
from profilers.backends.tensorrt import runtime as tensorrt_runtime
from profilers.backends.tensorrt.build import (
    EngineBuilder,
    load_tensorrt,
    supported_layers,
    timing_cache_path,
)
from profilers.backends.tensorrt.packs import Profile
from profilers.backends.tensorrt.runtime import PROFILED_RUNS, Execution, TensorRt
from profilers.errors import BackendUnavailable
from profilers.layers.models import layer_model
from profilers.layers.spec import LayerSpec
from profilers.precision import at_precision

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
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13")
    return EngineBuilder("tensorrt-rtx", precision, compute_capability=capability)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("capability", [86, 89])
def test_pruned_networks_build(pruned: bytes, precision: str, capability: int) -> None:
    built = builder(precision, capability).build(pruned)
    assert len(built) > 10_000  # an engine holds the weights; the network has 15,000 of them


@pytest.mark.parametrize("capability", [86, 89])
def test_a_network_builds_after_surgery_and_export(capability: int) -> None:
    """As ``prune`` leaves it: channels removed in PyTorch, batch-norms folded by the exporter."""
    model, x = randomize_norms(Residual()), torch.zeros(1, 3, 16, 16)
    coupling = find_coupling(model, x)
    widths = np.array([
        g.dense_width if g.frozen else max(8, g.dense_width // 2 // 8 * 8) for g in coupling.groups
    ])  # fmt: skip
    atoms = [np.arange(1.0, g.atoms + 1) for g in coupling.groups]
    small = remove_channels(model, coupling, keep_most_important(coupling, widths, atoms))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    exported = export_onnx(small, x).SerializeToString()
    assert len(builder("fp16", capability).build(exported)) > 10_000


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


def test_a_long_build_says_now_and_then_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(tensorrt_build.time, "monotonic", lambda: now[0])
    show = tensorrt_build._printing_progress()
    for step in range(1, 31):
        now[0] += 1.0
        show("Tactic Selection", step, 30)
    assert capsys.readouterr().err.splitlines() == [
        "building an engine: Tactic Selection 11/30", "building an engine: Tactic Selection 22/30",
    ]  # fmt: skip


# -- timings of tactics, kept between processes ------------------------------------------------


class Tactics:
    """TensorRT's timing cache: what was learned before and what this build adds."""

    def __init__(self, kept: bytes) -> None:
        self.kept = kept

    def serialize(self) -> bytes:
        return self.kept + b" tactic"


class TimingTensorRt(ModuleType):
    """Of TensorRT what a build needs; refuses timings of another card."""

    __version__ = "11.0.0"
    Flags = SimpleNamespace(STRONGLY_TYPED=0)
    NetworkDefinitionCreationFlag, BuilderFlag = Flags, SimpleNamespace()
    ProfilingVerbosity = SimpleNamespace(DETAILED=1)
    ILogger = type("ILogger", (), {"Severity": SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)})
    IProgressMonitor = type("IProgressMonitor", (), {})
    OnnxParser = staticmethod(lambda network, logger: SimpleNamespace(parse=lambda model: True))

    def __init__(self) -> None:
        super().__init__("tensorrt")
        self.used: list[bytes] = []

    def Builder(self, logger: object) -> SimpleNamespace:
        def accept(cache: Tactics, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            if cache.kept.startswith(b"foreign"):
                return False
            self.used.append(cache.kept)
            return True

        config = {"create_timing_cache": Tactics, "set_timing_cache": accept}
        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(),
            create_builder_config=lambda: SimpleNamespace(**config),
            build_serialized_network=lambda network, config: b"engine",
        )


@pytest.mark.parametrize(
    ("before", "used", "after"),
    [
        (None, b"", b" tactic"),
        (b"old", b"old", b"old tactic"),
        (b"foreign", b"", b" tactic"),  # started afresh rather than believed
    ],
)
def test_timings_are_kept_for_the_next_build(
    before: bytes | None, used: bytes, after: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache" / "timings.cache"
    if before is not None:
        path.parent.mkdir()
        path.write_bytes(before)
    library = TimingTensorRt()
    monkeypatch.setattr(tensorrt_build, "load_tensorrt", lambda backend: library)
    make = EngineBuilder("tensorrt", "fp32", timing_cache=path)
    assert make.build(layer_model(CONV, 8, 8)) == b"engine"
    assert library.used == [used]
    assert path.read_bytes() == after
    assert list(path.parent.iterdir()) == [path]
    make.build(layer_model(CONV, 8, 8))
    assert library.used[1] == after


def test_timings_are_of_one_card_driver_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    card: dict[str, str | int] = {"device": "A (sm_86)", "driver": "580.1", "uuid_sha256": "0"}
    path = timing_cache_path("tensorrt", "10.13", card)
    assert path.parent == Path("/cache/dsa_hw")
    assert timing_cache_path("tensorrt", "10.13", card | {"uuid_sha256": "1"}) == path
    others = {
        timing_cache_path("tensorrt", "11.0", card),
        timing_cache_path("tensorrt", "10.13", card | {"driver": "590.1"}),
        timing_cache_path("tensorrt", "10.13", card | {"device": "B (sm_89)"}),
    }
    assert len(others | {path}) == 4


# -- running an engine, on a card of formulas --------------------------------------------------

RUNTIME_NAMES = {
    "ICudaEngine": ("create_engine_inspector", "create_execution_context", "create_runtime_config",
                    "get_tensor_dtype", "get_tensor_mode", "get_tensor_name", "get_tensor_shape",
                    "num_io_tensors"),
    "IExecutionContext": ("execute_async_v3", "is_stream_capturable", "profiler",
                          "set_tensor_address"),
    "IRuntimeConfig": ("create_runtime_cache", "set_runtime_cache"),
    "IRuntimeCache": ("deserialize", "serialize"),
    "EngineInspector": ("get_engine_information",),
    "LayerInformationFormat": ("JSON",),
    "TensorIOMode": ("INPUT",),
    "Runtime": ("deserialize_cuda_engine",),
}  # fmt: skip


@pytest.mark.parametrize(("owner", "names"), RUNTIME_NAMES.items())
def test_the_runtime_has_what_is_called(owner: str, names: tuple[str, ...]) -> None:
    """A card is needed to load an engine; the real library's names are there without one."""
    library = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13")
    assert [name for name in names if not hasattr(getattr(library, owner), name)] == []


class EngineContext:
    """An engine and its context: two layers, the second of which is a fused one."""

    num_io_tensors = 2

    def __init__(self, starts: bool = True, capturable: bool = True) -> None:
        self.starts, self.capturable = starts, capturable
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []
        self.profiler: Any = None

    def create_execution_context(self) -> EngineContext:
        return self

    def create_engine_inspector(self) -> SimpleNamespace:
        layers = [{"Name": "conv", "Metadata": "[ONNX Layer: node_conv]"}, {"Name": "fused"}]
        return SimpleNamespace(
            get_engine_information=lambda form: json.dumps({"Layers": [*layers, "a name only"]})
        )

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name == "x" else "output"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (1, 3, 4, 4)

    def get_tensor_dtype(self, name: str) -> str:
        return "half"

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def is_stream_capturable(self, stream: int) -> bool:
        return self.capturable

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        if self.profiler is not None:
            self.profiler.report_layer_time("conv", 0.5 * len(self.streams))
            self.profiler.report_layer_time("fused", 1.0)
        return self.starts


def execution(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Execution:
    def on_host(shape: Any, dtype: torch.dtype) -> torch.Tensor:
        assert dtype == torch.float16
        return torch.zeros(tuple(shape), dtype=dtype)

    monkeypatch.setattr(tensorrt_runtime, "_buffer", on_host)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    library = SimpleNamespace(
        TensorIOMode=SimpleNamespace(INPUT="input"), IProfiler=type("IProfiler", (), {}),
        LayerInformationFormat=SimpleNamespace(JSON="json"),
        float32="float", float16="half", int8="int8", int32="int32", int64="int64",
    )  # fmt: skip
    stream: Any = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    return Execution(library, engine, stream)


def test_an_engine_runs_on_its_stream_from_buffers_that_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = EngineContext()
    ready = execution(engine, monkeypatch)
    ready.check_capturable()
    ready.run()
    assert engine.streams == [7]
    (x,), (y,) = ready.inputs, ready.outputs
    assert engine.addresses == {"x": x.data_ptr(), "y": y.data_ptr()}
    assert float(x.abs().sum()) > 0  # zeros would be too easy on the card's power


def test_each_profiled_run_is_told_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineContext()
    ready = execution(engine, monkeypatch)
    runs = ready.profiled(3)
    first = tensorrt_runtime.WARMUP_RUNS + 1
    assert [r["conv"] for r in runs] == [0.5 * (first + i) for i in range(3)]
    assert [r["fused"] for r in runs] == [1.0] * 3
    assert ready.metadata() == {"conv": "[ONNX Layer: node_conv]", "fused": ""}


def test_an_engine_that_does_not_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="could not start a run"):
        execution(EngineContext(starts=False), monkeypatch).run()
    with pytest.raises(BackendUnavailable, match="cannot be a CUDA graph"):
        execution(EngineContext(capturable=False), monkeypatch).check_capturable()
    no_memory = EngineContext()
    no_memory.create_execution_context = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(BackendUnavailable, match="too little memory"):
        execution(no_memory, monkeypatch)


def test_a_network_s_layer_times_have_the_names_of_its_graph(graph: DeployedGraph) -> None:
    model = graph.resized(graph.dense_widths)
    layers = supported_layers(model)
    runs = [{f"{layers[0]} + relu": 1.0, "Reformatting CopyNode for Input Tensor 0 to x": 0.25},
            {f"{layers[0]} + relu": 2.0, "unknown": 0.5}]  # fmt: skip
    runs = runs * (PROFILED_RUNS // 2)
    runtime: Any = object.__new__(TensorRt)
    runtime._profile = lambda content, count, layer: Profile(runs, {})
    found = runtime.layer_times(model)
    assert found.by_node == {layers[0]: pytest.approx(1.5)}
    assert found.reformat_ms == pytest.approx(0.125)
    assert found.other_ms == {"unknown": pytest.approx(0.25)}


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
    with pytest.raises(BackendUnavailable, match=r"pip install tensorrt "):
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
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    weight = weights["weight"]
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
