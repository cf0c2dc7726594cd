"""Optimizers, and the learning rate over a run's steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dsa_hw.runs.config import PruneConfig

MOMENTUM = 0.9


@dataclass(frozen=True)
class Stage:
    """One stretch of training.

    Args:
        name: of its checkpoint and of its lines in the log.
        epochs: to train.
        first_step, all_steps: its place in the learning rate's schedule.
    """

    name: str
    epochs: int
    first_step: int
    all_steps: int


def make_optimizer(model: nn.Module, config: PruneConfig) -> torch.optim.Optimizer:
    """The configured optimizer over a model's parameters.

    On CUDA it is the fused one, which alone leaves it to the device to skip a step whose float16
    gradients overflowed: Accelerate's scaler reads that on the host for the others.
    """
    groups = parameter_groups(model, config.weight_decay)
    fused = all(p.is_cuda for p in model.parameters()) or None
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.resolved_lr, fused=fused)
    return torch.optim.SGD(
        groups, lr=config.resolved_lr, momentum=MOMENTUM, nesterov=True, fused=fused
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on weights and normalization scales, not on biases."""
    named = list(model.named_parameters())  # under a mask: "...parametrizations.bias.original"
    decayed = [p for n, p in named if "bias" not in n.split(".")]
    free = [p for n, p in named if "bias" in n.split(".")]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
