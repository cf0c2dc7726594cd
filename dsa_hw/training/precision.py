"""The precision that training computes in: what ``auto`` means on a device, and what is slow there.

A CPU without bfloat16 instructions emulates them: a step of a small residual network took 4.4 s on
an AVX2 machine where float32 takes 0.36 s (docs/lab-notes.md).
"""

from __future__ import annotations

from typing import Literal

import torch

from dsa_hw.runs.config import TrainingConfig
from dsa_hw.runs.processes import trains_on_cpu
from profilers.backends.onnxruntime_cpu import cpu_identity

BF16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_tile", "bf16"})
"""Of x86-64 and Arm CPUs, as the operating system calls them."""


def training_precision(config: TrainingConfig) -> Literal["no", "bf16", "fp16"]:
    """``mixed_precision``, where ``auto`` is bf16 if the device that trains computes in it."""
    if config.mixed_precision != "auto":
        return config.mixed_precision
    return "bf16" if _computes_in_bf16(config) else "no"


def slow_precision_warning(config: TrainingConfig) -> list[str]:
    """Of a bf16 that was asked for by name, and that the device only emulates."""
    if config.epochs == 0 or config.mixed_precision != "bf16" or _computes_in_bf16(config):
        return []
    return [
        "mixed-precision is bf16, which this device has no instructions for: training is many "
        "times slower than with no or auto"
    ]


def _computes_in_bf16(config: TrainingConfig) -> bool:
    if trains_on_cpu(config):
        _, features = cpu_identity()
        return bool(BF16_INSTRUCTIONS & set(features.split()))
    return torch.cuda.is_bf16_supported(including_emulation=False)
