"""What proves a run: the last measurement, and that removing was what masking is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dsa_hw.allocation.target_loop import Timed
from dsa_hw.network.agreement import masked_and_cut_difference, outputs_on, random_batches
from dsa_hw.network.forward import Inputs
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.network.masks import ChannelMasks, hard_masks
from dsa_hw.network.removal import Keep
from profilers.timing import Measurement


@dataclass(frozen=True)
class LastTiming:
    """The last measurement of a run.

    Args:
        measured: of the dense and the pruned network.
        timed: against the target; None without one.
    """

    measured: dict[str, Measurement]
    timed: Timed | None


def masked_difference(
    model: nn.Module, small: nn.Module, graph: DeployedGraph, keep: Keep, example: Inputs
) -> float:
    """Largest difference between the masked dense network and the pruned one, on random inputs.

    Raises:
        UnsupportedModel: it is more than rounding explains.
    """
    masks = ChannelMasks(model, graph.coupling, example, branches=graph.branches)
    masks.set(*hard_masks(graph.coupling, graph.branches, keep))
    batches = random_batches(example)
    try:
        masked = outputs_on(model, batches)
    finally:
        masks.remove()
    return masked_and_cut_difference(masked, outputs_on(small, batches))
