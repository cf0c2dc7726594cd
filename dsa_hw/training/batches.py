"""Batches of a training set, and how many there are."""

from __future__ import annotations

from torch.utils.data import Dataset


def len_of(dataset: Dataset) -> int:
    """Number of samples of a map-style data set."""
    return len(dataset)  # pyright: ignore[reportArgumentType]
