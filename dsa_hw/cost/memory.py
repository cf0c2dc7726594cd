"""Peak activation memory of the deployed graph, as a function of the widths.

Values live from the node that makes them to the last that reads them, in the graph's order, which
is a topological one. An elementwise node writes over an input that nobody reads afterwards, as
runtimes do and as fused activations and additions are by nature; reshapes move nothing. Memory at a
node is the sum of what lives then, the peak their maximum. Weights are not counted, nor what an
allocator loses to alignment and fragments: this is the least that this order of execution needs.
At the nodes of a branch that may be removed, the sum is multiplied by the branch's gate
(``branch_gates``): where the branch is not, there is no such moment.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dsa_hw.cost.branch_gates import BranchGates, spread
from dsa_hw.cost.choices import WidthChoices, width_choices
from dsa_hw.network.elements import FREE_OPS, Linear
from dsa_hw.network.graph import DeployedGraph

IN_PLACE = ("Add", "Mul", "Relu", "Clip", "Sigmoid", "HardSwish", "HardSigmoid",
            "BatchNormalization")  # fmt: skip
BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


@dataclass(slots=True)
class _Buffer:
    """A stretch of memory: the values that are in it by turns, and the nodes it lives through."""

    size: Linear
    first: int
    members: list[str] = field(default_factory=list)
    last: int = 0


def live_elements(graph: DeployedGraph) -> tuple[np.ndarray, np.ndarray, list[int | None]]:
    """Elements alive at every node that can be the peak.

    Returns:
        (nodes, groups) coefficients and (nodes,) constants: ``coefficients @ widths + constants``;
        and the removable branch that each node is in.
    """
    buffers = _buffers(graph)
    nodes = graph.model.graph.node
    coefficients = np.zeros((len(nodes), len(graph.coupling.groups)))
    constants = np.zeros(len(nodes))
    for buffer in buffers:
        coefficients[buffer.first : buffer.last + 1] += buffer.size.coefficients
        constants[buffer.first : buffer.last + 1] += buffer.size.constant
    rows = np.column_stack([coefficients, constants])
    branches = [graph.branch_of.get(node.output[0]) for node in nodes]
    kept = [i for i in range(len(rows)) if not _is_dominated(i, rows, branches)]
    return rows[kept, :-1], rows[kept, -1], [branches[i] for i in kept]


def _is_dominated(index: int, rows: np.ndarray, branches: list[int | None]) -> bool:
    """Whether another row is at least as large for all widths (of equal ones the first stays), and
    there whenever this one is."""
    others = [
        i for i, branch in enumerate(branches) if i != index and branch in (None, branches[index])
    ]
    others = np.array(others, int)
    above = others[(rows[others] >= rows[index] - 1e-9).all(-1)]
    equal = np.isclose(rows[above], rows[index], atol=1e-9).all(-1)
    mutual = np.array([branches[i] == branches[index] for i in above], bool)
    return bool((~equal | (above < index) | ~mutual).any())


def _buffers(graph: DeployedGraph) -> list[_Buffer]:
    nodes = list(graph.model.graph.node)
    ends = {o.name for o in graph.model.graph.output}
    last_read = {name: len(nodes) - 1 for name in ends}
    for time, node in enumerate(nodes):
        for name in node.input:
            last_read[name] = max(last_read.get(name, 0), time)
    holder: dict[str, _Buffer] = {}
    buffers = []

    def place(name: str, buffer: _Buffer) -> None:
        buffer.members.append(name)
        buffer.last = max(buffer.last, last_read.get(name, buffer.first))
        holder[name] = buffer

    for value in graph.model.graph.input:
        if value.name in graph.elements:
            buffers.append(_Buffer(graph.elements[value.name], 0))
            place(value.name, buffers[-1])
    for time, node in enumerate(nodes):
        for name in node.output:
            if name not in graph.elements:
                continue
            buffer = _reused(node, time, graph.elements[name], holder)
            if buffer is None:
                buffer = _Buffer(graph.elements[name], time)
                buffers.append(buffer)
            place(name, buffer)
    return buffers


def _reused(node, time: int, size: Linear, holder: dict[str, _Buffer]) -> _Buffer | None:
    """The input's buffer that the node's output goes into, if it does."""
    inputs = [holder[name] for name in node.input if name in holder]
    if node.op_type in FREE_OPS:
        return inputs[0] if inputs else None
    if node.op_type not in IN_PLACE:
        return None
    for buffer in inputs:
        same = np.allclose(buffer.size.coefficients, size.coefficients)
        if buffer.last == time and same and np.isclose(buffer.size.constant, size.constant):
            return buffer
    return None


class PeakMemory:
    """Bytes of activations at the peak; a budget over widths.

    Its gradient is that of the node where the peak is.

    Args:
        choices: where branches that may be removed begin to fade; by single channels if None.
    """

    name, unit = "memory", "bytes"

    def __init__(
        self,
        graph: DeployedGraph,
        target: float,
        device: torch.device | str = "cpu",
        choices: WidthChoices | None = None,
    ) -> None:
        self.target = target
        self._graph, self._choices = graph, choices
        size = BYTES[graph.precision]
        coefficients, constants, branches = live_elements(graph)
        self._coefficients = _tensor(size * coefficients.T, device)
        self._constants = _tensor(size * constants, device)
        self._gates = None
        if graph.branches:
            if choices is None:
                choices = width_choices(graph, {layer.spec.kind: 1 for layer in graph.layers})
            self._gates = BranchGates(graph, choices, device)
            self._members = self._gates.members(branches)

    def terms(self, widths: Tensor) -> Tensor:
        """(..., groups) -> (..., nodes) bytes alive at each node that can be the peak."""
        alive = widths @ self._coefficients + self._constants
        if self._gates is None:
            return alive
        return alive * spread(self._gates.hard(widths), self._members)

    def cost(self, widths: Tensor) -> Tensor:
        """(..., groups) -> (...,) bytes, differentiable"""
        alive = widths @ self._coefficients + self._constants
        if self._gates is not None:
            alive = alive * spread(self._gates.smooth(widths), self._members)
        return alive.amax(-1)

    def charged(self, widths: Tensor) -> Tensor:
        """(..., groups) -> (...,) bytes"""
        return self.terms(widths).amax(-1)

    def to(self, device: torch.device | str) -> PeakMemory:
        """The same budget for widths on another device."""
        return PeakMemory(self._graph, self.target, device, self._choices)


def _tensor(values: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=device)
