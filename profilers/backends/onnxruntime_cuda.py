"""ONNX Runtime's CUDA and TensorRT providers: bound to device memory, as CUDA graphs.

ONNX Runtime goes on with the CPU when a provider does not load, and says why only on standard
error. Here that is an error with ONNX Runtime's own reason.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch  # before onnxruntime: its CUDA libraries are the ones that get used

import onnxruntime as ort  # isort: skip
from profilers.backends.cuda_clock import DeviceRunner, EventClock
from profilers.backends.cuda_device import check_cuda, cuda_index, device_provenance
from profilers.backends.tensorrt_build import cache_folder
from profilers.errors import BackendUnavailable
from profilers.precision import CHANNEL_STEPS, at_precision
from profilers.timing import Runner

PROVIDERS = {
    "onnxruntime": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
INSTALL = "pip uninstall onnxruntime && pip install dsa-hw[gpu] (onnxruntime-gpu)"
RUNS_BEFORE_REPLAY = 3
"""ONNX Runtime runs a graph twice before it captures it."""


class OnnxRuntimeCuda:
    """ONNX Runtime on a CUDA device.

    Args:
        backend: a key of ``PROVIDERS``.

    Raises:
        BackendUnavailable: no such device, or the installed ONNX Runtime lacks the provider.
    """

    layers_pay_call = True

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

    def notes(self) -> tuple[str, ...]:
        """Nothing to say of the choice."""
        return ()

    def observations(self) -> tuple[str, ...]:
        """Nothing is watched here; see ``isolated``."""
        return ()

    def provenance(self) -> dict[str, str | int]:
        """What a measurement here depends on."""
        copies = ", with copies" if self._include_copies else ""
        return device_provenance(self._index) | {
            "runtime": self.name,
            "runtime_version": ort.__version__,
            "provider": f"{self._provider}, CUDA graphs{copies}",
            "precision": self.precision,
            "batch_size": self.batch_size,
            "expected_step": CHANNEL_STEPS[self.precision],
        }

    @contextmanager
    def open(self, model: bytes | Path) -> Iterator[Runner]:
        """The whole model, bound to tensors on the device."""
        bound = self._bound(model)
        run = bound.run
        if self._include_copies:
            run = bound.run_with_copies
        with torch.cuda.stream(self._stream):
            for _ in range(RUNS_BEFORE_REPLAY):
                run()
        self._stream.synchronize()
        yield DeviceRunner(run, EventClock(self._stream))

    @contextmanager
    def open_layer(self, model: bytes) -> Iterator[Runner]:
        """One layer; ONNX Runtime keeps NCHW between layers, so nothing is cut off."""
        with self.open(model) as runner:
            yield runner

    def outputs(self, model: bytes | Path, inputs: np.ndarray) -> np.ndarray:
        """First output of the model on ``inputs`` (N, C, H, W)."""
        bound = self._bound(model)
        with torch.cuda.stream(self._stream):
            bound.inputs[0].copy_(torch.from_numpy(inputs).to(bound.inputs[0].dtype))
            bound.run()
        self._stream.synchronize()
        return bound.outputs[0].float().cpu().numpy()

    def _bound(self, model: bytes | Path) -> BoundSession:
        content = model if isinstance(model, bytes) else model.read_bytes()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        chosen = [(self._provider, self._provider_options())]
        if self._provider != "CUDAExecutionProvider":
            plain = {"device_id": self._index, "user_compute_stream": self._stream_handle()}
            chosen.append(("CUDAExecutionProvider", plain))
        session = open_session(at_precision(content, self.precision), options, chosen, ort)
        return BoundSession(session, self._index)

    def _stream_handle(self) -> str:
        return str(self._stream.cuda_stream)

    def _provider_options(self) -> dict[str, Any]:
        common = {"device_id": self._index, "user_compute_stream": self._stream_handle()}
        if self._provider == "CUDAExecutionProvider":
            return common | {"enable_cuda_graph": "1", "cudnn_conv_algo_search": "EXHAUSTIVE"}
        folder = cache_folder() / "onnxruntime"
        folder.mkdir(parents=True, exist_ok=True)
        return common | {
            "trt_cuda_graph_enable": True,
            "trt_fp16_enable": self.precision != "fp32",
            "trt_int8_enable": self.precision == "int8",
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(folder),
        }


class BoundSession:
    """A session whose inputs and outputs are PyTorch tensors on the device."""

    def __init__(self, session: Any, index: int) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.inputs = [self._tensor(value, index) for value in session.get_inputs()]
        self.outputs = [self._tensor(value, index) for value in session.get_outputs()]
        for tensor in self.inputs:
            tensor.normal_()
        torch.cuda.synchronize(index)
        for value, tensor in zip(session.get_inputs(), self.inputs, strict=True):
            self._binding.bind_input(value.name, "cuda", index, _numpy_type(tensor),
                                     tuple(tensor.shape), tensor.data_ptr())  # fmt: skip
        for value, tensor in zip(session.get_outputs(), self.outputs, strict=True):
            self._binding.bind_output(value.name, "cuda", index, _numpy_type(tensor),
                                      tuple(tensor.shape), tensor.data_ptr())  # fmt: skip
        self._pinned = [torch.empty_like(t, device="cpu").pin_memory() for t in self.inputs]
        self._fetched = [torch.empty_like(t, device="cpu").pin_memory() for t in self.outputs]

    def run(self) -> None:
        """One run on the session's stream, not waited for."""
        self._session.run_with_iobinding(self._binding, self._options)

    def run_with_copies(self) -> None:
        """One run with its inputs from, and its outputs to, pinned host memory."""
        for device, host in zip(self.inputs, self._pinned, strict=True):
            device.copy_(host, non_blocking=True)
        self.run()
        for device, host in zip(self.outputs, self._fetched, strict=True):
            host.copy_(device, non_blocking=True)

    @staticmethod
    def _tensor(value: Any, index: int) -> torch.Tensor:
        kinds = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
        return torch.zeros(tuple(value.shape), dtype=kinds[value.type], device=f"cuda:{index}")


def check_provider(provider: str, runtime: Any) -> None:
    """Refuse a provider that the installed build does not have.

    Raises:
        BackendUnavailable: says what the build has and what to install.
    """
    available = runtime.get_available_providers()
    if provider not in available:
        raise BackendUnavailable(
            f"the installed ONNX Runtime {runtime.__version__} has no {provider} (it has "
            f"{', '.join(available)}): {INSTALL}"
        )


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
