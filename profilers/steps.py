"""The steps of the latency staircase, found by measuring.

Runtimes compute channels in blocks: up to the next multiple of the block, more channels cost
nothing. The block is a property of (runtime, precision, kind of layer) and is looked for where it
shows most: small widths of one representative layer of the kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from profilers.collect import Request
from profilers.spec import LayerSpec
from profilers.table import LatencyTable, LayerKey

CANDIDATES = (64, 32, 16, 8, 4, 2, 1)
SWEEP = (40, 44, 48, 52, 56, 60, 64, 68, 72, 76, 80, 88, 96)
FIXED = 64
SLACK = 1.25
SLACK_PCT = 0.5


def representatives(specs: Iterable[LayerSpec]) -> dict[str, LayerSpec]:
    """One spec a kind: the one in the middle by work, so that its steps are visible."""
    by_kind: dict[str, list[LayerSpec]] = {}
    for spec in sorted(set(specs), key=lambda s: (s.flops(FIXED, FIXED), str(s))):
        by_kind.setdefault(spec.kind, []).append(spec)
    return {kind: found[len(found) // 2] for kind, found in by_kind.items()}


def sweep_keys(spec: LayerSpec) -> list[LayerKey]:
    """The measurements that show the steps of a layer's output channels."""
    unit = _unit(spec)
    widths = sorted({w // unit * unit for w in SWEEP})
    return [LayerKey(spec, w if spec.tied else FIXED, w) for w in widths]


def sweep_requests(specs: Iterable[LayerSpec]) -> list[Request]:
    """Requests for the sweeps of all kinds among ``specs``."""
    chosen = representatives(specs).values()
    return [Request.layer(k.spec, k.cin, k.cout) for spec in chosen for k in sweep_keys(spec)]


def find_step(table: LatencyTable, spec: LayerSpec) -> int:
    """The widest step that explains the sweep about as well as the best one does.

    For each candidate step s, times are regressed (relative least squares) on the width rounded
    up to a multiple of s; the true block explains the flat treads and the risers between them.

    Raises:
        KeyError: the sweep has not been measured.
    """
    unit = _unit(spec)
    keys = sweep_keys(spec)
    widths = np.array([k.cout for k in keys])
    times = np.array([table.measurement(k).median_ms for k in keys])
    errors = {s: _misfit_pct(widths, times, s) for s in CANDIDATES if s % unit == 0 or s == 1}
    best = min(errors.values())
    chosen = max(s for s, error in errors.items() if error <= SLACK * best + SLACK_PCT)
    return math.lcm(chosen, unit)


def _misfit_pct(widths: np.ndarray, times: np.ndarray, step: int) -> float:
    """Root mean square relative residual of ``times`` ~ a + b * ceil(width / step)."""
    design = np.stack([np.ones(len(widths)), np.ceil(widths / step)], axis=1) / times[:, None]
    solution, *_ = np.linalg.lstsq(design, np.ones(len(widths)), rcond=None)
    return 100.0 * float(np.sqrt(np.mean((design @ solution - 1.0) ** 2)))


def _unit(spec: LayerSpec) -> int:
    if spec.groups.startswith("width"):
        return int(spec.groups.removeprefix("width"))
    return 1
