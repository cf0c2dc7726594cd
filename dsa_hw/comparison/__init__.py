"""Methods x targets x seeds in one harness, resumable run by run."""

from dsa_hw.comparison.sweep import compare

__all__ = ["compare"]
