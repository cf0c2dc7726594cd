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

from dsa_hw.cost.latency.profiling import CalibratedModel, neighbours, refit
from dsa_hw.network.graph import DeployedGraph
from profilers.backends import Backend
from profilers.collect import Request, collect
from profilers.table import LatencyTable, NetworkKey

AROUND = 9
"""Networks around the allocation, itself among them. Fewer leave the model's terms to the ridge;
each costs as much time as any network of the calibration."""


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
    on_notice: Callable[[str], None] | None = None,
) -> RefinedModel:
    """Measure networks around ``widths`` where the table lacks them, and fit the model again.

    Args:
        widths: (groups,) on steps.
        rounds: of each network.
        on_notice: told when other programs do not leave the processors alone.
    """
    center = tuple(int(w) for w in widths)
    keys = [NetworkKey(graph.digest, near) for near in neighbours(latency, center, AROUND, seed)]
    requests = [Request(key, lambda w=key.widths: graph.resized(w)) for key in keys]
    collect(
        table,
        backend,
        requests,
        rounds=rounds,
        seed=seed,
        on_progress=on_progress,
        on_notice=on_notice,
    )
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
