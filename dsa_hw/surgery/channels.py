"""Really remove channels, and rebuild a pruned network from its run folder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsa_hw.network.coupling import Coupling


def keep_most_important(
    coupling: Coupling, widths: Sequence[int] | np.ndarray, importance: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Keep the atoms of the highest importance, as many as each group's width holds."""
    keep = []
    for group, width, scores in zip(coupling.groups, widths, importance, strict=True):
        kept = np.zeros(group.atoms, bool)
        order = np.argsort(-np.asarray(scores), kind="stable")
        kept[order[: int(width) // group.atom_channels]] = True
        keep.append(kept)
    return keep
