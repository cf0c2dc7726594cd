"""Building TensorRT engines from ONNX: TensorRT 10 and 11 and TensorRT-RTX, one code path.

All networks are built strongly typed, which TensorRT 10 has as an option and the others always:
precision is a property of the ONNX graph (``precision.at_precision``), never a builder flag.
TensorRT-RTX builds ahead of time, with no card present, for a given compute capability.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from profilers.errors import BackendUnavailable
from profilers.layers.kinds.registry import LAYER_KINDS
from profilers.precision import at_precision

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Python module of each backend."""
INSTALL = {
    "tensorrt": "pip install tensorrt (NVIDIA's libraries come from its own index: "
    "https://docs.nvidia.com/deeplearning/tensorrt)",
    "tensorrt-rtx": "pip install tensorrt-rtx-cu13 (GeForce and RTX cards)",
}
OLDEST = {"tensorrt": (10, 0), "tensorrt-rtx": (1, 0)}
SHOW_PROGRESS_EVERY_S = 10.0


def load_tensorrt(backend: str):
    """The TensorRT module of ``tensorrt`` or ``tensorrt-rtx``.

    Raises:
        BackendUnavailable: not installed, too old, or only its type stubs are there; says what
            to install.
    """
    if TYPE_CHECKING:
        import tensorrt

        return tensorrt
    name = MODULES[backend]
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnavailable(
            f"{backend} is not installed, or does not load ({error}): {INSTALL[backend]}"
        ) from error
    if not hasattr(module, "Builder"):  # tensorrt-stubs alone is importable too
        raise BackendUnavailable(f"{backend} is not installed: {INSTALL[backend]}")
    version = tuple(int(part) for part in module.__version__.split(".")[:2])
    if version < OLDEST[backend]:
        oldest = ".".join(map(str, OLDEST[backend]))
        raise BackendUnavailable(
            f"{backend} {module.__version__} is too old; {oldest} or later is needed: "
            f"{INSTALL[backend]}"
        )
    return module


class EngineBuilder:
    """Builds engines, and remembers what the builder said.

    Args:
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        precision: of the engines.
        timing_cache: file in which tactic timings are kept between processes; they hold for one
            card, driver and version only, so its name must be keyed by them. None keeps nothing.
        compute_capability: ``86`` builds for sm_86 whatever card is here (TensorRT-RTX only).
        on_progress: called with (phase, steps done, steps); None prints a line now and then.
    """

    def __init__(
        self,
        backend: str,
        precision: str,
        timing_cache: Path | None = None,
        compute_capability: int | None = None,
        on_progress: Any = None,
    ) -> None:
        self.trt = trt = load_tensorrt(backend)
        self.backend, self.precision = backend, precision
        self._timing_cache = timing_cache
        self._target = self._compute_capability(compute_capability)
        self.messages: list[str] = []
        self.logger = _recording_logger(trt, self.messages)
        self._monitor = _monitor(trt, on_progress or _printing_progress())
        self._builder = trt.Builder(self.logger)
        if not self._builder:
            raise BackendUnavailable(f"{backend} cannot start here: {self._last_words()}")

    def build(self, model: bytes, layer: bool = False) -> bytes:
        """A serialized engine.

        Args:
            model: float32 ONNX; converted to the builder's precision.
            layer: the model is one layer, or a pack of them, timed as inside a network: inputs and
                outputs may have any layout, so that none is changed at a layer's ends.

        Raises:
            BackendUnavailable: TensorRT refused the model; with its own reason.
        """
        trt = self.trt
        self.messages.clear()
        network = self._builder.create_network(
            1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        )
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse(at_precision(model, self.precision)):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            reasons = "; ".join(f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors)
            raise BackendUnavailable(f"{self.backend} cannot read the model: {reasons}")
        config = self._config()
        if layer:
            self._free_layouts(network)
            config.max_aux_streams = 0  # layers of a pack must not run beside each other
        cache = self._load_timing_cache(config)
        built = self._builder.build_serialized_network(network, config)
        if built is None:
            raise BackendUnavailable(f"{self.backend} cannot build the model: {self._last_words()}")
        if cache is not None and self._timing_cache is not None:
            _write_atomically(self._timing_cache, bytes(cache.serialize()))
        return bytes(built)

    def _config(self):
        trt = self.trt
        config = self._builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.progress_monitor = self._monitor
        capture = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
        if capture is not None:  # TensorRT-RTX: without it a CUDA graph cannot be captured
            config.set_flag(capture)
        if self._target is not None:
            plain: Any = config  # only TensorRT-RTX has these two
            plain.num_compute_capabilities = 1
            plain.set_compute_capability(self._target, 0)
        return config

    def _free_layouts(self, network) -> None:
        """Offer the layouts in which TensorRT hands tensors on at this precision."""
        formats = self.trt.TensorFormat
        offered = [formats.LINEAR]
        offered += [formats.HWC8, formats.CHW16] if self.precision != "fp32" else [formats.CHW32]
        if self.backend == "tensorrt-rtx":
            offered = [f for f in offered if f != formats.CHW16]
        mask = 0
        for each in offered:
            mask |= 1 << int(each)
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        tensors += [network.get_output(i) for i in range(network.num_outputs)]
        for tensor in tensors:
            if len(tensor.shape) == 4:
                tensor.allowed_formats = mask

    def _compute_capability(self, wanted: int | None):
        if wanted is None:
            return None
        known = getattr(self.trt, "ComputeCapability", None)
        if known is None:
            raise BackendUnavailable(
                f"{self.backend} builds for the card that is present only; TensorRT-RTX builds "
                "for others"
            )
        target = getattr(known, f"SM{wanted}", None)
        if target is None:
            names = [n for n in dir(known) if n.startswith("SM")]
            raise BackendUnavailable(
                f"{self.backend} {self.trt.__version__} cannot build for sm_{wanted}; it builds "
                f"for {', '.join(names)}"
            )
        return target

    def _load_timing_cache(self, config):
        """The kept timings, given to the builder; None where there is no timing to keep."""
        if self._timing_cache is None or self._target is not None:
            return None
        kept = self._timing_cache.read_bytes() if self._timing_cache.is_file() else b""
        cache = config.create_timing_cache(kept)
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            # Of another card or version after all: start afresh rather than trust it.
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, ignore_mismatch=False)
        return cache

    def _last_words(self) -> str:
        return " | ".join(self.messages[-3:]) or "it gave no reason"


def supported_layers(model: bytes) -> list[str]:
    """Names of the convolutions and linear layers of a model, in the graph's order."""
    graph = onnx.load_from_string(model).graph
    layers = {"MatMul", *(kind.operator for kind in LAYER_KINDS.values())}
    return [n.name for n in graph.node if n.op_type in layers]


def _recording_logger(trt, messages: list[str]):
    """A logger that keeps errors for the exception instead of printing them."""
    worst = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

    class Recording(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity, msg: str) -> None:
            if severity in worst:
                messages.append(" ".join(msg.split()))

    return Recording()


def _monitor(trt, on_progress):
    class Monitor(trt.IProgressMonitor):
        """Tells of the outermost phase; returning True lets the build go on."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name, parent_phase, num_steps) -> None:
            if parent_phase is None:
                self._steps[phase_name] = num_steps

        def phase_finish(self, phase_name) -> None:
            self._steps.pop(phase_name, None)

        def step_complete(self, phase_name, step) -> bool:
            if phase_name in self._steps:
                on_progress(phase_name, step + 1, self._steps[phase_name])
            return True

    return Monitor()


def _printing_progress():
    shown = [time.monotonic()]

    def show(phase: str, done: int, planned: int) -> None:
        if time.monotonic() - shown[0] > SHOW_PROGRESS_EVERY_S:
            shown[0] = time.monotonic()
            print(f"building an engine: {phase} {done}/{planned}", file=sys.stderr, flush=True)

    return show


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.new")
    partial.write_bytes(content)
    os.replace(partial, path)


def cache_folder() -> Path:
    """Where timing caches are kept between processes: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dsa_hw"


def timing_cache_path(backend: str, version: str, card: Mapping[str, str | int]) -> Path:
    """Where tactic timings are kept that hold for a card, its driver and a version of TensorRT.

    Args:
        card: ``device_provenance``; equal cards share a file.
    """
    identity = [card["device"], card["driver"], backend, version]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return cache_folder() / f"timings-{digest}.cache"
