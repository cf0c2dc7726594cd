"""Random damage to files, and judging what a reader makes of it: for ``benchmarks.faults``."""

from __future__ import annotations

import json
import random
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from dsa_hw.errors import UserError
from profilers.errors import ProfilerError

DEADLINE_S = 20.0
"""A reader that takes longer than this over a damaged file hangs; a whole one takes well below a
second."""
WORKS, CLEAR, TRACEBACK, HANG, LOSS = "works", "clear error", "traceback", "hang", "loss"
VALUES = (
    None, True, False, 0, -1, 1, 2**31, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    "x", "=1+1", "../../x", "evil:factory", "\ud800", "\0", [], {}, [[]], [1, "a"], {"a": {}},
)  # fmt: skip
"""What a value is replaced by."""


class Hangs(BaseException):
    """The deadline of a case has passed; no reader may catch it."""


class Lost(Exception):
    """A reader has taken damaged content for good, or damaged what was good; says what."""


@dataclass
class Tally:
    """What became of the cases.

    Args:
        failures: kind, and what happened, of the first few that ended as none may.
    """

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, outcome: str, detail: str = "") -> None:
        """Count a case."""
        self.counts[outcome] += 1
        if outcome in (TRACEBACK, HANG, LOSS) and len(self.failures) < 20:
            self.failures.append(f"{outcome}: {detail}")

    def figures(self) -> dict[str, Any]:
        """As the benchmark's JSON has it."""
        return {
            "tried": sum(self.counts.values()), "works": self.counts[WORKS],
            "clear_errors": self.counts[CLEAR], "tracebacks": self.counts[TRACEBACK],
            "hangs": self.counts[HANG], "losses": self.counts[LOSS], "failures": self.failures,
        }  # fmt: skip


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise ``Hangs`` in the block after ``seconds``."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(tally: Tally, case: str, read: Callable[[], object]) -> None:
    """Let ``read`` meet a damaged file, and count what comes of it."""
    try:
        with deadline(DEADLINE_S):
            read()
        tally.add(WORKS)
    except Lost as error:
        tally.add(LOSS, f"{case}: {error}")
    except (UserError, ProfilerError) as error:
        is_clear = bool(str(error).strip()) and "\n" not in str(error).strip()
        tally.add(CLEAR if is_clear else TRACEBACK, f"{case}: the message is {error!s:.200}")
    except Hangs:
        tally.add(HANG, case)
    except Exception:  # any other error is what a user would see as a traceback: it is counted so
        last = traceback.format_exc().strip().splitlines()
        tally.add(TRACEBACK, f"{case}: {' | '.join(line.strip() for line in last[-3:])}")


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """``content`` with one piece of damage, as a bad disk, a crash or an editor leaves it."""
    damaged = bytearray(content)
    at = rng.randrange(len(damaged) or 1)
    end = min(len(damaged), at + rng.randint(1, 40))
    kind = rng.randrange(8)
    if kind == 0 and damaged:
        damaged[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del damaged[at:end]
    elif kind == 2:
        del damaged[at:]
    elif kind == 3:
        damaged[at:at] = damaged[at:end]
    elif kind == 4:
        damaged[at:end] = rng.randbytes(end - at)
    elif kind == 5:
        damaged[at:end] = bytes(end - at)
    elif kind == 6:
        damaged += rng.choice([b"\n", b"\xff\xfe", b"{", b'{"a": 1}\n', b"[" * 100_000 + b"\n"])
    else:
        digit = [i for i, byte in enumerate(damaged) if chr(byte).isdigit()]
        if digit:
            damaged[rng.choice(digit)] = ord(rng.choice("0123456789-e."))
    return bytes(damaged)


def mutated_lines(content: bytes, rng: random.Random) -> bytes:
    """``content`` with a line removed, repeated, moved or emptied."""
    lines = content.splitlines(keepends=True)
    at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(4)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(to, lines[at])
    elif kind == 2:
        lines.insert(to, lines.pop(at))
    else:
        lines[at] = b"\n"
    return b"".join(lines)


def mutated_value(content: Any, rng: random.Random) -> Any:
    """A copy of JSON-like ``content`` in which one value or key is another."""
    copy = json.loads(json.dumps(content))
    holders = [h for h in _containers(copy) if h]
    holder = rng.choice(holders)
    key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    kind = rng.randrange(4)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder[key] = rng.choice(VALUES)
    return copy


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)
