"""Latency tables: one append-only JSON-lines file a (device, runtime, precision, batch, threads).

The first line is ``{"format", "version", "provenance"}``. Every other line is one round of one
measurement, its samples' statistics, the reference kernel's time just before it, and a checksum
chained to the line before, so that an edited, moved, repeated or missing line is found. A run
that was killed leaves at most one unfinished last line, which the next append removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from profilers.errors import ProvenanceMismatch, TableError
from profilers.spec import LayerSpec
from profilers.timing import Measurement, Round, summarize

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "dsa_hw.latency_table"
VERSION = 1
IDENTITY = (
    "device", "cpu_features", "driver", "runtime", "runtime_version", "provider", "precision",
    "batch_size", "threads",
)  # fmt: skip
"""Provenance fields that must agree before a measurement means anything elsewhere."""


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


Key = LayerKey | NetworkKey


@dataclass
class LatencyTable:
    """Measurements on one device, in memory and (if ``path`` is set) in its file.

    Example:
        >>> table = LatencyTable.load("latency_tables/cpu.jsonl")   # doctest: +SKIP
        >>> table.measurement(LayerKey(spec, 64, 128)).median_ms    # doctest: +SKIP
    """

    provenance: dict[str, str | int | float]
    path: Path | None = None
    rounds: dict[Key, list[tuple[Round, float]]] = field(default_factory=dict)
    _checksum: int = 0
    _size: int = 0

    # -- files -----------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table.

        Raises:
            TableError: no such file, or a line that is not what a profile wrote; names the line.
        """
        path = Path(path)
        if not path.is_file():
            raise TableError(f"no latency table at {path}; make one: python -m dsa_hw.profile")
        text = path.read_bytes()
        complete = text[: text.rfind(b"\n") + 1]
        lines = complete.decode("utf-8", errors="replace").splitlines()
        if not lines:
            raise TableError(f"{path}, line 1: the header is missing; delete the file")
        table = cls(_header(path, lines[0]), path, _size=len(complete))
        for number, line in enumerate(lines[1:], start=2):
            table._read(number, line)
        return table

    @classmethod
    def open(
        cls, path: str | Path, provenance: Mapping[str, str | int | float], *, allow: bool = False
    ) -> LatencyTable:
        """Load ``path`` for more measurements, or start it when it is not there.

        Args:
            provenance: of the backend that will measure.
            allow: accept a table measured under other conditions (to read, not to extend).

        Raises:
            ProvenanceMismatch: the table was measured under other conditions; names the field.
        """
        path = Path(path)
        if path.exists():
            table = cls.load(path)
            if not allow:
                table.check(provenance)
            return table
        table = cls(dict(provenance), path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"format": FORMAT, "version": VERSION, "provenance": table.provenance}
        with FileLock(f"{path}.lock"):
            if path.exists():  # another process was faster
                return cls.open(path, provenance, allow=allow)
            partial = path.with_name(f"{path.name}.{os.getpid()}.new")
            partial.write_text(json.dumps(header) + "\n", encoding="utf-8")
            os.replace(partial, path)
        table._size = path.stat().st_size
        return table

    def check(self, provenance: Mapping[str, str | int | float]) -> None:
        """Refuse use under other conditions than the table's own.

        Raises:
            ProvenanceMismatch: naming the field and both values.
        """
        for name, mine, other in self.mismatches(provenance):
            raise ProvenanceMismatch(
                f"table {self.path} was measured with {name} = {mine!r}, and here it is "
                f"{other!r}; measure a table of its own (another --table), or pass "
                "--allow-mismatch to use it all the same"
            )

    def mismatches(
        self, provenance: Mapping[str, str | int | float]
    ) -> list[tuple[str, object, object]]:
        """(field, the table's value, the other value) wherever the conditions differ."""
        pairs = [(n, self.provenance.get(n), provenance.get(n)) for n in IDENTITY]
        return [(name, mine, other) for name, mine, other in pairs if mine != other]

    def append(self, key: Key, taken: Round, reference_ms: float) -> None:
        """Add one round, and write its line at once."""
        row = key.fields() | {
            "median_ms": _short(taken.median_ms),
            "p10_ms": _short(taken.p10_ms),
            "p90_ms": _short(taken.p90_ms),
            "samples": taken.samples,
            "loops": taken.loops,
            "reference_ms": _short(reference_ms),
        }
        if self.path is not None:
            with FileLock(f"{self.path}.lock"):
                self._catch_up()
                line, checksum = _seal(row, self._checksum)
                with open(self.path, "r+b") as file:
                    file.truncate(self._size)
                    file.seek(self._size)
                    file.write(line)
                self._size += len(line)
                self._checksum = checksum
        self.rounds.setdefault(key, []).append((taken, reference_ms))

    def absorb(self, other: LatencyTable) -> int:
        """Add the rounds of another table of the same device and runtime; returns how many.

        A measurement in both keeps the rounds of both; a round that is here already is not added
        again. Drift is judged by this table's nominal reference time.

        Raises:
            ProvenanceMismatch: the tables were measured under different conditions.
        """
        self.check(other.provenance)
        added = 0
        for key, rounds in other.rounds.items():
            known = set(self.rounds.get(key, ()))
            for taken, reference_ms in rounds:
                if (taken, reference_ms) not in known:
                    self.append(key, taken, reference_ms)
                    added += 1
        return added

    def _catch_up(self) -> None:
        """Take in what other processes wrote since; leave out an unfinished last line."""
        assert self.path is not None
        with open(self.path, "rb") as file:
            file.seek(self._size)
            added = file.read()
        complete = added[: added.rfind(b"\n") + 1]
        for line in complete.decode("utf-8").splitlines():
            self._read(len(self) + 2, line)
        self._size += len(complete)

    def _read(self, number: int, line: str) -> None:
        try:
            row = json.loads(line)
            checksum = row.pop("crc")
            if checksum != _crc(row, self._checksum):
                raise TableError(
                    "does not follow the line before it (edited, moved, repeated or removed lines)"
                )
            key, taken, reference_ms = _parse(row)
        except TableError as error:
            raise TableError(f"{self.path}, line {number}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TableError(
                f"{self.path}, line {number}: not a measurement ({type(error).__name__}: {error})"
            ) from None
        self._checksum = checksum
        self.rounds.setdefault(key, []).append((taken, reference_ms))

    # -- contents --------------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(map(len, self.rounds.values()))

    def __contains__(self, key: Key) -> bool:
        return key in self.rounds

    @property
    def reference_ms(self) -> float:
        """The reference kernel's nominal time: what drift is measured against."""
        return float(self.provenance["reference_ms"])

    def measurement(self, key: Key) -> Measurement:
        """All rounds of ``key``, drift-corrected and combined.

        Raises:
            KeyError: never measured.
        """
        taken = self.rounds[key]
        drifts = [reference / self.reference_ms for _, reference in taken]
        return summarize([r for r, _ in taken], drifts)

    def layer_ms(self, key: LayerKey) -> float:
        """A layer's time inside a network: its measurement less the cost of calling the runtime.

        At least a tenth of the measurement: the smallest layers are hardly more than the call.

        Raises:
            KeyError: never measured.
        """
        measured = self.measurement(key).median_ms
        return max(measured - float(self.provenance.get("call_ms", 0.0)), 0.1 * measured)

    def layers(self) -> Iterator[LayerKey]:
        """The measured layers."""
        return (k for k in self.rounds if isinstance(k, LayerKey))

    def networks(self) -> Iterator[NetworkKey]:
        """The measured whole networks."""
        return (k for k in self.rounds if isinstance(k, NetworkKey))

    def frame(self) -> pd.DataFrame:
        """One row a measured layer: spec's fields, channels, statistics in ms."""
        import pandas as pd

        rows = []
        for key in self.layers():
            m = self.measurement(key)
            rows.append(
                {"layer": str(key.spec), "kind": key.spec.kind, "cin": key.cin, "cout": key.cout}
                | {"median_ms": m.median_ms, "p10_ms": m.p10_ms, "p90_ms": m.p90_ms}
                | {"ci95_low_ms": m.ci95_ms[0], "ci95_high_ms": m.ci95_ms[1]}
                | {"rounds": m.rounds, "drift": m.drift}
            )
        return pd.DataFrame(rows)


def default_path(provenance: Mapping[str, str | int | float], folder: Path) -> Path:
    """The file of a table with this provenance: readable, and different where tables differ."""
    identity = json.dumps([provenance.get(name) for name in IDENTITY])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:6]
    parts = [str(provenance[n]) for n in ("device", "runtime", "precision")]
    parts += [f"b{provenance['batch_size']}", f"t{provenance['threads']}", digest]
    slug = re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()).strip("-")
    return folder / f"{slug}.jsonl"


def _header(path: Path, line: str) -> dict[str, str | int | float]:
    try:
        header = json.loads(line)
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']!r}")
        if header["version"] != VERSION:
            raise ValueError(f"version {header['version']!r}; this is version {VERSION}")
        provenance = header["provenance"]
        float(provenance["reference_ms"])
        return provenance
    except (ValueError, KeyError, TypeError) as error:
        raise TableError(f"{path}, line 1: not the header of a latency table ({error})") from None


def _parse(row: dict) -> tuple[Key, Round, float]:
    if "layer" in row:
        key: Key = LayerKey(LayerSpec.parse(row["layer"]), row["cin"], row["cout"])
    else:
        key = NetworkKey(row["network"], tuple(row["widths"]))
    times = [row[n] for n in ("median_ms", "p10_ms", "p90_ms", "reference_ms")]
    if not all(isinstance(t, (int, float)) and t > 0 for t in times):
        raise TableError("a time that is not a positive number")
    taken = Round(times[0], times[1], times[2], row["samples"], row["loops"])
    return key, taken, times[3]


def _crc(row: dict, previous: int) -> int:
    return zlib.crc32(json.dumps(row).encode(), previous)


def _seal(row: dict, previous: int) -> tuple[bytes, int]:
    checksum = _crc(row, previous)
    return (json.dumps(row | {"crc": checksum}) + "\n").encode(), checksum


def _short(value: float) -> float:
    return float(f"{value:.6g}")
