"""Widths of the coupled groups -> milliseconds, differentiable.

    L(w) = c0 + sum_l [s_l * T_l(cin_l(w), cout_l(w)) + r * weights_l(w)]
           + sum_o r_o * elements_o(w)

T_l interpolates the table bilinearly on its knots, and a layer's weights are bilinear in its
channels too, so that both are one function of them; c0, s, r >= 0 are calibrated on whole networks
(see ``calibration``). Two forms: ``predict_ms`` is smooth between step tops, for gradients;
``staircase_ms`` rounds channels up to the next step first, which is what the device charges.

Layers and operations of a branch that may be removed are multiplied by its gate (``branch_gates``):
a branch whose internal groups have width zero costs nothing in either form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsa_hw.cost.branch_gates import BranchGates, branch_of_layers
from dsa_hw.cost.choices import WidthChoices
from dsa_hw.cost.latency.branch_terms import BranchTerms
from dsa_hw.cost.latency.coefficients import WEIGHTS, Coefficients, uncalibrated
from dsa_hw.cost.latency.surfaces import first_grids, refined_grids
from dsa_hw.network.elements import Layer
from dsa_hw.network.graph import DeployedGraph
from profilers.errors import MissingMeasurement
from profilers.grid import Grid
from profilers.layers.spec import LayerSpec
from profilers.table import LatencyTable, LayerKey


@dataclass(frozen=True, slots=True)
class Features:
    """What the coefficients multiply in the staircase form of some networks' latency.

    Args:
        layers: (networks, layers) isolated ms.
        rates: (networks,) elements by kind of operation, and weights.
    """

    layers: np.ndarray
    rates: Mapping[str, np.ndarray]


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
        self.grids = refined_grids(first_grids(graph, choices, steps), table, steps)
        self._surfaces = {spec: _surface(table, spec, grid) for spec, grid in self.grids.items()}
        self._build()

    def with_coefficients(self, coefficients: Coefficients) -> LatencyModel:
        """The same surfaces, as the table was when they were read, under another calibration."""
        return self._again(coefficients, self.device)

    def to(self, device: torch.device | str) -> LatencyModel:
        """The same model for widths on another device."""
        return self._again(self.coefficients, torch.device(device))

    def _again(self, coefficients: Coefficients, device: torch.device) -> LatencyModel:
        other = copy.copy(self)
        other.coefficients, other.device = coefficients, device
        other._build()
        return other

    def predict_ms(self, widths: Tensor) -> Tensor:
        """Smooth latency, (...,) for widths (..., groups), differentiable; no host sync.

        Widths are expected between the least and the dense ones; the interpolation's outermost
        slopes go on beyond them.
        """
        return self._network_ms(widths, staircase=False)

    def staircase_ms(self, widths: Tensor) -> Tensor:
        """What the device charges: channels rounded up to the next step, at most the dense ones.
        (..., groups) -> (...,)"""
        return self._network_ms(widths, staircase=True)

    def layer_ms(self, widths: Tensor, staircase: bool = False) -> Tensor:
        """Calibrated ms of every layer, (..., layers)."""
        if self._branches is None:
            return self._table_ms(widths, staircase)
        flat, terms = widths.double(), self._branches
        if staircase:
            ms = self._table_ms(flat, staircase) * terms.layers_there(flat)
        else:
            ms = self._table_ms(terms.gates.floored(flat), staircase) * terms.layer_gates(flat)
        return ms.to(widths.dtype)

    def _network_ms(self, widths: Tensor, staircase: bool) -> Tensor:
        terms = self._branches
        if terms is None:
            layers = self._table_ms(widths, staircase).sum(-1)
            return layers + widths @ self._operations + self._constant
        flat = widths.reshape(-1, widths.shape[-1]).double()
        if staircase:
            layers = self._table_ms(flat, staircase) * terms.layers_there(flat)
            ms = layers.sum(-1) + terms.operations_ms(flat)
        else:
            there = terms.gates.floored(flat)
            ms = terms.network_ms(flat, there, self._table_ms(there, staircase))
        return ms.reshape(widths.shape[:-1]).to(widths.dtype)

    def _table_ms(self, widths: Tensor, staircase: bool) -> Tensor:
        """Calibrated ms of every layer as if all branches were there, (..., layers)."""
        flat = widths.reshape(-1, widths.shape[-1]).double()
        channels = self._channels_of(flat, staircase)
        cells = torch.searchsorted(self._interior, channels.detach(), right=True)
        cin, cout = channels.chunk(2)
        row, column = cells.chunk(2)
        constant, by_in, by_out, by_both = self._cells[
            self._base + row * self._stride + column
        ].unbind(-1)
        ms = constant + by_in * cin + (by_out + by_both * cin) * cout
        return ms.T.reshape(*widths.shape[:-1], -1).to(widths.dtype)

    def _channels_of(self, widths: Tensor, staircase: bool) -> Tensor:
        """(2 layers, n) input channels of every layer, then output channels, of (n, groups)."""
        channels = torch.addmm(self._channel_constants, self._channels, widths.T)
        if not staircase:
            return channels
        stepped = torch.ceil(channels / self._step - 1e-4) * self._step
        return torch.minimum(stepped, self._most)

    def features(self, networks: Sequence[Sequence[int]]) -> Features:
        """Uncalibrated terms of the staircase form, of several networks at once.

        The staircase form is linear in the coefficients, and these are its factors.
        """
        widths = torch.tensor(networks, dtype=torch.float64, device=self.device)
        there = torch.ones(len(widths), len(self.graph.layers), dtype=torch.float64)
        if self._branches is not None:
            there = self._branches.layers_there(widths)
        cin, cout = self._channels_of(widths, staircase=True).chunk(2)
        ones = torch.ones_like(cin)
        weights = (self._taps * torch.where(self._tied, ones, cin) * cout).T * there
        elements = [self.graph.operation_elements(own) for own in networks]
        kinds = [kind for kind in self.coefficients.rates_ms if kind != WEIGHTS]
        rates = {kind: np.array([own[kind] for own in elements]) for kind in kinds}
        plain = self.with_coefficients(uncalibrated(self.graph))
        return Features(
            layers=plain.layer_ms(widths, staircase=True).cpu().numpy(),
            rates={WEIGHTS: weights.sum(1).cpu().numpy()} | rates,
        )

    def _build(self) -> None:
        def tensor(values: object, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.as_tensor(np.asarray(values), dtype=dtype, device=self.device)

        layers = self.graph.layers
        surfaces = [self._surfaces[layer.spec] for layer in layers]
        size = max(max(s.times_ms.shape) for s in surfaces) - 1
        cells = np.zeros((len(layers), size, size, 4))
        interior = np.full((2, len(layers), max(1, size - 1)), np.inf)
        for index, (layer, surface) in enumerate(zip(layers, surfaces, strict=True)):
            calibrated = self._calibrated_cells(layer, surface)
            cells[index, : calibrated.shape[0], : calibrated.shape[1]] = calibrated
            for side, knots_of_side in enumerate((surface.knots_in, surface.knots_out)):
                inner = knots_of_side[1:-1]
                interior[side, index, : len(inner)] = inner
        sides = [x.cin for x in layers] + [x.cout for x in layers]
        self._cells = tensor(cells).reshape(-1, 4)
        self._stride = size
        self._base = tensor(np.arange(len(layers))[:, None] * size * size, torch.int64)
        self._interior = tensor(interior.reshape(2 * len(layers), -1))
        self._channels = tensor(np.stack([x.coefficients for x in sides]))
        self._channel_constants = tensor([[x.constant] for x in sides])
        self._step = tensor([[self.steps[x.spec.kind]] for x in layers] * 2)
        self._most = tensor([[x(self.choices.dense)] for x in sides])
        self._taps = tensor([[x.weights.taps] for x in layers])
        self._tied = tensor([[x.weights.cin is None] for x in layers], torch.bool)
        rates = self.coefficients.rates_ms
        operations = self.graph.operations
        self._operations = tensor(
            sum(
                (o.elements.coefficients * rates[o.kind] for o in operations),
                np.zeros(len(self.graph.coupling.groups)),
            ),
            torch.float32,
        )
        self._constant = self.coefficients.constant_ms + sum(
            o.elements.constant * rates[o.kind] for o in operations
        )
        self._branches = self._branch_terms(tensor) if self.graph.branches else None

    def _calibrated_cells(self, layer: Layer, surface: _Surface) -> np.ndarray:
        """(rows, columns, 4) the surface's cells, scaled, and what the layer's weights cost."""
        cells = surface.cells() * self.coefficients.scale(layer)
        by_both, by_out = 3, 2
        per_weight = self.coefficients.rates_ms[WEIGHTS] * layer.weights.taps
        cells[..., by_out if layer.weights.cin is None else by_both] += per_weight
        return cells

    def _branch_terms(self, tensor: Callable[[object], Tensor]) -> BranchTerms:
        """Columns: what is in no branch, then each branch."""
        graph, rates = self.graph, self.coefficients.rates_ms
        operations, constants = [], []
        for within in (graph.operations, *graph.branch_operations):
            linear = [o.elements.scaled(rates[o.kind]) for o in within]
            none = np.zeros(len(graph.coupling.groups))
            operations.append(sum((x.coefficients for x in linear), none))
            constants.append(sum(x.constant for x in linear))
        operations[0] = operations[0] - sum(operations[1:])
        constants[0] += self.coefficients.constant_ms - sum(constants[1:])
        sums = np.zeros((len(graph.layers), 1 + len(graph.branches)))
        for row, branch in enumerate(branch_of_layers(graph)):
            sums[row, 0 if branch is None else 1 + branch] = 1.0
        gates = BranchGates(graph, self.choices, self.device, torch.float64)
        shares = torch.nn.functional.pad(gates.shares, (1, 0))
        return BranchTerms(
            gates=gates,
            closers=gates.closers(),
            shares=shares,
            always=tensor([1.0] + [0.0] * len(graph.branches)),
            sums=tensor(sums),
            operations=tensor(np.stack(operations, axis=1)),
            constants=tensor(constants),
        )


@dataclass(frozen=True, slots=True)
class _Surface:
    """Times on a rectangle of knots; a single knot is doubled, so that there is an interval."""

    knots_in: np.ndarray
    knots_out: np.ndarray
    times_ms: np.ndarray

    def cells(self) -> np.ndarray:
        """(rows, columns, 4) of each rectangle between knots: a + b cin + c cout + d cin cout."""
        x0, x1 = self.knots_in[:-1, None], self.knots_in[1:, None]
        y0, y1 = self.knots_out[None, :-1], self.knots_out[None, 1:]
        t = self.times_ms
        area = (x1 - x0) * (y1 - y0)
        corners = (t[:-1, :-1], t[1:, :-1], t[:-1, 1:], t[1:, 1:])
        t00, t10, t01, t11 = (corner / area for corner in corners)
        return np.stack(
            [
                t00 * x1 * y1 - t10 * x0 * y1 - t01 * x1 * y0 + t11 * x0 * y0,
                (t10 - t00) * y1 + (t01 - t11) * y0,
                (t01 - t00) * x1 + (t10 - t11) * x0,
                t00 - t10 - t01 + t11,
            ],
            axis=-1,
        )


def _surface(table: LatencyTable, spec: LayerSpec, grid: Grid) -> _Surface:
    ins, outs = grid.ins, grid.outs
    times = np.array([[_time_ms(table, spec, *grid.pair(i, o)) for o in outs] for i in ins], float)
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
