"""Taylor importance by gates, as HALP and MDP use it.

Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, arXiv:1906.10771:
what a channel contributes is, to first order, |gradient of the loss to a gate of value 1 on it|;
behind a batch-norm that is |gamma * dL/dgamma + beta * dL/dbeta|. Here the gate is an atom's, so
the contributions of coupled layers are added before the absolute value is taken. The averaging is
the search's own (``importance.TaylorScores``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from dsa_hw.comparison.methods.method import Workbench
from dsa_hw.network.coupling import Coupling
from dsa_hw.network.masks import ChannelMasks
from dsa_hw.training.schedule import Stage
from dsa_hw.worth.taylor import TaylorScores


class TaylorGates:
    """Gates on a model that is being trained; importance is averaged over its batches.

    Args:
        model: on its training device; the gates stay on until ``remove``.
        example_inputs: (N, C, H, W) on the same device.
    """

    def __init__(self, model: nn.Module, coupling: Coupling, example_inputs: Tensor) -> None:
        device = example_inputs.device
        self._masks = ChannelMasks(model, coupling, example_inputs)
        self._scores = TaylorScores(coupling, device, squared=False, decay=0.0)
        self.kept = self._scores.present.float()
        self._gates = self.kept
        self._open()

    def note(self) -> None:
        """After each backward pass: take its gradient in."""
        if self._gates.grad is not None:
            self._scores.note_atoms(self._gates.grad)
        self._open()

    def importance(self) -> np.ndarray:
        """(groups, atoms) mean over the batches since the last call; 0 where closed."""
        mean = (self._scores.mean() * self.kept).cpu().numpy()
        self._scores.forget()
        return mean

    def close(self, kept: Tensor) -> None:
        """Let only the atoms of ``kept`` (groups, atoms) through from now on."""
        self.kept = kept.to(self.kept)
        self._open()

    def remove(self) -> None:
        """Give the model back as it was."""
        self._masks.remove()

    def state_dict(self) -> dict[str, Any]:
        """For an exact resume."""
        return {"kept": self.kept.clone(), "scores": self._scores.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self._scores.restore(state["scores"])
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
