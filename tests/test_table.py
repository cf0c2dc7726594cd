"""Latency tables: what is written is read back; what does not belong is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from profilers.errors import ProvenanceMismatch, TableError
from profilers.layers.spec import LayerSpec
from profilers.table import LatencyTable, LayerKey, NetworkKey, TableRound, default_path
from profilers.timing import Round

PROVENANCE = {
    "device": "FAKE DEVICE (test)", "cpu_features": "", "driver": "none", "runtime": "fake",
    "runtime_version": "1", "provider": "none", "precision": "fp32", "batch_size": 1,
    "threads": 2, "reference_ms": 0.5,
}  # fmt: skip
SPEC = LayerSpec.parse("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 28x28 b1 fp32 +relu")


def taken(ms: float) -> Round:
    return Round(ms, 0.9 * ms, 1.2 * ms, 5, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    table = LatencyTable.open(tmp_path / "t.jsonl", PROVENANCE)
    for index in range(4):
        table.append(LayerKey(SPEC, 16, 16 * (index + 1)), taken(1.0 + index), 0.5)
    table.append(LayerKey(SPEC, 16, 16), taken(1.2), 0.6)
    table.append(NetworkKey("abc", (16, 32)), taken(9.0), 0.5)
    return tmp_path / "t.jsonl"


@pytest.mark.parametrize(
    "text",
    [
        "conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 28x28 b1 fp32 +relu",
        "conv k7x7 s2x2 p3.3.3.3 d1x1 gdense 224x224 b8 fp16",
        "conv k3x3 s1x1 p1.1.1.1 d2x2 gwidth8 14x14 b1 fp32 +clip",
        "conv k1x5 s1x2 p0.2.0.2 d1x1 gdepthwise 14x7 b1 fp32",
        "gemm k1x1 s1x1 p0.0.0.0 d1x1 gdense 1x1 b64 fp32",
    ],
)
def test_specs_round_trip(text: str) -> None:
    assert str(LayerSpec.parse(text)) == text


def test_round_trip(path: Path) -> None:
    table = LatencyTable.load(path)
    assert len(table) == 6
    assert table.rounds[LayerKey(SPEC, 16, 32)] == [TableRound(taken(2.0), 0.5)]
    first = table.measurement(LayerKey(SPEC, 16, 16))
    # 1.0 at nominal speed and 1.2 when the reference took 0.6 instead of 0.5: the same
    assert first.round_ms == pytest.approx((1.0, 1.0))
    assert list(table.frame().columns[:4]) == ["layer", "kind", "cin", "cout"]
    assert len(table.frame()) == 4


@pytest.mark.parametrize("field", ["device", "driver", "runtime_version", "precision", "threads"])
def test_other_conditions_are_refused_by_name(path: Path, field: str) -> None:
    other = PROVENANCE | {field: "another"}
    with pytest.raises(ProvenanceMismatch, match=f"{field} = .*'another'"):
        LatencyTable.open(path, other)
    assert len(LatencyTable.open(path, other, allow=True)) == 6


def test_different_conditions_have_different_files(tmp_path: Path) -> None:
    names = {
        default_path(PROVENANCE | change, tmp_path).name
        for change in ({}, {"threads": 1}, {"runtime_version": "2"}, {"cpu_features": "avx2"})
    }
    assert len(names) == 4


def test_an_unfinished_last_line_is_lost_and_nothing_else(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    table = LatencyTable.load(path)
    assert len(table) == 5
    table.append(NetworkKey("abc", (16, 32)), taken(9.0), 0.5)
    assert path.read_bytes() == whole
    assert len(LatencyTable.load(path)) == 6


def swapped(lines: list[str]) -> list[str]:
    return [*lines[:2], lines[3], lines[2], *lines[4:]]


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda rows: rows[:2] + rows[3:], 3),
        (swapped, 3),
        (lambda rows: [*rows[:3], rows[2], *rows[3:]], 4),
        (lambda rows: [*rows[:4], rows[4].replace('_ms": 4.0', '_ms": 3.0'), *rows[5:]], 5),
        (lambda rows: [*rows[:2], "{}", *rows[3:]], 3),
        (lambda rows: rows[1:], 1),
        (lambda rows: [rows[0].replace("dsa_hw.latency_table", "x"), *rows[1:]], 1),
    ],
    ids=["removed", "reordered", "duplicated", "edited", "emptied", "headless", "other format"],
)  # fmt: skip
def test_tampering_is_found_and_the_line_named(path: Path, edit, line: int) -> None:
    rows = path.read_text().splitlines()
    path.write_text("\n".join(edit(rows)) + "\n")
    with pytest.raises(TableError, match=f"line {line}:"):
        LatencyTable.load(path)


def test_two_writers_on_one_file(path: Path) -> None:
    first, second = LatencyTable.load(path), LatencyTable.load(path)
    for index in range(5):
        first.append(NetworkKey("first", (index,)), taken(1.0), 0.5)
        second.append(NetworkKey("second", (index,)), taken(2.0), 0.5)
    both = LatencyTable.load(path)
    assert len(both) == 16
    assert {k.network for k in both.networks()} == {"abc", "first", "second"}
    assert len(second) == 16  # the second writer has seen the first one's lines


def test_tables_of_one_device_merge(path: Path, tmp_path: Path) -> None:
    other = LatencyTable.open(tmp_path / "other.jsonl", PROVENANCE)
    other.append(LayerKey(SPEC, 16, 32), taken(2.0), 0.5)  # a round that both have
    other.append(LayerKey(SPEC, 16, 32), taken(2.5), 0.5)
    other.append(NetworkKey("other", (8,)), taken(1.0), 0.5)
    table = LatencyTable.load(path)
    assert table.absorb(other) == 2
    assert table.absorb(other) == 0
    again = LatencyTable.load(path)
    assert again.rounds == table.rounds
    assert len(again.rounds[LayerKey(SPEC, 16, 32)]) == 2


def test_tables_of_different_conditions_do_not_merge(path: Path, tmp_path: Path) -> None:
    other = LatencyTable.open(tmp_path / "other.jsonl", PROVENANCE | {"threads": 7})
    other.append(NetworkKey("other", (8,)), taken(1.0), 0.5)
    table = LatencyTable.load(path)
    with pytest.raises(ProvenanceMismatch, match=r"threads = .*7"):
        table.absorb(other)
    assert len(LatencyTable.load(path)) == 6


def test_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"python -m dsa_hw\.profile"):
        LatencyTable.load(tmp_path / "no.jsonl")


def test_lines_are_plain_json(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["provenance"] == PROVENANCE
    assert lines[1]["layer"] == str(SPEC)
    assert lines[-1]["widths"] == [16, 32]
