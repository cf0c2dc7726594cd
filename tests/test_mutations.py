"""The judge of ``benchmarks.faults`` tells apart what may become of a damaged file."""

from __future__ import annotations

import random
import time

import pytest

from benchmarks import mutations
from benchmarks.mutations import Lost, Tally, judge, mutated_bytes, mutated_lines, mutated_value
from dsa_hw.errors import UserError


def failing(error: Exception) -> None:
    raise error


def test_every_outcome_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutations, "DEADLINE_S", 0.05)
    tally = Tally()
    judge(tally, "a", lambda: None)
    judge(tally, "b", lambda: failing(UserError("x is 3; expected 4")))
    judge(tally, "c", lambda: failing(KeyError("x")))
    judge(tally, "d", lambda: failing(Lost("believed")))
    judge(tally, "e", lambda: time.sleep(10))
    judge(tally, "f", lambda: failing(UserError("")))  # says nothing
    figures = tally.figures()
    assert {k: v for k, v in figures.items() if k != "failures"} == {
        "tried": 6, "works": 1, "clear_errors": 1, "tracebacks": 2, "hangs": 1, "losses": 1,
    }  # fmt: skip
    assert [f.split(":")[0] for f in figures["failures"]] == [
        "traceback", "loss", "hang", "traceback",
    ]  # fmt: skip


def test_damage_is_seeded_and_damages() -> None:
    content = b'{"a": 1}\n{"b": 22}\n{"c": 3}\n'
    for mutate in (mutated_bytes, mutated_lines):
        first, again = ([mutate(content, random.Random(s)) for s in range(200)] for _ in range(2))
        assert first == again
        assert sum(x != content for x in first) > 150  # some put a digit where it was
    value = {"a": [1, {"b": 2}], "c": "x"}
    changed = [mutated_value(value, random.Random(seed)) for seed in range(200)]
    assert value == {"a": [1, {"b": 2}], "c": "x"}
    assert sum(c != value for c in changed) > 180
