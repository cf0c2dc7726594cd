"""What a comparison's folder holds, as plain data for the page.

Every field may be None: the sweep did not record it (or is not finished), and the page says so.
"""

from dataclasses import dataclass
from pathlib import Path

from dsa_hw.reports.fields import (
    Fields,
    Interval,
    ReportInputError,
    check_inside,
    is_plain_name,
    read_object,
    read_text,
)
from dsa_hw.reports.run_record import RunRecord, read_run
from dsa_hw.reports.setting import Setting

LATENCY_DSA = "dsa-latency"
FLOPS_DSA = "dsa-flops"

SLOWER_PCT = 2.0
"""More than this, and a gain in accuracy may be one of latency: what a last measurement is off by
on a shared machine."""
SURELY = 0.05
"""Probability of chance below which methods are said to differ."""


@dataclass(frozen=True, slots=True)
class MethodRow:
    """A method at a target, over its seeds; ``accuracy`` and its standard error are in 0..1."""

    method: str
    title: str
    target: str
    runs: float | None
    infeasible: float | None
    met: float | None
    undecided: float | None
    accuracy: float | None
    accuracy_error: float | None
    measured_ms: float | None
    measured_error_ms: float | None
    target_ms: float | None
    ratio: float | None
    flops: float | None
    params: float | None
    minutes: float | None


@dataclass(frozen=True, slots=True)
class Gain:
    """How many points of accuracy DSA under latency is ahead of ``title``, and how much slower.

    Args:
        slower_pct: in the mean over the seeds.
        level_points: the same at the other's latency, on the line through DSA's own networks.
    """

    target: str
    title: str
    seeds: float | None
    points: float | None
    error_points: float | None
    slower_pct: float | None
    level_points: float | None
    level_error_points: float | None


@dataclass(frozen=True, slots=True)
class Spread:
    """How much runs at a target differ by themselves, and whether methods differ beyond that."""

    target: str
    methods: tuple[str, ...]
    seeds: float | None
    run_sd_points: float | None
    p_value: float | None


@dataclass(frozen=True, slots=True)
class RunPoint:
    """One run: a method, a target, a seed."""

    cell: str
    method: str
    target: str
    seed: float | None
    accuracy: float | None
    predicted_ms: float | None
    measured_ms: float | None
    ci95_ms: Interval | None
    ratio: float | None
    met: bool | None
    verdict: str | None
    flops: float | None
    params: float | None
    minutes: float | None
    keep_ratios: tuple[float, ...]
    infeasible: str | None


@dataclass(frozen=True, slots=True)
class NetworkPoint:
    """A whole network of random widths."""

    flops: float
    measured_ms: float


@dataclass(frozen=True, slots=True)
class CostShare:
    """A group's part of all that narrowing saves, in milliseconds and in FLOPs."""

    group: str
    ms: float
    flops: float


@dataclass(frozen=True, slots=True)
class Staircase:
    """Milliseconds of one kind of layer against its output channels."""

    kind: str
    layer: str
    couts: tuple[float, ...]
    measured_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ComparisonRecord:
    """A sweep. ``runs_by_cell`` holds the runs whose details the page draws."""

    folder: str
    setting: Setting
    from_dense: float
    seeds: tuple[float, ...]
    methods: tuple[tuple[str, str], ...]
    targets: tuple[str, ...]
    dense_accuracy: float | None
    dense_accuracy_error: float | None
    dense_ms: float | None
    dense_flops: float | None
    dense_params: float | None
    rows: tuple[MethodRow, ...]
    gains: tuple[Gain, ...]
    spreads: tuple[Spread, ...]
    cells: tuple[RunPoint, ...]
    unfinished: tuple[str, ...]
    networks: tuple[NetworkPoint, ...]
    shares: tuple[CostShare, ...]
    staircases: tuple[Staircase, ...]
    heldout_mape_pct: float | None
    heldout_max_pct: float | None
    environment: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    config_text: str | None
    runs_by_cell: dict[str, RunRecord]
    problems: tuple[str, ...]

    def title_of(self, method: str) -> str:
        """As the page calls a method."""
        return dict(self.methods).get(method, method)


def read_comparison(folder: Path) -> ComparisonRecord:
    """Read a sweep's folder.

    Raises:
        ReportInputError: ``result.json`` is missing or is not a JSON object.
    """
    fields = read_object(folder / "result.json")
    dense = fields.object("dense") or Fields({})
    calibration = fields.object("calibration") or Fields({})
    cells = tuple(_cell(item) for item in fields.objects("cells") or ())
    return ComparisonRecord(
        folder=folder.name,
        setting=Setting.read(fields),
        from_dense=fields.number("from_dense") or 0,
        seeds=fields.numbers("seeds") or (),
        methods=tuple(
            (m.text("name") or "?", m.text("title") or "?") for m in fields.objects("methods") or ()
        ),
        targets=fields.texts("targets") or (),
        dense_accuracy=dense.number("accuracy"),
        dense_accuracy_error=dense.number("accuracy_standard_error"),
        dense_ms=dense.number("measured_ms"),
        dense_flops=dense.number("flops"),
        dense_params=dense.number("params"),
        rows=tuple(_row(item) for item in fields.objects("rows") or ()),
        gains=tuple(_gain(item) for item in fields.objects("gains") or ()),
        spreads=tuple(_spread(item) for item in fields.objects("spreads") or ()),
        cells=cells,
        unfinished=fields.texts("unfinished") or (),
        networks=tuple(_networks(fields)),
        shares=tuple(_shares(fields)),
        staircases=tuple(_staircases(fields)),
        heldout_mape_pct=calibration.number("heldout_mape_pct"),
        heldout_max_pct=calibration.number("heldout_max_pct"),
        environment=fields.texts_of("environment"),
        warnings=fields.texts("warnings") or (),
        config_text=read_text(folder / "config.yaml"),
        runs_by_cell=_details(folder, cells),
        problems=tuple(fields.problems),
    )


def _row(item: Fields) -> MethodRow:
    return MethodRow(
        method=item.text("method") or "?",
        title=item.text("title") or "?",
        target=item.text("target") or "?",
        runs=item.number("runs"),
        infeasible=item.number("infeasible"),
        met=item.number("met"),
        undecided=item.number("undecided"),
        accuracy=item.number("accuracy"),
        accuracy_error=item.number("accuracy_standard_error"),
        measured_ms=item.number("measured_ms"),
        measured_error_ms=item.number("measured_ms_standard_error"),
        target_ms=item.number("target_ms"),
        ratio=item.number("ratio"),
        flops=item.number("flops"),
        params=item.number("params"),
        minutes=item.number("minutes"),
    )


def _gain(item: Fields) -> Gain:
    return Gain(
        target=item.text("target") or "?",
        title=item.text("title") or "?",
        seeds=item.number("seeds"),
        points=item.number("points"),
        error_points=item.number("points_standard_error"),
        slower_pct=item.number("slower_pct"),
        level_points=item.number("points_at_its_latency"),
        level_error_points=item.number("points_at_its_latency_standard_error"),
    )


def _spread(item: Fields) -> Spread:
    return Spread(
        target=item.text("target") or "?",
        methods=item.texts("methods") or (),
        seeds=item.number("seeds"),
        run_sd_points=item.number("run_sd_points"),
        p_value=item.number("p_value"),
    )


def _cell(item: Fields) -> RunPoint:
    low, high = item.number("ci95_low_ms"), item.number("ci95_high_ms")
    return RunPoint(
        cell=item.text("cell") or "?",
        method=item.text("method") or "?",
        target=item.text("target") or "?",
        seed=item.number("seed"),
        accuracy=item.number("accuracy"),
        predicted_ms=item.number("predicted_ms"),
        measured_ms=item.number("measured_ms"),
        ci95_ms=None if low is None or high is None else (low, high),
        ratio=item.number("ratio"),
        met=item.flag("met"),
        verdict=item.text("verdict"),
        flops=item.number("flops"),
        params=item.number("params"),
        minutes=item.number("minutes"),
        keep_ratios=item.numbers("keep_ratios") or (),
        infeasible=item.text("infeasible"),
    )


def _networks(fields: Fields) -> list[NetworkPoint]:
    found = []
    for item in fields.objects("networks") or ():
        flops, measured_ms = item.number("flops"), item.number("measured_ms")
        if flops is not None and measured_ms is not None:
            found.append(NetworkPoint(flops, measured_ms))
    return found


def _shares(fields: Fields) -> list[CostShare]:
    found = []
    for item in fields.objects("shares") or ():
        ms, flops = item.number("ms"), item.number("flops")
        if ms is not None and flops:
            found.append(CostShare(item.text("name") or "?", ms, flops))
    return found


def _staircases(fields: Fields) -> list[Staircase]:
    found = []
    for item in fields.objects("staircases") or ():
        couts, times = item.numbers("cout") or (), item.numbers("measured_ms") or ()
        if couts and len(couts) == len(times):
            kind, layer = item.text("kind") or "?", item.text("layer") or "?"
            found.append(Staircase(kind, layer, couts, times))
    return found


def _details(folder: Path, cells: tuple[RunPoint, ...]) -> dict[str, RunRecord]:
    """The DSA runs of the first seed, whose searches and layers the page shows.

    Raises:
        ReportInputError: a run's name leads out of the folder, or its folder is a link out of it.
    """
    for number, cell in enumerate(cells):
        if not is_plain_name(cell.cell):
            raise ReportInputError(
                f"{folder / 'result.json'}: cells[{number}].cell is {cell.cell!r:.60}; expected "
                "the plain name of a folder in cells/"
            )
    seeds = [c.seed for c in cells if c.seed is not None]
    wanted = [c for c in cells if c.method in (LATENCY_DSA, FLOPS_DSA) and not c.infeasible]
    found = {}
    for cell in wanted:
        path = folder / "cells" / cell.cell
        if seeds and cell.seed == seeds[0] and (path / "result.json").is_file():
            check_inside(path)
            found[cell.cell] = read_run(path)
    return found
