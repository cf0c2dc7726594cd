"""The report of one latency table: its staircases, and where they come from."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from dsa_hw.reports import page as parts
from dsa_hw.reports.drawing import Drawing, draw_svg, style_axes
from dsa_hw.reports.formatting import TIMES, show_ms, show_number
from dsa_hw.reports.page import Cell, Headline, Section, Table, no_cell, number_cell
from dsa_hw.reports.palette import ramp
from dsa_hw.reports.table_record import (
    LayerPoint,
    NetworkPoint,
    SpecPoints,
    TableRecord,
    all_points,
    dump_points,
    provenance_text,
    read_table,
)
from dsa_hw.runs.durable_files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPECS_SHOWN = 24
LEGEND_LINES = 8
# Where a table's provenance names its device and runtime, in order of preference.
DEVICE_KEYS = ("device", "device_name", "cpu", "gpu")
RUNTIME_KEYS = ("backend", "runtime")


def write_table_report(table_path: Path, out: Path) -> Path:
    """Write one self-contained page about a latency table.

    Args:
        table_path: a latency table.
        out: where to write the page.

    Raises:
        TableError: the file is missing or is not such a table.
    """
    table_path, out = Path(table_path), Path(out)
    record = read_table(table_path)
    sections = [
        _summary_section(record),
        _staircase_section(record),
        _spec_section(record),
        _network_section(record),
        _provenance_section(record),
    ]
    shown = [section for section in sections if section is not None]
    page = parts.page(
        f"{table_path.name}: latency table", _headline(record), shown, f"Table: {table_path.name}."
    )
    replace_file(out, page.encode("utf-8", "replace"))
    return out


def _headline(record: TableRecord) -> Headline:
    names = (_first(record, DEVICE_KEYS), _first(record, RUNTIME_KEYS))
    setting = ", ".join(name for name in names if name)
    counted = (
        f"{len(all_points(record))} layer measurements of {len(record.specs)} layer kinds"
        f" and {len(record.networks)} whole networks"
    )
    return Headline("Latency table", counted + (f" on {setting}" if setting else ""), None, ())


def _first(record: TableRecord, keys: Sequence[str]) -> str | None:
    return next((value for key in keys if (value := provenance_text(record, key))), None)


def _summary_section(record: TableRecord) -> Section:
    points = all_points(record)
    purposes = Counter(point.purpose or "no purpose recorded" for point in points)
    rows = [_count_row("Layer measurements", len(points))]
    rows += [_count_row(f"of these, for {purpose}", count) for purpose, count in purposes.items()]
    rows += [
        _count_row("Layer kinds", len(record.specs)),
        _count_row("Whole networks", len(record.networks)),
    ]
    widths = [width for point in points if (width := _interval_pct(point)) is not None]
    if widths:
        rows.append(_fact_row("95 % interval, half width, median", median(widths), "%"))
        rows.append(_fact_row("95 % interval, half width, widest", max(widths), "%"))
    drifts = [point.drift for point in points if point.drift is not None]
    if drifts:
        rows.append(_fact_row("Drift of the reference, lowest", min(drifts), TIMES))
        rows.append(_fact_row("Drift of the reference, highest", max(drifts), TIMES))
    rounds = [point.rounds for point in points if point.rounds is not None]
    if rounds:
        rows.append(_fact_row("Rounds a measurement, median", median(rounds), ""))
    counts = Table(
        "Counts, and how steady the measurements were", ("", "Value"), tuple(rows), is_facts=True
    )
    return Section("summary", "What the table holds", (parts.table(counts),))


def _staircase_section(record: TableRecord) -> Section:
    if not record.specs:
        return Section("stairs", "Staircases", (parts.text("The table has no layer entries."),))
    shown = record.specs[:SPECS_SHOWN]
    left_out = len(record.specs) - len(shown)
    said = "Milliseconds against output channels, one line for each number of input channels"
    said += " (cin). Bars are 95 % intervals; open points were measured to find the step."
    if left_out:
        said += f" The {len(shown)} costliest are drawn; {left_out} cheaper ones are left out here"
        said += " and stand in the table below."
    figures = [_staircase(index, spec) for index, spec in enumerate(shown, start=1)]
    return Section("stairs", "Staircases", (parts.text(said, "muted"), parts.tiles(figures)))


def _staircase(index: int, spec: SpecPoints) -> parts.Html:
    low = min(point.median_ms for point in spec.points)
    caption = f"{len(spec.points)} points, {show_ms(low)} to {show_ms(spec.costliest_ms)}."
    drawing = _draw_staircase(f"stairs-{index}", spec)
    return parts.tile_figure(drawing, spec.label, caption, dump_points(spec.points))


def _draw_staircase(name: str, spec: SpecPoints) -> Drawing:
    lines = _lines(spec.points)
    said = f"{spec.label}: milliseconds against output channels. " + "; ".join(
        f"{label}: {show_number(points[0].median_ms)} ms at {points[0].cout:g} to "
        f"{show_number(points[-1].median_ms)} ms at {points[-1].cout:g}"
        for label, points in lines
    )

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        style_axes(axes)
        for (label, points), colour in zip(lines, ramp(len(lines)), strict=True):
            _draw_line(axes, label, points, colour)
        axes.set(xlabel="output channels", ylabel="ms")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        handles, labels = axes.get_legend_handles_labels()
        keep = _spread(len(handles), LEGEND_LINES)[::-1]
        axes.legend([handles[i] for i in keep], [labels[i] for i in keep], loc="upper left",
                    fontsize=7, handlelength=1.1, labelspacing=0.25)  # fmt: skip

    return draw_svg(name, said, (5.0, 3.1), draw)


def _lines(points: Sequence[LayerPoint]) -> list[tuple[str, list[LayerPoint]]]:
    """One line for each cin; a single one where cin follows cout (depthwise)."""
    ordered = sorted(points, key=lambda point: (point.cout, point.cin))
    if all(point.cin == point.cout for point in ordered):
        return [("cin = cout", ordered)]
    return [
        (f"cin {cin:g}", [point for point in ordered if point.cin == cin])
        for cin in sorted({point.cin for point in ordered})
    ]


def _draw_line(axes: "Axes", label: str, points: Sequence[LayerPoint], colour: str) -> None:
    for point in points:
        if point.ci95_ms is not None:
            axes.plot([point.cout] * 2, point.ci95_ms, color=colour, linewidth=1.0, alpha=0.75)
    couts = [point.cout for point in points]
    axes.plot(couts, [p.median_ms for p in points], color=colour, linewidth=1.2, label=label)
    for is_step, face in ((False, colour), (True, "none")):
        chosen = [point for point in points if (point.purpose == "step") == is_step]
        axes.plot(
            [point.cout for point in chosen],
            [point.median_ms for point in chosen],
            linestyle="",
            marker="o",
            markersize=3.2,
            markerfacecolor=face,
            markeredgecolor=colour,
            markeredgewidth=0.9,
        )


def _spread(count: int, limit: int) -> list[int]:
    """At most ``limit`` of ``count`` indices, the first and last among them."""
    if count <= limit:
        return list(range(count))
    return [round(index * (count - 1) / (limit - 1)) for index in range(limit)]


def _spec_section(record: TableRecord) -> Section | None:
    if not record.specs:
        return None
    rows = tuple(_spec_row(spec) for spec in record.specs)
    header = ("Layer", "Points", "cin", "cout", "Lowest ms", "Highest ms", "Widest interval (± %)")
    every = Table(f"All {len(rows)} layer kinds, the costliest first", header, rows)
    return Section("kinds", "Layer kinds", (parts.table(every),))


def _spec_row(spec: SpecPoints) -> tuple[Cell, ...]:
    widths = [width for point in spec.points if (width := _interval_pct(point)) is not None]
    lowest = min(point.median_ms for point in spec.points)
    return (
        Cell(spec.label, spec.label),
        number_cell(str(len(spec.points)), len(spec.points)),
        _range([point.cin for point in spec.points]),
        _range([point.cout for point in spec.points]),
        number_cell(show_number(lowest), lowest),
        number_cell(show_number(spec.costliest_ms), spec.costliest_ms, is_key=True),
        number_cell(f"{max(widths):.1f}", max(widths)) if widths else no_cell("not recorded"),
    )


def _network_section(record: TableRecord) -> Section | None:
    if not record.networks:
        return None
    by_name: dict[str, list[NetworkPoint]] = {}
    for network in record.networks:
        by_name.setdefault(network.name, []).append(network)
    rows = tuple(_network_row(name, found) for name, found in by_name.items())
    header = ("Network", "Width settings", "Lowest ms", "Median ms", "Highest ms")
    content = Table("Whole networks timed for calibration", header, rows)
    return Section("networks", "Whole networks", (parts.table(content),))


def _network_row(name: str, networks: Sequence[NetworkPoint]) -> tuple[Cell, ...]:
    times = [network.median_ms for network in networks]
    values = (min(times), median(times), max(times))
    counted = number_cell(str(len(times)), len(times))
    return (Cell(name, name), counted, *(number_cell(show_number(ms), ms) for ms in values))


def _provenance_section(record: TableRecord) -> Section:
    if not record.provenance:
        return Section("provenance", "Provenance", (parts.text("The table records none."),))
    rows = tuple((Cell(key, key), Cell(value, value)) for key, value in record.provenance)
    content = Table("Where the measurements come from", ("Key", "Value"), rows, is_facts=True)
    return Section("provenance", "Provenance", (parts.table(content),))


def _interval_pct(point: LayerPoint) -> float | None:
    """Half the width of the 95 % interval, in percent of the median."""
    if point.ci95_ms is None or point.median_ms <= 0:
        return None
    return (point.ci95_ms[1] - point.ci95_ms[0]) / 2 / point.median_ms * 100


def _range(values: Sequence[float]) -> Cell:
    low, high = min(values), max(values)
    shown = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return Cell(shown, shown, "number")


def _count_row(name: str, count: int) -> tuple[Cell, ...]:
    return Cell(name, name), number_cell(f"{count:,}", count)


def _fact_row(name: str, value: float, unit: str) -> tuple[Cell, ...]:
    return Cell(name, name), number_cell(f"{show_number(value)} {unit}".strip(), value)
