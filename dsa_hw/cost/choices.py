"""Which widths each group may have on a device: the steps of its staircase."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dsa_hw.network.graph import DeployedGraph

REMOVED_MOST = 0.5
"""Part of the removable branches that a random network may lose."""


@dataclass(frozen=True, slots=True)
class WidthChoices:
    """Allowed widths of every group, ascending, the dense width last.

    Widths between two steps cost what the next step up costs, so only steps are offered; a frozen
    group has its dense width only.

    Args:
        together: sets of groups that have width zero together or not at all: the internal groups
            of a branch that may be removed. Only they have a zero among their widths.
    """

    widths: tuple[tuple[int, ...], ...]
    steps: tuple[int, ...]
    together: tuple[tuple[int, ...], ...] = ()

    @property
    def least(self) -> np.ndarray:
        """(groups,) smallest widths; zero where a branch may be removed."""
        return np.array([w[0] for w in self.widths])

    @property
    def narrowest(self) -> np.ndarray:
        """(groups,) smallest widths above zero."""
        return np.array([w[1] if w[0] == 0 else w[0] for w in self.widths])

    @property
    def dense(self) -> np.ndarray:
        """(groups,) largest widths."""
        return np.array([w[-1] for w in self.widths])

    def allow(self, widths: Sequence[int]) -> bool:
        """Whether these are widths on steps."""
        return all(w in allowed for w, allowed in zip(widths, self.widths, strict=True))

    def without_removal(self) -> WidthChoices:
        """The same choices with all branches there to stay."""
        return WidthChoices(tuple(tuple(w for w in own if w) for own in self.widths), self.steps)

    def random(self, rng: np.random.Generator, least_keep_ratio: float = 0.25) -> tuple[int, ...]:
        """Random widths on steps: a common keep ratio, and each group's own around it.

        Half of the networks lose branches, up to half of those that may be removed. Which ones
        depends on the drawn widths alone: these are the same whether branches may be removed or
        not, so that networks measured before are measured networks now.
        """
        common = rng.uniform(least_keep_ratio, 1.0)
        chosen = []
        for allowed in self.widths:
            own = np.clip(common + rng.uniform(-0.35, 0.35), least_keep_ratio, 1.0)
            offered = [w for w in allowed if w >= least_keep_ratio * allowed[-1]]
            chosen.append(min(offered, key=lambda w: abs(w - own * allowed[-1])))
        if self.together:
            removal = np.random.default_rng(chosen)
            rate = removal.uniform(-REMOVED_MOST, REMOVED_MOST)
            for groups in self.together:
                if removal.random() < rate:
                    for group in groups:
                        chosen[group] = 0
        return tuple(chosen)


def width_choices(graph: DeployedGraph, steps: Mapping[str, int]) -> WidthChoices:
    """The choices of every group: the widest whole atoms on each tread of its largest step.

    Where steps of the layers that a group touches do not divide each other (12 and 16), widths on
    the smaller one are not offered, and those on the larger one cost a whole tread of the smaller.

    Args:
        steps: the measured step of each kind of layer.
    """
    touching: list[set[int]] = [{1} for _ in graph.coupling.groups]
    for layer in graph.layers:
        for side in (layer.cin, layer.cout):
            for group in np.flatnonzero(side.coefficients):
                touching[group].add(steps[layer.spec.kind])
    together = tuple(branch.groups for branch in graph.branches)
    removable = {group for groups in together for group in groups}
    widths, chosen_steps = [], []
    for index, (group, found) in enumerate(zip(graph.coupling.groups, touching, strict=True)):
        atom, dense = group.atom_channels, group.dense_width
        step = max(atom, *found)
        treads = {top // atom * atom for top in range(step, dense, step)}
        below = [] if group.frozen else sorted(treads)
        widths.append((*([0] if index in removable else []), *below, dense))
        chosen_steps.append(step)
    return WidthChoices(tuple(widths), tuple(chosen_steps), together)


def merged_choices(several: Sequence[WidthChoices]) -> WidthChoices:
    """Widths that every one of several budgets' devices allows (the dense width always is).

    Args:
        several: of one network, so that the same branches may be removed in all.
    """
    merged = []
    for offered in zip(*(c.widths for c in several), strict=True):
        common = set(offered[0]).intersection(*offered[1:]) | {offered[0][-1]}
        merged.append(tuple(sorted(common)))
    steps = tuple(math.lcm(*found) for found in zip(*(c.steps for c in several), strict=True))
    return WidthChoices(tuple(merged), steps, several[0].together)
