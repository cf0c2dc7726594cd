"""What removing a whole branch does to the latency."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hw.cost.branch_gates import BranchGates


@dataclass(frozen=True, slots=True)
class BranchTerms:
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
