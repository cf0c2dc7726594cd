"""Magnitude and Taylor pruning by the Torch-Pruning library itself, as its users call it.

Fang et al., "DepGraph", CVPR 2023, arXiv:2301.12900. One shot of global pruning on a trained
network, ``round_to`` set to the device's step (as users who know of the staircase do; without it
networks come out slower, see the README), then fine-tuning. The library knows ratios of channels,
not milliseconds: the ratio is searched until the latency fits.

The library leaves a group as it is where rounding would take all its channels. Latency is
therefore not monotone in the ratio, and the search goes over a grid before it bisects.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from dsa_hw.allocation.allocate import Allocation
from dsa_hw.comparison.methods.method import Made, Workbench
from dsa_hw.comparison.methods.to_target import reach_target
from dsa_hw.errors import InfeasibleBudget
from dsa_hw.network.coupling import Coupling
from dsa_hw.network.removal import kept_widths
from dsa_hw.runs.config import PruneConfig

GRID = 0.04
REFINEMENTS = 5
TAYLOR_BATCHES = 20


class Magnitude:
    """``tp.importance.GroupMagnitudeImportance`` (filters' L2 norm), globally ranked."""

    title = "Torch-Pruning, magnitude"

    def epochs_before(self, config: PruneConfig) -> int:
        """The dense network's training."""
        return config.search_epochs

    def make(self, bench: Workbench) -> Made:
        """Train, prune in one shot."""
        import torch_pruning as tp

        model = bench.train_dense(bench.config.search_epochs)
        return _prune(bench, model, lambda: tp.importance.GroupMagnitudeImportance(p=2))


class Taylor:
    """``tp.importance.GroupTaylorImportance`` from a few training batches, globally ranked."""

    title = "Torch-Pruning, Taylor"

    def epochs_before(self, config: PruneConfig) -> int:
        """The dense network's training."""
        return config.search_epochs

    def make(self, bench: Workbench) -> Made:
        """Train, take gradients, prune in one shot."""
        import torch_pruning as tp

        model = bench.train_dense(bench.config.search_epochs)
        bench.trainer.accumulate_gradients(model, TAYLOR_BATCHES)
        return _prune(bench, model, tp.importance.GroupTaylorImportance)


def _prune(bench: Workbench, model: nn.Module, importance: Callable[[], Any]) -> Made:
    ratios = _Ratios(bench, model, importance)
    allocation = reach_target(ratios.within, bench.budget, bench.measure)
    ratio, keep = ratios.of(allocation)
    small = ratios.pruned(ratio)
    model.zero_grad(set_to_none=True)
    return Made(small, keep, allocation, np.full(len(keep), 1.0 - ratio), source=model)


class _Ratios:
    """What the library makes of the network at one pruning ratio or another."""

    def __init__(self, bench: Workbench, model: nn.Module, importance: Callable[[], Any]) -> None:
        self._bench, self._model, self._importance = bench, model, importance
        self._seen: dict[float, list[np.ndarray]] = {}
        self._grid = [round(r, 6) for r in np.arange(GRID, 1.0, GRID)]

    def within(self, limit_ms: float) -> np.ndarray:
        """Widths at the lowest ratio (to a part of the grid) whose latency is in the limit."""
        below, found = 0.0, None
        for ratio in self._grid:
            if self._ms(ratio) <= limit_ms:
                found = ratio
                break
            below = ratio
        if found is None:
            least = min(map(self._ms, self._grid))
            raise InfeasibleBudget(
                f"Torch-Pruning reaches {least:.4g} ms at no ratio below 1, not "
                f"{limit_ms:.4g} ms: it leaves a group alone rather than take its last step"
            )
        for _ in range(REFINEMENTS):
            middle = round((below + found) / 2, 6)
            below, found = (below, middle) if self._ms(middle) <= limit_ms else (middle, found)
        return self._widths(found)

    def of(self, allocation: Allocation) -> tuple[float, list[np.ndarray]]:
        """The ratio (as a pruning ratio, the library's word) behind an allocation."""
        widths = allocation.widths.tolist()
        ratio = next(r for r in self._seen if self._widths(r).tolist() == widths)
        return ratio, self._seen[ratio]

    def pruned(self, ratio: float) -> nn.Module:
        """The network as the library prunes it."""
        small = copy_with_gradients(self._model)
        for group in self._step(small, ratio):
            group.prune()
        small.zero_grad(set_to_none=True)
        return small

    def _ms(self, ratio: float) -> float:
        return float(self._bench.modelled_ms(self._widths(ratio)[None])[0])

    def _widths(self, ratio: float) -> np.ndarray:
        coupling = self._bench.graph.coupling
        if ratio not in self._seen:
            self._seen[ratio] = self._select(ratio)
        return np.array(kept_widths(coupling, self._seen[ratio]))

    def _select(self, ratio: float) -> list[np.ndarray]:
        """Atoms that stay at a ratio; nothing is pruned."""
        names = {module: name for name, module in self._model.named_modules()}
        coupling = self._bench.graph.coupling
        keep = [np.ones(g.atoms, bool) for g in coupling.groups]
        for group in self._step(self._model, ratio):
            name = names[group[0].dep.target.module]
            _take_out(keep, coupling, name, np.asarray(group[0].idxs, int))
        return keep

    def _step(self, model: nn.Module, ratio: float):
        import torch_pruning as tp

        bench = self._bench
        modules = dict(model.named_modules())
        groups = bench.graph.coupling.groups
        frozen = [modules[name] for g in groups if g.frozen for name in g.layers]
        ends = [m for m in modules.values() if isinstance(m, nn.Linear)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its notices about unwrapped parameters
            pruner = tp.pruner.BasePruner(
                model,
                bench.example.to(bench.trainer.device),
                importance=self._importance(),
                global_pruning=True,
                pruning_ratio=ratio,
                round_to=bench.widest_step,
                ignored_layers=[*frozen, *ends[-1:]],
            )
            groups = pruner.step(interactive=True)
            assert groups is not None  # a generator, when interactive
            yield from groups


def _take_out(keep: list[np.ndarray], coupling: Coupling, name: str, indices: np.ndarray) -> None:
    if (name, "out") not in coupling.maps:
        return  # it is of no layer kind, and keeps its channels
    mapping = coupling.maps[name, "out"]
    for group, atom in zip(mapping.group[indices], mapping.atom[indices], strict=True):
        if group >= 0:
            keep[group][atom] = False


def copy_with_gradients(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters have copies of the gradients too."""
    import copy

    other = copy.deepcopy(model)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        mine.grad = None if theirs.grad is None else torch.clone(theirs.grad)
    return other
