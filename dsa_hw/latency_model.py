"""Widths of the coupled groups -> milliseconds, differentiable.

    L(w) = c0 + sum_l s_kind(l) * T_l(cin_l(w), cout_l(w)) + sum_o r_o * elements_o(w)

T_l interpolates the table bilinearly on its knots; c0, s, r >= 0 are calibrated on whole networks
(see ``calibration``). Two forms: ``predict_ms`` is smooth between step tops, for gradients;
``staircase_ms`` rounds channels up to the next step first, which is what the device charges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsa_hw.choices import WidthChoices
from dsa_hw.deployed import DeployedGraph, Layer
from profilers.collect import Request
from profilers.errors import MissingMeasurement
from profilers.grid import grid_requests, knots
from profilers.spec import LayerSpec
from profilers.table import LatencyTable, LayerKey


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What calibration fits.

    Args:
        constant_ms: c0.
        scales: by kind of layer; 1 where the table alone is right.
        rates_ms: by kind of operation, ms an element.
    """

    constant_ms: float
    scales: Mapping[str, float]
    rates_ms: Mapping[str, float]


def uncalibrated(graph: DeployedGraph) -> Coefficients:
    """The plain sum of the table."""
    return Coefficients(
        0.0,
        {layer.spec.kind: 1.0 for layer in graph.layers},
        {operation.kind: 0.0 for operation in graph.operations},
    )


Range = tuple[int, int]


def channel_ranges(
    graph: DeployedGraph, choices: WidthChoices
) -> dict[LayerSpec, tuple[Range, Range]]:
    """(least, most) input and output channels of every spec, over the layers that share it."""
    ranges: dict[LayerSpec, tuple[Range, Range]] = {}
    for layer in graph.layers:
        own = [
            (round(side(choices.least)), round(side(choices.dense)))
            for side in (layer.cin, layer.cout)
        ]
        if layer.spec in ranges:
            own = [
                (min(a[0], b[0]), max(a[1], b[1]))
                for a, b in zip(own, ranges[layer.spec], strict=True)
            ]
        ranges[layer.spec] = (own[0], own[1])
    return ranges


def table_requests(
    graph: DeployedGraph, choices: WidthChoices, steps: Mapping[str, int]
) -> list[Request]:
    """Everything that ``LatencyModel`` reads from a table for this network."""
    requests = []
    for spec, (cin, cout) in channel_ranges(graph, choices).items():
        requests += grid_requests(spec, cin, cout, steps[spec.kind])
    return requests


class LatencyModel:
    """Predicts a network's latency from the table.

    Args:
        graph: the network.
        table: must hold ``table_requests(graph, choices, steps)``.
        coefficients: of a calibration; None is the plain sum of the table.
        device: where the widths will be.

    Raises:
        MissingMeasurement: the table lacks a knot; names the layer and how to extend the table.
    """

    def __init__(
        self,
        graph: DeployedGraph,
        table: LatencyTable,
        choices: WidthChoices,
        steps: Mapping[str, int],
        coefficients: Coefficients | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.graph = graph
        self.table = table
        self.choices = choices
        self.steps = dict(steps)
        self.coefficients = coefficients or uncalibrated(graph)
        self.device = torch.device(device)
        ranges = channel_ranges(graph, choices)
        surfaces = {s: _surface(table, s, *r, steps[s.kind]) for s, r in ranges.items()}
        self._build(graph.layers, surfaces)

    def with_coefficients(self, coefficients: Coefficients) -> LatencyModel:
        """The same model under another calibration."""
        return LatencyModel(
            self.graph, self.table, self.choices, self.steps, coefficients, self.device
        )

    def to(self, device: torch.device | str) -> LatencyModel:
        """The same model for widths on another device."""
        return LatencyModel(
            self.graph, self.table, self.choices, self.steps, self.coefficients, device
        )

    def predict_ms(self, widths: Tensor) -> Tensor:
        """Smooth latency, (...,) for widths (..., groups), differentiable; no host sync.

        Widths are expected between the least and the dense ones; the interpolation's outermost
        slopes go on beyond them.
        """
        layers = self.layer_ms(widths).sum(-1)
        return layers + widths @ self._operations + self._constant

    def staircase_ms(self, widths: Tensor) -> Tensor:
        """What the device charges: channels rounded up to the next step. (..., groups) -> (...,)"""
        layers = self.layer_ms(widths, staircase=True).sum(-1)
        return layers + widths @ self._operations + self._constant

    def layer_ms(self, widths: Tensor, staircase: bool = False) -> Tensor:
        """Calibrated ms of every layer, (..., layers)."""
        cin = widths @ self._cin + self._cin_constant
        cout = widths @ self._cout + self._cout_constant
        if staircase:
            cin = torch.minimum(torch.ceil(cin / self._step - 1e-4) * self._step, self._most_in)
            cout = torch.minimum(torch.ceil(cout / self._step - 1e-4) * self._step, self._most_out)
        row, along = _locate(cin, self._knots_in, self._last_in)
        column, across = _locate(cout, self._knots_out, self._last_out)
        base = self._base + row * self._stride + column
        table = self._times
        low = torch.lerp(table[base], table[base + 1], across)
        high = torch.lerp(table[base + self._stride], table[base + self._stride + 1], across)
        return torch.lerp(low, high, along)

    def features(self, widths: Sequence[int]) -> dict[str, float]:
        """Uncalibrated terms of the staircase form: ms by kind of layer, elements by operation."""
        plain = self.with_coefficients(uncalibrated(self.graph))
        per_layer = plain.layer_ms(
            torch.tensor(widths, dtype=torch.float32, device=self.device), staircase=True
        )
        terms: dict[str, float] = {}
        for layer, ms in zip(self.graph.layers, per_layer.tolist(), strict=True):
            terms[layer.spec.kind] = terms.get(layer.spec.kind, 0.0) + ms
        return terms | {o.kind: o.elements(widths) for o in self.graph.operations}

    def _build(self, layers: Sequence[Layer], surfaces: Mapping[LayerSpec, _Surface]) -> None:
        def tensor(values: object, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.as_tensor(np.asarray(values), dtype=dtype, device=self.device)

        found = [surfaces[layer.spec] for layer in layers]
        size = max(max(s.times_ms.shape) for s in found)
        times = np.zeros((len(layers), size, size))
        knots_in = np.full((len(layers), size), np.inf)
        knots_out = np.full((len(layers), size), np.inf)
        for index, (layer, surface) in enumerate(zip(layers, found, strict=True)):
            rows, columns = surface.times_ms.shape
            scale = self.coefficients.scales[layer.spec.kind]
            times[index, :rows, :columns] = surface.times_ms * scale
            knots_in[index, :rows] = surface.knots_in
            knots_out[index, :columns] = surface.knots_out
        self._times = tensor(times).flatten()
        self._stride = size
        self._base = tensor(np.arange(len(layers)) * size * size, torch.int64)
        self._knots_in, self._knots_out = tensor(knots_in), tensor(knots_out)
        self._last_in = tensor([len(s.knots_in) - 2 for s in found], torch.int64)
        self._last_out = tensor([len(s.knots_out) - 2 for s in found], torch.int64)
        self._cin = tensor(np.stack([x.cin.coefficients for x in layers], axis=1))
        self._cout = tensor(np.stack([x.cout.coefficients for x in layers], axis=1))
        self._cin_constant = tensor([x.cin.constant for x in layers])
        self._cout_constant = tensor([x.cout.constant for x in layers])
        self._step = tensor([self.steps[x.spec.kind] for x in layers])
        self._most_in = tensor([x.cin(self.choices.dense) for x in layers])
        self._most_out = tensor([x.cout(self.choices.dense) for x in layers])
        rates = self.coefficients.rates_ms
        operations = self.graph.operations
        self._operations = tensor(
            sum(
                (o.elements.coefficients * rates[o.kind] for o in operations),
                np.zeros(len(self.graph.coupling.groups)),
            )
        )
        self._constant = self.coefficients.constant_ms + sum(
            o.elements.constant * rates[o.kind] for o in operations
        )


@dataclass(frozen=True, slots=True)
class _Surface:
    """Times on a rectangle of knots; a single knot is doubled, so that there is an interval."""

    knots_in: np.ndarray
    knots_out: np.ndarray
    times_ms: np.ndarray


def _surface(
    table: LatencyTable,
    spec: LayerSpec,
    cin: Range,
    cout: Range,
    step: int,
) -> _Surface:
    outs = knots(*cout, step)
    ins = [1] if spec.tied else knots(*cin, step)
    times = np.array(
        [[_time_ms(table, spec, o if spec.tied else i, o) for o in outs] for i in ins], float
    )
    knots_in, knots_out = np.array(ins, float), np.array(outs, float)
    if len(ins) == 1:
        knots_in, times = np.append(knots_in, knots_in + 1), np.repeat(times, 2, axis=0)
    if len(outs) == 1:
        knots_out, times = np.append(knots_out, knots_out + 1), np.repeat(times, 2, axis=1)
    return _Surface(knots_in, knots_out, times)


def _time_ms(table: LatencyTable, spec: LayerSpec, cin: int, cout: int) -> float:
    key = LayerKey(spec, cin, cout)
    if key not in table:
        measured = sorted({k.cout for k in table.layers() if k.spec == spec})
        raise MissingMeasurement(
            f"no measurement of {spec} with {cin} -> {cout} channels in {table.path} (output "
            f"channels measured: {measured or 'none'}); extend it: "
            "python -m dsa_hw.profile --model NAME --table FILE"
        )
    return table.layer_ms(key)


def _locate(values: Tensor, positions: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Interval of every value among its row of ascending knots, and the position within it."""
    index = (values.detach()[..., None] >= positions).sum(-1) - 1
    index = torch.minimum(index.clamp_min(0), last)
    rows = positions.expand(*values.shape[:-1], *positions.shape)
    low = torch.gather(rows, -1, index[..., None])[..., 0]
    high = torch.gather(rows, -1, index[..., None] + 1)[..., 0]
    return index, (values - low) / (high - low)
