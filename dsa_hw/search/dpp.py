"""The differentiable pruning process: keep ratios -> keep probabilities of channels.

Ning et al., "DSA: More Efficient Budgeted Pruning via Differentiable Sparsity Allocation",
ECCV 2020, arXiv:2004.02164, section 3.2. With base importance b_i > 0,

    p_i = sigmoid(beta2 * (log b_i - log beta1)),    beta1 such that mean_i p_i = alpha,

and by implicit differentiation  dp_i / dalpha = C * f'_i / sum_j f'_j,  f'_i = p_i (1 - p_i).

Where this differs from the paper: all groups are solved at once, padded, on the tensors' device,
by a fixed number of safeguarded Newton steps in float64 on log beta1 (the release used SciPy per
layer to 0.02, and failed for alpha < 0.01); f'_i / sum_j f'_j is a softmax of
log p_i + log (1 - p_i), which stays finite when the process is all but exact; and beta2 is given
per group, in units of the spread of the group's log importance, so that one schedule fits any
scale of importance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 48
EDGE = 1e-9
"""Keep ratios are solved within [EDGE, 1 - EDGE]; at 1 every probability is 1 - EDGE or more."""


def keep_probabilities(
    keep_ratios: Tensor, log_importance: Tensor, present: Tensor, inexactness: Tensor
) -> Tensor:
    """Probabilities of keeping each atom, differentiable in ``keep_ratios``.

    Args:
        keep_ratios: (groups,) alpha in (0, 1].
        log_importance: (groups, atoms) natural logarithms, padded with any finite number.
        present: (groups, atoms) bool, false where padded.
        inexactness: (groups,) beta2 > 0; the larger, the closer to a threshold.

    Returns:
        (groups, atoms); zero where padded. The mean over a group's atoms is its keep ratio.
    """
    return _KeepProbabilities.apply(keep_ratios, log_importance, present, inexactness)


def standardized_inexactness(
    log_importance: Tensor, present: Tensor, beta2: float | Tensor, least_spread: float = 0.02
) -> Tensor:
    """(groups,) beta2 in units of the standard deviation of each group's log importance.

    Args:
        least_spread: spreads below it count as it: importances that hardly differ say little.
    """
    count = present.sum(-1)
    mean = torch.where(present, log_importance, 0.0).sum(-1) / count
    squares = torch.where(present, (log_importance - mean[:, None]) ** 2, 0.0).sum(-1) / count
    return beta2 / squares.sqrt().clamp_min(least_spread)


def solve_threshold(
    keep_ratios: Tensor, log_importance: Tensor, present: Tensor, inexactness: Tensor
) -> Tensor:
    """log beta1 of every group, (groups,) float64, from the expectation condition.

    The root is bracketed: were all importances equal to the least (greatest), the condition would
    hold at exactly log b - logit(alpha) / beta2. Newton steps that leave the bracket, and every
    other step, are replaced by bisection.
    """
    alpha = keep_ratios.double().clamp(EDGE, 1 - EDGE)
    scores = log_importance.double()
    beta2 = inexactness.double()
    count = present.sum(-1)
    offset = torch.logit(alpha) / beta2
    low = scores.masked_fill(~present, torch.inf).amin(-1) - offset
    high = scores.masked_fill(~present, -torch.inf).amax(-1) - offset
    middle = (low + high) / 2
    for step in range(STEPS):
        p = torch.sigmoid(beta2[:, None] * (scores - middle[:, None])).masked_fill(~present, 0.0)
        excess = p.sum(-1) / count - alpha
        low = torch.where(excess > 0, middle, low)
        high = torch.where(excess > 0, high, middle)
        newton = middle + excess * count / (beta2 * (p * (1 - p)).sum(-1)).clamp_min(1e-300)
        inside = (newton > low) & (newton < high) & (step % 2 == 0)
        middle = torch.where(inside, newton, (low + high) / 2)
    return middle


class _KeepProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keep_ratios, log_importance, present, inexactness):
        threshold = solve_threshold(keep_ratios, log_importance, present, inexactness)
        logits = inexactness.double()[:, None] * (log_importance.double() - threshold[:, None])
        ctx.save_for_backward(logits, present)
        probabilities = torch.sigmoid(logits).masked_fill(~present, 0.0)
        return probabilities.to(keep_ratios.dtype)

    @staticmethod
    def backward(ctx, *gradients):
        (gradient,) = gradients
        logits, present = ctx.saved_tensors
        slopes = F.logsigmoid(logits) + F.logsigmoid(-logits)
        share = torch.softmax(slopes.masked_fill(~present, -torch.inf), dim=-1)
        per_group = (gradient.double() * share).sum(-1) * present.sum(-1)
        return per_group.to(gradient.dtype), None, None, None


def sample_masks(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Bernoulli masks of the same shape; the gradient passes straight through to ``p``."""
    noise = torch.rand(
        probabilities.shape,
        generator=generator,
        device=probabilities.device,
        dtype=probabilities.dtype,
    )
    return straight_through((noise < probabilities).to(probabilities.dtype), probabilities)


def hard_top_masks(probabilities: Tensor, importance: Tensor, present: Tensor) -> Tensor:
    """Masks that keep each group's most important atoms, as many as its keep ratio says.

    The forward pass is that of the network as it would be cut. The gradient passes straight through
    to ``probabilities``, so that it weighs the atoms as the process does: most at its threshold.

    Args:
        probabilities: (groups, atoms), zero where padded; their mean is the keep ratio.
        importance: (groups, atoms), that ranks them.
        present: (groups, atoms) bool, false where padded.

    Returns:
        (groups, atoms) zeros and ones, at least one atom of each group.
    """
    wanted = probabilities.detach().sum(-1, keepdim=True).round().clamp_min(1.0)
    ranked = importance.masked_fill(~present, -torch.inf)
    rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return straight_through((rank < wanted).to(probabilities.dtype), probabilities)


def straight_through(value: Tensor, smooth: Tensor) -> Tensor:
    """``value`` in the forward pass, with the gradient of ``smooth``."""
    return value + (smooth - smooth.detach())  # in brackets: exactly ``value``
