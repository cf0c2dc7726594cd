"""Running statistics of batch-norms, taken again for a network that was cut.

What is left of a layer has other means and variances than the whole layer had. A few forward passes
measure them: no labels, no gradients. (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021,
arXiv:2105.07576, section 3: statistics of the whole model, averaged over batches with equal
weights, instead of a moving average of the last ones.)

Only batch-norms are put into training mode. Dropout and stochastic depth stay off, since their
noise would be measured too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def retake_statistics(model: nn.Module, batches: Iterable[Any], device: torch.device) -> int:
    """Replace the batch-norms' running statistics by those over ``batches``.

    A batch-norm that keeps none is left alone, and so is a frozen one: one that is in evaluation
    mode while ``model`` is in training mode.

    Args:
        model: changed in place; all its modules keep their modes.
        batches: (N, C, H, W) images, or tuples or lists that begin with them, as a data loader
            gives. Statistics fit the images that they are taken on: give some hundred of the
            training data, in batches of 16 or more. In several processes, the same to all.
        device: that the model is on.

    Returns:
        How many batches there were; without any, nothing is changed.
    """
    norms = _moving(model)
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    # How many updates training has made, which these passes are none of.
    updates = [None if (n := norm.num_batches_tracked) is None else n.clone() for norm in norms]
    count = 0
    try:
        model.eval()
        for batch in batches if norms else ():
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
            if count == 0:
                _start_anew(norms)
            model(images.to(device))
            count += 1
    finally:
        for norm, momentum, made in zip(norms, momenta, updates, strict=True):
            norm.momentum = momentum
            if made is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(made)
        for module, mode in modes:
            module.training = mode
    return count


def _moving(model: nn.Module) -> list[BatchNorm]:
    """The batch-norms whose statistics follow the data."""
    return [
        module
        for module in model.modules()
        if isinstance(module, BatchNorm)
        and isinstance(module.running_mean, Tensor)
        and (module.training or not model.training)
    ]


def _start_anew(norms: list[BatchNorm]) -> None:
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches, each weighing the same
        norm.training = True
