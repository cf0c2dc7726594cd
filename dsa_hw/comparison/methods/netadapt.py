"""Greedy adaptation, after NetAdapt.

Yang et al., "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications", ECCV
2018, arXiv:1804.03230: in each iteration every layer in turn is made just small enough to save the
iteration's latency (by a table), the filters of least magnitude go, each proposal is trained for a
short time, and the one of the highest accuracy on held-out data is kept; at the end comes a long
fine-tuning.

Differences: a coupled group is what a layer is in the paper; magnitude is the filters' relative L1
norm; the search's epochs are split in halves, dense training and short-term training, so that the
network that comes out has had as many updates as any other here (the proposals that lose are
trained beside it: this search costs as many times the short-term half as there are groups); the
last reduction is settled by the closed loop, nearest to the last proposal that won.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dsa_hw.allocation.allocate import allocate
from dsa_hw.comparison.methods.method import Made, Workbench
from dsa_hw.cost.choices import WidthChoices
from dsa_hw.network.coupling import ChannelMap, Coupling
from dsa_hw.network.removal import Keep, remove_channels
from dsa_hw.runs.config import PruneConfig
from dsa_hw.surgery.channels import keep_most_important
from dsa_hw.worth.importance import AtomImportance
from dsa_hw.worth.values import closeness

ITERATIONS = 10
CHECKPOINT = "netadapt"


@dataclass(frozen=True)
class _Net:
    """A network on the way down: its weights, and which atoms of the dense one it has."""

    model: nn.Module
    keep: Keep
    widths: np.ndarray


class NetAdapt:
    """Greedy proposals, kept by held-out accuracy."""

    title = "greedy (after NetAdapt)"

    def epochs_before(self, config: PruneConfig) -> int:
        """Dense and short-term training."""
        return config.search_epochs

    def make(self, bench: Workbench) -> Made:
        """Train, adapt step by step, settle the last step by measuring."""
        dense_epochs = bench.config.search_epochs - _adapting_epochs(bench.config)
        model = bench.train_dense(dense_epochs, searching=True)
        adaptation = _Adaptation(bench, model)
        before, last = adaptation.run()
        narrower = _up_to(bench.choices, before.widths)
        values = closeness(narrower, last.widths.astype(float))
        allocation = allocate(narrower, values, [bench.budget], bench.measure)
        net = last
        if not np.array_equal(allocation.widths, last.widths):
            net = adaptation.recut(before, allocation.widths)
        return Made(net.model, net.keep, allocation, last.widths / bench.choices.dense)


def _adapting_epochs(config: PruneConfig) -> int:
    return config.search_epochs // 2


class _Adaptation:
    """The iterations; goes on from the folder's checkpoint if there is one."""

    def __init__(self, bench: Workbench, dense: nn.Module) -> None:
        self._bench, self._dense = bench, dense
        self._coupling = bench.graph.coupling
        self._batches = bench.trainer.search_batches()
        self._seen = 0  # batches, by all proposals
        self._since = 0  # updates since the network before the last iteration that cut

    def run(self) -> tuple[_Net, _Net]:
        """The networks before the last iteration that made one smaller, and at the end."""
        keep = [np.ones(g.atoms, bool) for g in self._coupling.groups]
        last = _Net(self._dense, keep, self._bench.choices.dense)
        before, done = last, 0
        state = self._bench.folder.load_checkpoint(CHECKPOINT)
        if state is not None:
            before, last, done = (
                self._load(state["before"]),
                self._load(state["last"]),
                state["done"],
            )
            self._since, self._seen = state["since"], state["seen"]
            self._batches = self._bench.trainer.search_batches(self._seen)
        dense_ms, target = self._ms(self._bench.choices.dense), self._bench.budget.target
        for number in range(done + 1, ITERATIONS + 1):
            limit_ms = dense_ms * (target / dense_ms) ** (number / ITERATIONS)
            if self._ms(last.widths) <= limit_ms:
                model = copy.deepcopy(last.model)
                self._train(model, self._steps(number), number)
                last = dataclasses.replace(last, model=model)
                self._since += self._steps(number)
            else:
                before, last = last, self._iterate(last, limit_ms, number)
                self._since = self._steps(number)
            state = {
                "before": _saved(before), "last": _saved(last), "done": number,
                "since": self._since, "seen": self._seen,
            }  # fmt: skip
            self._bench.folder.save_checkpoint(CHECKPOINT, state)
        return before, last

    def recut(self, before: _Net, widths: np.ndarray) -> _Net:
        """``before`` at other widths, with as many updates as the iterations after it have had."""
        net = _cut(self._coupling, before, widths)
        self._train(net.model, self._since, ITERATIONS)
        return net

    def _steps(self, number: int) -> int:
        """Updates of an iteration; together those of the epochs."""
        every = _adapting_epochs(self._bench.config) * self._bench.trainer.steps
        return every * number // ITERATIONS - every * (number - 1) // ITERATIONS

    def _train(self, model: nn.Module, steps: int, number: int) -> None:
        at = self._progress(number)
        self._bench.trainer.train_briefly(model, self._batches, steps, at)
        self._seen += steps

    def _iterate(self, net: _Net, limit_ms: float, number: int) -> _Net:
        """The best proposal."""
        best, best_accuracy, best_widths = net, -1.0, net.widths
        for widths in self._proposals(net.widths, limit_ms):
            made = _cut(self._coupling, net, widths)
            self._train(made.model, self._steps(number), number)
            accuracy = self._bench.trainer.validation_accuracy(made.model)
            if accuracy > best_accuracy:
                best, best_accuracy, best_widths = made, accuracy, widths
        self._bench.folder.log(
            {
                "event": "netadapt", "iteration": number, "limit_ms": limit_ms,
                "modelled_ms": self._ms(best_widths), "validation_accuracy": best_accuracy,
                "widths": best_widths.tolist(),
            }
        )  # fmt: skip
        return best

    def _proposals(self, widths: np.ndarray, limit_ms: float) -> list[np.ndarray]:
        """Each group alone at its largest width within the limit.

        Where no group alone can save that much, each at its least width: the next iterations save
        the rest.
        """
        within, least = [], []
        for group, allowed in enumerate(self._bench.choices.widths):
            smaller = [w for w in allowed if w < widths[group]]
            if not smaller:
                continue
            rows = np.repeat(widths[None], len(smaller), axis=0)
            rows[:, group] = smaller
            fits = np.flatnonzero(self._bench.modelled_ms(rows) <= limit_ms)
            least.append(rows[0])
            if len(fits):
                within.append(rows[fits[-1]])
        return within or least

    def _progress(self, number: int) -> float:
        """Place in the learning rate's schedule."""
        config = self._bench.config
        adapting = _adapting_epochs(config)
        done = config.search_epochs - adapting + adapting * number / ITERATIONS
        return done / config.epochs

    def _ms(self, widths: np.ndarray) -> float:
        return float(self._bench.modelled_ms(widths[None])[0])

    def _load(self, state: dict) -> _Net:
        keep = [k.numpy() for k in state["keep"]]
        model = remove_channels(self._dense, self._coupling, keep)
        model.load_state_dict(state["model"])
        return _Net(self._bench.trainer.prepare(model), keep, np.array(state["widths"]))


def _saved(net: _Net) -> dict:
    return {
        "keep": [torch.as_tensor(k) for k in net.keep],
        "model": net.model.state_dict(),
        "widths": net.widths.tolist(),
    }


def _cut(coupling: Coupling, net: _Net, widths: np.ndarray) -> _Net:
    """``net`` at smaller widths: the filters of least magnitude go."""
    now = shrunken(coupling, net.keep)
    scores = AtomImportance(net.model, now, "filter_l1")().cpu().numpy()
    atoms = [s[: g.atoms] for s, g in zip(scores, now.groups, strict=True)]
    own = keep_most_important(now, widths, atoms)
    model = remove_channels(net.model, now, own)
    keep = []
    for old, stays in zip(net.keep, own, strict=True):
        kept = copy.copy(old)
        kept[np.flatnonzero(old)[~stays]] = False
        keep.append(kept)
    return _Net(model, keep, np.asarray(widths))


def shrunken(coupling: Coupling, keep: Keep) -> Coupling:
    """The coupling of the network that ``keep`` leaves."""
    groups = tuple(
        dataclasses.replace(
            group, dense_width=int(kept.sum()) * group.atom_channels, atoms=int(kept.sum())
        )
        for group, kept in zip(coupling.groups, keep, strict=True)
    )
    number = [np.cumsum(kept) - 1 for kept in keep]
    maps = {}
    for side, mapping in coupling.maps.items():
        stays = mapping.kept(keep)
        group, atom = mapping.group[stays], mapping.atom[stays].copy()
        for index in np.unique(group[group >= 0]):
            atom[group == index] = number[index][atom[group == index]]
        maps[side] = ChannelMap(group, atom)
    return Coupling(groups, maps)


def _up_to(choices: WidthChoices, widths: np.ndarray) -> WidthChoices:
    """The choices that are no wider than ``widths``."""
    return WidthChoices(
        tuple(
            tuple(w for w in allowed if w <= most)
            for allowed, most in zip(choices.widths, widths, strict=True)
        ),
        choices.steps,
    )
