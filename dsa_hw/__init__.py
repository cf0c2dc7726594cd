"""Prune a network to a number of measured milliseconds on a device.

Differentiable Sparsity Allocation (Ning et al., ECCV 2020, arXiv:2004.02164) with measured
deployment latency as its budget.
"""

from __future__ import annotations

from dsa_hw.runs.search_path import demote_working_folder

demote_working_folder(__name__)  # before anything is imported that could be shadowed

import importlib  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

if TYPE_CHECKING:
    from dsa_hw.cost.counted import FlopsBudget, MemoryBudget, ParamsBudget
    from dsa_hw.cost.latency.budget import LatencyBudget
    from dsa_hw.data import DataSplits
    from dsa_hw.deployment.timing import loop_measure
    from dsa_hw.errors import InfeasibleBudget, SearchWarning, UnsupportedModel, UserError
    from dsa_hw.network.exported import export_onnx
    from dsa_hw.pipeline.pruner import DSAPruner
    from dsa_hw.search.settings import SearchSettings
    from dsa_hw.surgery.saved import load_pruned

__version__ = "0.1.0"

_HOME = {
    path.rpartition(".")[2]: path.rpartition(".")[0]
    for path in (
        "dsa_hw.cost.counted.FlopsBudget",
        "dsa_hw.cost.latency.budget.LatencyBudget",
        "dsa_hw.cost.counted.MemoryBudget",
        "dsa_hw.cost.counted.ParamsBudget",
        "dsa_hw.data.DataSplits",
        "dsa_hw.network.exported.export_onnx",
        "dsa_hw.errors.InfeasibleBudget",
        "dsa_hw.errors.SearchWarning",
        "dsa_hw.errors.UnsupportedModel",
        "dsa_hw.errors.UserError",
        "dsa_hw.pipeline.pruner.DSAPruner",
        "dsa_hw.search.settings.SearchSettings",
        "dsa_hw.surgery.saved.load_pruned",
        "dsa_hw.deployment.timing.loop_measure",
    )
}

__all__ = [
    "DSAPruner",
    "DataSplits",
    "FlopsBudget",
    "InfeasibleBudget",
    "LatencyBudget",
    "MemoryBudget",
    "ParamsBudget",
    "SearchSettings",
    "SearchWarning",
    "UnsupportedModel",
    "UserError",
    "export_onnx",
    "load_pruned",
    "loop_measure",
]


def __getattr__(name: str) -> object:
    """Import on first use: ``--help`` must not pay for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'dsa_hw' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List what can be imported, loaded or not yet."""
    return sorted({*globals(), *__all__})
