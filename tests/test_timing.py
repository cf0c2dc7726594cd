"""Timing with an injected clock: calibration of loops, intervals, drift, the stop rule."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pytest
from fake_device import FakeDevice

from profilers.collect import Request, collect
from profilers.layers.models import layer_model
from profilers.layers.spec import LayerSpec
from profilers.steps import CANDIDATES, SWEEP, rise_within_treads
from profilers.table import LatencyTable, LayerKey, NetworkKey
from profilers.timing import (
    Measurement,
    Round,
    Runner,
    SamplePlan,
    measure_interleaved,
    median_interval,
    paired,
    ratio,
    summarize,
)


class FakeClock:
    """Seconds that pass only when a run says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def subject(self, ms: float, log: list[str] | None = None, name: str = ""):
        """A subject whose runs take ``ms`` each on this clock."""

        @contextmanager
        def opened() -> Iterator[Runner]:
            def run() -> None:
                self.now += ms / 1e3

            if log is not None:
                log.append(name)
            yield Runner(run, clock=self)

        return opened


def test_loops_fill_a_sample() -> None:
    clock = FakeClock()
    with clock.subject(0.5)() as runner:
        taken = runner.take_round(SamplePlan(sample_ms=10.0, samples=3, warmup_ms=5.0))
    assert taken.loops == pytest.approx(20, abs=1)
    assert taken.median_ms == pytest.approx(0.5)


def test_a_long_run_is_its_own_sample() -> None:
    clock = FakeClock()
    with clock.subject(80.0)() as runner:
        assert runner.take_round(SamplePlan(sample_ms=10.0)).loops == 1


@pytest.mark.parametrize(("ms", "discarded"), [(1.0, 12), (5.0, 3), (30.0, 2)])
def test_runs_are_discarded_for_no_longer_than_the_plan_says(ms: float, discarded: int) -> None:
    clock = FakeClock()
    with clock.subject(ms)() as runner:
        runner.take_round(SamplePlan(sample_ms=ms, samples=3, warmup_ms=12.0))
    # the clock adds up floats, which may make the loops one more than one
    assert round((clock.now - 100.0) * 1e3 / ms) - 3 in (discarded, discarded + 3)


def test_drift_is_divided_out() -> None:
    rounds = [Round(1.0, 1.0, 1.0, 5, 1), Round(2.0, 2.0, 2.0, 5, 1)]
    assert summarize(rounds, [1.0, 2.0]).round_ms == (1.0, 1.0)


def correlated(rng: np.random.Generator, shape: tuple[int, int], rho: float) -> np.ndarray:
    """Standard normal rows whose neighbours correlate by ``rho`` (autoregressive)."""
    noise = rng.standard_normal(shape)
    for i in range(1, shape[1]):
        noise[:, i] = rho * noise[:, i - 1] + (1 - rho**2) ** 0.5 * noise[:, i]
    return noise


def skewed(noise: np.ndarray) -> np.ndarray:
    """Log-normal, of skewness 1.75; its median is where the normal one's is."""
    return np.exp(0.5 * noise) - 1.0


TRIES = 2500
COVERED = 0.94 - 2.5 * (0.94 * 0.06 / TRIES) ** 0.5
"""What 94% shows in so many tries, less two and a half standard errors of counting them."""


@pytest.mark.parametrize("count", [5, 6, 8, 10, 11, 15, 30])
@pytest.mark.parametrize("rho", [0.0, 0.3])
@pytest.mark.parametrize("form", [np.asarray, skewed], ids=["normal", "skewed"])
def test_intervals_cover_the_median(count: int, rho: float, form) -> None:
    noise = form(correlated(np.random.default_rng(count), (TRIES, count), rho))
    found = [median_interval(row.tolist()) for row in 10.0 + noise]
    assert sum(low <= 10.0 <= high for low, high in found) / TRIES >= COVERED


@pytest.mark.parametrize("count", [5, 10, 20, 40])
def test_intervals_are_not_wider_than_they_need_to_be(count: int) -> None:
    """At most so much wider than the narrowest that covers, were the spread known: half of it is
    1.96 * 1.2533 standard deviations over the root, 1.245 times that for correlation of 0.3. Few
    rounds do not know their spread: Student's t at four degrees of freedom alone is 1.42 times."""
    noise = correlated(np.random.default_rng(0), (500, count), 0.0)
    found = [median_interval(row.tolist()) for row in 10.0 + noise]
    half = float(np.mean([high - low for low, high in found])) / 2
    known = 1.96 * 1.2533 * 1.245 / count**0.5
    assert half / known < {5: 1.75, 10: 1.35, 20: 1.15, 40: 1.1}[count]


@pytest.mark.parametrize("limit_pct", [0.8, 1.6])
def test_intervals_cover_where_their_width_ends_the_rounds(limit_pct: float) -> None:
    rng = np.random.default_rng(1)
    tries, hits, numbers = 400, 0, []
    for _ in range(tries):
        values = (100.0 + 1.5 * rng.standard_normal(200)).tolist()
        taken = next(
            n
            for n in range(5, 201)
            if np.diff(median_interval(values[:n]))[0] <= 2 * limit_pct or n == 200
        )
        low, high = median_interval(values[:taken])
        hits += low <= 100.0 <= high
        numbers.append(taken)
    assert np.median(numbers) > 6  # the width decides, not the least number
    # 94%, less two and a half standard errors of counting 400 tries
    assert hits / tries >= 0.94 - 2.5 * (0.94 * 0.06 / tries) ** 0.5


def test_two_disturbed_rounds_of_fifteen_do_not_widen_the_interval() -> None:
    calm = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01, 0.99, 1.0, 1.01, 1.0, 1.0]
    low, high = median_interval([*calm, 9.0, 8.0])
    assert high - low < 0.1


def test_one_disturbed_round_does_not_widen_the_interval() -> None:
    calm = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01]
    low, high = median_interval([*calm, 9.0])
    assert high - low < 0.1


def test_one_round_gives_no_interval() -> None:
    assert median_interval([1.0]) == (0.0, math.inf)


def test_rounds_stop_when_intervals_are_narrow() -> None:
    clock, rounds = FakeClock(), []
    found = measure_interleaved(
        {"a": clock.subject(1.0), "b": clock.subject(2.0)},
        min_rounds=5, clock=clock, on_round=rounds.append,
    )  # fmt: skip
    assert rounds[-1] == 5  # no noise at all: the least number
    assert found["b"].median_ms == pytest.approx(2.0)
    value, (low, high) = ratio(found["b"], found["a"])
    assert value == pytest.approx(2.0)
    assert low <= 2.0 + 1e-9  # the clock adds up floats
    assert high >= 2.0 - 1e-9


def test_paired_measurements_are_free_of_what_slows_both() -> None:
    slow = (1.0, 1.0, 1.0, 1.5, 1.6)  # the machine, round by round
    base = Measurement(1.0, 1.0, 1.6, (0.9, 1.1), 5, 1.0, round_ms=slow)
    subject = Measurement(0.75, 0.5, 0.8, (0.4, 0.9), 5, 1.0, round_ms=tuple(s / 2 for s in slow))
    found = paired(subject, base)
    assert found.median_ms == pytest.approx(0.5)
    assert found.ci95_ms == pytest.approx((0.5, 0.5))


def test_noise_runs_into_the_time_limit_and_warns() -> None:
    clock = FakeClock()
    noise = itertools.cycle([1.0, 3.0, 1.5, 2.5])

    @contextmanager
    def noisy() -> Iterator[Runner]:
        ms = next(noise)

        def run() -> None:
            clock.now += ms / 1e3

        yield Runner(run, clock=clock)

    found = measure_interleaved({"noisy": noisy}, time_limit_s=2.0, max_rounds=1000, clock=clock)
    assert clock.now - 100.0 < 3.0
    assert found["noisy"].warning is not None
    assert "95% interval" in found["noisy"].warning


def test_order_is_shuffled_and_balanced() -> None:
    clock, log = FakeClock(), []
    measure_interleaved(
        {n: clock.subject(1.0, log, n) for n in "abc"}, min_rounds=12, max_rounds=12, clock=clock
    )
    turns = ["".join(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert {"".join(sorted(t)) for t in turns} == {"abc"}
    assert len(set(turns)) > 2


def test_steady_measurement_has_no_warning() -> None:
    assert Measurement(1.0, 1.0, 1.0, (0.99, 1.01), 5, 1.0).warning is None


SPEC = LayerSpec.parse("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 8x8 b1 fp32")


class Interrupted(FakeDevice):
    """A fake device that fails after some layers, as a killed process would."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    @contextmanager
    def open_layer(self, model: bytes) -> Iterator[Runner]:
        if self.opened >= self.after:
            raise KeyboardInterrupt
        with super().open_layer(model) as runner:
            yield runner


@pytest.mark.parametrize("after", [1, 7, 20, 30])
def test_an_interrupted_collection_loses_nothing(after: int, tmp_path) -> None:
    provenance = dict(FakeDevice().provenance()) | {"reference_ms": 1.0}
    requests = [Request.layer(SPEC, 8, 8 * (i + 1)) for i in range(8)]
    table = LatencyTable.open(tmp_path / "t.jsonl", provenance)
    with pytest.raises(KeyboardInterrupt):
        collect(table, Interrupted(after), requests, rounds=4)
    kept = len(LatencyTable.load(tmp_path / "t.jsonl"))
    assert kept == len(table)
    again = LatencyTable.load(tmp_path / "t.jsonl")
    collect(again, FakeDevice(), requests, rounds=4)
    assert len(LatencyTable.load(tmp_path / "t.jsonl")) == 8 * 4  # not one round more
    repeated = collect(again, FakeDevice(), requests, rounds=4)
    assert (repeated.measured, repeated.reused) == (0, 8)


def test_networks_are_built_once_as_far_as_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large one takes longer to build than a round of it takes to measure."""
    spec = LayerSpec.parse("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 8x8 b1 fp32 +relu")
    built: Counter[int] = Counter()

    def request(width: int) -> Request:
        def model() -> bytes:
            built[width] += 1
            return layer_model(spec, 8, width)

        return Request(NetworkKey("digest", (width,)), model)

    size = len(layer_model(spec, 8, 16))
    monkeypatch.setattr("profilers.collect.MODEL_BYTES", size + size // 2)
    table = LatencyTable(FakeDevice().provenance() | {"reference_ms": 1.0})
    found = collect(table, FakeDevice(), [request(16), request(24)], rounds=5)
    assert found.measured == 2
    # one of the two fits, whichever came first
    assert sorted(built.values()) == [1, 5]


def test_collection_measures_each_key_once(tmp_path) -> None:
    provenance = dict(FakeDevice().provenance()) | {"reference_ms": 1.0}
    table = LatencyTable.open(tmp_path / "t.jsonl", provenance)
    requests = [Request.layer(SPEC, 8, 16)] * 5
    assert collect(table, FakeDevice(), requests).measured == 1
    assert LayerKey(SPEC, 8, 16) in table


@pytest.mark.parametrize("step", [8, 16, 32])
def test_treads_of_a_staircase_hold_no_rise(step: int) -> None:
    widths = np.array(SWEEP)
    treads = np.log(0.01 + np.ceil(widths / step) ** 1.2)
    rises = {s: rise_within_treads(widths, treads, s) for s in CANDIDATES}
    assert rises[step] == pytest.approx(0.0, abs=1e-12)
    assert all(rises[s] > 0.2 * (treads[-1] - treads[0]) for s in CANDIDATES if s > step)


def test_a_measurement_ends_when_what_was_asked_is_known() -> None:
    """Half a width of no per cent is never reached; the word of ``is_enough`` counts instead, and
    not before the least rounds."""
    clock = FakeClock()
    asked: list[int] = []

    def is_enough(found: Mapping[str, Measurement]) -> bool:
        asked.append(found["a"].rounds)
        return found["a"].rounds >= 9

    subjects = {"a": clock.subject(1.0), "b": clock.subject(2.0)}
    found = measure_interleaved(
        subjects, min_rounds=7, half_width_pct=-1.0, clock=clock, is_enough=is_enough
    )
    assert asked == [7, 8, 9]
    assert found["a"].rounds == found["b"].rounds == 9
