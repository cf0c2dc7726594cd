"""The figures of a comparison's report. Each takes plain records and returns a drawing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsa_hw.reports.compare_record import (
    FLOPS_DSA,
    LATENCY_DSA,
    ComparisonRecord,
    CostShare,
    MethodRow,
    RunPoint,
    Staircase,
)
from dsa_hw.reports.drawing import Drawing, draw_svg, shorten, style_axes
from dsa_hw.reports.formatting import show_ms, show_number, show_pct
from dsa_hw.reports.palette import DENSE, INK, MUTED, PRUNED, SECOND, TARGET
from dsa_hw.reports.run_record import LayerCost

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 9.0
LAYERS_SHOWN = 24
GROUPS_SHOWN = 30
OTHERS = ("#b8752a", "#c0508f", "#4f9457", "#4a79c4", "#8f8a35", "#a0674b", "#2a8aa8")
"""Mid-tones that hold on a white and on a near-black page."""
MARKERS = "osD^vPXp<"


@dataclass(frozen=True, slots=True)
class Look:
    """How one method is drawn everywhere."""

    colour: str
    marker: str
    is_strong: bool


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """A colour and a marker a method; the two of DSA have roles of the page."""
    found, used = {}, 0
    for number, name in enumerate(methods):
        marker = MARKERS[number % len(MARKERS)]
        if name == LATENCY_DSA:
            found[name] = Look(PRUNED.light, marker, True)
        elif name == FLOPS_DSA:
            found[name] = Look(TARGET.light, marker, True)
        else:
            found[name] = Look(OTHERS[used % len(OTHERS)], marker, False)
            used += 1
    return found


def front_drawing(record: ComparisonRecord) -> Drawing:
    """Mean accuracy against mean measured ms, a line a method, bars of one standard error."""
    known = [r for r in record.rows if r.accuracy is not None and r.measured_ms is not None]
    said = "; ".join(
        f"{r.title} at {r.target}: {show_pct(r.accuracy or 0)} at {show_ms(r.measured_ms or 0)}"
        for r in known
    )
    drawn = looks([name for name, _ in record.methods])

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        style_axes(axes, grid="both")
        for name, title in record.methods:
            _front(axes, title, [r for r in known if r.method == name], drawn[name])
        _dense_point(axes, record)
        axes.set_xlabel("measured latency of the whole network (ms)")
        axes.set_ylabel("test accuracy (%)")
        axes.margins(0.06)
        figure.legend(loc="outside upper left", ncols=3)

    return draw_svg("fronts", said, (WIDTH_IN, 5.0), draw)


def flops_drawing(record: ComparisonRecord) -> Drawing:
    """Measured ms against FLOPs: networks of random widths, and what the methods found."""
    cells = [c for c in record.cells if c.flops is not None and c.measured_ms is not None]
    said = (
        f"Measured milliseconds against FLOPs of {len(record.networks)} networks of random widths "
        f"and {len(cells)} pruned ones."
    )
    drawn = looks([name for name, _ in record.methods])

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        style_axes(axes, grid="both")
        axes.plot(
            [n.flops / 1e6 for n in record.networks], [n.measured_ms for n in record.networks],
            linestyle="", marker=".", markersize=8, color=DENSE.light, label="random widths",
        )  # fmt: skip
        for name, title in record.methods:
            own = [c for c in cells if c.method == name]
            _dots(axes, title, [((c.flops or 0) / 1e6, c.measured_ms or 0) for c in own],
                  drawn[name])  # fmt: skip
        axes.set_xlabel("FLOPs (millions)")
        axes.set_ylabel("measured (ms)")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=3)

    return draw_svg("flops", said, (WIDTH_IN, 4.6), draw)


def share_drawing(shares: Sequence[CostShare]) -> Drawing:
    """Each group's share of the milliseconds over its share of the FLOPs, around 1."""
    shown = shares[:GROUPS_SHOWN]
    ratios = [s.ms / s.flops for s in shown]
    said = "; ".join(f"{s.group} {r:.2f}" for s, r in zip(shown, ratios, strict=True))

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        style_axes(axes, grid="x")
        axes.axvline(1, color=INK.light, linewidth=1)
        for row, value in enumerate(ratios):
            axes.plot([1, value], [row, row], color=DENSE.light, linewidth=1.6)
        axes.plot(ratios, range(len(shown)), linestyle="", marker="o", markersize=6.5,
                  color=PRUNED.light)  # fmt: skip
        axes.set_yticks(range(len(shown)), [shorten(s.group) for s in shown])
        axes.tick_params(axis="y", labelcolor=INK.light, labelsize=8)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(0, max(2.0, 1.1 * max(ratios)))
        axes.set_xlabel("share of the milliseconds over share of the FLOPs")

    return draw_svg("shares", said, (WIDTH_IN, 0.9 + 0.25 * len(shown)), draw)


def keep_drawing(record: ComparisonRecord, names: Sequence[str]) -> Drawing:
    """Kept part of every group under both of DSA's budgets, one panel a target, means of seeds."""
    shown = list(range(min(len(names), GROUPS_SHOWN)))
    means = {
        (method, target): _mean_ratios(record.cells, method, target)
        for method in (LATENCY_DSA, FLOPS_DSA)
        for target in record.targets
    }
    said = "; ".join(
        f"{record.title_of(method)} at {target}: "
        + ", ".join(f"{names[g]} {ratios[g]:.2f}" for g in shown)
        for (method, target), ratios in means.items()
        if ratios
    )
    drawn = looks([name for name, _ in record.methods])

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(1, len(record.targets), sharey=True, squeeze=False)[0]
        for axes, target in zip(panels, record.targets, strict=True):
            _draw_keep(axes, {m: means[m, target] for m in (LATENCY_DSA, FLOPS_DSA)}, shown, drawn)
            axes.set_title(f"target {target}")
        panels[0].set_yticks(shown, [shorten(names[g], 26) for g in shown])
        panels[0].set_ylim(len(shown) - 0.5, -0.5)
        keys = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels]
        found = {method: handle for key in keys for handle, method in key}
        titles = [record.title_of(method) for method in found]
        figure.legend(found.values(), titles, loc="outside upper left", ncols=2)

    return draw_svg("keep", said, (WIDTH_IN, 1.25 + 0.25 * len(shown)), draw)


def prediction_drawing(record: ComparisonRecord) -> Drawing:
    """Predicted against measured ms of every run, with the line where they agree."""
    cells = [c for c in record.cells if c.predicted_ms is not None and c.measured_ms is not None]
    said = f"Predicted against measured latency of {len(cells)} pruned networks."
    drawn = looks([name for name, _ in record.methods])

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        style_axes(axes, grid="both")
        every = [ms for c in cells for ms in (c.predicted_ms or 0, c.measured_ms or 0)]
        margin = (max(every) - min(every)) * 0.08 or max(every) * 0.08
        low, high = min(every) - margin, max(every) + margin
        axes.plot([low, high], [low, high], color=MUTED.light, linewidth=1, linestyle=(0, (4, 3)))
        for name, title in record.methods:
            own = [c for c in cells if c.method == name]
            for c in own:
                if c.ci95_ms is not None:
                    axes.plot([c.predicted_ms or 0] * 2, c.ci95_ms, color=drawn[name].colour,
                              linewidth=1)  # fmt: skip
            _dots(axes, title, [(c.predicted_ms or 0, c.measured_ms or 0) for c in own],
                  drawn[name])  # fmt: skip
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set_xlabel("predicted (ms)")
        axes.set_ylabel("measured (ms)")
        figure.legend(loc="outside right upper")

    return draw_svg("prediction", said, (WIDTH_IN * 0.88, WIDTH_IN * 0.55), draw)


def staircase_drawing(index: int, stairs: Staircase) -> Drawing:
    """ms of one layer against its output channels."""
    said = f"{stairs.layer}: {show_number(stairs.measured_ms[0])} ms at {stairs.couts[0]:g} to "
    said += f"{show_number(stairs.measured_ms[-1])} ms at {stairs.couts[-1]:g} output channels"

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        style_axes(axes)
        axes.plot(stairs.couts, stairs.measured_ms, color=PRUNED.light, linewidth=1.2, marker="o",
                  markersize=3.6)  # fmt: skip
        axes.set(xlabel="output channels", ylabel="ms")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", integer=True)

    return draw_svg(f"stairs-{index}", said, (5.0, 2.7), draw)


def layer_drawing(
    index: int, by_method: Mapping[str, Sequence[LayerCost]], record: ComparisonRecord
) -> Drawing:
    """Predicted ms of the costliest layers: dense, and under each of DSA's budgets."""
    first = next(iter(by_method.values()))
    by_cost = sorted(range(len(first)), key=lambda i: -first[i].dense_ms)
    rows = sorted(by_cost[:LAYERS_SHOWN])
    said = "; ".join(
        f"{first[i].name}: dense {first[i].dense_ms:.4g} ms, "
        + ", ".join(f"{record.title_of(m)} {x[i].pruned_ms:.4g} ms" for m, x in by_method.items())
        for i in rows
    )
    drawn = looks([name for name, _ in record.methods])

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        style_axes(axes, grid="x")
        places = list(range(len(rows)))
        axes.barh(places, [first[i].dense_ms for i in rows], height=0.8, color=DENSE.light,
                  alpha=0.4, label="dense")  # fmt: skip
        height = 0.6 / len(by_method)
        for number, (method, layers) in enumerate(by_method.items()):
            offset = (number - (len(by_method) - 1) / 2) * height
            axes.barh([p + offset for p in places], [layers[i].pruned_ms for i in rows],
                      height=height * 0.92, color=drawn[method].colour,
                      label=record.title_of(method))  # fmt: skip
        axes.set_yticks(places, [shorten(first[i].name) for i in rows])
        axes.tick_params(axis="y", labelcolor=INK.light, labelsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel("predicted by the latency model (ms)")
        figure.legend(loc="outside upper left", ncols=3)

    return draw_svg(f"layers-{index}", said, (WIDTH_IN, 1.0 + 0.3 * len(rows)), draw)


def gain_drawing(record: ComparisonRecord) -> Drawing:
    """Points of accuracy that DSA under latency is ahead of each method, by target."""
    titles = list(dict.fromkeys(g.title for g in record.gains))
    said = "; ".join(
        f"ahead of {g.title} at {g.target} by {g.points:.2f} points"
        for g in record.gains
        if g.points is not None
    )
    count = len(record.targets)
    shades = (PRUNED.light, SECOND.light, TARGET.light, DENSE.light)

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        style_axes(axes, grid="x")
        axes.axvline(0, color=INK.light, linewidth=1)
        for number, target in enumerate(record.targets):
            own = [g for g in record.gains if g.target == target and g.points is not None]
            offset = (number - (count - 1) / 2) * 0.5 / max(1, count - 1)
            axes.errorbar(
                [g.points or 0 for g in own], [titles.index(g.title) + offset for g in own],
                xerr=[g.error_points or 0 for g in own], linestyle="", marker=MARKERS[number % 9],
                markersize=5.5, color=shades[number % len(shades)], capsize=2.5, linewidth=1.3,
                label=f"target {target}",
            )  # fmt: skip
        axes.set_yticks(range(len(titles)), titles)
        axes.tick_params(axis="y", labelcolor=INK.light, labelsize=9)
        axes.set_ylim(len(titles) - 0.4, -0.6)
        axes.set_xlabel("points of accuracy ahead (right) or behind (left)")
        figure.legend(loc="outside upper left", ncols=4)

    return draw_svg("gains", said, (WIDTH_IN, 1.1 + 0.48 * len(titles)), draw)


def _front(axes: "Axes", title: str, rows: Sequence[MethodRow], look: Look) -> None:
    ordered = sorted(rows, key=lambda r: r.measured_ms or 0.0)
    if not ordered:
        return
    axes.errorbar(
        [r.measured_ms or 0.0 for r in ordered],
        [100 * (r.accuracy or 0.0) for r in ordered],
        xerr=[r.measured_error_ms or 0.0 for r in ordered],
        yerr=[100 * (r.accuracy_error or 0.0) for r in ordered],
        color=look.colour, marker=look.marker, markersize=7 if look.is_strong else 5,
        linewidth=2.2 if look.is_strong else 1.1, elinewidth=1.2, capsize=2.5, label=title,
        zorder=4 if look.is_strong else 3,
    )  # fmt: skip


def _dense_point(axes: "Axes", record: ComparisonRecord) -> None:
    if record.dense_accuracy is None or record.dense_ms is None:
        return
    axes.errorbar(
        [record.dense_ms], [100 * record.dense_accuracy],
        yerr=[100 * (record.dense_accuracy_error or 0.0)], color=INK.light, marker="*",
        markersize=10, linestyle="", elinewidth=1.2, capsize=2.5, label="dense",
    )  # fmt: skip


def _dots(axes: "Axes", title: str, points: Sequence[tuple[float, float]], look: Look) -> None:
    if points:
        axes.plot(
            [x for x, _ in points], [y for _, y in points], linestyle="", marker=look.marker,
            markersize=7 if look.is_strong else 5.5, color=look.colour, label=title,
            zorder=4 if look.is_strong else 3,
        )  # fmt: skip


def _draw_keep(
    axes: "Axes",
    means: dict[str, list[float]],
    shown: Sequence[int],
    drawn: dict[str, Look],
) -> None:
    style_axes(axes, grid="x")
    both = [ratios for ratios in means.values() if ratios]
    if len(both) == 2:
        for g in shown:
            axes.plot([both[0][g], both[1][g]], [g, g], color=DENSE.light, linewidth=1.6)
    for method, ratios in means.items():
        if ratios:
            axes.plot([ratios[g] for g in shown], list(shown), linestyle="", markersize=6.5,
                      marker=drawn[method].marker, color=drawn[method].colour,
                      label=method)  # fmt: skip
    axes.set_xlim(0, 1.04)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "", "0.5", "", "1"])
    axes.set_xlabel("part of the channels kept")
    axes.tick_params(axis="y", labelcolor=INK.light, labelsize=8)


def _mean_ratios(cells: Sequence[RunPoint], method: str, target: str) -> list[float]:
    """(groups,) mean over seeds; empty where there is no such run."""
    own = [c.keep_ratios for c in cells if (c.method, c.target) == (method, target)]
    own = [ratios for ratios in own if ratios]
    return [sum(column) / len(own) for column in zip(*own, strict=True)]
