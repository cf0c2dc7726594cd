"""How far FLOPs mislead on a device: each group's share of the milliseconds and of the FLOPs.

A search weighs what a channel does for the loss against what it costs, and the budget decides what
counts as cost. Where every group has the same share of the milliseconds as of the FLOPs, a latency
budget and a FLOPs budget ask for the same network; the further apart the shares, the more a search
under FLOPs saves where it saves no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dsa_hw.cost.budget import Budget
from dsa_hw.cost.choices import WidthChoices
from dsa_hw.cost.counted import flops_budget
from dsa_hw.cost.latency.budget import ModelledLatency
from dsa_hw.cost.latency.profiling import CalibratedModel
from dsa_hw.network.graph import DeployedGraph

MIDDLE, LOW, HIGH = 0.6, 0.4, 0.8
"""Of the dense widths: a group goes from the high to the low one, all others at the middle."""


@dataclass(frozen=True, slots=True)
class GroupShare:
    """What narrowing a group saves, as a part of what narrowing every group alike saves.

    Args:
        name: of the group.
        ms: share of the modelled milliseconds.
        flops: share of the FLOPs.
    """

    name: str
    ms: float
    flops: float

    @property
    def ms_over_flops(self) -> float:
        """Above 1, narrowing the group saves more time than its FLOPs promise."""
        return self.ms / self.flops


def group_shares(graph: DeployedGraph, latency: CalibratedModel) -> list[GroupShare]:
    """Of every group that has a choice, in network order."""
    choices = latency.choices.without_removal()
    free = [i for i, own in enumerate(choices.widths) if len(own) > 1]
    ms = _shares(ModelledLatency(latency.model, 1.0), choices, free)
    flops = _shares(flops_budget(graph, 1.0), choices, free)
    names = [graph.coupling.groups[i].name for i in free]
    return [GroupShare(*row) for row in zip(names, ms, flops, strict=True)]


def _shares(budget: Budget, choices: WidthChoices, free: Sequence[int]) -> list[float]:
    """Of every free group, what is saved a part of its width; they add up to 1."""
    middle = np.array([_nearest(own, MIDDLE * own[-1]) for own in choices.widths])
    saved = []
    for group in free:
        own = choices.widths[group]
        low = _nearest(own[:-1], LOW * own[-1])
        high = _nearest([w for w in own if w > low], HIGH * own[-1])
        ends = np.stack([middle, middle])
        ends[:, group] = low, high
        narrow, wide = budget.charged(torch.as_tensor(ends, dtype=torch.float32)).tolist()
        saved.append((wide - narrow) * own[-1] / (high - low))
    total = sum(saved)
    return [s / total for s in saved]


def _nearest(widths: Sequence[int], wanted: float) -> int:
    return min(widths, key=lambda w: abs(w - wanted))
