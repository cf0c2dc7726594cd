"""What was made of a model stays ready for its next round, as far as the card's memory allows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Ready = TypeVar("Ready")

KEEP_FREE = 0.4
"""Part of the card's memory that models kept ready must leave free."""
MOST_KEPT = 2048
"""More than a network's table has layers (resnet50 at fp16: 780): with fewer, shuffled rounds would
find many of them gone."""


class KeptModels(Generic[Ready]):
    """The models that were used last, ready to run.

    Args:
        is_full: whether room must be made before another one is prepared.
        freed: called after one was let go.
        most: that are kept.
    """

    def __init__(
        self, is_full: Callable[[], bool], freed: Callable[[], None], most: int = MOST_KEPT
    ) -> None:
        self._is_full, self._freed, self._most = is_full, freed, most
        self._kept: OrderedDict[str, Ready] = OrderedDict()

    def get(self, key: str, prepare: Callable[[], Ready]) -> Ready:
        """The model of that key, prepared if it is not there."""
        if key not in self._kept:
            while self._kept and (len(self._kept) >= self._most or self._is_full()):
                self._kept.popitem(last=False)
                self._freed()
            self._kept[key] = prepare()
        self._kept.move_to_end(key)
        return self._kept[key]


def card_is_full() -> bool:
    """Whether less than ``KEEP_FREE`` of the current CUDA device's memory is free."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return free < KEEP_FREE * total


def release_cached_memory() -> None:
    """Give PyTorch's unused blocks back to the card."""
    import torch

    torch.cuda.empty_cache()
