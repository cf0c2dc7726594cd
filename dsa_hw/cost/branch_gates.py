"""How far residual branches are there, as a function of the widths of the groups.

Between its narrowest widths and nothing a branch fades: its gate falls linearly from 1 to 0 with
the widths of its internal groups, and its cost with the gate, while its channels stay at their
narrowest. So the gradient sees what the branch's last step costs, and keep ratios can go to zero.
Where a branch has several internal groups, the gate follows their sum, each weighed by the FLOPs of
the layers that it touches: a squeeze of a few channels neither holds a branch nor takes it away.

Widths are (..., groups), gates (..., branches). Nothing here reads a value on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dsa_hw.cost.choices import WidthChoices
from dsa_hw.network.graph import DeployedGraph


class BranchGates:
    """Gates of a graph's removable branches.

    Args:
        choices: of the widths; their narrowest are where branches begin to fade.
        dtype: of the widths it will be given.

    Attributes:
        shares: (groups, branches); ``widths @ shares``, cut off at 1, are the gates.
    """

    def __init__(
        self,
        graph: DeployedGraph,
        choices: WidthChoices,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._graph, self._choices = graph, choices
        self._device, self._dtype = device, dtype
        internal = sorted({g for branch in graph.branches for g in branch.groups})
        floors = np.full(len(graph.coupling.groups), -np.inf)
        floors[internal] = choices.narrowest[internal]
        self._floors = self._tensor(floors)
        shares = np.array([_shares(graph, b.groups, b.layers) for b in graph.branches])
        shares = shares.reshape(len(graph.branches), len(floors))
        at_narrowest = shares @ choices.narrowest
        self.shares = self._tensor((shares / at_narrowest[:, None]).T)
        self._first = torch.tensor([b.groups[0] for b in graph.branches], device=device)

    def smooth(self, widths: Tensor) -> Tensor:
        """Gates in [0, 1], differentiable: 1 from the narrowest widths on."""
        return (widths @ self.shares).clamp_max(1.0)

    def hard(self, widths: Tensor) -> Tensor:
        """Gates of widths in which the internal groups of a branch are zero together: 0 or 1.

        The first internal group decides, so that a cost that is gated stays a sum over pairs of
        groups also where the widths of a branch disagree.
        """
        return (widths[..., self._first] > 0).to(widths.dtype)

    def floored(self, widths: Tensor) -> Tensor:
        """Widths with internal groups at their narrowest or wider; the gates say the rest."""
        return torch.maximum(widths, self._floors)

    def members(self, branch_of: Sequence[int | None]) -> Tensor:
        """(branches, items) 1 where an item is in the branch: for ``spread``.

        Args:
            branch_of: of each item; None where it is in none.
        """
        found = np.zeros((len(self._graph.branches), len(branch_of)))
        for item, branch in enumerate(branch_of):
            if branch is not None:
                found[branch, item] = 1.0
        return self._tensor(found)

    def closers(self) -> Tensor:
        """(groups, layers) 1 where a layer is gone when the group has width zero: its branch's
        internal groups that it touches, or the first of them if it touches none."""
        found = np.zeros((len(self._graph.coupling.groups), len(self._graph.layers)))
        for column, (layer, number) in enumerate(
            zip(self._graph.layers, branch_of_layers(self._graph), strict=True)
        ):
            if number is None:
                continue
            groups = self._graph.branches[number].groups
            touched = np.flatnonzero(layer.cin.coefficients + layer.cout.coefficients)
            own = [g for g in groups if g in touched]
            found[own or groups[:1], column] = 1.0
        return self._tensor(found)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=self._dtype, device=self._device)


def spread(gates: Tensor, members: Tensor) -> Tensor:
    """(..., items): the gate of each item's branch, 1 for items in none."""
    return 1.0 - (1.0 - gates) @ members


def branch_of_layers(graph: DeployedGraph) -> list[int | None]:
    """(layers,) number of the removable branch that a layer is in."""
    number = {name: i for i, branch in enumerate(graph.branches) for name in branch.layers}
    return [number.get(layer.name) for layer in graph.layers]


def bare_layers(graph: DeployedGraph) -> list[int | None]:
    """As ``branch_of_layers``, only for layers without an internal group: those whose FLOPs and
    weights do not go by themselves when the internal widths are zero."""
    found = branch_of_layers(graph)
    for index, (layer, number) in enumerate(zip(graph.layers, found, strict=True)):
        if number is None:
            continue
        touched = layer.cin.coefficients + layer.cout.coefficients
        if touched[list(graph.branches[number].groups)].any():
            found[index] = None
    return found


def _shares(graph: DeployedGraph, groups: Sequence[int], layers: Sequence[str]) -> np.ndarray:
    """(groups,) FLOPs a channel of each internal group, of the branch's layers that touch it."""
    shares = np.zeros(len(graph.coupling.groups))
    for layer in graph.layers:
        if layer.name not in layers:
            continue
        cin, cout = (round(side(graph.dense_widths)) for side in (layer.cin, layer.cout))
        touched = layer.cin.coefficients + layer.cout.coefficients
        for group in groups:
            if touched[group]:
                shares[group] += layer.spec.flops(cin, cout) / graph.dense_widths[group]
    return shares
