"""More knots where a layer's surface bends enough to matter for the network.

The middle of a gap is measured on the far edge of the grid, where times are largest. If it lies
off the straight line between its neighbours by more than the measurements' own intervals, and by
more than a part of the whole network's latency, the gap is halved by a whole row of knots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch

from dsa_hw.cost.latency.coefficients import uncalibrated
from dsa_hw.cost.latency.model import LatencyModel
from dsa_hw.cost.latency.surfaces import first_grids
from profilers.collect import Request
from profilers.grid import Gap
from profilers.layers.spec import LayerSpec
from profilers.table import LayerKey
from profilers.timing import FASTEST_REACH

BEND_SHARE = 0.002
"""Of the dense network's latency: smaller bends, over all layers of a kind, are left alone."""


class Refinement:
    """What a model's table lacks where its surfaces bend.

    Args:
        model: any calibration of it; isolated layers are compared with each other.
    """

    def __init__(self, model: LatencyModel) -> None:
        self._model, self._table = model, model.table
        self._uses = Counter(layer.spec for layer in model.graph.layers)
        plain = model.with_coefficients(uncalibrated(model.graph))
        dense = torch.as_tensor(model.choices.dense, dtype=torch.float32)
        self._least_ms = BEND_SHARE * float(plain.layer_ms(dense).sum())

    def counting(self, part: float) -> list[Request]:
        """Layers of the first grid whose times are at least ``part`` of the dense network's."""
        model = self._model
        first = first_grids(model.graph, model.choices, model.steps)
        least_ms = part / BEND_SHARE * self._least_ms
        return [
            Request.layer(spec, *pair)
            for spec, grid in first.items()
            for pair in grid.pairs()
            if self._table.layer_ms(LayerKey(spec, *pair)) * self._uses[spec] >= least_ms
        ]

    def probes(self) -> list[Request]:
        """The middles of the gaps that could hide a bend that matters."""
        keys = [self._on_edge(spec, gap, gap.middle) for spec, gap in self._gaps()]
        return [Request.layer(key.spec, key.cin, key.cout) for key in keys]

    def rows(self) -> list[Request]:
        """Whole rows of knots through the middles that turned out to bend.

        Raises:
            KeyError: a probe has not been measured.
        """
        grids = dict(self._model.grids)
        for spec, gap in self._gaps():
            if self._bends(spec, gap):
                grids[spec] = grids[spec].with_knot(gap.side, gap.middle)
        return [
            Request.layer(spec, *pair)
            for spec, grid in grids.items()
            for pair in grid.pairs()
            if grid != self._model.grids[spec] and LayerKey(spec, *pair) not in self._table
        ]

    def _gaps(self) -> Iterator[tuple[LayerSpec, Gap]]:
        """A surface rises, so its middle is off the line by at most half of the rise."""
        model = self._model
        first = first_grids(model.graph, model.choices, model.steps)
        for spec, grid in model.grids.items():
            for gap in grid.gaps(model.steps[spec.kind], first[spec]):
                low, high = (
                    self._table.layer_ms(self._on_edge(spec, gap, width))
                    for width in (gap.low, gap.high)
                )
                if self._matters(spec, (high - low) / 2):
                    yield spec, gap

    def _bends(self, spec: LayerSpec, gap: Gap) -> bool:
        part = (gap.middle - gap.low) / (gap.high - gap.low)
        weights = {gap.low: part - 1.0, gap.middle: 1.0, gap.high: -part}
        bend, variance = 0.0, 0.0
        for width, weight in weights.items():
            measured = self._table.measurement(self._on_edge(spec, gap, width))
            bend += weight * measured.fastest_ms
            variance += (weight * FASTEST_REACH * measured.fastest_error_ms) ** 2
        return abs(bend) > np.sqrt(variance) and self._matters(spec, bend)

    def _matters(self, spec: LayerSpec, ms: float) -> bool:
        return abs(ms) * self._uses[spec] > self._least_ms

    def _on_edge(self, spec: LayerSpec, gap: Gap, width: int) -> LayerKey:
        grid = self._model.grids[spec]
        inward = (width, grid.outs[-1]) if gap.side == "in" else (grid.ins[-1], width)
        return LayerKey(spec, *grid.pair(*inward))
