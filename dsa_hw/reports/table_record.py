"""A latency table as plain data grouped for the page."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from dsa_hw.reports.fields import Interval
from dsa_hw.reports.formatting import TIMES
from profilers.layers.spec import LayerSpec
from profilers.steps import canonical_layers, sweep_keys
from profilers.table import LatencyTable
from profilers.timing import Measurement


@dataclass(frozen=True, slots=True)
class LayerPoint:
    cin: float
    cout: float
    median_ms: float
    ci95_ms: Interval | None
    rounds: float | None
    drift: float | None
    purpose: str | None


@dataclass(frozen=True, slots=True)
class SpecPoints:
    """All measurements of one layer specification, at different widths."""

    label: str
    points: tuple[LayerPoint, ...]

    @property
    def costliest_ms(self) -> float:
        return max(point.median_ms for point in self.points)


@dataclass(frozen=True, slots=True)
class NetworkPoint:
    name: str
    median_ms: float
    ci95_ms: Interval | None


@dataclass(frozen=True, slots=True)
class TableRecord:
    """``specs`` are sorted by their costliest point, the costliest first."""

    provenance: tuple[tuple[str, str], ...]
    specs: tuple[SpecPoints, ...]
    networks: tuple[NetworkPoint, ...]


def read_table(path: Path) -> TableRecord:
    """Read a table.

    Raises:
        TableError: the file is missing, or a line of it is not what a profile wrote.
    """
    table = LatencyTable.load(path)
    swept = {
        key
        for spec in canonical_layers(key.spec for key in table.layers()).values()
        for key in sweep_keys(spec)
    }
    points: dict[LayerSpec, list[LayerPoint]] = {}
    for key in table.layers():
        measured = table.measurement(key)
        point = LayerPoint(
            cin=key.cin,
            cout=key.cout,
            median_ms=measured.median_ms,
            ci95_ms=_interval(measured),
            rounds=measured.rounds,
            drift=measured.drift,
            purpose="step" if key in swept else "grid",
        )
        points.setdefault(key.spec, []).append(point)
    specs = [SpecPoints(spec_label(spec), tuple(found)) for spec, found in points.items()]
    return TableRecord(
        provenance=tuple((name, str(value)) for name, value in table.provenance.items()),
        specs=tuple(sorted(specs, key=lambda spec: -spec.costliest_ms)),
        networks=tuple(
            NetworkPoint(key.network, measured.median_ms, _interval(measured))
            for key in table.networks()
            for measured in [table.measurement(key)]
        ),
    )


def _interval(measured: Measurement) -> Interval | None:
    return measured.ci95_ms if math.isfinite(measured.ci95_ms[1]) else None


def spec_label(spec: LayerSpec) -> str:
    """A layer specification in one line, with multiplication signs."""
    return str(spec).replace("x", TIMES)


def all_points(record: TableRecord) -> tuple[LayerPoint, ...]:
    return tuple(chain.from_iterable(spec.points for spec in record.specs))


def provenance_text(record: TableRecord, key: str) -> str | None:
    return dict(record.provenance).get(key)


def dump_points(points: Iterable[LayerPoint]) -> str:
    """The points of one figure as CSV."""
    lines = ["cin,cout,median_ms,ci95_low_ms,ci95_high_ms,purpose"]
    for point in points:
        low, high = ("", "") if point.ci95_ms is None else map(repr, point.ci95_ms)
        purpose = json.dumps(point.purpose) if point.purpose else ""
        lines.append(f"{point.cin:g},{point.cout:g},{point.median_ms!r},{low},{high},{purpose}")
    return "\n".join(lines) + "\n"
