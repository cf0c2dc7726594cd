"""TensorRT and TensorRT-RTX: engines timed as CUDA graphs, on buffers that stay on the device."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from profilers.backends.tensorrt.build import (
    EngineBuilder,
    load_tensorrt,
    supported_layers,
    timing_cache_path,
)
from profilers.backends.tensorrt.names import LayerTimes, attribute, node_names
from profilers.backends.tensorrt.packs import PackTimer, Profile
from profilers.cards.cuda_clock import (
    LAYER_REPEATS,
    DeviceRunner,
    EventClock,
    captured,
    on_host,
    with_copies,
)
from profilers.cards.cuda_device import (
    check_cuda,
    cuda_index,
    device_provenance,
    runtime_provenance,
)
from profilers.errors import BackendUnavailable
from profilers.timing import Round, Runner, SamplePlan
from profilers.workers.model_files import model_key

if TYPE_CHECKING:
    import tensorrt

PROFILED_RUNS = 20
WARMUP_RUNS = 5
VECTOR = 32
"""The widest channel vector of a TensorRT layout: buffers are padded to it."""


class TensorRt:
    """TensorRT 10 or 11 (``tensorrt``) or TensorRT-RTX (``tensorrt-rtx``) on a CUDA device.

    Engines of a session are kept in a temporary folder, so that a model's next round only loads
    its engine; tactic timings are kept in the user's cache, keyed by card, driver and version.

    Raises:
        BackendUnavailable: not installed, or no such device.
    """

    layers_pay_call = False

    def __init__(
        self,
        device: str = "cuda:0",
        backend: str = "tensorrt",
        precision: str = "fp16",
        batch_size: int = 1,
        include_copies: bool = False,
    ) -> None:
        check_cuda(device)
        self.name = backend
        self.batch_size, self.precision = batch_size, precision
        self._index = cuda_index(device)
        self._include_copies = include_copies
        torch.cuda.set_device(self._index)
        torch.cuda.init()
        # TensorRT-RTX times nothing while it builds.
        cache = self._timing_cache() if backend == "tensorrt" else None
        self._builder = EngineBuilder(backend, precision, cache)
        self._trt = self._builder.trt
        self._runtime = self._trt.Runtime(self._builder.logger)
        self._stream = torch.cuda.Stream()
        self._folder = tempfile.TemporaryDirectory(prefix="dsa_hw_engines_")
        self._kernels = KernelCache() if backend == "tensorrt-rtx" else None
        self._packs = PackTimer(self._profile, self._layer_ms, batch_size)

    def notes(self) -> tuple[str, ...]:
        """Nothing to say of the choice."""
        return ()

    def observations(self) -> tuple[str, ...]:
        """Nothing is watched here; see ``isolated``."""
        return ()

    def provenance(self) -> dict[str, str | int]:
        """What a measurement here depends on."""
        return runtime_provenance(
            self._index, runtime=self.name, version=self._trt.__version__, provider="CUDA graphs",
            precision=self.precision, batch_size=self.batch_size,
            include_copies=self._include_copies,
        )  # fmt: skip

    @contextmanager
    def open(self, model: bytes | Path) -> Iterator[Runner]:
        """The whole model, its inputs ready on the device, as a CUDA graph."""
        execution = self._execution(model, layer=False)
        execution.check_capturable()
        run = execution.run
        if self._include_copies:
            run = with_copies(run, on_host(execution.inputs), on_host(execution.outputs))
        yield DeviceRunner(captured(run, self._stream), EventClock(self._stream))

    @contextmanager
    def open_layer(self, model: bytes) -> Iterator[Runner]:
        """One layer, several times in a row in one graph, in the layout that suits it."""
        execution = self._execution(model, layer=True)
        execution.check_capturable()
        replay = captured(execution.run, self._stream, LAYER_REPEATS)
        yield DeviceRunner(replay, EventClock(self._stream), LAYER_REPEATS)

    def outputs(self, model: bytes | Path, inputs: np.ndarray) -> np.ndarray:
        """First output of the model on ``inputs`` (N, C, H, W)."""
        execution = self._execution(model, layer=False)
        with torch.cuda.stream(self._stream):
            first = execution.inputs[0]
            first.copy_(torch.from_numpy(inputs).to(first.dtype))
            execution.run()
        self._stream.synchronize()
        return execution.outputs[0].float().cpu().numpy()

    def layer_times(self, model: bytes | Path) -> LayerTimes:
        """Time of each layer inside the network, by TensorRT's own profiler.

        The profiler puts an event between layers, so their sum is above the network's latency.
        """
        content = _content(model)
        profile = self._profile(content, PROFILED_RUNS, layer=False)
        names = dict.fromkeys(name for run in profile.runs for name in run)
        graph = onnx.load_from_string(content).graph
        return attribute(
            [
                (name, sum(run.get(name, 0.0) for run in profile.runs) / PROFILED_RUNS)
                for name in names
            ],
            nodes=node_names(graph),
            layers=supported_layers(content),
            metadata=profile.metadata,
        )

    def pack_rounds(self, packed: Path) -> list[Round]:
        """A round of each layer in a pack (``packing.pack_models``), built as one engine.

        Raises:
            PackingRefused: layers are better timed one by one here.
        """
        return self._packs.rounds(packed.read_bytes())

    def _profile(self, model: bytes, runs: int, layer: bool = True) -> Profile:
        execution = self._execution(model, layer)
        return Profile(execution.profiled(runs), execution.metadata())

    def _layer_ms(self, model: bytes) -> float:
        with self.open_layer(model) as runner:
            return runner.take_round(SamplePlan(sample_ms=2.0, samples=5, warmup_ms=5.0)).median_ms

    def _execution(self, model: bytes | Path, layer: bool) -> Execution:
        kind = "layer" if layer else "network"
        path = Path(self._folder.name) / f"{model_key(model)}-{kind}.engine"
        if not path.exists():
            path.write_bytes(self._builder.build(_content(model), layer))
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            reason = " | ".join(self._builder.messages[-3:]) or "it gave no reason"
            raise BackendUnavailable(f"{self.name} cannot load the engine it built: {reason}")
        return Execution(self._trt, engine, self._stream, self._kernels)

    def _timing_cache(self) -> Path:
        version = load_tensorrt(self.name).__version__
        return timing_cache_path(self.name, version, device_provenance(self._index))


class KernelCache:
    """What TensorRT-RTX compiled for this card at an engine's first run, for its next opening."""

    def __init__(self) -> None:
        self._serialized: bytes | None = None

    def context(self, engine: Any) -> tuple[Any, Any]:
        """(execution context that uses the cache, the cache)."""
        config = engine.create_runtime_config()
        cache = config.create_runtime_cache()
        if self._serialized is not None:
            cache.deserialize(self._serialized)
        config.set_runtime_cache(cache)
        return engine.create_execution_context(config), cache

    def keep(self, cache: Any) -> None:
        """Remember what ``cache`` has learned."""
        self._serialized = bytes(cache.serialize())


class Execution:
    """An engine with buffers for its inputs and outputs.

    Args:
        trt: the module that built it.
        stream: on which it runs.
        kernels: of TensorRT-RTX, which compiles at the first run; None for TensorRT.
    """

    def __init__(
        self,
        trt: Any,
        engine: tensorrt.ICudaEngine,
        stream: torch.cuda.Stream,
        kernels: KernelCache | None = None,
    ) -> None:
        self._trt, self._engine, self._stream = trt, engine, stream
        cache = None
        context: tensorrt.IExecutionContext | None
        if kernels is None:
            context = engine.create_execution_context()
        else:
            context, cache = kernels.context(engine)
        if context is None:
            raise BackendUnavailable(
                "TensorRT cannot make an execution context of the engine: too little memory on the "
                "card, or an engine for another one"
            )
        self._context = context
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            tensor = _buffer(engine.get_tensor_shape(name), _torch_dtype(trt, engine, name))
            if is_input and tensor.is_floating_point():
                tensor.normal_()
            self._context.set_tensor_address(name, tensor.data_ptr())
            (self.inputs if is_input else self.outputs).append(tensor)
        torch.cuda.synchronize()  # the inputs were filled on another stream
        if kernels is not None:
            self.run()
            stream.synchronize()
            kernels.keep(cache)

    def run(self) -> None:
        """Give the stream one run."""
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise BackendUnavailable("TensorRT could not start a run of the engine")

    def check_capturable(self) -> None:
        """Refuse an engine that cannot become a CUDA graph, where the runtime can tell.

        Raises:
            BackendUnavailable: it cannot.
        """
        tells = getattr(self._context, "is_stream_capturable", None)
        if tells is not None and not tells(self._stream.cuda_stream):
            raise BackendUnavailable("TensorRT says that this engine cannot be a CUDA graph")

    def profiled(self, runs: int) -> list[dict[str, float]]:
        """ms by the runtime's layer name, for each of so many runs after a warm-up."""
        for _ in range(WARMUP_RUNS):
            self.run()
        self._stream.synchronize()
        collected: list[dict[str, float]] = []
        self._context.profiler = _collector(self._trt, collected)
        for _ in range(runs):
            collected.append({})
            self.run()
            self._stream.synchronize()
        return collected

    def metadata(self) -> dict[str, str]:
        """What the engine tells of each of its layers: the ONNX names behind a fused one."""
        inspector = self._engine.create_engine_inspector()
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        layers = json.loads(text).get("Layers", [])
        return {x["Name"]: x.get("Metadata", "") for x in layers if isinstance(x, dict)}


def _collector(trt: Any, runs: list[dict[str, float]]) -> Any:
    """A profiler that adds to the last of ``runs``."""

    class Collector(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            runs[-1][layer_name] = runs[-1].get(layer_name, 0.0) + ms

    return Collector()


def _buffer(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    """A device tensor of ``shape`` at the start of memory that any layout of it fits in."""
    sizes = tuple(int(size) for size in shape)
    if any(size < 0 for size in sizes):
        raise BackendUnavailable(f"a tensor of shape {sizes} is not of a fixed size")
    padded = [
        -(-size // VECTOR) * VECTOR if axis == 1 and len(sizes) == 4 else size
        for axis, size in enumerate(sizes)
    ]
    count = int(np.prod(sizes))
    storage = torch.zeros(int(np.prod(padded)), dtype=dtype, device="cuda")
    return storage[:count].view(sizes)


def _torch_dtype(trt: Any, engine: tensorrt.ICudaEngine, name: str) -> torch.dtype:
    known = {
        trt.float32: torch.float32, trt.float16: torch.float16, trt.int8: torch.int8,
        trt.int32: torch.int32, trt.int64: torch.int64,
    }  # fmt: skip
    return known[engine.get_tensor_dtype(name)]


def _content(model: bytes | Path) -> bytes:
    return model if isinstance(model, bytes) else model.read_bytes()
