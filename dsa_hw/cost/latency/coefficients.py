"""What calibration fits: a constant, scales of kinds of layers, rates of operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dsa_hw.network.elements import Layer
from dsa_hw.network.graph import DeployedGraph
from profilers.layers.spec import LayerSpec

WEIGHTS = "weights"
"""Name of the rate that is paid for each weight of a layer: large layers read them from memory.
The other rates are of the kinds of ``DeployedGraph.operations``."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What calibration fits.

    Args:
        constant_ms: c0.
        scales: by kind of layer, or by kind and size (``sized_kind``) where kinds alone are too
            coarse; 1 where the table alone is right.
        rates_ms: ms an element by kind of operation, and ms a weight (``WEIGHTS``).
        layers: scales of single layers by their names, before ``scales``: near one allocation a
            layer may cost another part of its table's time than its kind does (see ``refit``).
    """

    constant_ms: float
    scales: Mapping[str, float]
    rates_ms: Mapping[str, float]
    layers: Mapping[str, float] = field(default_factory=dict)

    def scale(self, layer: Layer) -> float:
        """What a layer's isolated time is multiplied by."""
        if layer.name in self.layers:
            return self.layers[layer.name]
        sized = sized_kind(layer.spec)
        return self.scales[sized if sized in self.scales else layer.spec.kind]


def sized_kind(spec: LayerSpec) -> str:
    """Kind and output size of a layer: ``conv 56x56``."""
    height, width = spec.output_size
    return f"{spec.kind} {height}x{width}"


def uncalibrated(graph: DeployedGraph) -> Coefficients:
    """The plain sum of the table."""
    return Coefficients(
        0.0,
        {layer.spec.kind: 1.0 for layer in graph.layers},
        {WEIGHTS: 0.0} | {operation.kind: 0.0 for operation in graph.operations},
    )
