"""A page for each file in ``benchmarks/results``: its figures as tables, and their origin.

``SHOWN`` says how the known benchmarks are best read. A benchmark that it does not name, and
figures that it does not mention, are shown all the same, by what they look like.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_ROWS = 40
"""Rows of a list that a page shows; the file has all of them."""

Cell = Callable[[Any], str]


def number(value: Any) -> str:
    """A figure with four digits, as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def percent(value: Any) -> str:
    """A part of one as a percentage."""
    return "" if value is None else f"{100 * value:.2f}%"


def percentage(value: Any) -> str:
    """What is a percentage already."""
    return "" if value is None else f"{value:.1f}%"


def points(value: Any) -> str:
    """A difference in percentage points, with its sign."""
    return "" if value is None else f"{value:+.2f}"


def seconds(value: Any) -> str:
    """Seconds without a fraction."""
    return "" if value is None else f"{value:.0f} s"


@dataclass(frozen=True)
class Table:
    """Columns of the rows at ``path`` in the figures: title -> (key, how its value is written)."""

    path: tuple[str, ...]
    title: str
    columns: Mapping[str, tuple[str, Cell]]


@dataclass(frozen=True)
class Shown:
    """How a benchmark's figures are best read."""

    title: str
    text: str
    tables: tuple[Table, ...] = ()
    hidden: tuple[str, ...] = ()
    """Top-level figures that are left to the file."""


PREDICTION = {
    "network": ("", str),
    "mean error": ("mape_pct", percentage),
    "95% within": ("p95_pct", percentage),
    "by FLOPs": ("flops_mape_pct", percentage),
    "plain sum of the table": ("uncalibrated_mape_pct", percentage),
    "same networks measured twice": ("noise_pct", percentage),
    "between steps": ("off_steps_mape_pct", percentage),
    "profile": ("profile_s", seconds),
    "measurements": ("measurements", number),
}
COMPARED = {
    "method": ("title", str),
    "target": ("target", str),
    "accuracy": ("accuracy", percent),
    "its error": ("accuracy_standard_error", percent),
    "measured / dense": ("ratio", number),
    "runs": ("runs", number),
    "met": ("met", number),
}
GAINS = {
    "target": ("target", str),
    "DSA on latency over": ("title", str),
    "points": ("points", points),
    "error": ("points_standard_error", number),
    "slower by": ("slower_pct", percentage),
    "points at the other's latency": ("points_at_its_latency", points),
    "its error": ("points_at_its_latency_standard_error", number),
}
SHOWN: Mapping[str, Shown] = {
    "latency_prediction": Shown(
        "How far predictions are off",
        "Whole networks of random widths, which were used for nothing else, are predicted and then "
        "measured. A predictor that is proportional to FLOPs knows the calibration networks too. "
        "*Measured twice* is the mean difference of two timings of one network: the machine's own "
        "noise.",
        (Table((), "Prediction against measurement", PREDICTION),),
    ),
    "compare_methods": Shown(
        "Methods at the same measured latency",
        "Every method is brought to the same measured latency by the same closed loop, with the "
        "same data, epochs and fine-tuning. Errors are standard errors of the mean over seeds. A "
        "gain is also taken at the latency that the other method ended at, on the line through "
        "DSA's own networks, since some methods end well under their limit.",
        tuple(
            table
            for network in ("glyphs_resnet10", "glyphs_mobilenet5")
            for table in (
                Table(("networks", network, "rows"), f"{network}: accuracy", COMPARED),
                Table(("networks", network, "gains"), f"{network}: gains of DSA on latency", GAINS),
            )
        ),
        hidden=("networks",),
    ),
    "quickstart_baseline": Shown(
        "The quickstart beside uniform widths",
        "Uniform widths are trained from scratch for as many epochs, and brought to the same "
        "target by the same closed loop.",
        (
            Table(
                ("runs",),
                "Seed by seed",
                {
                    "seed": ("seed", number),
                    "DSA": ("dsa_accuracy", percent),
                    "uniform": ("uniform_accuracy", percent),
                    "measured / target": ("dsa_over_target", number),
                    "predicted / measured": ("predicted_over_measured", number),
                    "DSA, ms": ("dsa_ms", number),
                    "uniform, ms": ("uniform_ms", number),
                    "minutes": ("minutes", number),
                },
            ),
        ),
    ),
    "allocation": Shown(
        "DSA, uniform widths and magnitude pruning at equal FLOPs",
        "A 14-layer residual network on glyphs, 16,000 test images, three seeds. The last rows are "
        "ablations of the search.",
        (
            Table(
                ("rows",),
                "Mean over seeds",
                {
                    "FLOPs": ("flops_ratio", percent),
                    "method": ("method", str),
                    "epochs": ("epochs", number),
                    "accuracy": ("accuracy", percent),
                    "standard error, points": ("standard_error_points", number),
                    "cost / target": ("cost_over_target", number),
                },
            ),
        ),
        hidden=("runs", "dense"),
    ),
    "dsa_overhead": Shown(
        "What the search adds to a training step",
        "Steps with and without DSA take turns in one process; times are ratios.",
    ),
    "flow_cost": Shown(
        "What the whole way costs",
        "Seconds of search, rounding and fine-tuning over the seconds of training the dense "
        "network, and the same for a greedy search (after NetAdapt) and an iterative knapsack "
        "(after HALP).",
        hidden=("runs",),
    ),
    "budget_met": Shown(
        "How near rounding comes to a budget",
        "The charged cost after rounding, as a part of the target.",
        hidden=("runs",),
    ),
    "latency_model_speed": Shown(
        "How fast the latency model is",
        "Milliseconds for a gradient, for a thousand candidates, and for a matrix product beside "
        "it.",
    ),
    "allocation_values": Shown(
        "What foretells an allocation's accuracy",
        "Random allocations are fine-tuned, and what could have been said of them before is "
        "ranked.",
    ),
}


def pages(folder: Path) -> dict[str, tuple[str, str]]:
    """The path of each page, its title and its text."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        title, text = page(path.stem, content)
        found[f"results/{path.stem}.md"] = (title, text)
    return found


def index(folder: Path) -> str:
    """The list of results."""
    rows = [
        f"| [{title}]({Path(path).name}) | `benchmarks.{Path(path).stem}` |"
        for path, (title, _) in pages(folder).items()
    ]
    return (
        "# Results\n\nEach page is made from a file in `benchmarks/results/` when this site is "
        "built, so that no number here can differ from what was measured. Every file was written "
        "by `python -m benchmarks.NAME`, which runs again on your machine; it says on what "
        "machine and at which commit it ran.\n\n| result | command |\n| --- | --- |\n"
        + "".join(f"{row}\n" for row in rows)
    )


def page(name: str, content: Mapping[str, Any]) -> tuple[str, str]:
    """One benchmark's title and page."""
    shown = SHOWN.get(name, Shown(name.replace("_", " ").capitalize(), ""))
    figures = content.get("figures", content)
    parts = [f"# {shown.title}\n", shown.text, f"Made by `python -m benchmarks.{name}`."]
    used = {table.path[0] for table in shown.tables if table.path}
    for table in shown.tables:
        parts += [f"## {table.title}\n", _chosen(table, figures)]
    if not any(not table.path for table in shown.tables):
        rest = {k: v for k, v in figures.items() if k not in used | set(shown.hidden)}
        parts += _anything("Figures", rest)
    made = {k: v for k, v in content.get("provenance", {}).items() if k != "config"}
    parts += _anything("Where this was measured", made)
    return shown.title, "\n\n".join(part for part in parts if part) + "\n"


def _chosen(table: Table, figures: Any) -> str:
    for key in table.path:
        figures = figures.get(key, {})
    named = figures.items() if isinstance(figures, Mapping) else (("", row) for row in figures)
    rows = [
        [write(name if key == "" else row.get(key)) for key, write in table.columns.values()]
        for name, row in named
    ]
    return _table(list(table.columns), rows)


def _anything(title: str, values: Any, depth: int = 2) -> list[str]:
    """Figures without a known form: single values in one table, lists and objects in their own."""
    if isinstance(values, Mapping):
        single = {k: v for k, v in values.items() if _is_single(v)}
        others = {k: v for k, v in values.items() if not _is_single(v)}
        parts = [f"{'#' * depth} {title}\n"]
        if single:
            parts.append(
                _table(["figure", "value"], [[_words(k), _text(v)] for k, v in single.items()])
            )
        if _alike(others):
            return [*parts, _rows([{"": k, **_flat(v)} for k, v in others.items()])]
        for key, value in others.items():
            parts += _anything(_words(key), value, min(depth + 1, 4))
        return parts
    rows = [row for row in values if isinstance(row, Mapping)]
    return [f"{'#' * depth} {title}\n", _rows(rows)] if rows else []


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """A list of objects as a table of their single values."""
    columns = [
        column
        for column in dict.fromkeys(key for row in rows for key in row)
        if all(_is_single(row.get(column)) for row in rows)
    ]
    shown = [[_text(row.get(column)) for column in columns] for row in rows[:MOST_ROWS]]
    more = len(rows) - len(shown)
    note = f"\n\n{more} more rows are in the file." if more else ""
    return _table([_words(column) for column in columns], shown) + note


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with those of objects within them under both names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = value if isinstance(value, Mapping) else {}
        flat |= {f"{key} {name}": part for name, part in inner.items()} or {key: value}
    return flat


def _alike(values: Mapping[str, Any]) -> bool:
    """Whether these are objects with mostly the same figures: rows of one table."""
    if len(values) < 2 or not all(isinstance(value, Mapping) for value in values.values()):
        return False
    keys = [set(value) for value in values.values()]
    return len(set.intersection(*keys)) >= max(len(k) for k in keys) / 2


def _is_single(value: Any) -> bool:
    if isinstance(value, Mapping):
        return False
    if isinstance(value, list):
        return len(value) <= 4 and not any(isinstance(part, Mapping | list) for part in value)
    return True


def _text(value: Any) -> str:
    return ", ".join(number(part) for part in value) if isinstance(value, list) else number(value)


def _words(key: str) -> str:
    return key.replace("_pct", ", %").replace("_ms", ", ms").replace("_", " ")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
