"""Every runtime's entry: where its class is, what it runs on, and at which precisions.

A runtime of one's own is one more entry, ``register(BackendInfo(...))``, in the process that opens
it. Its class is imported in the worker process alone, so its module must be on that process's path,
as an installed package's or one on PYTHONPATH is.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from profilers.errors import BackendUnavailable

ON_DEVICE = ("device", "backend", "precision", "batch_size", "include_copies")
"""What the class of a CUDA runtime is made of."""


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """One runtime on one kind of device.

    Args:
        name: what ``--backend`` calls it.
        module, class_name: of its ``Backend``, which runs in the worker process.
        devices: kinds that it runs on: ``cpu``, ``cuda``.
        precisions: that it deploys at.
        takes: what its class is called with, in this order: names of ``open_backend``'s arguments.
        rank: its place among those tried where no backend is named, the best first; None where it
            is only used by name.
        packs_layers: whether it can time many layers in one build (``TimesPacks``).
    """

    name: str
    module: str
    class_name: str
    devices: Sequence[str]
    precisions: Sequence[str] = ("fp32",)
    takes: Sequence[str] = ON_DEVICE
    rank: int | None = None
    packs_layers: bool = False

    def made(self, arguments: dict[str, Any]) -> Any:
        """Return the backend itself, in this process.

        Args:
            arguments: of ``open_backend``; those that ``takes`` names are handed on.

        Raises:
            BackendUnavailable: its module cannot be imported here, or it does not work.
        """
        try:
            made = getattr(importlib.import_module(self.module), self.class_name)
        except (ImportError, AttributeError) as error:
            raise BackendUnavailable(
                f"backend {self.name} is {self.module}.{self.class_name}, which cannot be "
                f"imported: {error}; install it, or put its folder on PYTHONPATH"
            ) from error
        return made(*(arguments[name] for name in self.takes))


def _torch(name: str, devices: Sequence[str], rank: int | None = None) -> BackendInfo:
    module = "profilers.backends.torch_runtime"
    precisions = ("fp32",) if "cpu" in devices else ("fp32", "fp16")  # no int8 convolutions
    return BackendInfo(name, module, "TorchRuntime", devices, precisions, rank=rank)


def _tensorrt(name: str, rank: int) -> BackendInfo:
    return BackendInfo(
        name,
        "profilers.backends.tensorrt.runtime",
        "TensorRt",
        ("cuda",),
        ("fp32", "fp16", "int8"),
        rank=rank,
        packs_layers=True,
    )


def _onnxruntime_cuda(name: str, precisions: Sequence[str], rank: int | None) -> BackendInfo:
    module = "profilers.backends.onnxruntime_cuda"
    return BackendInfo(name, module, "OnnxRuntimeCuda", ("cuda",), precisions, rank=rank)


class Backends:
    """The known runtimes, by name and kind of device."""

    def __init__(self, entries: Sequence[BackendInfo]) -> None:
        self._entries = list(entries)

    def __iter__(self) -> Iterator[BackendInfo]:
        return iter(self._entries)

    def register(self, entry: BackendInfo) -> None:
        """Add an entry.

        Raises:
            ValueError: one of its devices has a runtime of this name already.
        """
        for kind in entry.devices:
            if any(e.name == entry.name and kind in e.devices for e in self):
                raise ValueError(f"{kind} has a backend {entry.name!r} already")
        self._entries.append(entry)

    def remove(self, entry: BackendInfo) -> None:
        """Take an entry out again."""
        self._entries.remove(entry)

    def names(self, kind: str | None = None) -> tuple[str, ...]:
        """Names of the runtimes of a kind of device; of all if None."""
        found = (e.name for e in self if kind is None or kind in e.devices)
        return tuple(dict.fromkeys(found))

    def ranked(self, kind: str) -> tuple[str, ...]:
        """Names of what is tried on a kind of device where none is asked for, the best first."""
        ranked = [(e.rank, e.name) for e in self if e.rank is not None and kind in e.devices]
        return tuple(name for _, name in sorted(ranked))

    def find(self, name: str, kind: str) -> BackendInfo:
        """Return a runtime's entry for a kind of device.

        Raises:
            BackendUnavailable: no runtime has this name, or not on this kind of device.
        """
        if name not in self.names():
            known = ", ".join(self.names())
            raise BackendUnavailable(f"unknown backend {name!r}; there is: {known}")
        for entry in self:
            if entry.name == name and kind in entry.devices:
                return entry
        where = sorted({k for e in self if e.name == name for k in e.devices})
        raise BackendUnavailable(
            f"backend {name} runs on {' or '.join(where)} only; on {kind} there are: "
            f"{', '.join(self.names(kind))}"
        )


RUNTIMES = Backends(
    [
        BackendInfo(
            "onnxruntime",
            "profilers.backends.onnxruntime_cpu",
            "OnnxRuntimeCpu",
            ("cpu",),
            takes=("batch_size", "threads", "owns_process"),
            rank=0,
        ),
        _tensorrt("tensorrt", 0),
        _tensorrt("tensorrt-rtx", 1),
        _onnxruntime_cuda("onnxruntime", ("fp32", "fp16"), 2),
        _onnxruntime_cuda("onnxruntime-tensorrt", ("fp32", "fp16", "int8"), None),
        _torch("torch", ("cuda",), 3),
        _torch("torch-autocast", ("cuda",)),
        _torch("torch-eager", ("cpu",)),
        _torch("torch-eager", ("cuda",)),
        _torch("torch-compile", ("cpu",)),
        _torch("torch-compile", ("cuda",)),
    ]
)
"""The runtimes that this package comes with, and what was registered since."""


def check_precision(entry: BackendInfo, kind: str, precision: str) -> None:
    """See that a runtime deploys at a precision.

    Raises:
        BackendUnavailable: it does not; says which do.
    """
    if precision in entry.precisions:
        return
    others = [e.name for e in RUNTIMES if kind in e.devices and precision in e.precisions]
    if others:
        instead = f"on {kind} there are at {precision}: {', '.join(dict.fromkeys(others))}"
    else:
        instead = "use fp32, or name the GPU (--device cuda:0)"
    raise BackendUnavailable(
        f"backend {entry.name} is not measured at {precision} on {kind} (it is at "
        f"{', '.join(entry.precisions)}); {instead}"
    )


def device_kind(device: str) -> str:
    """``cpu`` or ``cuda`` of ``cpu``, ``cuda:0`` or ``cuda:0,cuda:1``."""
    return device.split(":")[0]
