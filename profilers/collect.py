"""Measure what a table lacks: shuffled rounds, a reference kernel against drift, resumable."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from profilers.backends import Backend, TimesPacks
from profilers.errors import ProvenanceMismatch
from profilers.host import Patience
from profilers.layers.models import layer_model, reference_model, tiny_model
from profilers.layers.spec import LayerSpec
from profilers.speed import FastWait
from profilers.table import CallKey, Key, LatencyTable, LayerKey
from profilers.timing import Round, SamplePlan, rounds_in_turn
from profilers.workers.parallel import members_of

LAYER_PLAN = SamplePlan(sample_ms=2.0, samples=3, warmup_ms=5.0)
NETWORK_PLAN = SamplePlan(sample_ms=8.0, samples=3, warmup_ms=12.0)
REFERENCE_PLAN = SamplePlan(sample_ms=2.0, samples=3, warmup_ms=5.0)
REFERENCE_EVERY_S = 0.5
"""Between two readings of the reference, where rounds do not bring their own."""
REFERENCE_READINGS = 31
"""The machine's speed is the median of so many readings: one is off by 10% as often as not where
other guests of the host come and go, and would put its own noise on what it corrects."""
FIRST_READINGS = 9
RETAKEN = 1.5
"""Times the rounds asked for: the most that are taken where some of them are disturbed."""
UNSTABLE_SPREAD_PCT = 8.0
MODEL_BYTES = 2**30
"""Of whole networks that are kept for their next rounds: building one takes longer than a round."""
CALL_SHARE = 4
"""Rounds of a call of the runtime for one of a layer: it is a part of every layer's time."""
PACK_BYTES = 256 * 2**20
"""Of a pack's inputs, outputs and weights: packing is for small layers."""


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to measure: its key, and the ONNX model that is it (built when needed).

    Args:
        share: it gets so many times the rounds of the others, spread evenly among theirs.
    """

    key: Key
    model: Callable[[], bytes]
    share: int = 1

    @classmethod
    def layer(cls, spec: LayerSpec, cin: int, cout: int) -> Request:
        """A layer at given channels."""
        return cls(LayerKey(spec, cin, cout), lambda: layer_model(spec, cin, cout))

    @classmethod
    def call(cls) -> Request:
        """A call of the runtime by itself, which is subtracted from every layer's time."""
        return cls(CallKey(), tiny_model, CALL_SHARE)


def call_requests(backend: Backend) -> list[Request]:
    """What to measure of calling the runtime, beside layers.

    Nothing where layers are timed several in one CUDA graph: what stands between two kernels there,
    a network pays as often.
    """
    return [Request.call()] if backend.layers_pay_call else []


@dataclass(frozen=True, slots=True)
class Collected:
    """What a call to ``collect`` did: numbers of measurements (a key each).

    ``left`` are rounds that were not taken because ``stop`` said so, ``disturbed`` rounds that were
    taken and do not count, because others had the processor or the machine was slow.
    """

    measured: int
    reused: int
    unstable: int
    seconds: float
    left: int = 0
    disturbed: int = 0


class Reference:
    """A fixed kernel, a dense convolution, whose time says how fast the machine is."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._model = reference_model()

    def ms(self) -> float:
        """Its time now; where the backend reads the machine's speed by itself, by that."""
        with self._backend.open_layer(self._model) as runner:
            speed = runner.speed()
            return speed.compute_ms if speed else runner.take_round(REFERENCE_PLAN).median_ms


def nominal_reference_ms(backend: Backend, rounds: int = REFERENCE_READINGS) -> float:
    """The reference kernel's time for a new table's header: the median of a few rounds."""
    reference = Reference(backend)
    return sorted(reference.ms() for _ in range(rounds))[rounds // 2]


def collect(
    table: LatencyTable,
    backend: Backend,
    requests: Sequence[Request],
    *,
    rounds: int = 4,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> Collected:
    """Bring every request to ``rounds`` rounds (times its share) in the table.

    What the table has is not measured again.

    A request whose rounds differ by more than ``UNSTABLE_SPREAD_PCT`` (of their median) is counted
    as unstable.

    Rounds begin when the machine is in its fast state (``FastWait``). Those during which others
    took the processor, or the machine was slower, are taken again, in all up to ``RETAKEN`` times
    as many as were asked for; where that is reached while a request is open, its rounds in a row
    (``rounds_in_turn``) are still taken.

    Args:
        on_progress: called with (rounds done, rounds planned).
        on_notice: told when other programs do not leave the processors alone.
        stop: asked before each round; once it says so, no more are taken. What is there is kept,
            and the same call goes on with the rest another time.

    Raises:
        ProvenanceMismatch: something is missing and the table is of other conditions than the
            backend's: it may be read (``--allow-mismatch``), but never mixed.
    """
    start = time.perf_counter()
    unique = {r.key: r for r in requests}
    missing = [r for r in unique.values() if _lacking(table, r, rounds)]
    if missing:
        _refuse_to_mix(table, backend, len(missing))
    patience = Patience(threads_of(backend), on_notice=on_notice)
    session = _Session(
        table, backend, missing, random.Random(seed), on_progress, stop, patience, on_notice
    )
    session.take(missing, rounds, planned=sum(_lacking(table, r, rounds) for r in missing))
    left = sum(_lacking(table, r, rounds) for r in missing)
    table.sync()
    measured = [r for r in missing if r.key in table]
    unstable = sum(_spread_pct(table, r.key) > UNSTABLE_SPREAD_PCT for r in measured)
    return Collected(
        measured=len(measured),
        reused=len(unique) - len(missing),
        unstable=unstable,
        seconds=time.perf_counter() - start,
        left=left,
        disturbed=session.disturbed,
    )


def threads_of(backend: Backend) -> int:
    """Processors that a round uses; 0 where it runs on a card, whose memory nobody else uses."""
    return int(backend.provenance()["threads"])


def _lacking(table: LatencyTable, request: Request, rounds: int) -> int:
    """Rounds that a request still needs, as far as it may have them."""
    wanted = rounds * request.share
    taken = table.rounds.get(request.key, ())
    counting = sum(table.counts(one) for one in taken)
    return max(0, min(wanted - counting, round(RETAKEN * wanted) - len(taken)))


def packs_of(requests: Sequence[Request], size: int) -> list[tuple[Request, ...]]:
    """Layers in packs of up to ``size`` and ``PACK_BYTES``, networks by themselves.

    The same requests make the same packs, so that a pack is built once for all its rounds.
    """
    packs: list[tuple[Request, ...]] = []
    pack: tuple[Request, ...] = ()
    room = 0
    for request in sorted(requests, key=lambda r: str(r.key)):
        if not isinstance(request.key, LayerKey) or size == 1:
            packs.append((request,))
            continue
        needed = request.key.spec.bytes_moved(request.key.cin, request.key.cout)
        if pack and (len(pack) == size or needed > room):
            packs.append(pack)
            pack = ()
        if not pack:
            room = PACK_BYTES
        pack, room = (*pack, request), room - needed
    return [*packs, pack] if pack else packs


def _refuse_to_mix(table: LatencyTable, backend: Backend, missing: int) -> None:
    for name, theirs, mine in table.mismatches(backend.provenance()):
        raise ProvenanceMismatch(
            f"table {table.path} lacks {missing} measurements, and they cannot be added here: it "
            f"was measured with {name} = {theirs!r}, and here it is {mine!r}; complete it where it "
            "was measured (python -m dsa_hw.profile), or measure another one (--table)"
        )


class _Models:
    """What requests are measured as; networks are built once, the first of them that fit.

    Args:
        room: bytes that may be kept.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._kept: dict[Key, bytes] = {}

    def of(self, request: Request) -> bytes:
        """A request's model."""
        if request.key in self._kept:
            return self._kept[request.key]
        model = request.model()
        if not isinstance(request.key, LayerKey) and len(model) <= self._room:
            self._kept[request.key] = model
            self._room -= len(model)
        return model


class _Station:
    """One device at work; knows how fast the machine was of late."""

    def __init__(
        self,
        backend: Backend,
        models: _Models,
        table: LatencyTable,
        on_notice: Callable[[str], None] | None,
    ) -> None:
        self._backend, self._models, self._table = backend, models, table
        self._reference = Reference(backend)
        self._readings: deque[float] = deque(maxlen=REFERENCE_READINGS)
        self._read_at = float("-inf")
        self._ready = FastWait(lambda: table.fast_speed, on_notice=on_notice)

    def measure(
        self, pack: Sequence[Request], wanted: Container[Key]
    ) -> Iterator[tuple[Request, Round, float]]:
        """A round of each wanted request, and the reference's time of late.

        Args:
            pack: measured together where the backend does that, else one by one.
        """
        if len(pack) > 1 and isinstance(self._backend, TimesPacks):
            together = self._backend.layers_per_pack > 1
            rounds = self._backend.pack_rounds([r.model() for r in pack]) if together else None
            if rounds is not None:
                self._look(rounds[0])
                for request, taken in zip(pack, rounds, strict=True):
                    if request.key in wanted:
                        yield request, taken, self._reference_ms
                return
        for request in pack:
            if request.key in wanted:
                for taken in self._alone(request):
                    self._look(taken)
                    yield request, taken, self._reference_ms

    def _alone(self, request: Request) -> list[Round]:
        model = self._models.of(request)
        if isinstance(request.key, LayerKey | CallKey):
            opened, plan = self._backend.open_layer(model), LAYER_PLAN
        else:
            opened, plan = self._backend.open(model), NETWORK_PLAN
        with opened as runner:
            return rounds_in_turn(runner, plan, self._ready)

    @property
    def _reference_ms(self) -> float:
        return statistics.median(self._readings)

    def _look(self, taken: Round) -> None:
        """Take a reading of the reference from a round in the fast state, or by itself."""
        if taken.speed is not None:
            if taken.counts(self._table.fast_speed) or not self._readings:
                self._readings.append(taken.speed.compute_ms)
            return
        if not self._readings:
            self._readings.extend(self._reference.ms() for _ in range(FIRST_READINGS))
        elif time.perf_counter() - self._read_at <= REFERENCE_EVERY_S:
            return
        else:
            self._readings.append(self._reference.ms())
        self._read_at = time.perf_counter()


class _Session:
    """One stretch of measuring ``requests``, on all devices of a backend at once."""

    def __init__(
        self,
        table: LatencyTable,
        backend: Backend,
        requests: Sequence[Request],
        shuffler: random.Random,
        on_progress: Callable[[int, int], None] | None,
        stop: Callable[[], bool] | None,
        patience: Patience,
        on_notice: Callable[[str], None] | None,
    ) -> None:
        self._table = table
        self._shuffler = shuffler
        self._on_progress = on_progress
        self._stop = stop or (lambda: False)
        members = members_of(backend)
        models = _Models(MODEL_BYTES)
        self._stations = [_Station(member, models, table, on_notice) for member in members]
        first = members[0]
        self._packs = packs_of(
            requests, first.layers_per_pack if isinstance(first, TimesPacks) else 1
        )
        self._lock = threading.Lock()
        self._failed = False
        self._patience = patience
        self.done = 0
        self.disturbed = 0

    def take(self, requests: Sequence[Request], rounds: int, planned: int) -> None:
        """Rounds in passes: each pass gives every request its share of what it lacks, shuffled."""
        while pending := {
            r.key: min(r.share, lacking)
            for r in requests
            if (lacking := _lacking(self._table, r, rounds))
        }:
            packs = [
                pack
                for pack in self._packs
                for _ in range(max(pending.get(r.key, 0) for r in pack))
            ]
            self._shuffler.shuffle(packs)
            waiting = iter(packs)
            if len(self._stations) == 1:
                self._work(self._stations[0], waiting, pending, planned)
            else:
                self._work_together(waiting, pending, planned)
            if self._stop():
                return

    def _work_together(
        self, waiting: Iterator[Sequence[Request]], wanted: Container[Key], planned: int
    ) -> None:
        with ThreadPoolExecutor(len(self._stations)) as pool:
            tasks = [pool.submit(self._work, s, waiting, wanted, planned) for s in self._stations]
            try:
                for task in tasks:
                    task.result()
            finally:
                self._failed = True  # after a failure, nobody begins another round
        self._failed = False

    def _work(
        self,
        station: _Station,
        waiting: Iterator[Sequence[Request]],
        wanted: Container[Key],
        planned: int,
    ) -> None:
        """Take packs until there are no more."""
        while True:
            with self._lock:
                pack = None if self._failed or self._stop() else next(waiting, None)
            if pack is None:
                return
            for request, taken, reference_ms in station.measure(pack, wanted):
                with self._lock:
                    self._table.append(request.key, taken, reference_ms)
                    if self._table.counts(self._table.rounds[request.key][-1]):
                        self.done += 1
                    else:
                        self.disturbed += 1
                    if self._on_progress:
                        self._on_progress(min(self.done, planned), planned)
                if self._stop():
                    return
                if taken.disturbed:
                    self._patience.wait()


def _spread_pct(table: LatencyTable, key: Key) -> float:
    """Distance between the 2nd lowest and the 2nd highest round (lowest and highest of three)."""
    values = sorted(table.measurement(key).round_ms)
    inner = values[1:-1] if len(values) > 3 else values
    return 100.0 * (inner[-1] - inner[0]) / table.measurement(key).median_ms
