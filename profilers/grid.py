"""Where to measure a layer: knots on steps, so few that a table takes minutes.

A layer's time on the treads of its staircase is close to a + b*cin + c*cout + d*cin*cout, which
bilinear interpolation reproduces; knots that double in width bound its error where it is not.
The knots below the largest are the same for every model, so tables are reused across models.
Where that is too coarse, a gap between two knots is halved (``Grid.gaps``) by a whole row of
measurements; a table that holds such rows says so itself (``refined_grid``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from profilers.collect import Request
from profilers.layers.spec import LayerSpec

DEPTH = 2
"""How often a gap of the first grid may be halved."""

Pair = tuple[int, int]
"""(input channels, output channels); of a depthwise layer (width, width)."""


def knots(low: int, high: int, step: int) -> list[int]:
    """Widths from at most ``low`` to ``high``: ``high`` itself, and multiples of ``step``.

    Below ``high`` they are step, 2 step, 4 step, ... : the largest of them at or under ``low``,
    and all above it that are at least ``step`` away from ``high``.
    """
    if low >= high:
        return [high]
    ladder = list(itertools.takewhile(lambda w: w < high, (step * 2**i for i in range(32))))
    start = max((w for w in ladder if w <= low), default=None)
    kept = [w for w in ladder if start is None or w >= start]
    if start is None:
        kept = [low, *kept]
    return [w for w in kept if w == kept[0] or high - w >= step] + [high]


@dataclass(frozen=True, slots=True)
class Gap:
    """Two neighbouring knots of one side, and the width on a step in their middle."""

    side: str
    low: int
    middle: int
    high: int


@dataclass(frozen=True, slots=True)
class Grid:
    """The knots of a layer's surface.

    Args:
        ins, outs: channels, ascending. A depthwise layer has outs only (``ins`` is (1,)).
        tied: whether it is depthwise.
    """

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    tied: bool = False

    def pair(self, cin: int, cout: int) -> Pair:
        """The channels at a knot of each side."""
        return (cout, cout) if self.tied else (cin, cout)

    def pairs(self) -> list[Pair]:
        """Everything that the surface needs."""
        return [self.pair(i, o) for i, o in itertools.product(self.ins, self.outs)]

    def with_knot(self, side: str, knot: int) -> Grid:
        """The grid with one more knot."""
        ins = tuple(sorted({*self.ins, knot})) if side == "in" else self.ins
        outs = tuple(sorted({*self.outs, knot})) if side == "out" else self.outs
        return Grid(ins, outs, self.tied)

    def gaps(self, step: int, first: Grid) -> Iterator[Gap]:
        """Gaps that may be halved: on steps, and of the first grid's at most ``DEPTH`` times."""
        for side, own, base in (("in", self.ins, first.ins), ("out", self.outs, first.outs)):
            for low, high in itertools.pairwise(own):
                around = max(b for b in base if b <= low), min(b for b in base if b >= high)
                middle = round((low + high) / (2 * step)) * step
                deep = (high - low) * 2**DEPTH <= around[1] - around[0]
                if low < middle < high and not deep:
                    yield Gap(side, low, middle, high)


def first_grid(spec: LayerSpec, cin: Pair, cout: Pair, step: int) -> Grid:
    """Knots that double in width, for channels within the ranges (least, most)."""
    if spec.tied:
        return Grid((1,), tuple(knots(*cout, step)), tied=True)
    return Grid(tuple(knots(*cin, step)), tuple(knots(*cout, step)))


def refined_grid(first: Grid, measured: Collection[Pair], step: int) -> Grid:
    """The first grid, and the knots on steps of which the table holds the whole row.

    Args:
        measured: channels of this layer that the table holds.
    """
    grid = first
    for side, own in (("out", first.outs), ("in", first.ins)):
        for knot in sorted({pair[side == "out"] for pair in measured}):
            if not own[0] < knot < own[-1] or knot % step or (side == "in" and first.tied):
                continue
            row = grid.with_knot(side, knot)
            if all(pair in measured for pair in set(row.pairs()) - set(grid.pairs())):
                grid = row
    return grid


def align(width: int, step: int, most: int) -> int:
    """``width`` rounded up to a multiple of ``step``, at most ``most``."""
    return min(most, math.ceil(width / step) * step)


def grid_requests(spec: LayerSpec, grid: Grid) -> list[Request]:
    """Requests for all of a grid."""
    return [Request.layer(spec, *pair) for pair in grid.pairs()]
