"""ONNX Runtime's CUDA and TensorRT providers: bound to device memory, as CUDA graphs.

ONNX Runtime goes on with the CPU when a provider does not load, and says why only on standard
error. Here that is an error with ONNX Runtime's own reason.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch  # before onnxruntime: its CUDA libraries are the ones that get used

import onnxruntime as ort  # isort: skip
from profilers.backends.tensorrt.build import timing_cache_path
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
from profilers.cards.kept import KeptModels, card_is_full, release_cached_memory
from profilers.errors import BackendUnavailable
from profilers.layers.models import layer_model
from profilers.layers.spec import LayerSpec
from profilers.precision import at_precision
from profilers.timing import Runner
from profilers.workers.model_files import model_key

PROVIDERS = {
    "onnxruntime": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
INSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
SHADOWED = (
    "; onnxruntime and onnxruntime-gpu are both installed, and the files of one overwrote the "
    "other's: only one of them can be there"
)
RUNS_BEFORE_REPLAY = 3
"""ONNX Runtime runs a graph twice before it captures it."""
TRIAL = LayerSpec.parse("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 14x14 b1 fp32 +relu")
TRIAL_CHANNELS = 32


class OnnxRuntimeCuda:
    """ONNX Runtime on a CUDA device.

    A network runs as ONNX Runtime's own CUDA graph, as it is deployed. Each of its runs costs the
    host more than a small layer takes, so layers are captured from outside, several runs in one
    graph; where that does not work (a trial tells), a layer is timed call by call.

    Sessions stay ready as far as the card's memory allows: finding a layer's fastest algorithm
    takes much longer than timing it.

    Args:
        backend: a key of ``PROVIDERS``.

    Raises:
        BackendUnavailable: no such device, or the installed ONNX Runtime lacks the provider.
    """

    def __init__(
        self,
        device: str = "cuda:0",
        backend: str = "onnxruntime",
        precision: str = "fp32",
        batch_size: int = 1,
        include_copies: bool = False,
    ) -> None:
        check_cuda(device)
        self.name, self._provider = backend, PROVIDERS[backend]
        self.batch_size, self.precision = batch_size, precision
        self._index = cuda_index(device)
        self._include_copies = include_copies
        check_provider(self._provider, ort)
        if precision == "int8" and backend == "onnxruntime":
            raise BackendUnavailable(
                "ONNX Runtime's CUDA provider has no int8 convolutions worth timing; use "
                "--backend tensorrt, tensorrt-rtx or onnxruntime-tensorrt"
            )
        torch.cuda.set_device(self._index)
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        self._stream = torch.cuda.Stream()
        self._kept: KeptModels[BoundSession] = KeptModels(card_is_full, release_cached_memory)
        self._refusal = self._capture_refusal()

    @property
    def layers_pay_call(self) -> bool:
        """Only where layers cannot be captured."""
        return self._refusal is not None

    def notes(self) -> tuple[str, ...]:
        """Whether layers are timed in CUDA graphs."""
        if self._refusal is None:
            return ()
        return (f"layers are timed call by call, which is coarse: {self._refusal}",)

    def observations(self) -> tuple[str, ...]:
        """Nothing is watched here; see ``isolated``."""
        return ()

    def provenance(self) -> dict[str, str | int]:
        """What a measurement here depends on."""
        return runtime_provenance(
            self._index, runtime=self.name, version=ort.__version__,
            provider=f"{self._provider}, CUDA graphs" + (", layers call by call" if
                                                         self.layers_pay_call else ""),
            precision=self.precision, batch_size=self.batch_size,
            include_copies=self._include_copies,
        )  # fmt: skip

    @contextmanager
    def open(self, model: bytes | Path) -> Iterator[Runner]:
        """The whole model, bound to tensors on the device."""
        bound = self._ready(model, own_graph=True)
        run = bound.run_with_copies if self._include_copies else bound.run
        with torch.cuda.stream(self._stream):
            for _ in range(RUNS_BEFORE_REPLAY):
                run()
        self._stream.synchronize()
        yield DeviceRunner(run, EventClock(self._stream))

    @contextmanager
    def open_layer(self, model: bytes) -> Iterator[Runner]:
        """One layer; ONNX Runtime keeps NCHW between layers, so nothing is cut off."""
        if self.layers_pay_call:
            with self.open(model) as runner:
                yield runner
            return
        bound = self._ready(model, own_graph=False)
        replay = captured(bound.run, self._stream, LAYER_REPEATS, "relaxed")
        yield DeviceRunner(replay, EventClock(self._stream), LAYER_REPEATS)

    def outputs(self, model: bytes | Path, inputs: np.ndarray) -> np.ndarray:
        """First output of the model on ``inputs`` (N, C, H, W)."""
        bound = self._bound(model, own_graph=False, stream=self._stream)
        with torch.cuda.stream(self._stream):
            bound.inputs[0].copy_(torch.from_numpy(inputs).to(bound.inputs[0].dtype))
            bound.run()
        self._stream.synchronize()
        return bound.outputs[0].float().cpu().numpy()

    def _capture_refusal(self) -> str | None:
        """Why runs cannot be captured from outside; None where a captured one computes the same."""
        if self._provider != "CUDAExecutionProvider":
            return "TensorRT's provider captures its own graphs only"
        stream = torch.cuda.Stream()  # a failed capture must not leave its mark on the other one
        bound = self._bound(layer_model(TRIAL, TRIAL_CHANNELS, TRIAL_CHANNELS), False, stream)
        return refusal_to_be_captured(bound, lambda run: captured(run, stream, 1, "relaxed"))

    def _ready(self, model: bytes | Path, own_graph: bool) -> BoundSession:
        key = f"{own_graph} {model_key(model)}"
        return self._kept.get(key, lambda: self._bound(model, own_graph, self._stream))

    def _bound(
        self, model: bytes | Path, own_graph: bool, stream: torch.cuda.Stream
    ) -> BoundSession:
        content = model if isinstance(model, bytes) else model.read_bytes()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        common = {"device_id": self._index, "user_compute_stream": str(stream.cuda_stream)}
        chosen = [(self._provider, common | self._provider_options(own_graph))]
        if self._provider != "CUDAExecutionProvider":
            chosen.append(("CUDAExecutionProvider", common))
        session = open_session(at_precision(content, self.precision), options, chosen, ort)
        return BoundSession(session, torch.device("cuda", self._index))

    def _provider_options(self, own_graph: bool) -> dict[str, Any]:
        if self._provider == "CUDAExecutionProvider":
            return {
                "enable_cuda_graph": "1" if own_graph else "0",
                "cudnn_conv_algo_search": "EXHAUSTIVE",
                # Hundreds of sessions stay ready: none may take twice the memory that it needs.
                "arena_extend_strategy": "kSameAsRequested",
            }
        card = device_provenance(self._index)
        folder = timing_cache_path(self.name, ort.__version__, card).with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        return {
            "trt_cuda_graph_enable": own_graph,
            "trt_fp16_enable": self.precision != "fp32",
            "trt_int8_enable": self.precision == "int8",
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(folder),
        }


class BoundSession:
    """A session whose inputs and outputs are PyTorch tensors on a device."""

    def __init__(self, session: Any, device: torch.device) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.inputs = [_tensor(value, device).normal_() for value in session.get_inputs()]
        self.outputs = [_tensor(value, device) for value in session.get_outputs()]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for bind, values, tensors in (
            (self._binding.bind_input, session.get_inputs(), self.inputs),
            (self._binding.bind_output, session.get_outputs(), self.outputs),
        ):
            for value, tensor in zip(values, tensors, strict=True):
                bind(value.name, device.type, device.index or 0, _numpy_type(tensor),
                     tuple(tensor.shape), tensor.data_ptr())  # fmt: skip

    def run(self) -> None:
        """One run on the session's stream, not waited for."""
        self._session.run_with_iobinding(self._binding, self._options)

    @functools.cached_property
    def run_with_copies(self) -> Callable[[], object]:
        """Gives one run with its inputs from, and its outputs to, pinned host memory."""
        return with_copies(self.run, on_host(self.inputs), on_host(self.outputs))


def _tensor(value: Any, device: torch.device) -> torch.Tensor:
    """For an input or output of a session."""
    kinds = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
    return torch.zeros(tuple(value.shape), dtype=kinds[value.type], device=device)


def refusal_to_be_captured(
    bound: Any, capture: Callable[[Callable[[], object]], Callable[[], object]]
) -> str | None:
    """Why ``bound``'s runs cannot be captured into a CUDA graph; None if they can.

    Having been captured says little: work that went to another stream is not in the graph, and a
    replay then does nothing.
    """
    bound.run()
    torch.cuda.synchronize()
    expected = [tensor.clone() for tensor in bound.outputs]
    try:
        replay = capture(bound.run)
    except Exception as error:  # ONNX Runtime's own classes share no base but this one
        return f"a run cannot be captured ({_brief(f'{type(error).__name__}: {error}')})"
    for tensor in bound.outputs:
        tensor.zero_()
    torch.cuda.synchronize()
    replay()
    torch.cuda.synchronize()
    if all(torch.equal(a, b) for a, b in zip(expected, bound.outputs, strict=True)):
        return None
    return "the replay of a captured run did not compute its outputs"


def check_provider(provider: str, runtime: Any) -> None:
    """Refuse a provider that the installed build does not have.

    Raises:
        BackendUnavailable: says what the build has and what to install.
    """
    available = runtime.get_available_providers()
    if provider not in available:
        shadowed = SHADOWED if both_installed() else ""
        raise BackendUnavailable(
            f"the installed ONNX Runtime {runtime.__version__} has no {provider} (it has "
            f"{', '.join(available)}{shadowed}): {INSTALL}"
        )


def both_installed() -> bool:
    """Whether ``onnxruntime`` and ``onnxruntime-gpu`` are installed over each other."""
    names = {d.metadata["Name"].lower().replace("_", "-") for d in metadata.distributions()}
    return {"onnxruntime", "onnxruntime-gpu"} <= names


def open_session(
    model: bytes, options: Any, providers: list[tuple[str, dict[str, Any]]], runtime: Any
) -> Any:
    """A session in which the first of ``providers`` is in use.

    Raises:
        BackendUnavailable: it is not; with the reason that ONNX Runtime gives.
    """
    wanted = providers[0][0]
    said: list[str] = []
    try:
        with _standard_error(said):
            session = runtime.InferenceSession(
                model, options, providers=providers, enable_fallback=0
            )
    except Exception as error:  # ONNX Runtime's own classes share no base but this one
        reason = f"{type(error).__name__}: {error}"
        raise BackendUnavailable(f"ONNX Runtime refused {wanted}: {_brief(reason)}") from error
    if wanted not in session.get_providers():
        reason = _brief("".join(said)) or "it gave no reason"
        raise BackendUnavailable(f"ONNX Runtime could not load {wanted}: {reason}")
    os.write(2, "".join(said).encode())
    return session


def _brief(text: str) -> str:
    """ONNX Runtime's message without terminal colours, time stamps and source locations."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    plain = re.sub(r"\d{4}-\d\d-\d\d [\d:.]+ \[\w:onnxruntime:[^\]]*\] ?", "", plain)
    plain = re.sub(r"\S*/(?=[\w.-]+\.(?:cc|h|so))", "", plain)
    return " ".join(plain.split())[:600]


@contextmanager
def _standard_error(said: list[str]) -> Iterator[None]:
    """Collect what C++ code writes to standard error."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.append(file.read().decode("utf-8", errors="replace"))


def _numpy_type(tensor: torch.Tensor) -> type:
    return np.float16 if tensor.dtype == torch.float16 else np.float32
