"""Measuring layers and networks on a device, in the runtime that deploys them."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

# ONNX Runtime's would upload from threads of its own, in the middle of what is measured.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from profilers.backends import Backend, open_backend
    from profilers.collect import Request, collect
    from profilers.errors import (
        BackendUnavailable,
        MissingMeasurement,
        ProfilerError,
        ProvenanceMismatch,
        TableError,
    )
    from profilers.layers.spec import LayerSpec
    from profilers.table import LatencyTable
    from profilers.timing import Measurement, measure_interleaved

_HOME = {
    "Backend": "backends",
    "BackendUnavailable": "errors",
    "LatencyTable": "table",
    "LayerSpec": "spec",
    "Measurement": "timing",
    "MissingMeasurement": "errors",
    "ProfilerError": "errors",
    "ProvenanceMismatch": "errors",
    "Request": "collect",
    "TableError": "errors",
    "collect": "collect",
    "measure_interleaved": "timing",
    "open_backend": "backends",
}

__all__ = [
    "Backend",
    "BackendUnavailable",
    "LatencyTable",
    "LayerSpec",
    "Measurement",
    "MissingMeasurement",
    "ProfilerError",
    "ProvenanceMismatch",
    "Request",
    "TableError",
    "collect",
    "measure_interleaved",
    "open_backend",
]


def __getattr__(name: str) -> object:
    """Import on first use: ``--help`` must not pay for pandas and a runtime."""
    if name not in _HOME:
        raise AttributeError(f"module 'profilers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"profilers.{_HOME[name]}"), name)
