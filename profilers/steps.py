"""The steps of the latency staircase, found by measuring.

Runtimes compute channels in blocks: up to the next multiple of the block, more channels cost
nothing. The block is a property of (runtime, precision, kind of layer); it is looked for on one
canonical layer of each kind, the same for every model, where steps show well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from profilers.collect import Request
from profilers.layers.kinds.registry import LAYER_KINDS
from profilers.layers.spec import LayerSpec
from profilers.table import LatencyTable, LayerKey

CANDIDATES = (64, 32, 16, 8, 4, 2, 1)
SWEEP = (16, 20, 24, 32, 40, 44, 48, 52, 56, 60, 64, 68, 72, 76, 80, 88, 96)
TREAD_SHARE = 0.2
"""Of the rise over the sweep, the part that may lie within treads (a straight line has 30% of its
rise within treads of 8, and 65% within treads of 16)."""
LEAST_RISE = 0.3
"""A sweep whose logarithm rises less says nothing about steps."""


def canonical_layers(specs: Iterable[LayerSpec]) -> dict[str, LayerSpec]:
    """The layer that is swept for each family among ``specs``, at their precision.

    It has the largest batch of the family's: a transformer's linear layers are many on tokens and
    one on (N, C). Grouped convolutions keep their own width.
    """
    chosen: dict[str, LayerSpec] = {}
    for spec in sorted(set(specs), key=lambda spec: (-spec.batch, str(spec))):
        canonical = LAYER_KINDS[spec.op].canonical(spec)
        chosen.setdefault(spec.kind, replace(canonical, batch=spec.batch, dtype=spec.dtype))
    return chosen


def sweep_keys(spec: LayerSpec) -> list[LayerKey]:
    """The measurements that show the steps of a canonical layer's output channels."""
    unit = _unit(spec)
    widths = sorted({max(unit, w // unit * unit) for w in SWEEP})
    cin = LAYER_KINDS[spec.op].swept_cin
    return [LayerKey(spec, w if spec.tied else cin, w) for w in widths]


def sweep_requests(specs: Iterable[LayerSpec]) -> list[Request]:
    """Requests for the sweeps of all kinds among ``specs``."""
    chosen = canonical_layers(specs).values()
    return [Request.layer(k.spec, k.cin, k.cout) for spec in chosen for k in sweep_keys(spec)]


def find_steps(table: LatencyTable, specs: Iterable[LayerSpec]) -> dict[str, int]:
    """The step of every kind among ``specs``.

    Across a multiple of the block the time jumps, and between two multiples it is level, however
    uneven the jumps are. So the step is the widest candidate whose treads hold hardly any of the
    sweep's rise. A sweep that hardly rises takes the step that most of the others have.

    Where the table's header expects a step (``expected_step``: what the device's matrix units take
    at once), every step is a multiple of it: small layers on a large card do not rise at all.

    Raises:
        KeyError: a sweep has not been measured.
    """
    layers = canonical_layers(specs)
    found = {kind: _widest_step(table, spec) for kind, spec in layers.items()}
    clear = [step for step in found.values() if step is not None]
    common = max(sorted(clear), key=clear.count) if clear else 1
    expected = int(table.provenance.get("expected_step", 1))
    return {
        kind: math.lcm(found[kind] or common, expected, _unit(spec))
        for kind, spec in layers.items()
    }


def _widest_step(table: LatencyTable, spec: LayerSpec) -> int | None:
    keys = sweep_keys(spec)
    widths = np.array([k.cout for k in keys])
    logs = np.log([table.measurement(k).median_ms for k in keys])
    rise = logs[-1] - logs[0]
    if rise < LEAST_RISE:
        return None
    return max(
        step
        for step in CANDIDATES
        if step == 1 or rise_within_treads(widths, logs, step) <= TREAD_SHARE * rise
    )


def rise_within_treads(widths: np.ndarray, values: np.ndarray, step: int) -> float:
    """Sum over the treads of ``step`` of last minus first value; widths ascending."""
    treads = np.ceil(widths / step)
    inside = treads[1:] == treads[:-1]
    return float(np.diff(values)[inside].sum())


def _unit(spec: LayerSpec) -> int:
    return spec.group_width if spec.tied else 1
