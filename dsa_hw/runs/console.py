"""What the commands show while they work, and the table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

EVERY_S = 10.0


class Progress:
    """Progress callback: what, how far, how long still. Redraws on a terminal, else prints lines.

    Calls take (what, done, planned). A silent one shows nothing: another process speaks.
    """

    def __init__(self, console: Console | None = None, silent: bool = False) -> None:
        self._console = console or Console(file=sys.stderr, soft_wrap=True, quiet=silent)
        self._what = ""
        self._start = 0.0
        self._first = 0
        self._shown = 0.0

    def __call__(self, what: str, done: int, planned: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._start, self._first, self._shown = what, now, done, 0.0
        terminal = self._console.is_terminal
        if now - self._shown < (0.2 if terminal else EVERY_S) and done < planned:
            return
        self._shown = now
        line = f"{what}: {done}/{planned} ({100 * done / max(1, planned):.0f}%)"
        if done > self._first:
            left = (now - self._start) / (done - self._first) * (planned - done)
            line += f", {left:.0f} s left"
        end = "\n" if done >= planned or not terminal else "\r"
        self._console.print(line.ljust(60), end=end, highlight=False, markup=False)

    def say(self, text: str) -> None:
        """One line about what happens now."""
        self._console.print(text, highlight=False, markup=False)


def counted(count: float, noun: str) -> str:
    """``1 thread``, ``2 threads``"""
    return f"{count:g} {noun}{'' if count == 1 else 's'}"


def print_result(result: Mapping[str, Any], run_dir: str) -> None:
    """The table at the end of a run, and where everything is."""
    console = Console()
    dense, pruned = result["dense"], result["pruned"]
    ratio = pruned["measured_ms"] / dense["measured_ms"]
    table = Table(title=_setting(result))
    for column in ("", "dense", "pruned", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    target_ms = result["target_ms"]
    if target_ms is not None:
        table.add_row("target, ms", "", f"{target_ms:.4g}", _ratio(target_ms, dense))
    table.add_row("predicted, ms", "", f"{pruned['predicted_ms']:.4g}",
                  _ratio(pruned["predicted_ms"], dense))  # fmt: skip
    table.add_row("measured, ms", _interval(dense), _interval(pruned), f"{ratio:.3f}")
    table.add_row("accuracy", _percent(dense["accuracy"]), _percent(pruned["accuracy"]), "")
    for name, unit, scale in (("flops", "M", 1e6), ("params", "M", 1e6)):
        table.add_row(
            f"{name}, {unit}",
            f"{dense[name] / scale:.4g}",
            f"{pruned[name] / scale:.4g}",
            f"{pruned[name] / dense[name]:.3f}",
        )
    console.print(table)
    if removed := result.get("removed_branches"):
        console.print(f"removed branches: {', '.join(removed)}", highlight=False, markup=False)
    seconds = result["seconds"]
    parts = ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items())
    console.print(f"minutes: {sum(seconds.values()) / 60:.1f} in all ({parts})", highlight=False)
    if target_ms is not None:
        share = pruned["measured_ms"] / target_ms
        words = {True: "target met", False: "TARGET MISSED", None: "UNDECIDED"}
        console.print(f"{words[result['met']]}: measured is {100 * share:.1f}% of the target",
                      highlight=False)  # fmt: skip
        if reason := result.get("verdict_reason"):  # runs of earlier versions have none
            console.print(f"verdict: {reason}", highlight=False, markup=False, soft_wrap=True)
    for warning in result.get("warnings", []):
        console.print(f"warning: {warning}", highlight=False, markup=False)
    console.print(f"run folder: {run_dir}\nreport:     {run_dir}/report.html", soft_wrap=True)


def _interval(part: Mapping[str, Any]) -> str:
    low, high = part["ci95_ms"]
    return f"{part['measured_ms']:.4g} ({low:.4g} to {high:.4g})"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.2f}%"


def _setting(result: Mapping[str, Any]) -> str:
    timed = f"{counted(result['threads'], 'thread')}, batch {result['batch_size']}"
    return f"{result['model']} on {result['device']} ({result['backend']}, {timed})"


def _ratio(value: float, dense: Mapping[str, Any]) -> str:
    return f"{value / dense['measured_ms']:.3f}"


def print_comparison(result: Mapping[str, Any], sweep_dir: str) -> None:
    """Accuracy and measured latency of every method at every target."""
    console = Console()
    runs = f"{counted(len(result['seeds']), 'seed')}, {counted(result['epochs'], 'epoch')}"
    table = Table(title=f"{_setting(result)}, {runs}")
    table.add_column("target")
    table.add_column("method")
    for column in ("accuracy %", "measured ms", "of dense", "FLOPs, M", "met"):
        table.add_column(column, justify="right")
    dense = result["dense"]
    table.add_row("", "dense", _points(dense), _plain(dense["measured_ms"]), "1.000",
                  f"{dense['flops'] / 1e6:.4g}", "")  # fmt: skip
    for row in result["rows"]:
        if not row["runs"]:
            why = "cannot reach it" if row["infeasible"] else "not finished"
            table.add_row(row["target"], row["title"], why, "", "", "", "")
            continue
        table.add_row(
            row["target"], row["title"], _points(row), _plain(row["measured_ms"]),
            f"{row['ratio']:.3f}", f"{row['flops'] / 1e6:.4g}", _met(row),
        )  # fmt: skip
    console.print(table)
    for warning in result["warnings"]:
        console.print(f"warning: {warning}", highlight=False, markup=False)
    if result["unfinished"]:
        console.print(f"not finished yet: {', '.join(result['unfinished'])}", highlight=False)
    console.print(f"sweep folder: {sweep_dir}\nreport:       {sweep_dir}/report.html",
                  soft_wrap=True)  # fmt: skip


def _met(row: Mapping[str, Any]) -> str:
    """``2/3``, and how many of the others are undecided."""
    open_runs = row.get("undecided", 0)
    return f"{row['met']}/{row['runs']}" + (f" ({open_runs} undecided)" if open_runs else "")


def _points(row: Mapping[str, Any]) -> str:
    if row["accuracy"] is None:
        return "not measured"
    error = row["accuracy_standard_error"]
    return f"{100 * row['accuracy']:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def _plain(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
