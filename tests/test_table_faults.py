"""Tables that somebody damaged, on purpose or not: one message each, and nothing more is lost."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import zlib
from pathlib import Path
from typing import Any

import filelock
import pytest

from profilers.errors import TableError
from profilers.layers.spec import LayerSpec
from profilers.speed import Speed
from profilers.table import CallKey, LatencyTable, LayerKey, NetworkKey
from profilers.timing import Round

PROVENANCE = {"device": "FAKE DEVICE (test)", "threads": 2, "batch_size": 1, "reference_ms": 0.5}
SPEC = LayerSpec.parse("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 28x28 b1 fp32 +relu")


def taken(ms: float) -> Round:
    return Round(ms, 0.9 * ms, 1.2 * ms, 5, 3, 0.01, Speed(0.5, 2.0))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    table = LatencyTable.open(tmp_path / "t.jsonl", PROVENANCE)
    table.append(CallKey(), taken(0.01), 0.5)
    for index in range(4):
        table.append(LayerKey(SPEC, 16, 16 * (index + 1)), taken(1.0 + index), 0.5)
    table.append(NetworkKey("abc", (16, 0, 32)), Round(9.0, 8.0, 9.5, 5, 3), 0.5)
    return tmp_path / "t.jsonl"


def sealed(rows: list[dict[str, Any]]) -> str:
    """Lines with the right checksums, whatever is in them: what a forger would write."""
    lines, checksum = [], 0
    for row in rows:
        own = {name: value for name, value in row.items() if name != "crc"}
        if lines:
            checksum = zlib.crc32(json.dumps(own).encode(), checksum)
            own["crc"] = checksum
        lines.append(json.dumps(own) + "\n")
        if len(lines) == 1:
            checksum = zlib.crc32(lines[0].encode())
    return "".join(lines)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_forger_of_these_tests_knows_the_form(path: Path) -> None:
    assert sealed(rows_of(path)) == path.read_text()


@pytest.mark.parametrize(("name", "value"), [("threads", 1), ("reference_ms", 0.25)])
def test_the_header_is_in_the_chain(path: Path, name: str, value: float) -> None:
    lines = path.read_text().splitlines()
    header = json.loads(lines[0])
    header["provenance"][name] = value
    path.write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n")
    with pytest.raises(TableError, match=r"t\.jsonl, line 2: .*edited"):
        LatencyTable.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("median_ms", math.inf), ("median_ms", math.nan), ("median_ms", 0), ("median_ms", True),
        ("median_ms", 10**400), ("p90_ms", 1e-9), ("reference_ms", -1.0), ("reference_ms", None),
        ("memory_ms", 0.0), ("compute_ms", None), ("compute_ms", "1"), ("lost", -0.1),
        ("lost", "none"), ("cin", "16"), ("cin", [1]),
        ("cin", True), ("cin", 16.0), ("cin", 0), ("cout", -16), ("cout", 2**60),
        ("samples", "<b>"), ("samples", 0), ("loops", 1.5), ("layer", 7), ("layer", {}),
        ("layer", str(SPEC).replace("s1x1", "s0x0")), ("layer", str(SPEC).replace("28", "028")),
        ("layer", str(SPEC).replace("28", "٢٨")), ("layer", str(SPEC) * 50),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_name(path: Path, name: str, value: object) -> None:
    rows = rows_of(path)
    rows[2][name] = value
    path.write_text(sealed(rows))
    with pytest.raises(TableError, match=r"t\.jsonl, line 3: ") as refused:
        LatencyTable.load(path)
    assert name.partition("_")[0] in str(refused.value) or "number" in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [{"widths": [[1], 2]}, {"widths": "16"}, {"widths": [-1]}, {"network": 3}, {"network": None}],
)
def test_a_network_that_cannot_be_is_refused(path: Path, change: dict[str, object]) -> None:
    rows = rows_of(path)
    rows[-1] |= change
    path.write_text(sealed(rows))
    with pytest.raises(TableError, match=r"t\.jsonl, line 7: not a measurement"):
        LatencyTable.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("reference_ms", 0), ("reference_ms", math.nan), ("reference_ms", "0.5"), ("threads", 1.5),
     ("threads", True), ("date", None), ("device", ["a"])],
)  # fmt: skip
def test_a_header_that_cannot_be_is_refused(path: Path, name: str, value: object) -> None:
    rows = rows_of(path)
    rows[0]["provenance"][name] = value
    path.write_text(sealed(rows))
    with pytest.raises(TableError, match=r"t\.jsonl, line 1: not the header"):
        LatencyTable.load(path)


def test_a_table_of_an_earlier_version_says_to_measure_again(path: Path) -> None:
    path.write_text(path.read_text().replace('"version": 3', '"version": 2', 1))
    with pytest.raises(TableError, match=r"line 1: .*version 2, .*measure it again"):
        LatencyTable.load(path)


@pytest.mark.parametrize(
    "garbage", [b"[" * 200_000 + b"\n", b"\xff\xfe\xfa\n", b"7\n", b"null\n", b"\x00" * 50 + b"\n"]
)
def test_garbage_is_refused_when_read_and_when_it_comes_while_open(
    path: Path, garbage: bytes
) -> None:
    table = LatencyTable.load(path)
    with path.open("ab") as file:
        file.write(garbage)
    for action in (
        lambda: LatencyTable.load(path),
        lambda: table.append(LayerKey(SPEC, 8, 8), taken(1.0), 0.5),
    ):
        with pytest.raises(TableError, match=r"t\.jsonl, line 8: not a measurement"):
            action()


def test_a_file_that_shrank_while_open_is_left_as_it_is(path: Path) -> None:
    table = LatencyTable.load(path)
    left = path.read_bytes()[:700]
    path.write_bytes(left)
    with pytest.raises(TableError, match="nothing was written"):
        table.append(LayerKey(SPEC, 8, 8), taken(1.0), 0.5)
    assert path.read_bytes() == left


def test_a_file_that_was_replaced_by_a_longer_one_is_left_as_it_is(path: Path) -> None:
    table = LatencyTable.load(path)
    path.unlink()
    other = LatencyTable.open(path, PROVENANCE)
    for _ in range(20):
        other.append(LayerKey(SPEC, 8, 8), taken(1.0), 0.5)
    content = path.read_bytes()
    with pytest.raises(TableError, match="nothing was written"):
        table.append(LayerKey(SPEC, 8, 8), taken(1.0), 0.5)
    assert path.read_bytes() == content


def test_a_file_that_was_removed_while_open_is_told(path: Path) -> None:
    table = LatencyTable.load(path)
    path.unlink()
    with pytest.raises(TableError, match=r"t\.jsonl cannot be written: No such file"):
        table.append(LayerKey(SPEC, 8, 8), taken(1.0), 0.5)


@pytest.mark.parametrize("refused", ["t.jsonl", "t.jsonl.lock"])
def test_a_file_of_another_user_is_told(
    path: Path, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everything, so the system's refusal is played."""
    table = LatencyTable.load(path)
    really_open = os.open

    def no_lock(name: Any, *rest: Any, **more: Any) -> int:
        if str(name).endswith(refused):
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return really_open(name, *rest, **more)

    def no_file(name: Any, *rest: Any, **more: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(name))

    if refused.endswith(".lock"):
        monkeypatch.setattr(os, "open", no_lock)
    else:
        monkeypatch.setattr("builtins.open", no_file)
    with pytest.raises(TableError, match=r"t\.jsonl cannot be written: Permission denied.*--table"):
        table.append(LayerKey(SPEC, 8, 8), taken(1.0), 0.5)


def test_a_lock_that_is_never_let_go_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profilers.table.LOCK_S", 0.1)
    table = LatencyTable.load(path)
    with (
        filelock.FileLock(f"{path}.lock"),
        pytest.raises(TableError, match="locked: another process"),
    ):
        table.append(LayerKey(SPEC, 8, 8), taken(1.0), 0.5)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_folder_in_place_of_a_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="cannot be read: Is a directory"):
        LatencyTable.load(tmp_path)


def test_what_could_not_be_read_again_is_not_written(path: Path) -> None:
    table = LatencyTable.load(path)
    before = path.read_bytes()
    with pytest.raises(TableError, match="median_ms"):
        table.append(LayerKey(SPEC, 8, 8), Round(math.nan, 1.0, 1.0, 1, 1), 0.5)
    assert path.read_bytes() == before


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A table with one thing wrong: bytes changed, lines moved, values exchanged."""
    lines = content.splitlines(keepends=True)
    line = rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        at = rng.randrange(len(content))
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if kind == 1:
        start = rng.randrange(len(content))
        return content[:start] + content[start + rng.randrange(1, 200) :]
    if kind == 2:
        return b"".join(rng.sample(lines, len(lines)))
    if kind == 3:
        at = rng.randrange(len(content))
        return content[:at] + rng.randbytes(rng.randrange(1, 40)) + content[at:]
    rows = [json.loads(one) for one in lines]
    place = rows[line].get("provenance", rows[line])
    name = rng.choice(sorted(place))
    place[name] = rng.choice([None, True, -1, 0, 1e300, "", "x", [], {}, [[]], 10**30, math.inf])
    forged = sealed(rows) if kind == 4 else "".join(json.dumps(row) + "\n" for row in rows)
    return forged.encode()


def test_a_mutated_table_is_refused_by_line_or_harmless(path: Path) -> None:
    """Never another error, and never another measurement than what somebody wrote."""
    content, refusals = path.read_bytes(), []
    for seed in range(400):
        path.write_bytes(mutated(content, random.Random(seed)))
        try:
            table = LatencyTable.load(path)
        except TableError as error:
            refusals.append(str(error))
            continue
        for key in table.rounds:
            assert 0 < table.measurement(key).median_ms < math.inf, seed
        for key in table.layers():
            assert table.layer_ms(key) > 0, seed
    assert 200 < len(refusals) < 400
    assert all(re.search(r"t\.jsonl, line \d+: ", refusal) for refusal in refusals)
