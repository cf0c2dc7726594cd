"""Times of layers built together, by TensorRT's profiler: whether to believe them, and at what.

The profiler puts an event around each layer, so its times hold that event's cost and are not of
the kind that the rest of a table is (CUDA graphs). A trial settles whether packing is of use: the
same few layers are timed in a pack and alone. Packing is refused where a build costs hardly
anything beside its layers, where the runtime's names do not tell the layers apart, and where the
two kinds of times do not agree once the event's cost is taken off.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from profilers.backends.packing import AmbiguousNames, pack_models, pack_size, split_times
from profilers.layers.models import layer_model
from profilers.layers.spec import LayerSpec
from profilers.timing import Round

WORTH_S = 0.3
"""Fixed cost of a build from which packing is worth it: what a round of a layer costs many times
over. TensorRT-RTX's builds take 0.1 to 0.2 s in all."""
AGREEMENT = 0.1
"""Largest difference of the two kinds of times, over the time alone."""
LEAST_LEFT = 0.1
"""Part of a profiled time that stays when the event's cost is taken off."""
TRIAL_LAYERS = (
    ("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 28x28 b1 fp32 +relu", 128, 128),
    ("conv k1x1 s1x1 p0.0.0.0 d1x1 gdense 56x56 b1 fp32 +relu", 64, 256),
    ("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 14x14 b1 fp32 +relu", 256, 256),
)
RUNS = 20
"""Profiled runs a round."""


class PackingRefused(Exception):
    """Layers are better timed one by one here; the message says why."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What the runtime's profiler reported.

    Args:
        runs: ms by the runtime's layer name, for each run.
        metadata: by the runtime's layer name.
    """

    runs: Sequence[Mapping[str, float]]
    metadata: Mapping[str, str]


class PackTimer:
    """Times the layers of packs.

    Args:
        profile: builds a packed model (or loads it) and profiles so many runs after a warm-up.
        alone: a one-layer model's ms as the rest of the table is timed, building it if needed.
        batch_size: of the trial's layers.
        clock: seconds.
    """

    def __init__(
        self,
        profile: Callable[[bytes, int], Profile],
        alone: Callable[[bytes], float],
        batch_size: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._profile, self._alone, self._clock = profile, alone, clock
        self._batch_size = batch_size
        self._event_ms: float | None = None

    def rounds(self, packed: bytes) -> list[Round]:
        """A round of each layer in the pack; the first call makes the trial.

        Raises:
            PackingRefused: layers are better timed one by one.
        """
        if self._event_ms is None:
            self._event_ms = self._trial()
        times = self._times(packed, pack_size(packed))
        freed = np.maximum(times - self._event_ms, LEAST_LEFT * times)
        low, middle, high = np.percentile(freed, [10, 50, 90], axis=0).tolist()
        return [
            Round(m, lo, hi, samples=RUNS, loops=1)
            for m, lo, hi in zip(middle, low, high, strict=True)
        ]

    def _times(self, packed: bytes, members: int) -> np.ndarray:
        """(runs, members) ms by the profiler."""
        found = self._profile(packed, RUNS)
        try:
            return np.array([split_times(r.items(), members, found.metadata) for r in found.runs])
        except AmbiguousNames as error:
            raise PackingRefused(str(error)) from error

    def _trial(self) -> float:
        """The cost of the profiler's event, ms.

        The pack is built first. So the single builds find their layers' tactics in the timing
        cache, and the time they still take is what a pack saves.
        """
        models = [trial_model(number, self._batch_size) for number in range(len(TRIAL_LAYERS))]
        together = np.median(self._times(pack_models(models), len(models)), axis=0)
        alone, seconds = [], []
        for model in models:
            start = self._clock()
            alone.append(self._alone(model))
            seconds.append(self._clock() - start)
        return event_cost_ms(together.tolist(), alone, statistics.median(seconds))


def event_cost_ms(together_ms: Sequence[float], alone_ms: Sequence[float], build_s: float) -> float:
    """The profiler's cost a layer: the median difference between the two kinds of times.

    Raises:
        PackingRefused: packing saves too little, or the times do not agree without that cost.
    """
    if build_s < WORTH_S:
        raise PackingRefused(f"a build takes only {build_s:.2g} s beside its layers' timing")
    cost = statistics.median(t - a for t, a in zip(together_ms, alone_ms, strict=True))
    off = max(abs(t - cost - a) / a for t, a in zip(together_ms, alone_ms, strict=True))
    if off > AGREEMENT:
        raise PackingRefused(
            f"the profiler's times differ from those of the same layers alone by up to {off:.0%}"
        )
    return cost


def trial_model(number: int, batch_size: int) -> bytes:
    """One of the trial's layers."""
    text, cin, cout = TRIAL_LAYERS[number]
    return layer_model(LayerSpec.parse(text.replace(" b1 ", f" b{batch_size} ")), cin, cout)
