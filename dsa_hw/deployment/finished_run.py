"""A finished run timed again beside its prediction and target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsa_hw.allocation.target_loop import Timed
from dsa_hw.deployment.timing import Target, time_networks, timed_to_target
from profilers.backends import Backend
from profilers.speed import Speed
from profilers.timing import Measurement, paired

LAST_HALF_WIDTH_PCT = 0.5
"""The same of the last measurement, which gives the verdict (``verdict.TOLERANCE``)."""
LAST_LEAST_ROUNDS = 12


@dataclass(frozen=True, slots=True)
class Validated:
    """A finished run's network, timed again.

    Args:
        pruned: its measurement; by pairs with the dense network's where the target is a part of it.
        dense_ms: of the dense network beside it; None where the target was not a part of it.
        timed: the same against the target as it holds now; None without a latency target.
    """

    pruned: Measurement
    dense_ms: float | None
    timed: Timed | None


def validate_run(
    backend: Backend,
    pruned: Path,
    dense: bytes | None,
    *,
    target: Target | None,
    time_limit_s: float,
    on_round: Callable[[int], None] | None = None,
    fast: Speed | None = None,
) -> Validated:
    """Time a run's network as the run did: in turn with the dense one, if that was its measure.

    The machine's speed then cancels, which in a number of milliseconds it does not. Measuring ends
    when the verdict is decided and the interval narrow.

    Args:
        target: None where the run had no latency target.
        fast: the machine's fast state, as the run saw it.
    """
    models: dict[str, bytes | Path] = {"pruned": pruned}
    if dense is not None and target is not None and target.ms is None:
        models["dense"] = dense
    if target is None:
        found = time_networks(
            backend, models, time_limit_s=time_limit_s, on_round=on_round, fast=fast
        )
        return Validated(found["pruned"], None, None)
    found, timed = timed_to_target(
        backend,
        models,
        target,
        half_width_pct=LAST_HALF_WIDTH_PCT,
        time_limit_s=time_limit_s,
        min_rounds=LAST_LEAST_ROUNDS,
        needs_verdict=True,
        on_round=on_round,
        fast=fast,
    )
    own = found["pruned"]
    return Validated(
        paired(own, found["dense"]) if "dense" in found else own, timed.dense_ms, timed
    )
