"""Learn from the dense network as well as from the labels.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531,
section 2: cross entropy with the labels, and with the teacher's outputs softened by a temperature,
the latter times its square, so that its gradient does not shrink with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Distillation:
    """A teacher, and how much of the loss it has.

    Args:
        teacher: the dense network, on the training device; kept in evaluation mode.
        weight: its share of the loss, in (0, 1].
        temperature: softens both networks' outputs.
    """

    teacher: nn.Module
    weight: float
    temperature: float

    def loss(self, label_loss: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
        """The mixed loss.

        Args:
            label_loss: scalar, of the same batch.
            outputs: (N, classes) of the student.
            inputs: (N, C, H, W).
        """
        self.teacher.eval()
        with torch.no_grad():
            wanted = self.teacher(inputs)
        imitation = soft_cross_entropy(outputs.float(), wanted.float(), self.temperature)
        return torch.lerp(label_loss.float(), imitation, self.weight)


def soft_cross_entropy(outputs: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened outputs, times the temperature's square; scalar."""
    ours = F.log_softmax(outputs / temperature, dim=-1)
    theirs = F.log_softmax(wanted / temperature, dim=-1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
