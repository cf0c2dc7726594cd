"""Taylor importance by gates, as HALP and MDP use it.

Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, arXiv:1906.10771:
what a channel contributes is, to first order, |gradient of the loss to a gate of value 1 on it|;
behind a batch-norm that is |gamma * dL/dgamma + beta * dL/dbeta|. Here the gate is an atom's, so
the contributions of coupled layers are added before the absolute value is taken.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dsa_hw.comparison.methods.method import Workbench
from dsa_hw.network.coupling import Coupling
from dsa_hw.network.masks import ChannelMasks
from dsa_hw.training.schedule import Stage


class TaylorGates:
    """Gates on a model that is being trained; importance is averaged over its batches.

    Args:
        model: on its training device; the gates stay on until ``remove``.
        example_inputs: (N, C, H, W) on the same device.
    """

    def __init__(self, model: nn.Module, coupling: Coupling, example_inputs: Tensor) -> None:
        size = max(g.atoms for g in coupling.groups)
        self._masks = ChannelMasks(model, coupling, example_inputs)
        self.kept = torch.zeros(len(coupling.groups), size, device=example_inputs.device)
        for row, group in zip(self.kept, coupling.groups, strict=True):
            row[: group.atoms] = 1.0
        self._sum = torch.zeros_like(self.kept)
        self._batches = 0
        self._gates = self.kept
        self._open()

    def note(self) -> None:
        """After each backward pass: take its gradient in."""
        if self._gates.grad is not None:
            self._sum += self._gates.grad.abs()
            self._batches += 1
        self._open()

    def importance(self) -> np.ndarray:
        """(groups, atoms) mean over the batches since the last call; 0 where closed."""
        mean = (self._sum / max(1, self._batches) * self.kept).cpu().numpy()
        self._sum.zero_()
        self._batches = 0
        return mean

    def close(self, kept: Tensor) -> None:
        """Let only the atoms of ``kept`` (groups, atoms) through from now on."""
        self.kept = kept.to(self.kept)
        self._open()

    def remove(self) -> None:
        """Give the model back as it was."""
        self._masks.remove()

    def state_dict(self) -> dict[str, Tensor | int]:
        """For an exact resume."""
        return {"kept": self.kept.clone(), "sum": self._sum.clone(), "batches": self._batches}

    def load_state_dict(self, state: dict) -> None:
        """Continue where ``state_dict`` was taken."""
        self._sum.copy_(state["sum"])
        self._batches = state["batches"]
        self.close(state["kept"])

    def _open(self) -> None:
        self._gates = self.kept.clone().requires_grad_()
        self._masks.set(self._gates)


def gated_training(
    bench: Workbench, after_step: Callable[[TaylorGates, int], None]
) -> tuple[nn.Module, TaylorGates]:
    """Train a fresh network for the search's epochs with gates on it (and leave them on).

    Args:
        after_step: called after every optimizer step with the number of steps so far.
    """
    model = bench.trainer.prepare(bench.fresh_model())
    example = bench.example.to(bench.trainer.device)
    gates = TaylorGates(model, bench.graph.coupling, example)
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        gates.note()
        after_step(gates, steps)

    def state() -> dict:
        return {"gates": gates.state_dict(), "steps": steps}

    def load(kept: dict) -> None:
        nonlocal steps
        gates.load_state_dict(kept["gates"])
        steps = kept["steps"]

    stage = Stage("search", bench.config.search_epochs, 0, bench.all_steps)
    bench.trainer.train(model, stage, after_step=step, extra_state=state, load_extra=load)
    return model, gates
