"""Sequential design: whole networks around an allocation are timed, and the model fitted again.

An optimum under a wrong model is found where the model errs most in its favour, and a single scale
for all predictions cannot move it. So after the first rounding, networks a step or so away from the
allocation are measured into the table and the latency model is calibrated with them, which also
says how far it errs there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dsa_hw.deployed import DeployedGraph
from dsa_hw.profiling import CalibratedModel, latency_model
from profilers.backends import Backend
from profilers.collect import Request, collect
from profilers.table import LatencyTable, NetworkKey

AROUND = 8
"""Networks around the allocation, beside itself. Fewer leave the model's terms to the ridge; each
costs as much time as the dense network takes in all its rounds."""


@dataclass(frozen=True, slots=True)
class RefinedModel:
    """A latency model that has seen networks around an allocation.

    Args:
        scatter: standard deviation of the logarithm of measured over predicted among these
            networks, each predicted without itself; None with fewer than three.
    """

    latency: CalibratedModel
    scatter: float | None


def refine_around(
    graph: DeployedGraph,
    backend: Backend,
    table: LatencyTable,
    latency: CalibratedModel,
    widths: np.ndarray,
    *,
    rounds: int,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> RefinedModel:
    """Measure networks around ``widths`` where the table lacks them, and fit the model again.

    Args:
        widths: (groups,) on steps.
        rounds: of each network.
    """
    center = tuple(int(w) for w in widths)
    near = list(dict.fromkeys([center, *neighbours(latency, center, AROUND, seed)]))
    keys = [NetworkKey(graph.digest, each) for each in near]
    requests = [Request(key, lambda w=key.widths: graph.resized(w)) for key in keys]
    collect(table, backend, requests, rounds=rounds, seed=seed, on_progress=on_progress)
    refitted = refit(latency, table, around=center)
    return RefinedModel(refitted, _scatter(refitted, keys))


def _scatter(latency: CalibratedModel, keys: Sequence[NetworkKey]) -> float | None:
    """Of the held-out predictions of these networks."""
    near = {key.widths for key in keys}
    errors = [
        math.log(point.measured_ms / point.predicted_ms)
        for point in latency.calibration.points
        if point.widths in near
    ]
    return float(np.std(errors, ddof=1)) if len(errors) >= 3 else None


def neighbours(
    latency: CalibratedModel, widths: Sequence[int], count: int, seed: int
) -> list[tuple[int, ...]]:
    """Networks in which two random groups are a step away from ``widths``."""
    rng = np.random.default_rng(seed)
    allowed = latency.choices.widths
    movable = [g for g, offered in enumerate(allowed) if len(offered) > 1 and offered[0] > 0]
    found: dict[tuple[int, ...], None] = {}
    for _ in range(20 * count):
        if len(found) == count or not movable:
            break
        changed = [int(w) for w in widths]
        for group in rng.choice(movable, min(2, len(movable)), replace=False):
            at = allowed[group].index(changed[group]) + int(rng.choice((-1, 1)))
            changed[group] = allowed[group][min(max(at, 0), len(allowed[group]) - 1)]
        if changed != list(widths):
            found[tuple(changed)] = None
    return list(found)


def refit(latency: CalibratedModel, table: LatencyTable, around: Sequence[int]) -> CalibratedModel:
    """The model fitted to all networks of the table."""
    return latency_model(latency.model.graph, table)
