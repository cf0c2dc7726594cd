"""Which widths each group may have on a device: the steps of its staircase."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dsa_hw.deployed import DeployedGraph

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


def random_off_steps(
    graph: DeployedGraph,
    choices: WidthChoices,
    rng: np.random.Generator,
    part: int = 4,
    least_keep_ratio: float = 0.25,
) -> tuple[int, ...]:
    """Random widths at a ``part`` of the steps (of a group's atom, where that is wider)."""
    return tuple(
        dense if low == dense else int(rng.integers(low // unit, dense // unit + 1)) * unit
        for low, dense, unit in _between_steps(graph, choices, part, least_keep_ratio)
    )


def least_off_steps(graph: DeployedGraph, choices: WidthChoices) -> np.ndarray:
    """(groups,) the smallest widths that the choices or ``random_off_steps`` give a group."""
    between = np.array([low for low, _, _ in _between_steps(graph, choices)])
    return np.minimum(choices.narrowest, between)


def _between_steps(
    graph: DeployedGraph, choices: WidthChoices, part: int = 4, least_keep_ratio: float = 0.25
) -> list[tuple[int, int, int]]:
    """(least width, dense width, unit) of every group's widths between steps."""
    found = []
    rows = zip(graph.coupling.groups, choices.steps, choices.dense.tolist(), strict=True)
    for group, step, dense in rows:
        unit = math.lcm(group.atom_channels, max(1, step // part))
        low = math.ceil(least_keep_ratio * dense / unit) * unit
        free = not group.frozen and dense // unit * unit > low
        found.append((low if free else dense, dense, unit))
    return found


def width_choices(graph: DeployedGraph, steps: Mapping[str, int]) -> WidthChoices:
    """The choices of every group.

    Args:
        steps: the measured step of each kind of layer.
    """
    touching: list[set[int]] = [{g.atom_channels} for g in graph.coupling.groups]
    for layer in graph.layers:
        for side in (layer.cin, layer.cout):
            for group in np.flatnonzero(side.coefficients):
                touching[group].add(steps[layer.spec.kind])
    together = tuple(branch.groups for branch in graph.branches)
    removable = {group for groups in together for group in groups}
    widths, chosen_steps = [], []
    for index, (group, found) in enumerate(zip(graph.coupling.groups, touching, strict=True)):
        step = math.lcm(*found)
        dense = group.dense_width
        below = [] if group.frozen else list(range(step, dense, step))
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
