"""The lines of a latency table: what they say, and what cannot be one."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profilers.errors import TableError
from profilers.layers.spec import LayerSpec
from profilers.speed import Speed
from profilers.timing import Round

FORMAT = "dsa_hw.latency_table"
VERSION = 3
MOST = 2**53
"""Largest number in a table: whole numbers up to it are exact in every reader of JSON."""
READINGS = ("compute_ms", "memory_ms")


@dataclass(frozen=True, slots=True)
class LayerKey:
    """A layer at given channels."""

    spec: LayerSpec
    cin: int
    cout: int

    def fields(self) -> dict[str, object]:
        """Its part of a table line."""
        return {"layer": str(self.spec), "cin": self.cin, "cout": self.cout}


@dataclass(frozen=True, slots=True)
class NetworkKey:
    """A whole network at given widths of its coupled groups.

    ``network`` is a digest of the dense network's deployed graph: weights do not enter.
    """

    network: str
    widths: tuple[int, ...]

    def fields(self) -> dict[str, object]:
        """Its part of a table line."""
        return {"network": self.network, "widths": list(self.widths)}


@dataclass(frozen=True, slots=True)
class CallKey:
    """A call of the runtime by itself: a model of one tiny activation.

    Every isolated layer pays it, and a network pays it once.
    """

    def fields(self) -> dict[str, object]:
        """Its part of a table line."""
        return {"call": "tiny activation"}


Key = LayerKey | NetworkKey | CallKey


@dataclass(frozen=True, slots=True)
class TableRound:
    """A round as the table keeps it.

    Args:
        reference_ms: the time of the kernel bound by computing, of late, in the fast state.
    """

    taken: Round
    reference_ms: float


def reason_of(error: Exception) -> str:
    if isinstance(error, TableError):
        return str(error)
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    return str(error)[:200]


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def loaded(line: bytes) -> dict[str, Any]:
    row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    if not isinstance(row, dict):
        raise TableError(f"a {type(row).__name__} in place of an object")
    return row


def header_of(path: Path, line: bytes) -> dict[str, str | int | float]:
    try:
        header = loaded(line)
        if header["format"] != FORMAT:
            raise TableError(f"its format is {header['format']!r}, not {FORMAT!r}")
        if header["version"] != VERSION:
            raise TableError(
                f"version {header['version']!r}, and this program reads and writes version "
                f"{VERSION}: measure it again (delete or rename the file, or name another --table)"
            )
        provenance = header["provenance"]
        if not isinstance(provenance, dict):
            raise TableError("'provenance' is not an object")
        for name, value in provenance.items():
            if not isinstance(value, str):
                _number(name, value)
        _positive(provenance, "reference_ms")
        for name in {"batch_size", "threads"} & provenance.keys():
            _whole(name, provenance[name], 0)
        return provenance
    except (TableError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = reason_of(error)
        raise TableError(f"{path}, line 1: not the header of a latency table ({reason})") from None


def parsed(row: dict[str, Any]) -> tuple[Key, TableRound]:
    taken = Round(
        _positive(row, "median_ms"),
        _positive(row, "p10_ms"),
        _positive(row, "p90_ms"),
        _whole("samples", row["samples"]),
        _whole("loops", row["loops"]),
        None if row["lost"] is None else _number("lost", row["lost"]),
        None if row["compute_ms"] is None else Speed(*(_positive(row, n) for n in READINGS)),
    )
    if not taken.p10_ms <= taken.median_ms <= taken.p90_ms:
        raise TableError("p10_ms, median_ms and p90_ms are not in this order")
    if taken.lost is not None and taken.lost < 0:
        raise TableError(f"lost is {taken.lost!r}; expected a part of the time, 0 or more")
    if (row["compute_ms"] is None) != (row["memory_ms"] is None):
        raise TableError("of compute_ms and memory_ms there is one; expected both or none")
    return _key(row), TableRound(taken, _positive(row, "reference_ms"))


def _key(row: dict[str, Any]) -> Key:
    if "layer" in row:
        if not isinstance(row["layer"], str):
            raise TableError(f"layer is {row['layer']!r}; expected a description")
        spec = LayerSpec.parse(row["layer"])
        return LayerKey(spec, _whole("cin", row["cin"]), _whole("cout", row["cout"]))
    if "call" in row:
        if CallKey().fields() != {"call": row["call"]}:
            raise TableError(f"call is {row['call']!r}; expected {CallKey().fields()['call']!r}")
        return CallKey()
    network, widths = row["network"], row["widths"]
    if not isinstance(network, str) or not isinstance(widths, list):
        raise TableError("a network is a digest and a list of widths")
    return NetworkKey(network, tuple(_whole("widths", w, 0) for w in widths))


def _number(name: str, value: object) -> float:
    """``value``, if it is a finite number.

    Raises:
        TableError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TableError(f"{name} is {str(value)[:40]!r}; expected a number")
    if not (abs(value) <= MOST and math.isfinite(value)):
        raise TableError(f"{name} is out of range; expected a number of at most {MOST}")
    return value


def _positive(row: Mapping[str, object], name: str) -> float:
    value = _number(name, row[name])
    if value <= 0:
        raise TableError(f"{name} is {value!r}; expected a positive number")
    return value


def _whole(name: str, value: object, least: int = 1) -> int:
    number = _number(name, value)
    if not isinstance(number, int) or number < least:
        raise TableError(f"{name} is {number!r}; expected a whole number of at least {least}")
    return number


def checksum_of(row: dict[str, Any], previous: int) -> int:
    return zlib.crc32(json.dumps(row).encode(), previous)


def sealed(row: dict[str, Any], previous: int) -> tuple[bytes, int]:
    checksum = checksum_of(row, previous)
    return (json.dumps(row | {"crc": checksum}) + "\n").encode(), checksum


def short(value: float) -> float:
    return float(f"{value:.6g}")
