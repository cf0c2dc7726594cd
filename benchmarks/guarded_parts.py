"""Parts of a long measurement: each with a time of its own, none hides another, all resumable.

What a part finds is written as soon as it exists. The same call again goes on with what is left:
first what has no figures yet, then what stopped early, then what failed.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
Clock = Callable[[], float]
"""Seconds, monotonic."""

STATE_FILE = "state.json"
GRACE_S = 45.0
"""What a part may take beyond its time before it is interrupted: it asks only now and then."""
LEAST_S = 5.0
"""With less time than this a part is not begun."""
FINISHED = ("done", "absent")
TURN = {"early": 1, "failed": 2}
"""When a part's turn comes that was run before; the others go first."""


class NotHere(Exception):
    """A part that cannot be run on this machine; the message says why. It is no failure."""


class OutOfTime(Exception):
    """A part's time was over before it had figures; what it measured is kept for the next call."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment to be done by.

    Args:
        at_s: by ``clock``.
    """

    at_s: float
    clock: Clock = time.monotonic

    def left_s(self) -> float:
        """Seconds until then, not below 0."""
        return max(0.0, self.at_s - self.clock())

    def over(self) -> bool:
        """Whether it has passed."""
        return self.left_s() == 0.0

    def check(self, what: str) -> None:
        """See that there is time for ``what``.

        Raises:
            OutOfTime: there is none.
        """
        if self.over():
            raise OutOfTime(f"no time was left for {what}; the same command goes on from here")


@dataclass(frozen=True, slots=True)
class Part:
    """One part.

    Args:
        run: gives its figures, with a ``summary``; ``left`` above 0 says it stopped early.
        budget_s: the most time it gets.
    """

    run: Callable[[Deadline], Figures]
    budget_s: float


def run_parts(
    parts: Mapping[str, Part],
    folder: Path,
    say: Callable[[str], None],
    minutes: float,
    *,
    interrupt: Callable[[], None] = lambda: None,
    clock: Clock = time.monotonic,
) -> dict[str, Figures]:
    """Run what is not done yet; returns every part's record, and keeps it in the folder.

    A record's ``status`` is ``done``, ``early`` (figures, but measuring stopped with the time),
    ``unfinished`` (no figures yet; what was measured is kept), ``failed`` (with the error),
    ``absent`` (cannot be run here, with the reason) or ``left`` (the minutes were over).

    Args:
        interrupt: ends, from another thread, what a part waits for ``GRACE_S`` after its time.
    """
    path = folder / STATE_FILE
    folder.mkdir(parents=True, exist_ok=True)
    records = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    end = Deadline(clock() + 60 * minutes, clock)

    def turn(name: str) -> int:
        return TURN.get(records.get(name, {}).get("status"), 0)

    pending = [n for n in parts if records.get(n, {}).get("status") not in FINISHED]
    for number, name in enumerate(sorted(pending, key=turn), start=1):
        if end.left_s() >= min(LEAST_S, parts[name].budget_s):
            limit_s = min(parts[name].budget_s, end.left_s())
            say(f"[{number}/{len(pending)}] {name} (at most {limit_s:.0f} s)")
            found = guarded(parts[name], limit_s, interrupt, clock)
            keeps = found["status"] == "failed" and turn(name) == TURN["early"]
            records[name] = records[name] if keeps else found
            say(f"    {found['status']}: {found['summary']}")
        elif name not in records:
            records[name] = {"status": "left", "summary": "the minutes were over"}
        write_json(path, records)
    return {name: records[name] for name in parts}


def guarded(part: Part, limit_s: float, interrupt: Callable[[], None], clock: Clock) -> Figures:
    """A part's record, whatever happens in it."""
    began = clock()
    watchdog = threading.Timer(limit_s + GRACE_S, interrupt)
    watchdog.daemon = True
    watchdog.start()
    try:
        figures = part.run(Deadline(began + limit_s, clock))
        record = {"status": "early" if figures.get("left") else "done"} | figures
    except NotHere as absent:
        record = {"status": "absent", "summary": str(absent)}
    except OutOfTime as over:
        record = {"status": "unfinished", "summary": str(over)}
    except Exception as error:  # reported in the record, the table and the exit code
        record = {
            "status": "failed",
            "summary": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "traceback": _without_paths(traceback.format_exc()),
        }
    finally:
        watchdog.cancel()
    return record | {"took_s": round(clock() - began, 1)}


def write_json(path: Path, content: Figures) -> None:
    """Replace a file at once: a killed run leaves the old one or the new one."""
    partial = path.with_name(f".{path.name}.new")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _without_paths(text: str) -> str:
    """A traceback without this machine's folders."""
    root = str(Path(__file__).resolve().parent.parent)
    return text.replace(root + "/", "").replace(sys.prefix, "PREFIX")
