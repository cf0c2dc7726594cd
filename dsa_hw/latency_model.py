"""Widths of the coupled groups -> milliseconds, differentiable.

    L(w) = c0 + sum_l s_kind(l) * T_l(cin_l(w), cout_l(w)) + sum_o r_o * elements_o(w)

T_l interpolates the table bilinearly on its knots; c0, s, r >= 0 are calibrated on whole networks
(see ``calibration``). Two forms: ``predict_ms`` is smooth between step tops, for gradients;
``staircase_ms`` rounds channels up to the next step first, which is what the device charges.

Layers and operations of a branch that may be removed are multiplied by its gate (``branch_gates``):
a branch whose internal groups have width zero costs nothing in either form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsa_hw.branch_gates import BranchGates, branch_of_layers
from dsa_hw.choices import WidthChoices, least_off_steps
from dsa_hw.deployed import DeployedGraph, Layer
from profilers.collect import Request
from profilers.errors import MissingMeasurement
from profilers.grid import Grid, first_grid, grid_requests, refined_grid
from profilers.spec import LayerSpec
from profilers.table import LatencyTable, LayerKey


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What calibration fits.

    Args:
        constant_ms: c0.
        scales: by kind of layer, or by kind and size (``sized_kind``) where kinds alone are too
            coarse; 1 where the table alone is right.
        rates_ms: by kind of operation, ms an element.
        off_step: part by which a layer whose output channels are on no step costs more inside a
            network than alone, in the staircase form.
        below_step_ms: what a layer costs more whose output channels are fewer than one step, for
            an element of its output at one step (it is not blocked, and laid out anew), in the
            staircase form.
    """

    constant_ms: float
    scales: Mapping[str, float]
    rates_ms: Mapping[str, float]
    off_step: float = 0.0
    below_step_ms: float = 0.0

    def scale(self, spec: LayerSpec) -> float:
        """What a layer's isolated time is multiplied by."""
        sized = sized_kind(spec)
        return self.scales[sized if sized in self.scales else spec.kind]


def sized_kind(spec: LayerSpec) -> str:
    """Kind and output size of a layer: ``conv 56x56``."""
    height, width = spec.output_size
    return f"{spec.kind} {height}x{width}"


def uncalibrated(graph: DeployedGraph) -> Coefficients:
    """The plain sum of the table."""
    return Coefficients(
        0.0,
        {layer.spec.kind: 1.0 for layer in graph.layers},
        {operation.kind: 0.0 for operation in graph.operations},
    )


Range = tuple[int, int]


def channel_ranges(
    graph: DeployedGraph, choices: WidthChoices, steps: Mapping[str, int]
) -> dict[LayerSpec, tuple[Range, Range]]:
    """(least, most) input and output channels of every spec, over the layers that share it; the
    least of what is there, where a branch may be removed.

    Where the least is one step (or a dense width below it), narrower widths between steps are
    within the range too: below one step a layer need not cost what a whole step costs.
    """
    ranges: dict[LayerSpec, tuple[Range, Range]] = {}
    narrower = least_off_steps(graph, choices)
    for layer in graph.layers:
        step = steps[layer.spec.kind]
        own = []
        for side in (layer.cin, layer.cout):
            least = round(side(choices.narrowest))
            if least <= step:
                least = round(side(narrower))
            own.append((least, round(side(choices.dense))))
        if layer.spec in ranges:
            own = [
                (min(a[0], b[0]), max(a[1], b[1]))
                for a, b in zip(own, ranges[layer.spec], strict=True)
            ]
        ranges[layer.spec] = (own[0], own[1])
    return ranges


def first_grids(
    graph: DeployedGraph, choices: WidthChoices, steps: Mapping[str, int]
) -> dict[LayerSpec, Grid]:
    """The least that the table must hold of every spec."""
    return {
        spec: first_grid(spec, cin, cout, steps[spec.kind])
        for spec, (cin, cout) in channel_ranges(graph, choices, steps).items()
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
        surfaces = {spec: _surface(table, spec, grid) for spec, grid in self.grids.items()}
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
        return self._network_ms(widths, staircase=False)

    def staircase_ms(self, widths: Tensor) -> Tensor:
        """What the device charges: channels rounded up to the next step, those below the first as
        they are. (..., groups) -> (...,)"""
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
        channels = torch.addmm(self._channel_constants, self._channels, flat.T)
        surcharge = None
        if staircase:
            stepped = torch.ceil(channels / self._step - 1e-4) * self._step
            low = channels < self._step - 0.5
            surcharge = self._surcharge(
                (stepped - channels > 0.5) & (channels < self._most - 0.5), low
            )
            stepped = torch.where(low, torch.maximum(channels, self._low), stepped)
            channels = torch.minimum(stepped, self._most)
        cells = torch.searchsorted(self._interior, channels.detach(), right=True)
        cin, cout = channels.chunk(2)
        row, column = cells.chunk(2)
        constant, by_in, by_out, by_both = self._cells[
            self._base + row * self._stride + column
        ].unbind(-1)
        ms = constant + by_in * cin + (by_out + by_both * cin) * cout
        if surcharge is not None:
            part, added = surcharge
            ms = ms * part + added
        return ms.T.reshape(*widths.shape[:-1], -1).to(widths.dtype)

    def _surcharge(self, between: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """Factor and additional ms, (layers, n) each, of output channels on no step.

        Args:
            between: (2 layers, n) whether channels are on no step.
            low: (2 layers, n) whether they are fewer than one.
        """
        within, below = (between & ~low).chunk(2)[1], (between & low).chunk(2)[1]
        added = self.coefficients.below_step_ms * self._block_elements * below
        return 1.0 + self.coefficients.off_step * within, added

    def features(self, widths: Sequence[int]) -> dict[str, float]:
        """Uncalibrated terms of the staircase form: ms by kind and size of layer, elements by
        operation."""
        plain = self.with_coefficients(uncalibrated(self.graph))
        per_layer = plain.layer_ms(
            torch.tensor(widths, dtype=torch.float32, device=self.device), staircase=True
        )
        terms: dict[str, float] = {}
        for layer, ms in zip(self.graph.layers, per_layer.tolist(), strict=True):
            name = sized_kind(layer.spec)
            terms[name] = terms.get(name, 0.0) + ms
        return terms | self.graph.operation_elements(widths)

    def _build(self, layers: Sequence[Layer], surfaces: Mapping[LayerSpec, _Surface]) -> None:
        def tensor(values: object, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.as_tensor(np.asarray(values), dtype=dtype, device=self.device)

        found = [surfaces[layer.spec] for layer in layers]
        size = max(max(s.times_ms.shape) for s in found) - 1
        cells = np.zeros((len(layers), size, size, 4))
        interior = np.full((2, len(layers), max(1, size - 1)), np.inf)
        for index, (layer, surface) in enumerate(zip(layers, found, strict=True)):
            own = surface.cells() * self.coefficients.scale(layer.spec)
            cells[index, : own.shape[0], : own.shape[1]] = own
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
        grids = [self.grids[x.spec] for x in layers]
        self._low = tensor([[x.ins[0]] for x in grids] + [[x.outs[0]] for x in grids])
        self._block_elements = tensor(
            [[x.spec.batch * np.prod(x.spec.output_size) * self.steps[x.spec.kind]] for x in layers]
        )
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

    def _branch_terms(self, tensor: Callable[[object], Tensor]) -> _BranchTerms:
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
        return _BranchTerms(
            gates=gates,
            closers=gates.closers(),
            shares=shares,
            always=tensor([1.0] + [0.0] * len(graph.branches)),
            sums=tensor(sums),
            operations=tensor(np.stack(operations, axis=1)),
            constants=tensor(constants),
        )


@dataclass(frozen=True, slots=True)
class _BranchTerms:
    """A latency model's terms by branch, in columns: what is in no branch, then each branch.

    Args:
        closers: (groups, layers), see ``BranchGates``.
        shares: (groups, columns); with ``always``, the gates before they are cut off at 1.
        always: (columns,) 1 for what is in no branch.
        sums: (layers, columns) 1 where a layer belongs.
        operations: (groups, columns) ms a channel.
        constants: (columns,) ms.
    """

    gates: BranchGates
    closers: Tensor
    shares: Tensor
    always: Tensor
    sums: Tensor
    operations: Tensor
    constants: Tensor

    def network_ms(self, widths: Tensor, there: Tensor, layer_ms: Tensor) -> Tensor:
        """(n,) smooth ms, from (n, groups) widths, these floored, and (n, layers) table ms."""
        columns = torch.addmm(self.constants, there, self.operations)
        columns = torch.addmm(columns, layer_ms, self.sums)
        return (self._smooth(widths) * columns).sum(-1)

    def layer_gates(self, widths: Tensor) -> Tensor:
        """(..., layers) smooth gates."""
        flat = widths.reshape(-1, widths.shape[-1])
        return (self._smooth(flat) @ self.sums.T).reshape(*widths.shape[:-1], -1)

    def layers_there(self, widths: Tensor) -> Tensor:
        """(..., layers) 1 where a layer is, 0 where its branch is removed."""
        return ((widths <= 0).double() @ self.closers == 0).double()

    def operations_ms(self, widths: Tensor) -> Tensor:
        """(n,) ms of operations and the constant, removed branches left out."""
        columns = torch.addmm(self.constants, widths, self.operations)
        return columns[:, 0] + (columns[:, 1:] * self.gates.hard(widths)).sum(-1)

    def _smooth(self, widths: Tensor) -> Tensor:
        return torch.addmm(self.always, widths, self.shares).clamp_max(1.0)


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
