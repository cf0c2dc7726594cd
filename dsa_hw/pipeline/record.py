"""What a run writes down of its outcome."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from dsa_hw.allocation.allocate import Allocation
from dsa_hw.allocation.target_loop import LoopRound, Timed, verdict_sentence
from dsa_hw.network.removal import Keep
from dsa_hw.pipeline.finished_result import names_code
from dsa_hw.reports.fields import read_json_lines
from dsa_hw.runs.folder import LOG_FILE, RunFolder

WARNED_SLOWDOWN = 1.15
"""Of the dense network's fastest time, from which a last measurement is warned of: the closed loop
gives such a round a fifth of its weight."""


@dataclass(frozen=True)
class Small:
    """What the allocation and the surgery made.

    Args:
        headroom: by budget, the part of its target that is left.
        next_step: the cheapest single step that would add value and does not fit, as
            ``result.json`` has it, with the index of the group.
    """

    model: nn.Module
    keep: Keep
    widths: list[int]
    keep_ratios: list[float]
    masked_vs_pruned_max_abs: float | None
    predicted_ms: float | None
    rounds: list[dict[str, Any]]
    headroom: dict[str, float] = field(default_factory=dict)
    next_step: dict[str, Any] | None = None


def small_of(
    model: nn.Module,
    allocation: Allocation,
    keep: Keep,
    ratios: list[float],
    difference: float | None,
) -> Small:
    """What the later stages need of a network at its target."""
    chosen = allocation.chosen
    return Small(
        model=model,
        keep=keep,
        widths=[int(w) for w in allocation.widths],
        keep_ratios=[float(r) for r in ratios],
        masked_vs_pruned_max_abs=difference,
        predicted_ms=chosen.predicted_ms if chosen else None,
        rounds=[_round_record(i, r) for i, r in enumerate(allocation.rounds, start=1)],
        headroom=allocation.headroom,
        next_step=_step_record(allocation),
    )


def _step_record(allocation: Allocation) -> dict[str, Any] | None:
    step = allocation.next_step
    if step is None:
        return None
    return {
        "group": step.group,
        "width": step.width,
        "next_width": step.next_width,
        "gain": step.gain,
        "extra": dict(zip(allocation.headroom, step.extra, strict=True)),
    }


def validate_command(run: Path, model: str, data: str) -> str:
    """Return the command that times a run again."""
    trusted = " --trust-run true" if names_code(model, data) else ""
    return f"python -m dsa_hw.validate --run {run}{trusted}"


def verdict_record(timed: Timed | None, again: str) -> dict[str, Any]:
    """Return what ``result.json`` says of the target; without one, it is met by anything.

    Args:
        timed: the last measurement against the target.
        again: the command that measures again (``validate_command``).
    """
    if timed is None:
        return {"met": True, "verdict": "met", "verdict_reason": "there is no latency target"}
    judged = timed.judged
    reason = verdict_sentence(timed)
    if judged.verdict == "undecided":
        reason += f": {again}"
    return {
        "met": judged.met,
        "verdict": judged.verdict,
        "verdict_reason": reason,
        "target_use": {"measured": judged.use, "ci95": list(judged.interval)},
        "seconds_to_decide": judged.more_seconds,
        "rounds_set_aside": timed.disturbed,
        "processor_lost": timed.lost,
    }


def _round_record(number: int, turn: LoopRound) -> dict[str, Any]:
    return {
        "round": number,
        "predicted_ms": turn.predicted_ms,
        "measured_ms": turn.timed.measured_ms,
        "ci95_ms": list(turn.timed.ci95_ms),
        "target_ms": turn.timed.target_ms,
        "dense_ms": turn.timed.dense_ms,
        "correction": turn.correction,
        "aim": turn.aim,
        "budget": turn.budget,
    }


def disturbed_warning(rounds: list[dict[str, Any]], dense_ms: float, again: str) -> list[str]:
    """Whether the machine was slower in the last measurement than in the closed loop's fastest.

    Args:
        rounds: as ``result.json`` has them.
        dense_ms: of the dense network in the last measurement.
        again: the command that measures again (``validate_command``).
    """
    fastest = min((r["dense_ms"] for r in rounds if r.get("dense_ms")), default=dense_ms)
    if dense_ms <= WARNED_SLOWDOWN * fastest:
        return []
    return [
        f"the machine was disturbed in the last measurement: the dense network took {dense_ms:.4g} "
        f"ms, and {fastest:.4g} ms in the closed loop, whose slow rounds count little; a verdict "
        f"from such a measurement says little too: {again}"
    ]


def logged_warnings(folder: RunFolder) -> list[str]:
    """Return what the run's log warned of, and which of its lines could not be read."""
    path = folder.path / LOG_FILE
    if not path.exists():
        return []
    problems: list[str] = []
    events = list(read_json_lines(path, problems))
    warnings = [e.text("message") for e in events if e.values.get("event") == "warning"]
    return [message for message in warnings if message is not None] + problems
