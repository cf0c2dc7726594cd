"""Runtimes that deploy and time ONNX models, behind one small protocol."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from profilers.errors import BackendUnavailable
from profilers.timing import Runner

if TYPE_CHECKING:
    import numpy as np

BACKENDS = ("onnxruntime",)


class Backend(Protocol):
    """A runtime on a device at one precision, batch size and thread count."""

    name: str

    def provenance(self) -> dict[str, str | int]:
        """What a measurement here depends on: device, driver, runtime, precision, ..."""
        ...

    def open(self, model: bytes | Path) -> AbstractContextManager[Runner]:
        """Compile an ONNX model as it would be deployed; inputs are ready on the device."""
        ...

    def open_layer(self, model: bytes) -> AbstractContextManager[Runner]:
        """Compile a one-layer model as that layer runs *inside* a network of this runtime."""
        ...

    def renew(self) -> None:
        """Forget what outlasts a model (a process, its memory): the next one starts as if first."""
        ...

    def outputs(self, model: bytes | Path, inputs: np.ndarray) -> np.ndarray:
        """First output of a model with one input."""
        ...


def open_backend(
    device: str = "cpu",
    *,
    backend: str | None = None,
    precision: str = "fp32",
    batch_size: int = 1,
    threads: int | None = None,
) -> Backend:
    """The backend for a device.

    Args:
        device: ``cpu`` (``cuda:N`` is recognised, see Raises).
        backend: a name from ``BACKENDS``; None takes the best one for the device.
        threads: intra-operator threads; None is the runtime's own default (physical cores).

    Raises:
        BackendUnavailable: no such device or runtime here, or not at that precision.
    """
    if backend is not None and backend not in BACKENDS:
        raise BackendUnavailable(f"unknown backend {backend!r}; there is: {', '.join(BACKENDS)}")
    if device.split(":")[0] == "cuda":
        raise BackendUnavailable(_why_no_cuda(device))
    if device != "cpu":
        raise BackendUnavailable(f"unknown device {device!r}; use cpu or cuda:0")
    if precision != "fp32":
        raise BackendUnavailable(
            f"precision {precision} is not measured on the CPU by this version; use fp32"
        )
    from profilers.backends.isolated import IsolatedOnnxRuntimeCpu

    return IsolatedOnnxRuntimeCpu(batch_size=batch_size, threads=threads)


def _why_no_cuda(device: str) -> str:
    import torch

    if not torch.cuda.is_available():
        return (
            f"device {device} cannot be used: PyTorch {torch.__version__} finds no CUDA device "
            "on this machine; use --device cpu"
        )
    return f"device {device}: this version measures on the CPU only; use --device cpu"
