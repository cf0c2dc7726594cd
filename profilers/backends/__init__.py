"""Runtimes that deploy and time ONNX models, behind one small protocol."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from profilers.backends.registry import RUNTIMES, check_precision, device_kind
from profilers.errors import BackendUnavailable
from profilers.timing import Round, Runner

if TYPE_CHECKING:
    import numpy as np


class Backend(Protocol):
    """A runtime on a device at one precision, batch size and thread count."""

    name: str

    @property
    def layers_pay_call(self) -> bool:
        """Whether a lone layer pays for a call that inside a network is paid once: not where
        several runs of it stand in one CUDA graph."""
        ...

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

    def notes(self) -> tuple[str, ...]:
        """Why this backend was chosen, and why the better ones were not; a sentence each."""
        ...

    def observations(self) -> tuple[str, ...]:
        """What disturbed the measurements so far; a sentence each, empty if nothing did."""
        ...


@runtime_checkable
class TimesPacks(Protocol):
    """A backend that can time many layers in one build, where it finds that it may."""

    @property
    def layers_per_pack(self) -> int:
        """The most layers that ``pack_rounds`` takes; 1 where layers are timed one by one."""
        ...

    def pack_rounds(self, models: Sequence[bytes]) -> list[Round] | None:
        """A round of each one-layer model; None where that cannot be believed (from then on
        ``layers_per_pack`` is 1, and ``observations`` says why)."""
        ...


@runtime_checkable
class CountsEnergy(Protocol):
    """A backend whose device counts the energy that it uses."""

    def energy_mj(self, model: bytes | Path, seconds: float = 2.0) -> float | None:
        """Millijoules of the whole card for one run; None where it does not count them."""
        ...


def open_backend(
    device: str = "cpu",
    *,
    backend: str | None = None,
    precision: str = "fp32",
    batch_size: int = 1,
    threads: int | None = None,
    include_copies: bool = False,
) -> Backend:
    """The backend for a device.

    Args:
        device: ``cpu``, ``cuda:N``, or several equal cards, ``cuda:0,cuda:1``.
        backend: a name from ``registry.RUNTIMES``; None takes the best one for the device.
        threads: intra-operator threads; None takes the cores that this process may use.
        include_copies: on CUDA, time the copies of inputs and outputs too.

    Raises:
        BackendUnavailable: no such device or runtime here, or not at that precision.
    """
    kind = device_kind(device)
    if kind != "cuda" and device != "cpu":
        raise BackendUnavailable(f"unknown device {device!r}; use cpu or cuda:0")
    if backend is not None:
        check_precision(RUNTIMES.find(backend, kind), kind, precision)
    if kind == "cuda":
        from profilers.backends.selection import open_cuda

        return open_cuda(device, backend, precision, batch_size, include_copies)
    name = backend or RUNTIMES.ranked(kind)[0]
    check_precision(RUNTIMES.find(name, kind), kind, precision)
    from profilers.workers.isolated import Isolated, IsolatedOnnxRuntimeCpu

    if name == "onnxruntime":  # computes outputs in this process, and starts anew every round
        return IsolatedOnnxRuntimeCpu(batch_size=batch_size, threads=threads)
    return Isolated(device, name, precision, batch_size, include_copies, threads)
