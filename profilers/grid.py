"""Where to measure a layer: knots on steps, so few that a table takes minutes.

A layer's time on the treads of its staircase is close to a + b*cin + c*cout + d*cin*cout, which
bilinear interpolation reproduces; knots that double in width bound its error where it is not.
The knots below the largest are the same for every model, so tables are reused across models.
"""

from __future__ import annotations

import itertools
import math

from profilers.collect import Request
from profilers.spec import LayerSpec

RATIO = 2.0


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


def layer_grid(
    spec: LayerSpec,
    cin: tuple[int, int],
    cout: tuple[int, int],
    step: int,
) -> list[tuple[int, int]]:
    """(cin, cout) pairs to measure for channels within the ranges (least, most)."""
    if spec.tied:
        return [(w, w) for w in knots(*cout, step)]
    return list(itertools.product(knots(*cin, step), knots(*cout, step)))


def align(width: int, step: int, most: int) -> int:
    """``width`` rounded up to a multiple of ``step``, at most ``most``."""
    return min(most, math.ceil(width / step) * step)


def grid_requests(
    spec: LayerSpec, cin: tuple[int, int], cout: tuple[int, int], step: int
) -> list[Request]:
    """Requests for ``layer_grid``."""
    return [Request.layer(spec, i, o) for i, o in layer_grid(spec, cin, cout, step)]
