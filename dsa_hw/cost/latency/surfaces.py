"""Which widths of a layer are measured: ranges of channels and the grids over them."""

from __future__ import annotations

from collections.abc import Mapping

from dsa_hw.cost.choices import WidthChoices
from dsa_hw.network.graph import DeployedGraph
from profilers.collect import Request
from profilers.grid import Grid, first_grid, grid_requests, refined_grid
from profilers.layers.spec import LayerSpec
from profilers.table import LatencyTable

Range = tuple[int, int]


def channel_ranges(
    graph: DeployedGraph, choices: WidthChoices
) -> dict[LayerSpec, tuple[Range, Range]]:
    """(least, most) input and output channels of every spec, over the layers that share it; the
    least of what is there, where a branch may be removed.
    """
    ranges: dict[LayerSpec, tuple[Range, Range]] = {}
    for layer in graph.layers:
        sides = [
            (round(side(choices.narrowest)), round(side(choices.dense)))
            for side in (layer.cin, layer.cout)
        ]
        if layer.spec in ranges:
            sides = [
                (min(a[0], b[0]), max(a[1], b[1]))
                for a, b in zip(sides, ranges[layer.spec], strict=True)
            ]
        ranges[layer.spec] = (sides[0], sides[1])
    return ranges


def first_grids(
    graph: DeployedGraph, choices: WidthChoices, steps: Mapping[str, int]
) -> dict[LayerSpec, Grid]:
    """The least that the table must hold of every spec."""
    return {
        spec: first_grid(spec, cin, cout, steps[spec.kind])
        for spec, (cin, cout) in channel_ranges(graph, choices).items()
    }


def table_requests(
    graph: DeployedGraph, choices: WidthChoices, steps: Mapping[str, int]
) -> list[Request]:
    """Everything that ``LatencyModel`` needs in a table for this network."""
    grids = first_grids(graph, choices, steps)
    return [request for spec, grid in grids.items() for request in grid_requests(spec, grid)]


def refined_grids(
    first: Mapping[LayerSpec, Grid], table: LatencyTable, steps: Mapping[str, int]
) -> dict[LayerSpec, Grid]:
    """The grids with all the knots that the table has whole rows of."""
    measured: dict[LayerSpec, set[tuple[int, int]]] = {spec: set() for spec in first}
    for key in table.layers():
        if key.spec in measured:
            measured[key.spec].add((key.cin, key.cout))
    return {
        spec: refined_grid(grid, measured[spec], steps[spec.kind]) for spec, grid in first.items()
    }
