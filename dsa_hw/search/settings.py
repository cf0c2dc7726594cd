"""Settings of the search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsa_hw.search.holding import ConstraintMethod

MaskKind = Literal["soft", "sampled", "hard"]


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """The schedule; the defaults need no tuning for a network or a dataset.

    Args:
        warmup: least and most of the steps without masks, as fractions, from random weights; in
            between the search begins as soon as the loss has fallen.
        trained_warmup: the steps without masks, as a fraction, where the weights were trained.
        fallen: the loss has fallen when its average is at most this part of its first average.
        beta2: inexactness at the start and at the end, in spreads of log importance.
        budget_ramp: fraction of the search, without the warm-up, over which the target is lowered.
        validation_every: steps between two moves of the keep ratios, at most; masks follow at each.
        moves: at least so many in a search: a short one moves more often, up to every second step.
        keep_ratio_lr: Adam's step for the keep ratios, falling to a tenth; the least.
        travel: sum of the moves' steps if they did not fall, at least: where there are few moves
            they are longer, or the keep ratios would end near each other whatever the gradient.
        constraint: how the budgets are held while the keep ratios move.
        mask_training: whether the weights are trained under the masks (the paper). If not, masks
            are on the validation passes alone, and the network is cut when the search ends.
        masks: ``soft`` scales channels by their keep probabilities; ``sampled`` draws zeros and
            ones with these probabilities (the paper); ``hard`` keeps the most important channels,
            as many as the keep ratio says. The last two pass the gradient straight through to the
            probabilities. A group that only batch-norms read hardly feels soft masks while beta2 is
            small: all of its channels shrink alike, and the batch-norm divides that out.
        log_every: steps between two events of the history (each waits for the device once).
    """

    warmup: tuple[float, float] = (0.4, 0.7)
    trained_warmup: float = 0.1
    fallen: float = 0.95
    beta2: tuple[float, float] = (2.0, 50.0)
    budget_ramp: float = 0.9
    validation_every: int = 8
    moves: int = 80
    keep_ratio_lr: float = 0.04
    travel: float = 5.0
    constraint: ConstraintMethod = "projection"
    mask_training: bool = False
    masks: MaskKind = "soft"
    log_every: int = 10
