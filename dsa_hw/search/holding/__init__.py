"""How the search holds its budgets: one method a file, all behind ``KeepRatioMover``."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dsa_hw.search.holding.admm import Admm
from dsa_hw.search.holding.mover import KeepRatioMover
from dsa_hw.search.holding.projection import Projection

ConstraintMethod = Literal["projection", "admm"]

METHODS: dict[ConstraintMethod, type[KeepRatioMover]] = {
    "projection": Projection,
    "admm": Admm,
}


def make_mover(
    method: ConstraintMethod, keep_ratios: Tensor, least: Tensor, budgets: int
) -> KeepRatioMover:
    """The method of that name over ``keep_ratios`` (moved in place, within ``least`` and 1)."""
    return METHODS[method](keep_ratios, least, budgets)
