"""From a network and a backend to a calibrated latency model: measure what the table lacks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dsa_hw.cost.choices import WidthChoices, width_choices
from dsa_hw.cost.latency.calibration import Calibration, calibrate, recalibrate
from dsa_hw.cost.latency.model import LatencyModel
from dsa_hw.cost.latency.refinement import Refinement
from dsa_hw.cost.latency.surfaces import table_requests
from dsa_hw.network.graph import DeployedGraph
from profilers.backends import Backend
from profilers.collect import Collected, Request, call_requests, collect
from profilers.errors import MeasuringStopped, MissingMeasurement
from profilers.steps import canonical_layers, find_steps, sweep_keys, sweep_requests
from profilers.table import LatencyTable, NetworkKey

Progress = Callable[[str, int, int], None]
"""(what, done, planned)"""


LEAST_NETWORKS = 4
LAYER_ROUNDS = 2
"""Of every layer, at the least. A layer's error in the network's latency is in proportion to its
time, so those that count get the rounds that were asked for."""
COUNTS = 0.01
"""Part of the dense network's latency, over all layers of a kind, from which a layer counts."""
GOOD_PCT = 1.5
"""Held-out error at which the knots are dense enough, beyond what the networks' own rounds differ
by."""
STEPS_FOUND = 2
"""Times that layers are measured for: the steps may be others once the fast state was seen."""
REFINEMENTS = 2
MATTERS = 0.1
"""Of the largest change of the latency by one step of a group: where a group's step changes less,
``neighbours`` leaves it as it is."""


@dataclass(frozen=True, slots=True)
class CalibratedModel:
    """A network's latency model on a device, with how far to trust it.

    Args:
        steps: of the staircase, by kind of layer.
    """

    model: LatencyModel
    calibration: Calibration
    choices: WidthChoices
    steps: dict[str, int]


@dataclass(frozen=True, slots=True)
class ProfiledNetwork:
    """A latency model, and what it cost to get."""

    latency: CalibratedModel
    collected: Collected


def profile_network(
    graph: DeployedGraph,
    backend: Backend,
    table: LatencyTable,
    *,
    networks: int = 48,
    rounds: int = 4,
    seed: int = 0,
    on_progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> ProfiledNetwork:
    """Measure steps, layers and whole networks where the table lacks them, and calibrate.

    Rounds of whole networks are spread among those of layers: what isolated layers miss must not be
    mixed up with how fast the machine was at another time. While the held-out error is not good,
    more knots are put where surfaces bend, in at most ``REFINEMENTS`` turns.

    Args:
        networks: whole networks of random widths for calibration, the dense one included.
        rounds: of each network, and of each layer that counts; sweeps for steps get twice as many.
        stop: once it says so no more rounds are taken. One round of everything, and of
            ``LEAST_NETWORKS`` whole networks, gives a latency model already.
        on_notice: told when other programs do not leave the processors alone.

    Raises:
        MeasuringStopped: ``stop`` said so before that; the same call goes on from there.
    """

    def measure(what: str, requests: list[Request], rounds: int) -> Collected:
        report = None if on_progress is None else functools.partial(on_progress, what)
        return collect(
            table, backend, requests, rounds=rounds, seed=seed, on_progress=report, stop=stop,
            on_notice=on_notice,
        )  # fmt: skip

    def need(what: str, requests: list[Request], least: int) -> None:
        there = sum(r.key in table for r in requests)
        if there < min(least, len(requests)):
            raise MeasuringStopped(
                f"{there} of {len(requests)} {what} were measured when the time was over; the "
                "same command goes on from there"
            )

    specs = [layer.spec for layer in graph.layers]
    sweeps = sweep_requests(specs)
    parts = [measure("steps", sweeps + call_requests(backend), 2 * rounds)]
    need("steps", sweeps, len(sweeps))
    steps = find_steps(table, specs)
    for _ in range(STEPS_FOUND):
        choices = width_choices(graph, steps)
        layers = table_requests(graph, choices, steps)
        keys = calibration_networks(graph, choices, networks, seed)
        few = min(LAYER_ROUNDS, rounds)
        whole = [Request(k, lambda w=k.widths: graph.resized(w), rounds // few) for k in keys]
        parts.append(measure("layers and networks", layers + whole, few))
        need("layers", layers, len(layers))
        need("networks", whole, LEAST_NETWORKS)
        found = find_steps(table, specs)  # what the fast state is may have become clear meanwhile
        if found == steps:
            break
        steps = found
    latency = latency_model(graph, table)
    counting = Refinement(latency.model).counting(COUNTS) + [replace(w, share=1) for w in whole]
    more = measure("layers that count", counting, rounds)
    if more.measured:
        parts.append(replace(more, measured=0, reused=0))  # they were counted before
        latency = latency_model(graph, table)
    for _ in range(REFINEMENTS):
        if latency.calibration.excess_mape_pct <= GOOD_PCT:
            break
        probes = Refinement(latency.model).probes()
        parts.append(measure("bends", probes, rounds))
        if any(probe.key not in table for probe in probes):
            break  # stopped; what there is makes a model
        rows = Refinement(latency.model).rows()
        parts.append(measure("refinement", rows, rounds))
        if not rows:
            break
        latency = latency_model(graph, table)
    return ProfiledNetwork(latency, _sum(parts))


def latency_model(graph: DeployedGraph, table: LatencyTable) -> CalibratedModel:
    """The calibrated latency model of a network that has been profiled into ``table``.

    Raises:
        MissingMeasurement: it has not, or not all of it; says what is missing.
    """
    specs = [layer.spec for layer in graph.layers]
    for spec in canonical_layers(specs).values():
        if any(key not in table for key in sweep_keys(spec)):
            raise MissingMeasurement(
                f"the steps of {spec} have not been measured in {table.path}; "
                "run python -m dsa_hw.profile with this model and --table"
            )
    steps = find_steps(table, specs)
    choices = width_choices(graph, steps)
    model = LatencyModel(graph, table, choices, steps)
    networks = _networks_of(graph, choices, table)
    least = len(calibration_networks(graph, choices, LEAST_NETWORKS, 0))  # small ones have fewer
    if len(networks) < least:
        raise MissingMeasurement(
            f"{table.path} has {len(networks)} whole networks of this model, too few to calibrate "
            f"({least}); run python -m dsa_hw.profile with this model and --table"
        )
    calibration = calibrate(model, table, networks)
    calibrated = model.with_coefficients(calibration.coefficients)
    return CalibratedModel(calibrated, calibration, choices, steps)


def _networks_of(
    graph: DeployedGraph, choices: WidthChoices, table: LatencyTable
) -> list[NetworkKey]:
    """What the table holds of a network at widths on steps."""
    return [
        key for key in table.networks()
        if key.network == graph.digest and graph.can_have(key.widths) and choices.allow(key.widths)
    ]  # fmt: skip


def neighbours(
    latency: CalibratedModel, widths: Sequence[int], count: int, seed: int = 0
) -> list[tuple[int, ...]]:
    """Networks around an allocation, to be timed before ``refit``: it itself, then others.

    Each of the others has every group that matters one step up, one down, or as it is, at random:
    so every measurement says something of all of these groups. Groups whose step changes less than
    ``MATTERS`` of what the largest step changes stay as they are, and so do removed branches.

    Args:
        widths: (groups,) on steps.
        count: how many, at most; there may be fewer of them.
    """
    start = tuple(int(w) for w in widths)
    moves = _steps_that_matter(latency, start)
    rng = np.random.default_rng(seed)
    chosen = {start: None}
    for _ in range(20 * count):
        if len(chosen) >= count:
            break
        moved = list(start)
        for group, offered in moves.items():
            moved[group] = int(rng.choice(offered))
        chosen[tuple(moved)] = None
    return list(chosen)[:count]


def _steps_that_matter(
    latency: CalibratedModel, widths: tuple[int, ...]
) -> dict[int, tuple[int, ...]]:
    """Widths within one step of an allocation's, by group, of the groups that matter."""
    offered: dict[int, tuple[int, ...]] = {}
    changes: dict[int, float] = {}
    for group, allowed in enumerate(latency.choices.widths):
        if widths[group] == 0:
            continue
        place = allowed.index(widths[group])
        near = tuple(w for w in allowed[max(0, place - 1) : place + 2] if w)
        if len(near) == 1:
            continue
        ends = [[*widths[:group], w, *widths[group + 1 :]] for w in (near[0], near[-1])]
        low, high = latency.model.staircase_ms(torch.tensor(ends, dtype=torch.float32)).tolist()
        offered[group], changes[group] = near, (high - low) / (len(near) - 1)
    least = MATTERS * max(changes.values(), default=0.0)
    return {group: near for group, near in offered.items() if changes[group] >= least}


def refit(latency: CalibratedModel, table: LatencyTable, around: Sequence[int]) -> CalibratedModel:
    """Calibrate again with what the table has learned since, near an allocation.

    Networks count less the more their layers' times differ from the allocation's. Where the table
    has no network that ``latency`` does not know, it is returned as it is.

    Args:
        latency: of the same table; its surfaces are kept.
        around: (groups,) widths.
    """
    model, known = latency.model, latency.calibration
    networks = _networks_of(model.graph, latency.choices, table)
    seen = {(point.widths, point.measured_ms) for point in known.points}
    new = [k for k in networks if (k.widths, table.measurement(k).fastest_ms) not in seen]
    if not new and known.prior is None:
        return latency
    prior = known.prior or known.coefficients
    calibration = recalibrate(model, table, networks, around, prior)
    calibrated = model.with_coefficients(calibration.coefficients)
    return replace(latency, model=calibrated, calibration=calibration)


def calibration_networks(
    graph: DeployedGraph, choices: WidthChoices, count: int, seed: int
) -> list[NetworkKey]:
    """The dense network and ``count - 1`` of random widths on steps (fewer if fewer exist), some
    of them without some of the branches that may be removed.
    """
    rng = np.random.default_rng(seed)
    found = {tuple(int(w) for w in choices.dense): None}
    for _ in range(20 * count):
        if len(found) == count:
            break
        found[choices.random(rng)] = None
    return [NetworkKey(graph.digest, widths) for widths in found]


def _sum(parts: list[Collected]) -> Collected:
    return Collected(
        measured=sum(p.measured for p in parts),
        reused=sum(p.reused for p in parts),
        unstable=sum(p.unstable for p in parts),
        seconds=sum(p.seconds for p in parts),
        left=sum(p.left for p in parts),
        disturbed=sum(p.disturbed for p in parts),
    )
