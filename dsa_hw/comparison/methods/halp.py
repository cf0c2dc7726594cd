"""A latency knapsack, after HALP.

Shen et al., "Structural Pruning via Latency-Saliency Knapsack", NeurIPS 2022, arXiv:2210.06659:
channels are ranked by Taylor importance and taken in chunks of the device's step; a chunk saves
the latency that the table gives for its layers' output channels at the present input channels; a
0/1 knapsack in which a chunk needs the more important ones before it decides what stays; pruning
happens in many small steps during training, under a capacity that falls exponentially.

Differences: coupled layers are one item (their latencies are added, and see ``gates`` for their
importance); the knapsack is solved exactly by dynamic programming over how many chunks each group
keeps, latency rounded up to 1/2000 of the capacity; the last step's capacity is searched until the
measured latency is at the target (the paper has none to reach). As in the paper, what a chunk
saves in the layers that read it is not counted within a step.
"""

from __future__ import annotations

import numpy as np
import torch

from dsa_hw.comparison.methods.gates import TaylorGates, gated_training
from dsa_hw.comparison.methods.method import Made, Workbench
from dsa_hw.comparison.methods.to_target import reach_target
from dsa_hw.cost.choices import WidthChoices
from dsa_hw.errors import InfeasibleBudget
from dsa_hw.network.removal import remove_channels
from dsa_hw.runs.config import PruneConfig
from dsa_hw.surgery.channels import keep_most_important

PRUNING_STEPS = 30
PRUNED_OVER = (0.5, 0.9)
"""Part of the search epochs in which pruning steps fall."""
LEFT_FOR_THE_LAST = 1.15
"""Of the target, where the last pruning step in training ends; the closed loop takes the rest. What
is closed stays closed, and a chunk's step may be a tenth of a network's latency: from 1.06 of the
target two of three networks ended 11% under it."""
BINS = 2000
CAPACITIES = 128


class Halp:
    """Iterative knapsacks during training, then one at the measured target."""

    title = "knapsack (after HALP)"

    def epochs_before(self, config: PruneConfig) -> int:
        """Training and pruning steps."""
        return config.search_epochs

    def make(self, bench: Workbench) -> Made:
        """Train, closing gates on the way, and remove what is closed in the end."""
        pruning = _Pruning(bench)
        model, gates = gated_training(bench, pruning.after_step)
        last = pruning.knapsack(gates)
        allocation = reach_target(last.within, bench.budget, bench.measure)
        keep = keep_most_important(bench.graph.coupling, allocation.widths, last.atoms)
        gates.remove()
        small = remove_channels(model, bench.graph.coupling, keep)
        ratios = allocation.widths / bench.choices.dense
        return Made(small, keep, allocation, ratios, source=model)


class _Pruning:
    """When to close gates, and which."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        steps = bench.config.search_epochs * bench.trainer.steps
        first, last = (round(f * steps) for f in PRUNED_OVER)
        self._at = {int(s): i for i, s in enumerate(np.linspace(first, last, PRUNING_STEPS), 1)}
        self._dense_ms = float(bench.modelled_ms(bench.choices.dense[None])[0])

    def after_step(self, gates: TaylorGates, step: int) -> None:
        """Solve and close gates where the schedule says so."""
        if step not in self._at:
            return
        share = self._at[step] / PRUNING_STEPS
        goal_ms = min(self._dense_ms, LEFT_FOR_THE_LAST * self._bench.budget.target)
        limit_ms = self._dense_ms * (goal_ms / self._dense_ms) ** share
        knapsack = self.knapsack(gates)
        keep = keep_most_important(
            self._bench.graph.coupling, knapsack.within(limit_ms), knapsack.atoms
        )
        gates.close(torch.as_tensor(self.stacked(keep)))

    def knapsack(self, gates: TaylorGates) -> Knapsack:
        """The problem at the present widths and importances."""
        groups = self._bench.graph.coupling.groups
        kept = self._bench.split_atoms(gates.kept.cpu().numpy())
        widths = np.array(
            [round(float(k.sum())) * g.atom_channels for k, g in zip(kept, groups, strict=True)]
        )
        atoms = self._bench.split_atoms(gates.importance())
        # an open gate without any gradient is still worth more than a closed one
        atoms = [a + 1e-20 * k for a, k in zip(atoms, kept, strict=True)]
        return Knapsack(self._bench, widths, atoms)

    def stacked(self, keep: list[np.ndarray]) -> np.ndarray:
        """(groups, atoms) 1 where an atom stays, padded with 0."""
        rows = np.zeros((len(keep), max(map(len, keep))), np.float32)
        for row, kept in zip(rows, keep, strict=True):
            row[: len(kept)] = kept
        return rows


class Knapsack:
    """Which chunks stay, given what they are worth and what they cost at the present widths.

    Args:
        widths: (groups,) now; nothing grows.
        atoms: importance of every atom, a group's (atoms,).
    """

    def __init__(self, bench: Workbench, widths: np.ndarray, atoms: list[np.ndarray]) -> None:
        self.atoms = atoms
        self._bench, self._now = bench, widths
        self._options = _no_wider(bench.choices, widths)
        self._values = [
            np.cumsum(np.sort(scores)[::-1])[np.array(offered) * len(scores) // dense - 1]
            for offered, scores, dense in zip(
                self._options, atoms, bench.choices.dense, strict=True
            )
        ]
        self._costs, self._fixed_ms = self._own_ms()

    def within(self, limit_ms: float) -> np.ndarray:
        """The most important widths whose modelled latency is within the limit.

        The knapsack's own sum overstates latency (inputs shrink too), by more for some widths than
        for others: of the solutions for many capacities, the most important one that fits.

        Raises:
            InfeasibleBudget: the smallest widths cost more.
        """
        least = np.array([offered[0] for offered in self._options])
        least_ms = float(self._bench.modelled_ms(least[None])[0])
        if least_ms > limit_ms:
            raise InfeasibleBudget(
                f"the knapsack cannot reach {limit_ms:.4g} ms: with every group at its smallest "
                f"width the network has {least_ms:.4g} ms"
            )
        highest = 2.0 * limit_ms + self._fixed_ms
        solved = [self.solve(c) for c in np.linspace(0.2 * least_ms, highest, CAPACITIES)]
        widths = np.unique([least, *(w for w in solved if w is not None)], axis=0)
        fitting = widths[self._bench.modelled_ms(widths) <= limit_ms]
        return self._filled(max(fitting, key=self._worth), limit_ms)

    def _filled(self, widths: np.ndarray, limit_ms: float) -> np.ndarray:
        """Wider, a chunk at a time, as long as the modelled latency stays within the limit.

        The knapsack sees no latency that a chunk saves in the layers that read it, so that its
        sum leaves room which no capacity fills.
        """
        while True:
            wider = []
            for group, offered in enumerate(self._options):
                following = [w for w in offered if w > widths[group]]
                if following:
                    candidate = widths.copy()
                    candidate[group] = following[0]
                    wider.append(candidate)
            if not wider:
                return widths
            candidates = np.array(wider)
            fitting = candidates[self._bench.modelled_ms(candidates) <= limit_ms]
            if not len(fitting):
                return widths
            widths = max(fitting, key=self._worth)

    def _worth(self, widths: np.ndarray) -> float:
        """Importance that stays at these widths."""
        return sum(
            float(value[offered.index(int(w))])
            for value, offered, w in zip(self._values, self._options, widths, strict=True)
        )

    def solve(self, capacity_ms: float) -> np.ndarray | None:
        """(groups,) the most important widths whose own costs fit; None where none do."""
        least = sum(float(c.min()) for c in self._costs)
        room = capacity_ms - self._fixed_ms - least
        if room < 0:
            return None
        chosen = choose(self._values, [c - c.min() for c in self._costs], room)
        return np.array([o[i] for o, i in zip(self._options, chosen, strict=True)])

    def _own_ms(self) -> tuple[list[np.ndarray], float]:
        """ms of each group's layers at each of its options, inputs as they are; and the rest."""
        model = self._bench.budget.model
        costs = []
        for group, offered in enumerate(self._options):
            owned = [bool(x.cout.coefficients[group]) for x in self._bench.graph.layers]
            rows = np.repeat(self._now[None], len(offered), axis=0)
            rows[:, group] = offered
            with torch.no_grad():
                layer_ms = model.layer_ms(torch.as_tensor(rows).float(), staircase=True)
            costs.append(layer_ms[:, torch.tensor(owned)].sum(-1).double().numpy())
        total = float(self._bench.modelled_ms(self._now[None])[0])
        return costs, total - sum(float(c[-1]) for c in costs)


def choose(values: list[np.ndarray], costs: list[np.ndarray], capacity: float) -> list[int]:
    """One option a group, the highest total value with the total cost within the capacity.

    Exact for costs in whole bins (rounded up): dynamic programming over groups.

    Args:
        values, costs: per group, one number an option; each group's least cost is 0.
    """
    bin_ms = max(capacity, 1e-12) / BINS
    best = np.zeros(BINS + 1)
    picks = []
    for value, cost in zip(values, costs, strict=True):
        table = np.full((len(value), BINS + 1), -np.inf)
        for row, v, bins in zip(table, value, np.ceil(cost / bin_ms - 1e-9), strict=True):
            if bins <= BINS:
                row[int(bins) :] = best[: BINS + 1 - int(bins)] + v
        picks.append(table.argmax(0))
        best = table.max(0)
    chosen, left = [], BINS
    for pick, cost in zip(reversed(picks), reversed(costs), strict=True):
        option = int(pick[left])
        chosen.append(option)
        left -= int(np.ceil(cost[option] / bin_ms - 1e-9))
    return chosen[::-1]


def _no_wider(choices: WidthChoices, widths: np.ndarray) -> list[tuple[int, ...]]:
    return [
        tuple(w for w in allowed if w <= now)
        for allowed, now in zip(choices.widths, widths, strict=True)
    ]
