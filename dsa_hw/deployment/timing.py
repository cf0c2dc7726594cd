"""Time deployed networks against each other, and check that they compute the right thing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsa_hw.allocation.allocate import Measure
from dsa_hw.allocation.target_loop import Timed
from dsa_hw.allocation.verdict import is_decided
from dsa_hw.network.graph import DeployedGraph
from profilers.backends import Backend
from profilers.collect import threads_of
from profilers.host import Patience
from profilers.speed import Speed
from profilers.timing import Measurement, SamplePlan, measure_interleaved, paired

PLAN = SamplePlan(sample_ms=8.0, samples=3, warmup_ms=12.0)
"""Short rounds: the machine's speed drifts within seconds, so what is compared must alternate
faster than that. Sessions are opened and closed for each, or their threads would spin into the
next one's turn; and each round is a process of its own, or one layout of memory would decide."""


LOOP_HALF_WIDTH_PCT = 0.8
"""Half width, in per cent of the target, at which a round of the closed loop ends: less than the
least margin, and rounds are pooled."""
LOOP_LEAST_ROUNDS = 8


def time_networks(
    backend: Backend,
    models: Mapping[str, bytes | Path],
    *,
    half_width_pct: float = 0.6,
    time_limit_s: float = 20.0,
    seed: int = 0,
    min_rounds: int = 15,
    on_round: Callable[[int], None] | None = None,
    fast: Speed | None = None,
    on_notice: Callable[[str], None] | None = None,
    is_enough: Callable[[Mapping[str, Measurement]], bool] | None = None,
) -> dict[str, Measurement]:
    """Interleaved measurements of whole networks, every round in a process of its own.

    Args:
        fast: the machine's fast state, where a table knows it (``LatencyTable.fast_speed``).
        on_notice: told when other programs do not leave the processors alone.
        min_rounds: before any of the reasons to stop but ``time_limit_s`` counts.
        is_enough: says of the measurements so far that no more rounds are needed, in place of
            intervals of ``half_width_pct``.
    """
    return measure_interleaved(
        {name: lambda m=model: backend.open(m) for name, model in models.items()},
        plan=PLAN,
        min_rounds=min_rounds,
        max_rounds=200,
        half_width_pct=half_width_pct,
        time_limit_s=time_limit_s,
        seed=seed,
        before_round=backend.renew,
        on_round=on_round,
        fast=fast,
        wait=Patience(threads_of(backend), on_notice=on_notice).wait,
        is_enough=is_enough,
    )


@dataclass(frozen=True, slots=True)
class Target:
    """A latency target in either of its forms.

    Args:
        ms: milliseconds; None where it is a part of the dense network's latency.
        ratio: that part; it counts where there are no milliseconds.
    """

    ms: float | None = None
    ratio: float | None = None

    def timed(self, found: Mapping[str, Measurement], seconds: float | None = None) -> Timed:
        """``"pruned"`` against the target; by pairs with ``"dense"`` where that is a part of it.

        Args:
            found: ``"dense"`` may be missing where the target is in milliseconds.
            seconds: that measuring took.
        """
        pruned, dense = found["pruned"], found.get("dense")
        if self.ms is None:
            assert dense is not None
            pruned = paired(pruned, dense)
        dense_ms = None if dense is None else dense.median_ms
        return Timed(
            measured_ms=pruned.median_ms,
            ci95_ms=pruned.ci95_ms,
            target_ms=resolve_target(self.ms, self.ratio, dense_ms),
            dense_ms=dense_ms,
            settled=all(m.settled for m in found.values()),
            rounds=pruned.rounds,
            disturbed=max(m.disturbed for m in found.values()),
            taken=pruned.taken,
            lost=pruned.lost,
            seconds=seconds,
        )

    def is_enough(
        self, half_width_pct: float, *, needs_verdict: bool
    ) -> Callable[[Mapping[str, Measurement]], bool]:
        """Return what says that ``"pruned"`` over the target is known well enough.

        Args:
            half_width_pct: of its interval, in per cent of the target.
            needs_verdict: whether its verdict has to be decided too.
        """

        def enough(found: Mapping[str, Measurement]) -> bool:
            timed = self.timed(found)
            low, high = timed.interval
            narrow = 50.0 * (high - low) <= half_width_pct
            return narrow and (not needs_verdict or is_decided(timed.use, timed.interval))

        return enough


def timed_to_target(
    backend: Backend,
    models: Mapping[str, bytes | Path],
    target: Target,
    *,
    half_width_pct: float,
    time_limit_s: float,
    min_rounds: int,
    needs_verdict: bool = False,
    on_round: Callable[[int], None] | None = None,
    fast: Speed | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> tuple[dict[str, Measurement], Timed]:
    """``"pruned"`` and what else there is in turn, until its ratio to the target is known.

    Args:
        half_width_pct, needs_verdict: when it is; see ``Target.is_enough``.
        time_limit_s: the most that it takes.
        fast, on_notice: see ``time_networks``.
    """
    started = time.perf_counter()
    found = time_networks(
        backend,
        models,
        time_limit_s=time_limit_s,
        min_rounds=min_rounds,
        on_round=on_round,
        fast=fast,
        on_notice=on_notice,
        is_enough=target.is_enough(half_width_pct, needs_verdict=needs_verdict),
    )
    return found, target.timed(found, time.perf_counter() - started)


def loop_measure(
    graph: DeployedGraph,
    backend: Backend,
    *,
    target_ms: float | None,
    target_ratio: float | None,
    time_limit_s: float = 20.0,
    on_measured: Callable[[np.ndarray, dict[str, Measurement]], None] | None = None,
    fast: Speed | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> Measure:
    """The closed loop's measurement: the dense network and the candidate, in turn.

    Args:
        target_ms, target_ratio: one of them; a ratio is of the dense network measured beside.
        time_limit_s: the most that it takes; it stops when the ratio's interval is narrow.
        fast, on_notice: see ``time_networks``.
    """
    dense = graph.resized(graph.dense_widths)
    target = Target(target_ms, target_ratio)

    def measure(widths: np.ndarray) -> Timed:
        models: dict[str, bytes | Path] = {"dense": dense, "pruned": graph.resized(widths)}
        found, timed = timed_to_target(
            backend,
            models,
            target,
            half_width_pct=LOOP_HALF_WIDTH_PCT,
            time_limit_s=time_limit_s,
            min_rounds=LOOP_LEAST_ROUNDS,
            fast=fast,
            on_notice=on_notice,
        )
        if on_measured:
            on_measured(widths, found)
        return timed

    return measure


def resolve_target(
    target_ms: float | None, target_ratio: float | None, dense_ms: float | None
) -> float:
    """The target in ms, from either of its forms."""
    if target_ms is not None:
        return target_ms
    assert target_ratio is not None
    assert dense_ms is not None
    return target_ratio * dense_ms
