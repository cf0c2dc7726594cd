"""What widths are worth to rounding: kept importance, and nearness to learned widths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsa_hw.cost.choices import WidthChoices
from dsa_hw.errors import UserError

REMOVED = 0.25
"""Width of a removed group in values, in its narrowest widths. Closeness is even between the two
where the branch's gate is half closed; importance counts a removal like the loss of three quarters
of what the narrowest width keeps."""
KEPT_WEIGHT = 3.0
"""Of kept importance beside closeness; both are logarithms of shares."""


def closeness(
    choices: WidthChoices, widths: np.ndarray, curvature: np.ndarray | None = None
) -> list[np.ndarray]:
    """Value of every choice of every group: minus the squared log distance to ``widths``.

    At the optimum under a budget the loss's slope along the budget is zero, so what rounding loses
    is half of d' H d: a distance weighs as much as the loss bends with it.

    Zero counts as ``REMOVED`` of the narrowest width, and so does any learned width below that.

    Args:
        widths: (groups,) to be near to.
        curvature: (groups,) second derivative of the loss by the log of each group's width, in any
            unit; 1 for all if None.
    """
    weights = np.ones(len(widths)) if curvature is None else np.asarray(curvature, float)
    values = []
    for allowed, width, weight in zip(choices.widths, widths, weights, strict=True):
        offered = np.array(allowed, float)
        least = 1e-3
        if allowed[0] == 0:
            least = offered[0] = REMOVED * offered[1]
        values.append(-weight * np.log(offered / max(width, least)) ** 2)
    return values


def kept_importance(
    choices: WidthChoices, importance: Sequence[np.ndarray], layers: Sequence[int]
) -> list[np.ndarray]:
    """Value of every choice: log of the share of the group's importance that stays.

    Shares multiply along the network, hence the logarithm; a group counts once for each layer
    that makes its channels. Without its branch a network still has the shortcut: zero counts as
    ``REMOVED`` of the share of the narrowest width, and not as nothing.

    Args:
        importance: a group's atoms, (atoms,), non-negative.
        layers: the number of layers of each group.

    Raises:
        UserError: an importance is not finite.
    """
    values = []
    for group, scores in enumerate(importance):
        if not np.isfinite(scores).all():
            raise UserError(
                f"the importance of group {group} is not finite at {_where_not(scores)} of its "
                f"{len(scores)} atoms: see that the network's weights are numbers"
            )
    for allowed, scores, count in zip(choices.widths, importance, layers, strict=True):
        ordered = np.cumsum(np.sort(scores + 1e-12)[::-1])
        there = np.array(allowed[1:] if allowed[0] == 0 else allowed)
        shares = ordered[there * len(scores) // allowed[-1] - 1] / ordered[-1]
        if allowed[0] == 0:
            shares = np.append(REMOVED * shares[0], shares)
        values.append(count * np.log(shares))
    return values


def _where_not(scores: np.ndarray) -> int:
    """How many are not finite."""
    return int((~np.isfinite(scores)).sum())


def near_and_important(
    choices: WidthChoices,
    widths: np.ndarray,
    importance: Sequence[np.ndarray],
    layers: Sequence[int],
) -> list[np.ndarray]:
    """Value of every choice: ``kept_importance``, and less so ``closeness`` to ``widths``.

    For a network that is cut at once. What its fine-tuning ends with follows the importance that
    stays more closely than any width that was learned (docs/decisions.md).
    """
    near = closeness(choices, widths)
    kept = kept_importance(choices, importance, layers)
    return [n + KEPT_WEIGHT * k for n, k in zip(near, kept, strict=True)]
