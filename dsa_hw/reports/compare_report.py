"""The report of a comparison: who is how accurate at the same measured latency, and why."""

from collections.abc import Callable
from pathlib import Path

from dsa_hw.reports import compare_figures as figures
from dsa_hw.reports import page as parts
from dsa_hw.reports.common_sections import (
    Absent,
    config_section,
    environment_section,
    interval_cell,
    with_left_out,
)
from dsa_hw.reports.compare_record import (
    FLOPS_DSA,
    LATENCY_DSA,
    SLOWER_PCT,
    SURELY,
    ComparisonRecord,
    MethodRow,
    RunPoint,
    read_comparison,
)
from dsa_hw.reports.formatting import MINUS, show_count, show_ms, show_number, show_pct
from dsa_hw.reports.page import Cell, Headline, Section, Table, no_cell, number_cell
from dsa_hw.reports.run_figures import search_drawing
from dsa_hw.reports.run_report import steps_csv
from dsa_hw.runs.console import counted
from dsa_hw.runs.durable_files import replace_file


def write_comparison_report(folder: Path, out: Path | None = None) -> Path:
    """Write one self-contained page about a (finished or running) comparison.

    Args:
        folder: holds ``result.json`` and ``cells/``.
        out: where to write; ``folder / "report.html"`` if not given.

    Returns:
        The path of the page. What is not finished or not recorded is named on it.

    Raises:
        ReportInputError: ``result.json`` is missing or is not a JSON object.
    """
    folder = Path(folder)
    out = folder / "report.html" if out is None else Path(out)
    record = read_comparison(folder)
    headline = Headline(
        "Comparison" + (f" · {record.setting.data}" if record.setting.data else ""),
        _sentence(record), None, _proof(record),
    )  # fmt: skip
    statistic = record.setting.statistic or "median"
    footer = f"Sweep folder: {record.folder}. Times are the {statistic}."
    title = f"{record.setting.model or record.folder}: comparison of pruning methods"
    page = parts.page(title, headline, _sections(record), footer)
    replace_file(out, page.encode("utf-8", "replace"))
    return out


def _sections(record: ComparisonRecord) -> list[Section]:
    """The sections that the sweep has data for, then one that names the others."""
    builders: tuple[Callable[[ComparisonRecord], Section | Absent], ...] = (
        _front_section,
        _result_section,
        _gain_section,
        _flops_section,
        _share_section,
        _keep_section,
        _layer_section,
        _prediction_section,
        _staircase_section,
        _search_section,
        _warning_section,
        _runs_section,
        lambda record: environment_section(record.environment, "Where everything was measured"),
        lambda record: config_section(record.config_text),
    )
    built = [build(record) for build in builders]
    if record.unfinished:
        names = ", ".join(record.unfinished)
        built.append(f"not finished, {counted(len(record.unfinished), 'run')}: {names}")
    return with_left_out(built, record.problems)


def _sentence(record: ComparisonRecord) -> str:
    """What came out, in one sentence that the numbers decide."""
    name = record.setting.model or record.folder
    leads = [_leader(record, target) for target in record.targets]
    known = [lead for lead in leads if lead is not None]
    if not known:
        return f"{name}: {len(record.methods)} methods at {len(record.targets)} latency targets"
    ours = sum(lead.method == LATENCY_DSA for lead in known)
    title = record.title_of(LATENCY_DSA)
    if not any(row.method == LATENCY_DSA for row in record.rows):
        best = ", ".join(f"{lead.title} at {lead.target}" for lead in known)
        return f"{name}: most accurate at the same latency: {best}"
    return f"{name}: {title} is the most accurate at {ours} of {len(leads)} latency targets"


def _leader(record: ComparisonRecord, target: str) -> MethodRow | None:
    """The most accurate method whose networks were not measured slower than the target."""
    rows = [r for r in record.rows if r.target == target and _at_target(r)]
    return max(rows, key=lambda r: r.accuracy or 0.0, default=None)


def _at_target(row: MethodRow) -> bool:
    """Whether all its networks met the target, or it is hardly slower in the mean."""
    if row.accuracy is None or row.measured_ms is None or row.target_ms is None:
        return False
    near = row.measured_ms <= (1 + SLOWER_PCT / 100) * row.target_ms
    return near or (bool(row.runs) and row.met == row.runs)


def _proof(record: ComparisonRecord) -> tuple[str, ...]:
    said = []
    for target in record.targets:
        lead = _leader(record, target)
        if lead is not None:
            error = f" ± {100 * lead.accuracy_error:.1f}" if lead.accuracy_error else ""
            said.append(f"{target}: {lead.title} {100 * (lead.accuracy or 0):.1f}{error} %")
    lines = ["Most accurate by target: " + "; ".join(said) + "."] if said else []
    if record.gains:
        lines.append(_certainty(record))
    if record.dense_accuracy is not None and record.dense_ms is not None:
        lines.append(f"Dense: {show_pct(record.dense_accuracy)} at {show_ms(record.dense_ms)}.")
    return (" ".join(lines),) if lines else ()


def _certainty(record: ComparisonRecord) -> str:
    """At how many targets DSA on latency is ahead of everyone by more than the error."""
    sure = 0
    for target in record.targets:
        gains = [g for g in record.gains if g.target == target]
        sure += bool(gains) and all(
            g.points is not None
            and g.error_points is not None
            and g.points > g.error_points
            and (g.slower_pct or 0.0) <= SLOWER_PCT
            for g in gains
        )
    return (
        f"{record.title_of(LATENCY_DSA)} is ahead of every other method by more than the standard "
        f"error of the difference at {sure} of {len(record.targets)} targets."
    )


def _setting(record: ComparisonRecord) -> str:
    epochs = None
    if record.setting.epochs is not None:
        start = f" from a dense network trained for {record.from_dense:g}"
        epochs = f"{record.setting.epochs} epochs{start if record.from_dense else ' in all'}"
    seeds = counted(len(record.seeds), "seed") if record.seeds else None
    return record.setting.line(epochs, seeds)


def _front_section(record: ComparisonRecord) -> Section | Absent:
    known = [r for r in record.rows if r.accuracy is not None and r.measured_ms is not None]
    if not known:
        return "Accuracy against latency: no run has both yet."
    training = "epochs and fine-tuning"
    if record.from_dense:
        training = (
            "dense network to start from, epochs and fine-tuning (but uniform widths, where they "
            "are compared: from random weights, with the dense network's epochs on top)"
        )
    caption = (
        "Up and to the left is better. Means over seeds; bars are one standard error. All methods "
        f"had the same data, {training}, and were brought to the same measured targets by the "
        "same closed loop."
    )
    header = ("method", "target", "accuracy", "accuracy_standard_error", "measured_ms",
              "measured_ms_standard_error")  # fmt: skip
    lines = [(r.method, r.target, r.accuracy, r.accuracy_error, r.measured_ms,
              r.measured_error_ms) for r in known]  # fmt: skip
    lines.append(("dense", "", record.dense_accuracy, record.dense_accuracy_error,
                  record.dense_ms, None))  # fmt: skip
    shown = parts.figure(figures.front_drawing(record), caption, parts.csv_text(header, lines))
    return Section("fronts", "Accuracy against measured latency", (shown,))


def _result_section(record: ComparisonRecord) -> Section | Absent:
    if not record.rows:
        return "Results: rows is not in result.json."
    by_target = [
        parts.details(f"Target {target} in full", _target_table(record, target))
        for target in record.targets
    ]
    said = parts.text(_setting(record), "muted")
    return Section("results", "Results", (said, _matrix(record), *by_target))


def _matrix(record: ComparisonRecord) -> parts.Html:
    """Accuracy of every method at every target, the highest mean over the targets first."""
    found = {(r.method, r.target): r for r in record.rows}
    leaders = {t: lead.method for t in record.targets if (lead := _leader(record, t)) is not None}
    rows = tuple(
        (
            Cell(title, title),
            *(_accuracy(found.get((name, t)), leaders.get(t) == name) for t in record.targets),
        )
        for name, title in sorted(record.methods, key=lambda m: -_mean_accuracy(record, m[0]))
    )
    caption = (
        "Accuracy (%) ± standard error at each measured target; the best is in colour, without "
        f"those that missed the target and are slower by more than {SLOWER_PCT:g} %"
    )
    return parts.table(Table(caption, ("Method", *record.targets), rows))


def _mean_accuracy(record: ComparisonRecord, method: str) -> float:
    known = [r.accuracy for r in record.rows if r.method == method and r.accuracy is not None]
    return sum(known) / len(known) if known else 0.0


def _accuracy(row: MethodRow | None, is_best: bool) -> Cell:
    if row is None or row.accuracy is None:
        return no_cell("cannot reach it" if row is not None and row.infeasible else "not finished")
    error = "" if row.accuracy_error is None else f" ± {100 * row.accuracy_error:.2f}"
    shown = f"{100 * row.accuracy:.2f}{error}"
    return Cell(shown, repr(100 * row.accuracy), "key" if is_best else "number")


def _target_table(record: ComparisonRecord, target: str) -> parts.Html:
    rows = [r for r in record.rows if r.target == target]
    lead = _leader(record, target)
    ordered = sorted(rows, key=lambda r: -(r.accuracy or 0.0))
    target_ms = next((r.target_ms for r in ordered if r.target_ms is not None), None)
    caption = f"Target {target}" + (f" ({show_ms(target_ms)})" if target_ms is not None else "")
    header = ("Method", "Accuracy (%)", "± error", "Measured (ms)", "Of dense",
              "FLOPs", "Parameters", "Met", "Minutes")  # fmt: skip
    strong = frozenset({ordered.index(lead)}) if lead is not None else frozenset()
    lines = tuple(_method_line(r) for r in ordered)
    return parts.table(Table(caption, header, lines, strong_rows=strong))


def _method_line(row: MethodRow) -> tuple[Cell, ...]:
    name = Cell(row.title, row.title)
    if row.accuracy is None or row.measured_ms is None:
        why = "cannot reach it" if row.infeasible else "not finished"
        return (name, no_cell(why), *(no_cell() for _ in range(7)))
    met = f"{row.met or 0:g} of {row.runs or 0:g}"
    if row.undecided:
        met += f" ({row.undecided:g} undecided)"
    return (
        name,
        number_cell(f"{100 * row.accuracy:.2f}", 100 * row.accuracy, is_key=True),
        _number(row.accuracy_error, lambda v: f"{100 * v:.2f}", scale=100, absent="one seed"),
        number_cell(show_number(row.measured_ms), row.measured_ms),
        _number(row.ratio, lambda v: f"{v:.3f}"),
        _number(row.flops, show_count),
        _number(row.params, show_count),
        Cell(met, met, "number"),
        _number(row.minutes, lambda v: f"{v:.1f}"),
    )


def _gain_section(record: ComparisonRecord) -> Section | Absent:
    known = [g for g in record.gains if g.points is not None]
    if not known:
        return "How far ahead: DSA with a latency budget and another method have no seed in common."
    caption = (
        "Accuracy of DSA with a latency budget less that of each other method, seed by seed (the "
        "same data and first weights), in points. Bars are one standard error. A network that is "
        f"slower by more than {SLOWER_PCT:g} % is not counted as ahead. The table also has the "
        "gain at the other network's latency, on the line through DSA's own networks."
    )
    rows = tuple(
        (
            Cell(g.target, g.target),
            Cell(g.title, g.title),
            number_cell(f"{g.points:+.2f}".replace("-", MINUS), g.points or 0.0, is_key=True),
            _number(g.error_points, lambda v: f"{v:.2f}", absent="one seed"),
            _number(g.slower_pct, lambda v: f"{v:+.1f} %".replace("-", MINUS)),
            _number(g.level_points, lambda v: f"{v:+.2f}".replace("-", MINUS), absent="none"),
            _number(g.level_error_points, lambda v: f"{v:.2f}", absent="one seed"),
            _number(g.seeds, lambda v: f"{v:g}"),
        )
        for g in known
    )
    header = (
        "Target", "Against", "Points ahead", "± standard error", "Slower by",
        "Ahead at its latency", "± standard error", "Seeds",
    )  # fmt: skip
    every = parts.details("Every difference as a table",
                          parts.table(Table("Points ahead", header, rows)))  # fmt: skip
    return Section(
        "gains", "How far ahead, or behind",
        (parts.figure(figures.gain_drawing(record), caption), *_spread_notes(record), every),
    )  # fmt: skip


def _spread_notes(record: ComparisonRecord) -> tuple[parts.Html, ...]:
    """What a difference has to be larger than, target by target."""
    items = []
    for spread in record.spreads:
        sd, p, seeds = spread.run_sd_points, spread.p_value, spread.seeds
        if sd is None or p is None or not seeds:
            continue
        differ = "" if p < SURELY else "no more than chance explains "
        items.append(
            f"{spread.target}: a run's own error is {sd:.2f} points (standard deviation), that of "
            f"a difference over {seeds:g} seeds {sd * (2 / seeds) ** 0.5:.2f}. The means of "
            f"{len(spread.methods)} methods differ {differ}(p {show_p(p)})."
        )
    return (parts.notes(items),) if items else ()


def show_p(value: float) -> str:
    """A probability, with its relation: next to nothing is less than a thousandth."""
    return f"= {value:.2g}" if value >= 0.001 else "< 0.001"


def _flops_section(record: ComparisonRecord) -> Section | Absent:
    if not record.networks and not any(c.flops for c in record.cells):
        return "FLOPs against latency: no networks in result.json."
    caption = (
        "If FLOPs decided latency, all points would lie on one line. Networks of nearly equal "
        "FLOPs differ in milliseconds as far as the points spread upwards."
    ) + _spread(record)
    header = ("method", "flops", "measured_ms")
    lines: list[tuple[object, ...]] = [
        ("random widths", n.flops, n.measured_ms) for n in record.networks
    ]
    lines += [(c.method, c.flops, c.measured_ms) for c in record.cells if c.flops is not None]
    shown = parts.figure(figures.flops_drawing(record), caption, parts.csv_text(header, lines))
    return Section("flops", "FLOPs against measured latency", (shown,))


def _spread(record: ComparisonRecord) -> str:
    """The two networks of nearly equal FLOPs whose latencies differ most."""
    points = [(n.flops, n.measured_ms) for n in record.networks]
    points += [(c.flops, c.measured_ms) for c in record.cells
               if c.flops is not None and c.measured_ms is not None]  # fmt: skip
    pairs = [
        (b[1] / a[1], a, b)
        for a in points
        for b in points
        if abs(a[0] - b[0]) <= 0.02 * max(a[0], b[0]) and b[1] > a[1]
    ]
    if not pairs:
        return ""
    factor, a, b = max(pairs)
    return (
        f" The widest gap here: {show_count(a[0])} FLOPs in {show_ms(a[1])}, and "
        f"{show_count(b[0])} in {show_ms(b[1])}, {factor:.2f} times as long."
    )


def _share_section(record: ComparisonRecord) -> Section | Absent:
    shares = record.shares
    if len(shares) < 2:
        return "What a channel costs: fewer than two groups of channels in result.json."
    ratios = {s.group: s.ms / s.flops for s in shares}
    low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    rest = len(shares) - figures.GROUPS_SHOWN
    caption = (
        "What narrowing a group of channels saves of the modelled milliseconds, as a part of what "
        "narrowing all of them saves, over the same part of the FLOPs. Right of 1 a search under "
        "FLOPs saves too little there, left of it too much; where all are near 1, both budgets "
        f"ask for the same network. Here {ratios[low]:.2f} ({low}) to {ratios[high]:.2f} ({high})."
    ) + (f" The first {figures.GROUPS_SHOWN} groups; {rest} more are in the CSV." if rest > 0
         else "")  # fmt: skip
    lines = [(s.group, s.ms, s.flops, s.ms / s.flops) for s in shares]
    numbers = parts.csv_text(("group", "share_of_ms", "share_of_flops", "ratio"), lines)
    shown = parts.figure(figures.share_drawing(shares), caption, numbers)
    return Section("shares", "What a channel costs, in milliseconds and in FLOPs", (shown,))


def _group_names(record: ComparisonRecord) -> list[str]:
    return [g.name for run in record.runs_by_cell.values() for g in run.groups][
        : max((len(run.groups) for run in record.runs_by_cell.values()), default=0)
    ]


def _keep_section(record: ComparisonRecord) -> Section | Absent:
    names = _group_names(record)
    has = {c.method for c in record.cells if c.keep_ratios}
    if not names or not has & {LATENCY_DSA, FLOPS_DSA}:
        return "Keep ratios under both budgets: no finished DSA run."
    rest = len(names) - figures.GROUPS_SHOWN
    caption = (
        "Part of each group's channels that DSA keeps at the same measured latency, in network "
        "order, mean over seeds. Where the two marks part, FLOPs and milliseconds disagree about "
        "what a channel costs."
    ) + (f" The first {figures.GROUPS_SHOWN} groups; {rest} more are in the CSV." if rest > 0
         else "")  # fmt: skip
    lines = [
        (c.cell, c.method, c.target, c.seed, name, ratio)
        for c in record.cells
        for name, ratio in zip(names, c.keep_ratios, strict=False)
    ]
    numbers = parts.csv_text(("cell", "method", "target", "seed", "group", "kept"), lines)
    shown = parts.figure(figures.keep_drawing(record, names), caption, numbers)
    return Section("keep", "Keep ratios under both budgets", (shown,))


def _layer_section(record: ComparisonRecord) -> Section | Absent:
    body = []
    for index, target in enumerate(record.targets):
        by_method = {
            c.method: record.runs_by_cell[c.cell].layers
            for c in record.cells
            if c.target == target and c.cell in record.runs_by_cell
        }
        by_method = {m: layers for m, layers in by_method.items() if layers}
        if not by_method:
            continue
        drawing = figures.layer_drawing(index, by_method, record)
        caption = f"Target {target}, first seed: the costliest layers, predicted by the model."
        lines = [
            (target, m, x.name, x.op, x.dense_ms, x.pruned_ms)
            for m, layers in by_method.items()
            for x in layers
        ]
        numbers = parts.csv_text(
            ("target", "method", "layer", "operator", "dense_ms", "pruned_ms"), lines
        )
        shown = parts.figure(drawing, caption, numbers)
        body.append(shown if not body else parts.details(f"Target {target}", shown))
    if not body:
        return "Milliseconds by layer: no finished DSA run."
    return Section("layers", "Where the milliseconds go, before and after", tuple(body))


def _prediction_section(record: ComparisonRecord) -> Section | Absent:
    known = [c for c in record.cells if c.predicted_ms is not None and c.measured_ms is not None]
    if not known:
        return "Predicted against measured: no finished run."
    off = [abs((c.predicted_ms or 0) / (c.measured_ms or 1) - 1) for c in known]
    caption = (
        f"Every pruned network; on the dashed line both agree. Mean error "
        f"{100 * sum(off) / len(off):.1f} %, largest {100 * max(off):.1f} %. Predictions are "
        "after the closed loop's corrections; bars are 95 % intervals of the measurement."
    )
    if record.heldout_mape_pct is not None and record.heldout_max_pct is not None:
        caption += (
            f" Before any correction, networks the model had not seen: mean "
            f"{record.heldout_mape_pct:.1f} %, largest {record.heldout_max_pct:.1f} %."
        )
    lines = [(c.cell, c.predicted_ms, c.measured_ms) for c in known]
    numbers = parts.csv_text(("cell", "predicted_ms", "measured_ms"), lines)
    shown = parts.figure(figures.prediction_drawing(record), caption, numbers)
    return Section("prediction", "Predicted against measured", (shown,))


def _staircase_section(record: ComparisonRecord) -> Section | Absent:
    if not record.staircases:
        return "Staircases: staircases is not in result.json."
    tiles = []
    for index, stairs in enumerate(record.staircases, start=1):
        lines = zip(stairs.couts, stairs.measured_ms, strict=True)
        numbers = parts.csv_text(("cout", "measured_ms"), lines)
        drawing = figures.staircase_drawing(index, stairs)
        tiles.append(parts.tile_figure(drawing, stairs.kind, stairs.layer, numbers))
    said = "What a channel costs here: each kind of layer at one size, measured channel by channel."
    return Section("stairs", "Staircases", (parts.text(said, "muted"), parts.tiles(tiles)))


def _search_section(record: ComparisonRecord) -> Section | Absent:
    body = []
    for index, (cell, run) in enumerate(record.runs_by_cell.items()):
        steps = [s for s in run.log.steps if s.keep_ratios]
        if not steps:
            continue
        drawing = search_drawing(steps, [g.name for g in run.groups], f"search-{index}")
        shown = parts.figure(
            drawing,
            f"{cell}: {len(steps)} logged steps.",
            steps_csv(steps, [g.name for g in run.groups]),
        )
        body.append(shown if not body else parts.details(cell, shown))
    if not body:
        return "Search history: no search_step events in the runs' logs."
    return Section("search", "How the searches went", tuple(body))


def _warning_section(record: ComparisonRecord) -> Section | Absent:
    unreached = [f"{c.cell}: {c.infeasible}" for c in record.cells if c.infeasible]
    if not record.warnings and not unreached:
        return Section("warnings", "Warnings", (parts.text("The runs recorded none."),))
    said = [*unreached, *record.warnings]
    title = f"Warnings ({len(said)})"
    listed = parts.notes(said, "notes warnings")
    body = listed if len(said) <= 6 else parts.details(counted(len(said), "warning"), listed)
    return Section("warnings", title, (body,))


def _runs_section(record: ComparisonRecord) -> Section | Absent:
    if not record.cells:
        return "Every run: cells is not in result.json."
    header = ("Run", "Seed", "Accuracy (%)", "Predicted (ms)", "Measured (ms)",
              "95 % interval (ms)", "Of dense", "FLOPs", "Met", "Minutes")  # fmt: skip
    rows = tuple(_run_line(c) for c in record.cells)
    every = parts.table(Table(f"All {len(rows)} runs", header, rows))
    return Section("runs", "Every run", (parts.details(counted(len(rows), "run"), every),))


def _run_line(cell: RunPoint) -> tuple[Cell, ...]:
    met = {True: "yes", False: "no", None: "not reached"}[cell.met]
    if cell.verdict == "undecided":
        met = cell.verdict
    return (
        Cell(cell.cell, cell.cell),
        _number(cell.seed, lambda v: f"{v:g}"),
        _number(cell.accuracy, lambda v: f"{100 * v:.2f}", scale=100),
        _number(cell.predicted_ms, show_number),
        _number(cell.measured_ms, show_number),
        interval_cell(cell.ci95_ms, absent=""),
        _number(cell.ratio, lambda v: f"{v:.3f}"),
        _number(cell.flops, show_count),
        Cell(met, met, "number"),
        _number(cell.minutes, lambda v: f"{v:.1f}"),
    )  # fmt: skip


def _number(
    value: float | None, show: Callable[[float], str], *, scale: float = 1.0, absent: str = ""
) -> Cell:
    return no_cell(absent) if value is None else number_cell(show(value), scale * value)
