"""Methods x targets x seeds in one harness, resumable run by run."""

from dsa_hw.comparison.sweep import compare, prepare

__all__ = ["compare", "prepare"]
