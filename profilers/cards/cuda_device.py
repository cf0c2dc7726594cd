"""A CUDA device as the backends see it: whether it is there, and who it is."""

from __future__ import annotations

import re

from profilers.cards.nvml import Card, NvmlAbsent, hashed
from profilers.errors import BackendUnavailable
from profilers.precision import CHANNEL_STEPS

INSTALL_HINT = (
    "install an NVIDIA driver (nvidia-smi must list the card) and a CUDA build of PyTorch "
    "(pip install torch)"
)


def cuda_index(device: str) -> int:
    """The number in ``cuda:N`` (``cuda`` is 0).

    Raises:
        BackendUnavailable: not of that form.
    """
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise BackendUnavailable(f"unknown device {device!r}; use cpu or cuda:0")
    return int(match[1] or 0)


def check_cuda(device: str) -> None:
    """Refuse a device that is not there, in one sentence.

    Raises:
        BackendUnavailable: no CUDA here, or not so many devices.
    """
    import torch

    index = cuda_index(device)
    if not torch.cuda.is_available():
        built = torch.version.cuda
        build = f"built for CUDA {built}" if built else "a build without CUDA"
        raise BackendUnavailable(
            f"device {device} cannot be used: PyTorch {torch.__version__} ({build}) finds no CUDA "
            f"device on this machine; {INSTALL_HINT}, or use --device cpu"
        )
    count = torch.cuda.device_count()
    if index >= count:
        last = "only cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise BackendUnavailable(f"device {device} is not there: this machine has {last}")


def device_uuid(index: int) -> str:
    """The device's UUID, by which NVML knows it too."""
    import torch

    return str(torch.cuda.get_device_properties(index).uuid)


def device_provenance(index: int) -> dict[str, str | int]:
    """What a measurement on the device depends on, but for the runtime.

    From NVML; where it is absent, from the CUDA runtime, and the header says so.
    """
    import torch

    uuid = device_uuid(index)
    common: dict[str, str | int] = {"cpu_features": "none", "threads": 0}
    try:
        return common | Card(uuid).fingerprint().provenance()
    except NvmlAbsent as absent:
        properties = torch.cuda.get_device_properties(index)
        return common | {
            "device": f"{properties.name} (sm_{properties.major}{properties.minor})",
            "driver": f"unknown, CUDA {torch.version.cuda}",
            "memory_mib": properties.total_memory // 2**20,
            "uuid_sha256": hashed(uuid),
            "nvml": str(absent),
        }


def runtime_provenance(
    index: int,
    *,
    runtime: str,
    version: str,
    provider: str,
    precision: str,
    batch_size: int,
    include_copies: bool,
) -> dict[str, str | int]:
    """What a measurement by a runtime on the device depends on: a table's header.

    Args:
        runtime: the backend's name.
        provider: how the runtime runs a model.
        include_copies: whether the copies of inputs and outputs are timed too.
    """
    return device_provenance(index) | {
        "runtime": runtime,
        "runtime_version": version,
        "provider": provider + (", with copies" if include_copies else ""),
        "precision": precision,
        "batch_size": batch_size,
        "expected_step": CHANNEL_STEPS[precision],
    }
