"""Widths by one integer program, after MDP.

Sun et al., "MDP: Multidimensional Vision Model Pruning with Latency Constraint", CVPR 2025,
arXiv:2504.02168: after training, the kept Taylor importance is maximised in a single pass under
the latency of every layer at its input *and* output channels, which makes a mixed-integer
non-linear program over one-hot choices of each width.

Here a layer's product of two one-hot choices is written with the variables of a transport problem
(one a pair of choices, rows and columns summing to the choices), which is exact and linear, and
SciPy's HiGHS solves it. Differences: whole blocks are not removed (no baseline here does that);
latency is this project's calibrated model on the device's steps. A solver that finds nothing
raises.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from dsa_hw.comparison.methods.gates import TaylorGates, gated_training
from dsa_hw.comparison.methods.method import Made, State, Workbench
from dsa_hw.comparison.methods.to_target import reach_target
from dsa_hw.cost.choices import WidthChoices
from dsa_hw.cost.latency.model import LatencyModel
from dsa_hw.errors import InfeasibleBudget, UnsupportedModel
from dsa_hw.network.removal import remove_channels
from dsa_hw.runs.config import PruneConfig
from dsa_hw.surgery.channels import keep_most_important

TIME_LIMIT_S = 60.0
GAP = 1e-3


class Mdp:
    """One integer program on the trained network."""

    title = "integer program (after MDP)"

    def epochs_before(self, config: PruneConfig) -> int:
        """The dense network's training; importance is taken over its last epoch."""
        return config.search_epochs

    def make(self, bench: Workbench) -> Made:
        """Train, solve, remove."""
        state = bench.shared("taylor-gates", lambda: _train(bench))
        model = bench.trainer.prepare(bench.fresh_model())
        model.load_state_dict(state["model"])
        atoms = bench.split_atoms(state["importance"].numpy())
        program = WidthProgram(bench.choices, kept_values(bench.choices, atoms), bench.budget.model)
        allocation = reach_target(program.within, bench.budget, bench.measure)
        keep = keep_most_important(bench.graph.coupling, allocation.widths, atoms)
        small = remove_channels(model, bench.graph.coupling, keep)
        ratios = allocation.widths / bench.choices.dense
        return Made(small, keep, allocation, ratios, source=model)


def _train(bench: Workbench) -> State:
    """A dense network and its atoms' importance over the last epoch; no target changes them."""
    last_epoch = (bench.config.search_epochs - 1) * bench.trainer.steps

    def forget_early(gates: TaylorGates, step: int) -> None:
        if step == last_epoch:
            gates.importance()

    model, gates = gated_training(bench, forget_early)
    importance = torch.as_tensor(gates.importance())
    gates.remove()
    return {"model": model.state_dict(), "importance": importance}


def kept_values(choices: WidthChoices, atoms: list[np.ndarray]) -> list[np.ndarray]:
    """Per group and choice: importance of the atoms that stay, the most important first."""
    return [
        np.cumsum(np.sort(scores)[::-1])[np.array(allowed) * len(scores) // allowed[-1] - 1]
        for allowed, scores in zip(choices.widths, atoms, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Terms:
    """The latency as a constant, a number a choice, and a number a pair of choices."""

    constant_ms: float
    single_ms: list[np.ndarray]
    pair_ms: dict[tuple[int, int], np.ndarray]


class WidthProgram:
    """Maximise the value of one-hot choices under the staircase latency.

    Args:
        values: per group, one number a choice.

    Raises:
        UnsupportedModel: a layer's latency depends on more than two groups.
    """

    def __init__(
        self, choices: WidthChoices, values: list[np.ndarray], model: LatencyModel
    ) -> None:
        self._choices, self._values = choices, values
        self._terms = _latency_terms(choices, model)
        sizes = [len(w) for w in choices.widths]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self._pair_first: dict[tuple[int, int], int] = {}
        at = int(self._first[-1])
        for pair in self._terms.pair_ms:
            self._pair_first[pair] = at
            at += sizes[pair[0]] * sizes[pair[1]]
        self._variables = at

    def within(self, limit_ms: float) -> np.ndarray:
        """(groups,) the most valuable widths within the limit.

        Raises:
            InfeasibleBudget: the solver proves that there are none, or finds none in its time.
        """
        scale = sum(float(v.max()) for v in self._values) or 1.0
        objective = np.zeros(self._variables)
        objective[: self._first[-1]] = -np.concatenate(self._values) / scale
        integral = np.zeros(self._variables)
        integral[: self._first[-1]] = 1
        room = limit_ms - self._terms.constant_ms
        found = milp(
            objective,
            integrality=integral,
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(self._latency_row() / limit_ms, ub=room / limit_ms),
                *self._structure(),
            ],
            options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": GAP},
        )
        if found.x is None:
            raise InfeasibleBudget(
                f"the integer program found no widths within {limit_ms:.4g} ms in "
                f"{TIME_LIMIT_S:.0f} s ({found.message})"
            )
        return np.array(
            [
                allowed[int(np.argmax(found.x[first : first + len(allowed)]))]
                for allowed, first in zip(self._choices.widths, self._first[:-1], strict=True)
            ]
        )

    def _latency_row(self) -> np.ndarray:
        row = np.zeros(self._variables)
        row[: self._first[-1]] = np.concatenate(self._terms.single_ms)
        for pair, first in self._pair_first.items():
            cost = self._terms.pair_ms[pair].ravel()
            row[first : first + len(cost)] = cost
        return row

    def _structure(self) -> list[LinearConstraint]:
        """One choice a group; pairs sum to the choices they are made of."""
        rows: list[tuple[np.ndarray, np.ndarray, float]] = []
        for first, last in zip(self._first[:-1], self._first[1:], strict=True):
            rows.append((np.arange(first, last), np.ones(last - first), 1.0))
        for (a, b), first in self._pair_first.items():
            index = first + np.arange(self._terms.pair_ms[a, b].size)
            index = index.reshape(self._terms.pair_ms[a, b].shape)
            for group, lines in ((a, index), (b, index.T)):
                for choice, line in enumerate(lines):
                    columns = np.append(line, self._first[group] + choice)
                    rows.append((columns, np.append(np.ones(len(line)), -1.0), 0.0))
        numbers = np.concatenate([np.full(len(c), i) for i, (c, _, _) in enumerate(rows)])
        columns = np.concatenate([c for c, _, _ in rows])
        entries = np.concatenate([e for _, e, _ in rows])
        matrix = coo_array((entries, (numbers, columns)), shape=(len(rows), self._variables))
        right = np.array([r for _, _, r in rows])
        equal = LinearConstraint(matrix.tocsc(), right, right)  # pyright: ignore[reportArgumentType]
        return [equal]


@torch.no_grad()
def _latency_terms(choices: WidthChoices, model: LatencyModel) -> _Terms:
    """Every layer's staircase ms over the choices of the groups that it depends on."""
    sizes = [len(w) for w in choices.widths]
    single = [np.zeros(n) for n in sizes]
    pairs: dict[tuple[int, int], np.ndarray] = {}
    constant = 0.0
    for number, layer in enumerate(model.graph.layers):
        groups = np.flatnonzero(layer.cin.coefficients != 0).tolist()
        groups += np.flatnonzero(layer.cout.coefficients != 0).tolist()
        free = sorted({g for g in groups if sizes[g] > 1})
        if len(free) > 2:
            raise UnsupportedModel(
                f"{layer.name} depends on {len(free)} groups of channels; the integer program "
                "takes layers of one input and one output group (leave mdp out of --methods)"
            )
        cost = _grid_ms(choices, model, number, free)
        if not free:
            constant += float(cost)
        elif len(free) == 1:
            single[free[0]] += cost
        else:
            pair = (free[0], free[1])
            pairs[pair] = pairs.get(pair, np.zeros(cost.shape)) + cost
    _add_operations(choices, model, single)
    rest = model.staircase_ms(torch.as_tensor(choices.least).float())
    covered = model.layer_ms(torch.as_tensor(choices.least).float(), staircase=True).sum()
    return _Terms(constant + float(rest - covered), single, pairs)


def _grid_ms(choices: WidthChoices, model: LatencyModel, layer: int, free: list[int]) -> np.ndarray:
    """One layer's ms over all choices of the ``free`` groups, shaped by them."""
    offered = [np.array(choices.widths[g]) for g in free]
    grid = np.stack(np.meshgrid(*offered, indexing="ij"), -1) if free else np.zeros(0)
    rows = np.repeat(choices.dense[None], max(1, grid.reshape(-1, max(1, len(free))).shape[0]), 0)
    for column, group in enumerate(free):
        rows[:, group] = grid[..., column].ravel()
    ms = model.layer_ms(torch.as_tensor(rows).float(), staircase=True)[:, layer]
    return ms.double().numpy().reshape([len(o) for o in offered])


def _add_operations(choices: WidthChoices, model: LatencyModel, single: list[np.ndarray]) -> None:
    """What other operations add over each group's least width; it is linear in the widths."""
    for group, allowed in enumerate(choices.widths):
        rows = np.repeat(choices.least[None], len(allowed), axis=0)
        rows[:, group] = allowed
        widths = torch.as_tensor(rows).float()
        other = model.staircase_ms(widths) - model.layer_ms(widths, staircase=True).sum(-1)
        single[group] += (other - other[0]).double().numpy()
