"""The report of one pruning run: what was asked, what came out, and how."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dsa_hw.allocation.verdict import verdict_of
from dsa_hw.reports import page as parts
from dsa_hw.reports import run_figures as figures
from dsa_hw.reports.common_sections import (
    Absent,
    config_section,
    environment_section,
    interval_cell,
    with_left_out,
)
from dsa_hw.reports.drawing import thin
from dsa_hw.reports.formatting import (
    TIMES,
    show_change,
    show_count,
    show_interval,
    show_ms,
    show_number,
    show_pct,
    show_points,
    show_seconds,
)
from dsa_hw.reports.page import Cell, Headline, Section, Table, no_cell, number_cell
from dsa_hw.reports.run_record import NetworkFigures, RunRecord, SearchStep, read_run
from dsa_hw.runs.console import counted
from dsa_hw.runs.durable_files import replace_file

NOT_MEASURED = "not measured"


def write_run_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write one self-contained page about a finished (or stopped) run.

    Args:
        run_dir: holds ``result.json`` and, where the run wrote them,
            ``log.jsonl`` and ``config.yaml``.
        out: where to write; ``run_dir / "report.html"`` if not given.

    Returns:
        The path of the page. What the run did not record is named on it.

    Raises:
        ReportInputError: ``result.json`` is missing or is not a JSON object.
    """
    run_dir = Path(run_dir)
    out = run_dir / "report.html" if out is None else Path(out)
    run = read_run(run_dir)
    headline = _headline(run)
    title = f"{run.setting.model or run.folder}: pruning report"
    statistic = run.setting.statistic or "recorded statistic"
    footer = f"Run folder: {run.folder}. Times are the {statistic}."
    page = parts.page(title, headline, _sections(run), footer)
    replace_file(out, page.encode("utf-8", "replace"))
    return out


def _sections(run: RunRecord) -> list[Section]:
    """The sections that the run has data for, then one that names the others."""
    builders: tuple[Callable[[RunRecord], Section | Absent], ...] = (
        _result_section,
        _warning_section,
        _latency_section,
        _group_section,
        _layer_section,
        _calibration_section,
        _closed_loop_section,
        _search_section,
        _training_section,
        _time_section,
        _table_section,
        lambda run: environment_section(run.environment, "Environment of the run"),
        lambda run: config_section(run.config_text),
    )
    return with_left_out([build(run) for build in builders], run.problems)


def _headline(run: RunRecord) -> Headline:
    return Headline(
        kind="Pruning report" + (f" · {run.setting.data}" if run.setting.data else ""),
        sentence=_sentence(run),
        badge=_badge(run),
        details=_proof(run),
    )


def _sentence(run: RunRecord) -> str:
    dense = NOT_MEASURED if run.dense.measured_ms is None else show_ms(run.dense.measured_ms)
    if run.pruned.measured_ms is not None:
        pruned = f"{show_ms(run.pruned.measured_ms)} measured"
    elif run.pruned.predicted_ms is not None:
        pruned = f"{show_ms(run.pruned.predicted_ms)} predicted, {NOT_MEASURED}"
    else:
        pruned = NOT_MEASURED
    target = "no target" if run.target_ms is None else f"target {show_ms(run.target_ms)}"
    known = (run.setting.device, run.setting.backend, run.setting.threads_text)
    setting = ", ".join(item for item in known if item)
    on = f" on {setting}" if setting else ""
    return f"{run.setting.model or 'network'}: {dense} → {pruned} ({target}){on}"


def _badge(run: RunRecord) -> str:
    """What the run says. Where it does not say, its interval does; a number alone says nothing."""
    if run.verdict is not None:
        return run.verdict
    if run.target_ms and run.pruned.ci95_ms is not None:
        low, high = run.pruned.ci95_ms
        return verdict_of((low / run.target_ms, high / run.target_ms))
    return "unknown"


def _proof(run: RunRecord) -> tuple[str, ...]:
    """One line of facts behind the badge; empty where nothing was measured."""
    facts = []
    measured_ms, interval = run.pruned.measured_ms, run.pruned.ci95_ms
    if measured_ms is not None and run.target_ms:
        gap = (measured_ms / run.target_ms - 1) * 100
        side = "above" if gap > 0 else "under"
        within = f" (95 % interval {show_interval(interval)} ms)" if interval else ""
        facts.append(f"{abs(gap):.1f} % {side} the target{within}")
    if run.verdict == "undecided" and run.verdict_reason:
        facts.append(run.verdict_reason)
    if run.headroom is not None and run.next_step is not None:
        step = run.next_step
        facts.append(
            f"as predicted, {100 * run.headroom:.1f} % of the target is left, and the next step up "
            f"({step.group}) would cost {100 * step.extra:.1f} %"
        )
    if measured_ms and run.dense.measured_ms:
        facts.append(
            f"{run.dense.measured_ms / measured_ms:.2f}{TIMES} as fast as the dense network"
        )
    if run.dense.accuracy is not None and run.pruned.accuracy is not None:
        before, after = run.dense.accuracy, run.pruned.accuracy
        change = show_points(before, after)
        facts.append(f"accuracy {show_pct(before)} → {show_pct(after)} ({change})")
    return ("; ".join(facts) + ".",) if facts else ()


def _result_section(run: RunRecord) -> Section:
    rows = (
        _latency_row(run),
        _interval_row(run),
        _figure_row("Accuracy", run, lambda net: net.accuracy, show_pct, show_points, NOT_MEASURED),
        _figure_row("FLOPs", run, lambda net: net.flops, show_count, show_change),
        _figure_row("Parameters", run, lambda net: net.params, show_count, show_change),
        _removal_row(run),
    )
    header = ("", "Dense", "Target", "Pruned, predicted", "Pruned, measured", "Change")
    result = Table(_setting(run), header, rows, strong_rows=frozenset({0}))
    body = [parts.table(result)]
    if run.removed_branches:
        body.append(parts.text(f"Removed branches: {', '.join(run.removed_branches)}."))
    return Section("result", "Result", tuple(body))


def _setting(run: RunRecord) -> str:
    """What the times hold for, as the caption of the main table."""
    seed = None if run.seed is None else f"seed {run.seed}"
    epochs = None if run.setting.epochs is None else f"epochs {run.setting.epochs}"
    return run.setting.line(run.setting.statistic, epochs, seed)


def _latency_row(run: RunRecord) -> tuple[Cell, ...]:
    dense, pruned = run.dense.measured_ms, run.pruned.measured_ms
    return (
        Cell("Latency (ms)", "Latency (ms)"),
        _number(dense, NOT_MEASURED),
        _number(run.target_ms, "no target"),
        _number(run.pruned.predicted_ms, "not predicted"),
        _number(pruned, NOT_MEASURED, is_key=True),
        _change(dense, pruned),
    )


def _interval_row(run: RunRecord) -> tuple[Cell, ...]:
    name = Cell("95 % interval (ms)", "95 % interval (ms)")
    dense, pruned = interval_cell(run.dense.ci95_ms), interval_cell(run.pruned.ci95_ms)
    return (name, dense, no_cell(), no_cell(), pruned, no_cell())


def _figure_row(
    name: str,
    run: RunRecord,
    pick: Callable[[NetworkFigures], float | None],
    show: Callable[[float], str],
    compare: Callable[[float, float], str],
    absent: str = "not recorded",
) -> tuple[Cell, ...]:
    """A row of the main table that has no target and no prediction."""
    dense, pruned = pick(run.dense), pick(run.pruned)
    shown = [
        no_cell(absent) if value is None else number_cell(show(value), value)
        for value in (dense, pruned)
    ]
    return (
        Cell(name, name),
        shown[0],
        no_cell(),
        no_cell(),
        shown[1],
        _change(dense, pruned, compare),
    )


def _removal_row(run: RunRecord) -> tuple[Cell, ...]:
    """Proof of the surgery: the largest difference of an output, masked less removed."""
    difference = run.pruned.masked_vs_pruned_max_abs
    shown = (
        no_cell("not recorded")
        if difference is None
        else number_cell(f"{difference:.3g}", difference)
    )
    name = "Outputs changed by removal, at most"
    return (Cell(name, name), no_cell(), no_cell(), no_cell(), shown, no_cell())


def _latency_section(run: RunRecord) -> Section | Absent:
    known = (run.dense.measured_ms, run.pruned.predicted_ms, run.pruned.measured_ms)
    if all(value is None for value in known):
        return "Latency figure: result.json has no latency, measured or predicted."
    caption = (
        "Latency of the whole network. Thin bars at the ends are 95 % intervals of the "
        "measurement; a predicted time has none."
    )
    names = ("dense, measured", "pruned, predicted", "pruned, measured", "target")
    times = (*known, run.target_ms)
    numbers = parts.csv_text(("network", "ms"), zip(names, times, strict=True))
    shown = parts.figure(figures.latency_drawing(run), caption, numbers, kind="lead")
    return Section("latency", "Latency", (shown,))


def _group_section(run: RunRecord) -> Section | Absent:
    if not run.groups:
        return "Widths by group: groups is not in result.json."
    rows = tuple(
        (
            Cell(item.name, item.name),
            _number(item.dense_width),
            _number(item.width, is_key=True),
            _number(item.keep_ratio, "not recorded"),
            _number(item.step, "not recorded"),
            parts.text_cell(", ".join(item.members) or None),
        )
        for item in run.groups
    )
    header = ("Group", "Dense width", "Width", "Before rounding", "Step", "Member layers")
    caption = (
        f"Channels kept in each of {len(run.groups)} coupled groups, in network order. The mark "
        "is the keep ratio that the search (or a plan without one) came to; the bar is the width "
        "after rounding to the device's steps at the target."
    )
    return Section(
        "widths",
        "Widths by group",
        (
            parts.figure(figures.group_drawing(run.groups), caption),
            parts.details("Every group as a table", parts.table(Table("Groups", header, rows))),
        ),
    )


def _layer_section(run: RunRecord) -> Section | Absent:
    if not run.layers:
        return "Milliseconds by layer: layers is not in result.json."
    before_ms = sum(layer.dense_ms for layer in run.layers)
    after_ms = sum(layer.pruned_ms for layer in run.layers)
    hidden = len(run.layers) - figures.LAYERS_SHOWN
    rest = f" The {hidden} cheapest layers are one bar." if hidden > 0 else ""
    caption = (
        f"Predicted by the latency model, not measured: {show_ms(before_ms)} in layers before, "
        f"{show_ms(after_ms)} after.{rest}"
    )
    rows = tuple(
        (
            Cell(layer.name, layer.name),
            parts.text_cell(layer.op),
            _shape(layer.dense_shape),
            _shape(layer.pruned_shape),
            _number(layer.dense_ms),
            _number(layer.pruned_ms, is_key=True),
        )
        for layer in run.layers
    )
    header = ("Layer", "Operator", "Channels, dense", "Channels, pruned", "Dense ms", "Pruned ms")
    by_layer = Table("Predicted milliseconds by layer", header, rows)
    return Section(
        "layers",
        "Where the milliseconds go",
        (
            parts.figure(figures.layer_drawing(run.layers), caption),
            parts.details("Every layer as a table", parts.table(by_layer)),
        ),
    )


def _calibration_section(run: RunRecord) -> Section | Absent:
    calibration = run.calibration
    if calibration is None or not calibration.networks:
        return "Predicted against measured networks: calibration is not in result.json."
    facts = (
        ("Held-out error, mean (%)", calibration.heldout_mape_pct),
        ("Held-out error, largest (%)", calibration.heldout_max_pct),
        ("Constant (ms)", calibration.constant_ms),
        *((f"Scale of {kind}", scale) for kind, scale in calibration.scales.items()),
    )
    rows = tuple(
        (
            parts.text_cell("held out" if network.held_out else "calibration"),
            _number(network.predicted_ms),
            _number(network.measured_ms, is_key=True),
            interval_cell(network.ci95_ms),
            _change(network.measured_ms, network.predicted_ms),
        )
        for network in calibration.networks
    )
    header = ("Used for", "Predicted ms", "Measured ms", "95 % interval (ms)", "Prediction off by")
    caption = (
        "Whole networks of random widths; on the dashed line prediction and measurement agree. "
        "Held-out networks took no part in the calibration. Vertical bars: 95 % intervals."
    )
    networks = parts.table(Table("Whole networks", header, rows))
    return Section(
        "calibration",
        "Can the prediction be trusted?",
        (
            _numbers_table("Error and coefficients", facts),
            parts.figure(figures.calibration_drawing(calibration.networks), caption, kind="medium"),
            parts.details("Every network as a table", networks),
        ),
    )


def _closed_loop_section(run: RunRecord) -> Section | Absent:
    if not run.closed_loop:
        return "Closed-loop rounds: closed_loop is not in result.json."
    rows = tuple(
        (
            Cell(_plain(item.round), _plain(item.round)),
            _number(item.predicted_ms, "not predicted"),
            _number(item.measured_ms, NOT_MEASURED, is_key=True),
            interval_cell(item.ci95_ms),
            _number(item.target_ms, "no target"),
            _change(item.target_ms, item.measured_ms),
            _number(item.correction, "not recorded"),
        )
        for item in run.closed_loop
    )
    header = (
        "Round",
        "Predicted ms",
        "Measured ms",
        "95 % interval (ms)",
        "Target ms",
        "Against target",
        "Correction",
    )
    rounds = Table("Round, measure, correct the model, round again", header, rows)
    return Section("rounds", "Closed-loop rounds", (parts.table(rounds),))


def _search_section(run: RunRecord) -> Section | Absent:
    steps = run.log.steps
    drawable = any(
        step.loss is not None or step.validation_loss is not None or step.keep_ratios or step.costs
        for step in steps
    )
    if not drawable:
        return "Search history: log.jsonl has no search_step events."
    thinned = f" Lines show at most {figures.MAX_POINTS} of them, evenly spaced."
    caption = f"{len(steps)} logged steps of the search." + (
        thinned if len(steps) > figures.MAX_POINTS else ""
    )
    names = [group.name for group in run.groups]
    drawing = figures.search_drawing(steps, names)
    numbers = steps_csv(steps, names)
    return Section("search", "Search history", (parts.figure(drawing, caption, numbers),))


def steps_csv(steps: Sequence[SearchStep], group_names: Sequence[str]) -> str:
    """The steps that are drawn, as CSV."""
    budgets = sorted({budget for step in steps for budget in step.costs})
    header = ("step", "phase", "loss", "validation_loss", "beta2",
              *(f"{name} {what}" for name in budgets for what in ("cost", "target")),
              *group_names)  # fmt: skip
    return parts.csv_text(
        header,
        [
            (
                s.step, s.phase, s.loss, s.validation_loss, s.inexactness_beta2,
                *(part.get(name) for name in budgets for part in (s.costs, s.targets)),
                *s.keep_ratios,
            )
            for s in thin(steps)
        ],
    )  # fmt: skip


def _training_section(run: RunRecord) -> Section | Absent:
    epochs = [e for e in run.log.epochs if e.train_loss is not None or e.accuracy is not None]
    if not epochs:
        return "Training history: log.jsonl has no epoch events."
    stages = ", ".join(dict.fromkeys(epoch.stage for epoch in epochs))
    caption = f"{counted(len(epochs), 'epoch')}; stages in order: {stages}."
    lines = [(e.stage, e.epoch, e.train_loss, e.accuracy) for e in epochs]
    numbers = parts.csv_text(("stage", "epoch", "train_loss", "accuracy"), lines)
    drawing = figures.training_drawing(epochs)
    return Section("training", "Training history", (parts.figure(drawing, caption, numbers),))


def _time_section(run: RunRecord) -> Section | Absent:
    known = [value for _, value in run.seconds if value is not None]
    if not known:
        return "Time spent: seconds is not in result.json, or holds no number."
    rows = tuple(
        (
            Cell(stage, stage),
            no_cell("not recorded") if value is None else number_cell(show_seconds(value), value),
        )
        for stage, value in run.seconds
    )
    name = "total" if len(known) == len(rows) else "total of those recorded"
    total = (Cell(name, name), number_cell(show_seconds(sum(known)), sum(known)))
    content = Table(
        "Wall-clock time by stage", ("Stage", "Time"), (*rows, total), frozenset({len(rows)}), True
    )
    return Section("time", "Time spent", (parts.table(content),))


def _table_section(run: RunRecord) -> Section | Absent:
    use = run.table
    if use is None:
        return "Latency table: table is not in result.json."
    counts = (
        ("Entries", use.entries),
        ("Measured in this run", use.measured),
        ("Reused", use.reused),
    )
    said = parts.text(use.path or "(path not recorded)")
    return Section("table", "Latency table", (said, _numbers_table("Measurements", counts)))


def _warning_section(run: RunRecord) -> Section | Absent:
    if run.warnings is None:
        return "Warnings: warnings is not in result.json and log.jsonl has none."
    if not run.warnings:
        return Section("warnings", "Warnings", (parts.text("The run recorded none."),))
    warnings = parts.notes(run.warnings, "notes warnings")
    return Section("warnings", f"Warnings ({len(run.warnings)})", (warnings,))


def _numbers_table(caption: str, facts: Sequence[tuple[str, float | None]]) -> parts.Html:
    """Names and numbers, two columns; what is not recorded says so."""
    rows = tuple((Cell(name, name), _number(value, "not recorded")) for name, value in facts)
    return parts.table(Table(caption, ("", "Value"), rows, is_facts=True))


def _number(value: float | None, absent: str = "", is_key: bool = False) -> Cell:
    return no_cell(absent) if value is None else number_cell(show_number(value), value, is_key)


def _change(
    before: float | None,
    after: float | None,
    show: Callable[[float, float], str] = show_change,
) -> Cell:
    """The change as ``show`` writes it; the relative change, as a fraction, in the CSV."""
    if not before or after is None:
        return no_cell()
    return Cell(show(before, after), repr(after / before - 1), "number")


def _shape(shape: tuple[float | None, float | None]) -> Cell:
    known = " → ".join("?" if width is None else f"{width:g}" for width in shape)
    return no_cell("not recorded") if shape == (None, None) else Cell(known, known)


def _plain(value: float | None) -> str:
    return "?" if value is None else f"{value:g}"
