"""The figures of *How it works*: sketches, drawn as SVG that takes its colours from the page.

Each function returns HTML with the picture and a caption. Text and lines have the page's own
colour, so that one picture serves the light and the dark theme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, FAINT, ONE, TWO, THREE = "#010101", "#020202", "#030303", "#040404", "#050505"
COLOURS = {
    INK: "currentColor",
    FAINT: "var(--md-default-fg-color--lighter)",
    ONE: "var(--dsa-one)",
    TWO: "var(--dsa-two)",
    THREE: "var(--dsa-three)",
}
"""What stands for the page's colours while drawing, and what it becomes."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dsa",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
WIDTH = 5.4
"""Inches, about the width of a phone's page at the size of its text."""


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def _plain(height: float, across: float, up: float) -> tuple[Figure, Axes]:
    """A figure without axes whose units are given."""
    figure = _figure(height)
    axes = figure.add_subplot()
    axes.set_xlim(0, across)
    axes.set_ylim(0, up)
    axes.axis("off")
    return figure, axes


def _html(name: str, figure: Figure) -> str:
    """The figure as HTML, with its caption."""
    caption, told = CAPTIONS[name]
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    for drawn, shown in COLOURS.items():
        text = text.replace(drawn, shown)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: [^;\"]*?([\d.]+)px[^;\"]*", r"font-size: \1px", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', _opening(told), text, count=1)
    text = "\n".join(line for line in text.splitlines() if line.strip())
    return f'<figure class="drawn">\n{text}\n<figcaption>{caption}</figcaption>\n</figure>'


def _opening(told: str) -> str:
    return (
        r'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        rf'viewBox="\1" role="img" aria-label="{told}" style="fill: none; stroke-linejoin: round">'
    )


def _box(axes: Axes, left: float, low: float, wide: float, high: float, colour: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (left, low), wide, high, boxstyle="round,pad=0,rounding_size=0.12",
            facecolor="none", edgecolor=colour, linewidth=1.4,
        )
    )  # fmt: skip


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color=INK, linewidth=1.1,
            connectionstyle=f"arc3,rad={bend}",
        )
    )  # fmt: skip


CHAIN = (
    ("network", "layers, coupled channels, what cannot be cut"),
    ("cost", "measured milliseconds: widths → ms"),
    ("worth", "what channels are worth"),
    ("search", "keep ratios learned by gradient"),
    ("allocation", "widths on the device's steps, at the target"),
    ("surgery", "channels really removed"),
    ("deployment", "exported, compared, timed"),
    ("training", "fine-tuned"),
    ("reports", "what came out, with intervals"),
)


CAPTIONS: Mapping[str, tuple[str, str]] = {
    "chain": (
        "The stages, in the order of the packages in <code>dsa_hw/</code>.",
        "Nine stages in a column from network to reports",
    ),
    "network": (
        "An addition needs its two inputs to have the same channels: the outputs of <em>a</em> "
        "and <em>c</em> are one group, and lose the same channels.",
        "Two convolutions joined by an addition share one group",
    ),
    "cost": (
        "A sketch of one layer on a device with steps of 16: 97 channels cost what 112 do.",
        "Milliseconds rise in steps of sixteen channels while FLOPs rise evenly",
    ),
    "worth": (
        "A sketch of two groups, the most important channels kept: the first can be cut to a "
        "half at little loss, the second cannot.",
        "Two rising curves of kept importance against kept channels",
    ),
    "search": (
        "Keep probabilities whose mean is the keep ratio, here a half. As β₂ grows in the "
        "search, the more important half is kept and the rest is not.",
        "Three sigmoid curves, the steeper the later in the search",
    ),
    "allocation": (
        "A sketch: each group gets a width on a step, all together within the target.",
        "Learned widths move to lines at multiples of sixteen",
    ),
    "surgery": (
        "A removed channel is a row of the layer that writes it and a column of every layer that "
        "reads it (faint).",
        "Two matrices; two rows of the first and two columns of the second are faint",
    ),
    "deployment": (
        "A sketch with invented times: both networks slow down together, and rounds that take "
        "turns faster than the machine drifts keep the ratio.",
        "Times of two networks rise and fall together while their ratio is level",
    ),
    "training": (
        "Epochs of a run from random weights: a third is search, of which the first part only "
        "trains; two thirds are fine-tuning.",
        "A bar of epochs in three parts: weights, keep ratios, fine-tuning",
    ),
}
"""Under each figure, and what it shows in words for those who cannot see it."""


def chain() -> str:
    """The stages in their order, and the one arrow that goes back."""
    figure, axes = _plain(5.6, 10, len(CHAIN))
    for index, (name, text) in enumerate(CHAIN):
        low = len(CHAIN) - 1 - index
        _box(axes, 0.1, low + 0.18, 2.6, 0.64, ONE)
        axes.text(1.4, low + 0.5, name, ha="center", va="center", weight="bold")
        axes.text(2.95, low + 0.5, text, va="center", fontsize=9)
        if index:
            _arrow(axes, (1.4, low + 1.2), (1.4, low + 0.8))
    deployed, allocated = 2.5, 4.5
    _arrow(axes, (9.2, deployed), (9.2, allocated), 0.6)
    axes.text(9.3, 3.5, "a miss\ncorrects\nthe cost", ha="center", va="center", fontsize=8)
    return _html("chain", figure)


def network() -> str:
    """A residual addition that ties the outputs of two convolutions into one group."""
    figure, axes = _plain(2.1, 11.4, 3.6)
    for left, name, colour in ((0.2, "conv a", ONE), (3.2, "conv b", TWO), (6.2, "conv c", ONE)):
        _box(axes, left, 1.3, 2, 0.9, colour)
        axes.text(left + 1, 1.75, name, ha="center", va="center")
    _box(axes, 9.2, 1.3, 0.9, 0.9, INK)
    axes.text(9.65, 1.75, "+", ha="center", va="center", fontsize=14)
    for start, end in ((2.2, 3.2), (5.2, 6.2), (8.2, 9.2), (10.1, 11.3)):
        _arrow(axes, (start, 1.75), (end, 1.75))
    axes.plot((2.6, 2.6, 9.65), (1.75, 2.9, 2.9), color=INK, linewidth=1.1)
    _arrow(axes, (9.65, 2.95), (9.65, 2.2))
    axes.text(6.1, 3.2, "a's output, once more", ha="center", fontsize=9)
    axes.text(0.2, 0.55, "a and c: one group", color=ONE, fontsize=9)
    axes.text(5.4, 0.55, "b: a group of its own", color=TWO, fontsize=9)
    return _html("network", figure)


def cost() -> str:
    """Milliseconds and FLOPs against width: a staircase beside a line."""
    figure = _figure(2.6)
    axes = figure.add_subplot()
    width = np.arange(1, 129)
    line = width / 128
    stairs = np.ceil(width / 16) / 8 * 0.92 + 0.08
    axes.plot(width, line, color=TWO, label="FLOPs")
    axes.step(width, stairs, where="mid", color=ONE, label="milliseconds")
    on_steps = np.arange(16, 129, 16)
    axes.plot(on_steps, on_steps / 128 * 0.92 + 0.08, "o", color=ONE, markersize=4,
              label="widths that are offered")  # fmt: skip
    axes.set_xlabel("output channels of a layer")
    axes.set_ylabel("part of the dense layer's")
    axes.set_ylim(0, 1.08)
    axes.legend(loc="upper left")
    return _html("cost", figure)


def worth() -> str:
    """What is kept of a group's importance as its channels are removed, least important first."""
    figure = _figure(2.6)
    axes = figure.add_subplot()
    share = np.linspace(0, 1, 100)
    for power, colour, text in ((4, ONE, "few channels matter"), (1.3, TWO, "all matter alike")):
        axes.plot(share, 1 - (1 - share) ** power, color=colour, label=text)
    axes.set_xlabel("part of the group's channels that is kept")
    axes.set_ylabel("part of its importance")
    axes.legend(loc="lower right")
    return _html("worth", figure)


def search() -> str:
    """Keep probabilities of channels by their importance, at one keep ratio."""
    figure = _figure(2.6)
    axes = figure.add_subplot()
    importance = np.geomspace(0.1, 10, 200)
    for steepness, colour in ((1, TWO), (4, THREE), (30, ONE)):
        axes.plot(importance, keep_probability(importance, steepness, 0.5), color=colour,
                  label=f"β₂ = {steepness}")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("importance of a channel")
    axes.set_ylabel("probability to be kept")
    axes.legend(loc="upper left")
    return _html("search", figure)


def keep_probability(importance: np.ndarray, steepness: float, keep_ratio: float) -> np.ndarray:
    """``sigmoid(steepness * (log b - log threshold))`` with the threshold that gives the mean."""
    low, high = -20.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        kept = 1 / (1 + np.exp(-steepness * (np.log(importance) - middle)))
        low, high = (middle, high) if kept.mean() > keep_ratio else (low, middle)
    return kept


def allocation() -> str:
    """Learned widths, and the allowed widths that they become."""
    figure = _figure(2.6)
    axes = figure.add_subplot()
    learned = np.array([37, 58, 41, 90, 71, 104])
    chosen = np.array([32, 64, 48, 96, 64, 112])
    place = np.arange(len(learned))
    for step in range(16, 129, 16):
        axes.axhline(step, color=FAINT, linewidth=0.8)
    axes.plot(place, learned, "o", color=TWO, label="learned")
    axes.plot(place, chosen, "s", color=ONE, label="chosen")
    for index in place:
        axes.annotate("", (index, chosen[index]), (index, learned[index]),
                      arrowprops={"arrowstyle": "->", "color": INK})  # fmt: skip
    axes.set_xticks(place, [f"group {index + 1}" for index in place], fontsize=8)
    axes.set_ylabel("width")
    axes.set_ylim(0, 130)
    axes.legend(loc="upper left")
    return _html("allocation", figure)


def surgery() -> str:
    """A weight matrix that loses rows, and the next one that loses the same columns."""
    figure, axes = _plain(2.2, 11, 5)
    gone = {1, 4}
    for row in range(6):
        for column in range(6):
            colour = FAINT if row in gone else ONE
            _cell(axes, 0.5 + column * 0.6, 3.9 - row * 0.6, colour)
            colour = FAINT if column in gone else TWO
            _cell(axes, 6.7 + column * 0.6, 3.9 - row * 0.6, colour)
    axes.text(2.3, 4.75, "writer: rows go", ha="center", fontsize=9)
    axes.text(8.5, 4.75, "reader: the same columns go", ha="center", fontsize=9)
    _arrow(axes, (4.4, 2.6), (6.4, 2.6))
    return _html("surgery", figure)


def _cell(axes: Axes, left: float, low: float, colour: str) -> None:
    axes.add_patch(Rectangle((left, low), 0.5, 0.5, facecolor=colour, edgecolor="none"))


def deployment() -> str:
    """Short rounds in turn on a machine that drifts: the ratio is steadier than either time."""
    figure = _figure(2.8)
    axes = figure.add_subplot()
    random = np.random.default_rng(7)
    rounds = np.arange(16)
    drift = 1 + 0.25 * np.sin(rounds / 3.5) ** 2
    dense = 4.0 * drift * random.normal(1, 0.01, len(rounds))
    small = 2.4 * drift * random.normal(1, 0.01, len(rounds))
    axes.plot(rounds, dense, "o", color=TWO, label="dense, ms")
    axes.plot(rounds + 0.4, small, "s", color=ONE, label="pruned, ms")
    axes.plot(rounds, small / dense, "-", color=INK, label="ratio")
    axes.set_xlabel("round")
    axes.set_ylim(0, 7.6)
    axes.legend(loc="upper left", ncols=3)
    return _html("deployment", figure)


def training() -> str:
    """How the epochs of one run are divided."""
    figure, axes = _plain(1.5, 12, 3)
    for left, wide, colour, text in (
        (0, 1.6, FAINT, "weights"), (1.6, 2.4, TWO, "+ keep ratios"), (4, 8, ONE, "fine-tuning")
    ):  # fmt: skip
        _box(axes, left + 0.05, 1.2, wide - 0.1, 0.9, colour)
        axes.text(left + wide / 2, 1.65, text, ha="center", va="center", fontsize=8)
    axes.text(2, 0.6, "search: the whole network", ha="center", fontsize=9)
    axes.text(8, 0.6, "the small network", ha="center", fontsize=9)
    axes.text(4, 2.45, "cut", ha="center", fontsize=9)
    return _html("training", figure)


FIGURES: Mapping[str, Callable[[], str]] = {
    draw.__name__: draw
    for draw in (chain, network, cost, worth, search, allocation, surgery, deployment, training)
}


def drawn(name: str) -> str:
    """The HTML of one of ``FIGURES``."""
    with matplotlib.rc_context(STYLE):
        return FIGURES[name]()
