"""Latency tables: one append-only JSON-lines file a (device, runtime, precision, batch, threads).

The first line is ``{"format", "version", "provenance"}``. Every other line is one round of one
measurement: its samples' statistics, what others took of the processor meanwhile, the times of two
reference kernels around it (bound by computing, bound by memory), that of the first of late, and a
checksum chained to the line before, from the header on, so that an edited, moved, repeated or
missing line is found. A run that was killed leaves at most one unfinished last line, which the next
append removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import filelock

from profilers.errors import ProvenanceMismatch, TableError
from profilers.speed import Speed, SpeedsSeen
from profilers.table_lines import (
    FORMAT,
    VERSION,
    CallKey,
    Key,
    LayerKey,
    NetworkKey,
    TableRound,
    checksum_of,
    header_of,
    loaded,
    parsed,
    reason_of,
    sealed,
    short,
)
from profilers.timing import (
    LEAST_ROUNDS,
    Measurement,
    Round,
    summarize,
)

if TYPE_CHECKING:
    import pandas as pd

LOCK_S = 60.0
"""Seconds to wait for another process that writes a line: each takes a few milliseconds."""
SYNC_EVERY_S = 5.0
"""Seconds of measuring that a power cut may lose: bringing a line to the disk takes milliseconds,
and for each line by itself that would be a tenth of the measuring time."""
TAIL = 64
"""Bytes at the end of what was read, by which a file is known again before it is appended to."""
IDENTITY = (
    "device", "cpu_features", "driver", "runtime", "runtime_version", "provider", "precision",
    "batch_size", "threads",
)  # fmt: skip
"""Provenance fields that must agree before a measurement means anything elsewhere."""


@dataclass
class LatencyTable:
    """Measurements on one device, in memory and (if ``path`` is set) in its file.

    Example:
        >>> table = LatencyTable.load("latency_tables/cpu.jsonl")   # doctest: +SKIP
        >>> table.measurement(LayerKey(spec, 64, 128)).median_ms    # doctest: +SKIP
    """

    provenance: dict[str, str | int | float]
    path: Path | None = None
    rounds: dict[Key, list[TableRound]] = field(default_factory=dict)
    _checksum: int = 0
    _size: int = 0
    _tail: bytes = b""
    _synced_at: float = float("-inf")
    _known: dict[Key, tuple[int, Speed | None, float, Measurement]] = field(
        default_factory=dict, repr=False
    )
    _seen: SpeedsSeen = field(default_factory=SpeedsSeen, repr=False)

    # -- files -----------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table.

        Raises:
            TableError: no such file, or a line that is not what a profile wrote; names the line.
        """
        path = Path(path)
        with _told(path, "read"):
            if not path.exists():
                raise TableError(f"no latency table at {path}; make one: python -m dsa_hw.profile")
            content = path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        lines = complete.splitlines(keepends=True)
        if not lines:
            raise TableError(f"{path}, line 1: the header is missing; delete the file")
        table = cls(header_of(path, lines[0]), path)
        table._begin(lines[0])
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
        header = {"format": FORMAT, "version": VERSION, "provenance": table.provenance}
        line = (json.dumps(header) + "\n").encode()
        header_of(path, line)  # what is written can be read
        with _told(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with table._locked():
                if path.exists():  # another process was faster
                    return cls.open(path, provenance, allow=allow)
                partial = path.with_name(f"{path.name}.{os.getpid()}.new")
                with partial.open("wb") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
        table._begin(line)
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
        """Add one round, and write its line at once.

        Raises:
            TableError: the file cannot be written, or is no longer the one that was read; nothing
                was written then.
        """
        row = key.fields() | {
            "median_ms": short(taken.median_ms),
            "p10_ms": short(taken.p10_ms),
            "p90_ms": short(taken.p90_ms),
            "samples": taken.samples,
            "loops": taken.loops,
            "lost": None if taken.lost is None else round(taken.lost, 4),
            "reference_ms": short(reference_ms),
            "compute_ms": None if taken.speed is None else short(taken.speed.compute_ms),
            "memory_ms": None if taken.speed is None else short(taken.speed.memory_ms),
        }
        if self.path is not None:
            parsed(row)  # what is written can be read
            with _told(self.path, "written"), self._locked(), open(self.path, "r+b") as file:
                self._catch_up(file)
                line, checksum = sealed(row, self._checksum)
                self._write(file, line)
                self._checksum = checksum
        self._add(key, TableRound(taken, reference_ms))

    def sync(self) -> None:
        """Bring what was appended to the disk, so that a power cut does not lose it."""
        if self.path is not None:
            with _told(self.path, "written"), open(self.path, "r+b") as file:
                os.fsync(file.fileno())
            self._synced_at = time.monotonic()

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
            for one in rounds:
                if one not in known:
                    self.append(key, one.taken, one.reference_ms)
                    added += 1
        return added

    def _begin(self, header: bytes) -> None:
        """The chain starts with the header."""
        self._checksum = zlib.crc32(header)
        self._advance(header)

    def _advance(self, line: bytes) -> None:
        self._size += len(line)
        self._tail = (self._tail + line)[-TAIL:]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = f"{self.path}.lock"
        try:
            with filelock.FileLock(lock, timeout=LOCK_S, mode=0o664):
                yield
        except filelock.Timeout:
            raise TableError(
                f"{self.path} is locked: another process has held {lock} for {LOCK_S:.0f} s; end "
                "it (it may be stopped), or use another --table"
            ) from None

    def _catch_up(self, file: BinaryIO) -> None:
        """Take in what other processes wrote since; leave out an unfinished last line."""
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, self._size - len(self._tail)))
        if size < self._size or file.read(len(self._tail)) != self._tail:
            raise TableError(
                f"{self.path} is not the file that was read: it held {self._size} bytes, and now "
                f"holds {size} or others (another program truncated or replaced it); nothing was "
                "written to it. Put back a copy, or delete it and run the same command again"
            )
        added = file.read()
        for line in added[: added.rfind(b"\n") + 1].splitlines(keepends=True):
            self._read(len(self) + 2, line)

    def _write(self, file: BinaryIO, line: bytes) -> None:
        """Append a line in place of an unfinished one; a disk that is full leaves none."""
        file.truncate(self._size)
        file.seek(self._size)
        try:
            file.write(line)
            file.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(file.fileno(), self._size)
            raise
        self._advance(line)
        if time.monotonic() - self._synced_at > SYNC_EVERY_S:
            os.fsync(file.fileno())
            self._synced_at = time.monotonic()

    def _read(self, number: int, line: bytes) -> None:
        try:
            row = loaded(line)
            checksum = row.pop("crc")
            if checksum != checksum_of(row, self._checksum):
                raise TableError(
                    "does not follow the line before it (edited, moved, repeated or removed lines)"
                )
            key, taken = parsed(row)
        except (TableError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise TableError(
                f"{self.path}, line {number}: not a measurement ({reason_of(error)}); put back a "
                "copy, or delete the file and profile again"
            ) from None
        self._checksum = checksum
        self._advance(line)
        self._add(key, taken)

    def _add(self, key: Key, one: TableRound) -> None:
        self.rounds.setdefault(key, []).append(one)
        self._seen.add(one.taken.speed)

    # -- contents --------------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(map(len, self.rounds.values()))

    def __contains__(self, key: Key) -> bool:
        return key in self.rounds

    @property
    def reference_ms(self) -> float:
        """The reference's time in the fast state, where rounds tell it; else the header's."""
        return self._seen.nominal_compute_ms or float(self.provenance["reference_ms"])

    @property
    def fast_speed(self) -> Speed | None:
        """The machine's fast state; None without readings."""
        return self._seen.fast

    def counts(self, one: TableRound) -> bool:
        """Whether a round was undisturbed and in the machine's fast state, as far as is known."""
        return one.taken.counts(self.fast_speed)

    def measurement(self, key: Key) -> Measurement:
        """The rounds of ``key`` that count, drift-corrected and combined.

        Where fewer than ``LEAST_ROUNDS`` count the measurement is not settled; where fewer than two
        do, it is of all of them.

        Raises:
            KeyError: never measured.
        """
        rounds = self.rounds[key]
        state = (len(rounds), self.fast_speed, self.reference_ms)
        known = self._known.get(key)
        if known is None or known[:3] != state:
            known = (*state, self._summarized(rounds))
            self._known[key] = known
        return known[3]

    def _summarized(self, rounds: list[TableRound]) -> Measurement:
        counting = [r for r in rounds if self.counts(r)]
        settled = len(counting) >= min(LEAST_ROUNDS, len(rounds))
        used = counting if len(counting) > 1 else rounds
        return summarize(
            [r.taken for r in used],
            [self._drift(r) for r in used],
            disturbed=len(rounds) - len(counting),
            settled=settled,
            taken=len(rounds),
        )

    def _drift(self, one: TableRound) -> float:
        """How much slower than in its fast state the machine was at a round.

        By the round's own readings where it has them: in another state layers are slower by about
        as much. In the fast state they are not corrected: readings vary by more than layers do.
        """
        speed = one.taken.speed
        if speed is not None and speed.is_fast(self.fast_speed):
            return 1.0
        return (speed.compute_ms if speed else one.reference_ms) / self.reference_ms

    @property
    def call_ms(self) -> float:
        """What calling the runtime costs by itself; nothing where it was not measured, because
        layers are timed several in one CUDA graph and pay no call."""
        return self.measurement(CallKey()).fastest_ms if CallKey() in self else 0.0

    def layer_ms(self, key: LayerKey) -> float:
        """A layer's time inside a network: its fastest less the cost of calling the runtime.

        At least a tenth of the measurement: the smallest layers are hardly more than the call.

        Raises:
            KeyError: never measured.
        """
        measured = self.measurement(key).fastest_ms
        return max(measured - self.call_ms, 0.1 * measured)

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


@contextlib.contextmanager
def _told(path: Path, done: str) -> Iterator[None]:
    """What the system refuses becomes a ``TableError`` that names file and reason."""
    try:
        yield
    except OSError as error:
        name = error.filename or path
        raise TableError(
            f"the latency table {path} cannot be {done}: {error.strerror or error} ({name}); allow "
            "it or make room, or name another file (--table)"
        ) from error
