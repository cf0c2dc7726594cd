"""The figures of a run's report. Each takes plain records and returns a drawing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsa_hw.reports.drawing import MAX_POINTS, Drawing, draw_svg, shorten, style_axes, thin
from dsa_hw.reports.fields import Interval
from dsa_hw.reports.formatting import show_ms, show_number, show_pct
from dsa_hw.reports.palette import DENSE, INK, MUTED, PREDICTED, PRUNED, SECOND, SHADE, TARGET, ramp
from dsa_hw.reports.run_record import (
    CalibrationNetwork,
    EpochPoint,
    GroupWidth,
    LayerCost,
    RunRecord,
    SearchStep,
)
from dsa_hw.runs.console import counted

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 9.0
ROWS_A_COLUMN = 45
LAYERS_SHOWN = 40
POINTS_A_FIGURE = 16_000
Bar = tuple[str, float, Interval | None, str]
Line = tuple[str, str, Sequence[tuple[float, float]]]


def latency_drawing(run: RunRecord) -> Drawing:
    """Dense, predicted and measured milliseconds as bars, the target as a line."""
    bars = _latency_bars(run)
    said = [f"{label}: {show_ms(value)}" for label, value, _, _ in bars]
    if run.target_ms is not None:
        said.append(f"target: {show_ms(run.target_ms)}")

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        style_axes(axes, grid="x")
        reach = max((ci or (0.0, value))[1] for _, value, ci, _ in bars)
        for row, (_, value, ci, colour) in enumerate(bars):
            axes.barh(row, value, height=0.56, color=colour)
            if ci is not None:
                _interval_bar(axes, row, ci)
            edge = max(value, ci[1] if ci else value)
            place = _clear_of_target(edge, reach * 0.012, reach * 0.12, run.target_ms)
            axes.text(place, row, show_ms(value), va="center", weight="bold")
        if run.target_ms is not None:
            _target_line(axes, run.target_ms)
        axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
        axes.tick_params(axis="y", labelcolor=INK.light, labelsize=9.5)
        axes.set_ylim(len(bars) - 0.5, -0.85)
        axes.set_xlim(0, max(reach, run.target_ms or 0.0) * 1.13)
        axes.set_xlabel("latency of the whole network (ms)")

    return draw_svg("latency", "; ".join(said), (7.2, 0.9 + 0.42 * len(bars)), draw)


def group_drawing(groups: Sequence[GroupWidth]) -> Drawing:
    """Kept width of each group inside the outline of its dense width, in network order."""
    columns = 1 if len(groups) <= ROWS_A_COLUMN else 2
    a_column = -(-len(groups) // columns)
    said = "; ".join(f"{item.name}: {item.width:g} of {item.dense_width:g}" for item in groups)

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(1, columns, squeeze=False)[0]
        for index, axes in enumerate(panels):
            _draw_groups(axes, groups[index * a_column : (index + 1) * a_column], a_column)
        handles = _group_legend(any(item.keep_ratio is not None for item in groups))
        figure.legend(handles=handles, loc="outside upper left", ncols=3)

    return draw_svg("groups", said, (WIDTH_IN, 0.95 + 0.24 * a_column), draw)


def layer_drawing(layers: Sequence[LayerCost]) -> Drawing:
    """Predicted milliseconds of each layer before and after, in network order.

    Only the ``LAYERS_SHOWN`` costliest are drawn one by one; the rest are one row.
    """
    rows = _layer_rows(layers)
    said = "; ".join(f"{name}: {before:.4g} to {after:.4g} ms" for name, before, after in rows)

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        style_axes(axes, grid="x")
        places = range(len(rows))
        before_ms = [before for _, before, _ in rows]
        after_ms = [after for _, _, after in rows]
        axes.barh(places, before_ms, height=0.78, color=DENSE.light, alpha=0.45, label="dense")
        axes.barh(places, after_ms, height=0.44, color=PRUNED.light, label="pruned")
        axes.set_yticks(places, [shorten(name) for name, _, _ in rows])
        axes.tick_params(axis="y", labelcolor=INK.light, labelsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel("predicted by the latency model (ms)")
        figure.legend(loc="outside upper left", ncols=2)

    return draw_svg("layers", said, (WIDTH_IN, 0.95 + 0.22 * len(rows)), draw)


def calibration_drawing(networks: Sequence[CalibrationNetwork]) -> Drawing:
    """Predicted against measured whole networks, with the line where they agree."""
    held_out = sum(network.held_out for network in networks)
    said = (
        f"Predicted against measured latency of {len(networks)} whole networks: "
        f"{len(networks) - held_out} used for calibration, {held_out} held out."
    )

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        style_axes(axes, grid="both")
        every = [ms for item in networks for ms in (item.predicted_ms, item.measured_ms)]
        margin = (max(every) - min(every)) * 0.06 or max(every) * 0.06
        low, high = min(every) - margin, max(every) + margin
        axes.plot([low, high], [low, high], color=MUTED.light, linewidth=1, linestyle=(0, (4, 3)))
        _scatter(axes, [n for n in networks if not n.held_out], DENSE.light, "calibration", "s")
        _scatter(axes, [n for n in networks if n.held_out], PRUNED.light, "held out", "o")
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set_xlabel("predicted (ms)")
        axes.set_ylabel("measured (ms)")
        axes.legend(loc="upper left")

    return draw_svg("calibration", said, (WIDTH_IN * 0.64, WIDTH_IN * 0.58), draw)


def search_drawing(
    steps: Sequence[SearchStep], group_names: Sequence[str], name: str = "search"
) -> Drawing:
    """Loss, keep ratios, each budget's cost against its moving target, and beta2."""
    budgets = sorted({budget for step in steps for budget in step.costs})
    has_beta2 = any(step.inexactness_beta2 is not None for step in steps)
    has_ratios = any(step.keep_ratios for step in steps)
    has_loss = any(s.loss is not None or s.validation_loss is not None for s in steps)
    panels = has_loss + has_ratios + len(budgets) + has_beta2
    said = f"History of {len(steps)} logged search steps. " + _last_ratios(steps, group_names)

    def draw(figure: "Figure") -> None:
        stack = iter(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
        if has_loss:
            _draw_loss(next(stack), steps)
        if has_ratios:
            _draw_ratios(next(stack), steps)
        for budget in budgets:
            _draw_budget(next(stack), steps, budget)
        if has_beta2:
            _draw_beta2(next(stack), steps)
        for axes in figure.axes:
            _shade_warmup(axes, steps)
        figure.axes[-1].set_xlabel("search step")

    return draw_svg(name, said, (WIDTH_IN, 0.5 + 1.75 * panels), draw)


def training_drawing(epochs: Sequence[EpochPoint]) -> Drawing:
    """Training loss and accuracy by epoch, the stages one after the other."""
    measures = [("training loss", [epoch.train_loss for epoch in epochs])]
    if any(epoch.accuracy is not None for epoch in epochs):
        measures.append(("accuracy (%)", [_percent(epoch.accuracy) for epoch in epochs]))
    stages = list(dict.fromkeys(epoch.stage for epoch in epochs))
    colours = dict(zip(stages, ramp(len(stages)), strict=True))
    ends = [f"{s}: {counted(sum(epoch.stage == s for epoch in epochs), 'epoch')}" for s in stages]

    def draw(figure: "Figure") -> None:
        for axes, (label, values) in zip(
            figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True
        ):
            style_axes(axes)
            for stage in stages:
                line = [
                    (place, value)
                    for place, (epoch, value) in enumerate(zip(epochs, values, strict=True), 1)
                    if epoch.stage == stage and value is not None
                ]
                points = thin(line)
                marker = "o" if len(points) <= 40 else ""
                _plot(axes, (stage, colours[stage], points), marker=marker, markersize=3.5)
            axes.set_title(label)
            axes.set_xlim(0.5, len(epochs) + 0.5)
            axes.locator_params(axis="x", integer=True)
            axes.set_xlabel("epoch, stages one after the other")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)

    return draw_svg("training", "; ".join(ends), (WIDTH_IN, 2.9), draw)


def _latency_bars(run: RunRecord) -> list[Bar]:
    candidates = (
        ("dense, measured", run.dense.measured_ms, run.dense.ci95_ms, DENSE.light),
        ("pruned, predicted", run.pruned.predicted_ms, None, PREDICTED.light),
        ("pruned, measured", run.pruned.measured_ms, run.pruned.ci95_ms, PRUNED.light),
    )
    return [(name, ms, ci, colour) for name, ms, ci, colour in candidates if ms is not None]


def _clear_of_target(edge: float, gap: float, room: float, target_ms: float | None) -> float:
    """Where a label of width ``room`` starts, right of ``edge`` and off the target line."""
    start = edge + gap
    crosses = target_ms is not None and start - gap < target_ms < start + room
    return target_ms + gap if crosses and target_ms is not None else start


def _interval_bar(axes: "Axes", row: float, interval: Interval) -> None:
    low, high = interval
    axes.plot([low, high], [row, row], color=INK.light, linewidth=1.4, solid_capstyle="butt")
    for end in (low, high):
        axes.plot([end, end], [row - 0.1, row + 0.1], color=INK.light, linewidth=1.4)


def _target_line(axes: "Axes", target_ms: float) -> None:
    axes.axvline(target_ms, color=TARGET.light, linewidth=1.6, linestyle=(0, (4, 2.5)))
    axes.annotate(
        f"target {show_ms(target_ms)}",
        (target_ms, -0.62),
        xytext=(5, 0),
        textcoords="offset points",
        color=TARGET.light,
        weight="bold",
        va="center",
    )


def _draw_groups(axes: "Axes", groups: Sequence[GroupWidth], rows: int) -> None:
    style_axes(axes, grid="x")
    places = range(len(groups))
    axes.barh(
        places,
        [item.dense_width for item in groups],
        height=0.7,
        facecolor="none",
        edgecolor=DENSE.light,
        linewidth=0.9,
    )
    axes.barh(places, [item.width for item in groups], height=0.7, color=PRUNED.light)
    reach = max(item.dense_width for item in groups)
    for row, item in enumerate(groups):
        if item.keep_ratio is not None:
            learned = item.keep_ratio * item.dense_width
            axes.plot([learned] * 2, [row - 0.43, row + 0.43], color=TARGET.light, linewidth=2)
        share = f" ({show_pct(item.width / item.dense_width)})" if item.dense_width else ""
        label = f"{item.width:g} / {item.dense_width:g}{share}"
        axes.text(item.dense_width + reach * 0.01, row, label, va="center", fontsize=7.5)
    axes.set_yticks(places, [shorten(item.name) for item in groups])
    axes.tick_params(axis="y", labelcolor=INK.light, labelsize=8)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xlim(0, reach * 1.2)
    axes.set_xlabel("channels")


def _group_legend(has_ratios: bool) -> "list[Artist]":
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Artist] = [
        Patch(facecolor="none", edgecolor=DENSE.light, label="dense"),
        Patch(color=PRUNED.light, label="kept"),
    ]
    if has_ratios:
        handles.append(Line2D([], [], color=TARGET.light, linewidth=2, label="before rounding"))
    return handles


def _layer_rows(layers: Sequence[LayerCost]) -> list[tuple[str, float, float]]:
    by_cost = sorted(range(len(layers)), key=lambda index: -layers[index].dense_ms)
    shown = sorted(by_cost[:LAYERS_SHOWN])
    rows = [(layers[i].name, layers[i].dense_ms, layers[i].pruned_ms) for i in shown]
    rest = [layers[i] for i in by_cost[LAYERS_SHOWN:]]
    if rest:
        before_ms, after_ms = sum(r.dense_ms for r in rest), sum(r.pruned_ms for r in rest)
        rows.append((f"the other {len(rest)} layers", before_ms, after_ms))
    return rows


def _scatter(
    axes: "Axes", networks: Sequence[CalibrationNetwork], colour: str, label: str, marker: str
) -> None:
    if not networks:
        return
    for network in networks:
        if network.ci95_ms is not None:
            axes.plot([network.predicted_ms] * 2, network.ci95_ms, color=colour, linewidth=1.1)
    axes.plot(
        [network.predicted_ms for network in networks],
        [network.measured_ms for network in networks],
        linestyle="",
        marker=marker,
        markersize=5.5,
        color=colour,
        label=f"{label} ({len(networks)})",
    )


def _draw_loss(axes: "Axes", steps: Sequence[SearchStep]) -> None:
    style_axes(axes)
    train = [(step.step, step.loss) for step in steps if step.loss is not None]
    held = [(s.step, s.validation_loss) for s in steps if s.validation_loss is not None]
    _plot(axes, ("training", DENSE.light, thin(train)))
    _plot(axes, ("validation", SECOND.light, thin(held)))
    axes.set_title("loss")
    axes.legend(loc="upper right", ncols=2)


def _draw_ratios(axes: "Axes", steps: Sequence[SearchStep]) -> None:
    style_axes(axes)
    count = max(len(step.keep_ratios) for step in steps)
    known = thin([s for s in steps if s.keep_ratios], min(MAX_POINTS, POINTS_A_FIGURE // count))
    for group, colour in enumerate(ramp(count)):
        line = [(s.step, s.keep_ratios[group]) for s in known if group < len(s.keep_ratios)]
        _plot(axes, ("", colour, line), linewidth=1.0)
    axes.set_ylim(0, 1.03)
    axes.set_title(f"keep ratio of each group ({count}; first group orange, last violet)")


def _draw_budget(axes: "Axes", steps: Sequence[SearchStep], name: str) -> None:
    style_axes(axes)
    cost = [(step.step, step.costs[name]) for step in steps if name in step.costs]
    target = [(step.step, step.targets[name]) for step in steps if name in step.targets]
    _plot(axes, ("cost", PRUNED.light, thin(cost)), linewidth=1.6)
    _plot(axes, ("target", TARGET.light, thin(target)), linestyle=(0, (4, 2.5)))
    axes.set_ylim(bottom=0)
    unit = " (ms, predicted)" if name.startswith("latency") else ""
    axes.set_title(f"budget: {name}{unit}")
    axes.legend(loc="upper right", ncols=2)


def _draw_beta2(axes: "Axes", steps: Sequence[SearchStep]) -> None:
    style_axes(axes)
    line = [(s.step, s.inexactness_beta2) for s in steps if s.inexactness_beta2 is not None]
    _plot(axes, ("", SECOND.light, thin(line)))
    if min(value for _, value in line) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
    axes.set_title("β₂: from soft masks (low) to a hard threshold (high)")


def _shade_warmup(axes: "Axes", steps: Sequence[SearchStep]) -> None:
    warmup = [step.step for step in steps if step.phase == "warmup"]
    if not warmup:
        return
    axes.axvspan(min(warmup), max(warmup), color=SHADE.light, zorder=0, linewidth=0)
    if axes is axes.figure.axes[0]:
        axes.annotate(
            "warm-up",
            (min(warmup), 0.04),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            color=MUTED.light,
            fontsize=7.5,
        )


def _plot(
    axes: "Axes",
    line: Line,
    linewidth: float = 1.4,
    linestyle: str | tuple[float, tuple[float, float]] = "-",
    marker: str = "",
    markersize: float = 3.0,
) -> None:
    """Plot ``(label, colour, points)``; a line with no points leaves no legend entry."""
    label, colour, points = line
    if points:
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=label or "_nolegend_",
            color=colour,
            linewidth=linewidth,
            linestyle=linestyle,
            marker=marker,
            markersize=markersize,
        )


def _last_ratios(steps: Sequence[SearchStep], names: Sequence[str]) -> str:
    last = next((step for step in reversed(steps) if step.keep_ratios), None)
    if last is None:
        return "Keep ratios were not logged."
    labels = names if len(names) == len(last.keep_ratios) else range(1, len(last.keep_ratios) + 1)
    pairs = zip(labels, last.keep_ratios, strict=True)
    return "Last keep ratios: " + ", ".join(
        f"{label} {show_number(ratio)}" for label, ratio in pairs
    )


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else fraction * 100
