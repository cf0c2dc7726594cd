"""Prune a network to a number of measured milliseconds on a device.

Differentiable Sparsity Allocation (Ning et al., ECCV 2020, arXiv:2004.02164) with measured
deployment latency as its budget.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsa_hw.budgets import FlopsBudget, LatencyBudget, MemoryBudget, ParamsBudget
    from dsa_hw.errors import InfeasibleBudget, SearchWarning, UnsupportedModel, UserError
    from dsa_hw.search import DSAPruner, SearchSettings
    from dsa_hw.surgery import load_pruned

__version__ = "0.1.0"

_HOME = {
    "DSAPruner": "search",
    "FlopsBudget": "budgets",
    "InfeasibleBudget": "errors",
    "LatencyBudget": "budgets",
    "MemoryBudget": "budgets",
    "ParamsBudget": "budgets",
    "SearchSettings": "search",
    "SearchWarning": "errors",
    "UnsupportedModel": "errors",
    "UserError": "errors",
    "load_pruned": "surgery",
}

__all__ = [
    "DSAPruner",
    "FlopsBudget",
    "InfeasibleBudget",
    "LatencyBudget",
    "MemoryBudget",
    "ParamsBudget",
    "SearchSettings",
    "SearchWarning",
    "UnsupportedModel",
    "UserError",
    "load_pruned",
]


def __getattr__(name: str) -> object:
    """Import on first use: ``--help`` must not pay for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'dsa_hw' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dsa_hw.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """List what can be imported, loaded or not yet."""
    return sorted({*globals(), *__all__})
