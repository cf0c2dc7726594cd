"""A latency table in JSON lines, as plain data grouped for the page."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from dsa_hw.html_report.fields import Fields, Interval, ReportInputError, read_json_lines
from dsa_hw.html_report.formatting import TIMES

FORMAT = "dsa_hw.latency_table"
VERSION = 1


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
    problems: tuple[str, ...]


def read_table(path: Path) -> TableRecord:
    """Read a table; lines cut short by a kill are skipped and counted.

    Raises:
        ReportInputError: the file is missing, or its first line is not that of
            a latency table of a known version.
    """
    if not path.is_file():
        raise ReportInputError(f"{path} does not exist: give the .jsonl file of a latency table.")
    problems: list[str] = []
    lines = read_json_lines(path, problems)
    header = next(lines, Fields({}))
    _check_header(path, header)
    provenance = header.object("provenance")
    points: dict[str, list[LayerPoint]] = {}
    networks: list[NetworkPoint] = []
    for fields in lines:
        _read_line(fields, points, networks)
    specs = [SpecPoints(label, tuple(found)) for label, found in points.items()]
    return TableRecord(
        provenance=() if provenance is None else provenance.flat_texts(),
        specs=tuple(sorted(specs, key=lambda spec: -spec.costliest_ms)),
        networks=tuple(networks),
        problems=tuple(problems),
    )


def spec_label(spec: Fields) -> str:
    """A layer specification in one line; it tells any two different ones apart.

    Example: ``conv 3x3 s1 p1 at 28x28 depthwise fp32 +relu`` (with multiplication signs).
    """
    parts = [spec.shown("op") or "layer"]
    parts += _sizes(spec, (("kernel", ""), ("stride", "s"), ("padding", "p")))
    if spec.numbers("dilation") not in (None, (1.0, 1.0)):
        parts += _sizes(spec, (("dilation", "d"),))
    height, width = spec.number("height"), spec.number("width")
    if height is not None and width is not None:
        parts.append(f"at {height:g}{TIMES}{width:g}")
    groups = spec.shown("groups")
    if groups not in (None, "1"):
        parts.append(f"groups {groups}" if groups[:1].isdigit() else groups)
    batch = spec.number("batch")
    if batch not in (None, 1.0):
        parts.append(f"batch {batch:g}")
    parts += [spec.shown("dtype") or ""]
    parts += [f"+{item}" for item in spec.texts("tail") or ()]
    parts += _unknown_keys(spec)
    return " ".join(part for part in parts if part)


def _sizes(spec: Fields, keys: Iterable[tuple[str, str]]) -> list[str]:
    """``3x3``, ``s2``, ``p1``: equal sides of a prefixed size are written once."""
    found = []
    for key, prefix in keys:
        sides = spec.numbers(key)
        if sides is None:
            continue
        if prefix and len(set(sides)) == 1:
            sides = sides[:1]
        found.append(prefix + TIMES.join(f"{side:g}" for side in sides))
    return found


SPEC_KEYS = frozenset(
    "op kernel stride padding dilation height width groups batch dtype tail".split()
)


def _unknown_keys(spec: Fields) -> list[str]:
    extra = sorted(set(spec.values) - SPEC_KEYS)
    return [f"{key}={spec.shown(key)}" for key in extra if spec.shown(key)]


def _check_header(path: Path, header: Fields) -> None:
    found_format, found_version = header.values.get("format"), header.values.get("version")
    if found_format != FORMAT or found_version != VERSION:
        raise ReportInputError(
            f"{path}: the first line has format {found_format!r}, version {found_version!r}; "
            f"expected {FORMAT!r}, version {VERSION}. Give a table written by the profile command."
        )


def _read_line(
    fields: Fields, points: dict[str, list[LayerPoint]], networks: list[NetworkPoint]
) -> None:
    kind, median_ms = fields.values.get("kind"), fields.number("median_ms")
    if kind not in ("layer", "network"):
        return
    if median_ms is None:
        fields.problems.append(f"{fields.where}median_ms is missing: line left out")
        return
    if kind == "network":
        name = fields.text("name") or fields.text("network") or "(unnamed)"
        networks.append(NetworkPoint(name, median_ms, fields.interval("ci95_ms")))
        return
    spec, cin, cout = fields.object("spec"), fields.number("cin"), fields.number("cout")
    if spec is None or cin is None or cout is None:
        fields.problems.append(f"{fields.where}spec, cin or cout is missing: line left out")
        return
    point = LayerPoint(
        cin=cin,
        cout=cout,
        median_ms=median_ms,
        ci95_ms=fields.interval("ci95_ms"),
        rounds=fields.number("rounds"),
        drift=fields.number("drift"),
        purpose=fields.text("purpose"),
    )
    points.setdefault(spec_label(spec), []).append(point)


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
