"""Reads how fast the machine's processors are, in the worker process, around each round."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from profilers.cpu_threads import CpuThreads
from profilers.layers.models import reference_model
from profilers.speed import Speed

STREAM_BYTES = 24 * 2**20
"""Read and written by the other kernel: more than a core's own caches. It is one thread's copy,
because waking a second one varies by more than memory does: of 406 readings the 99th percentile
over the 10th was 2.4 for two threads on 8 MB, 1.7 for one, and 1.2 for one on 24 MB."""
RUNS = 3
"""Of each kernel: the fastest counts, since a state outlasts them and other noise does not."""
FRESH_S = 0.02
"""A reading that was taken so recently is not taken again."""
MEMORY_FRESH_S = 0.25
"""The same for memory, whose states last for seconds, and whose reading takes a while."""


class Speedometer:
    """Times two small kernels.

    Args:
        threads: those that models run on.
    """

    def __init__(self, threads: CpuThreads) -> None:
        source = np.full(STREAM_BYTES // 2 // 4, 0.5, dtype=np.float32)
        target = source.copy()
        kernels = (_opened(reference_model(), threads), lambda: np.copyto(target, source))
        self._compute = _Recent(kernels[0], FRESH_S)
        self._memory = _Recent(kernels[1], MEMORY_FRESH_S)

    def read(self, again: bool = False) -> Speed:
        """Read now, or tell what was read a moment ago.

        Args:
            again: read the computing kernel now in any case.
        """
        return Speed(self._compute.ms(again), self._memory.ms())


class _Recent:
    """A kernel's time, read again where the last reading is older than ``fresh_s``."""

    def __init__(self, kernel: Callable[[], object], fresh_s: float) -> None:
        self._kernel, self._fresh_s = kernel, fresh_s
        self._last_ms, self._read_at = 0.0, float("-inf")

    def ms(self, again: bool = False) -> float:
        if again or time.perf_counter() - self._read_at > self._fresh_s:
            self._last_ms = _fastest_ms(self._kernel)
            self._read_at = time.perf_counter()
        return self._last_ms


def _opened(model: bytes, threads: CpuThreads) -> Callable[[], object]:
    options = threads.options()
    # between two readings its threads sleep: they would take the processors from what is measured
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = threads.session(model, options)
    given = session.get_inputs()[0]
    inputs = {given.name: np.full(given.shape, 0.5, dtype=np.float32)}
    return lambda: session.run(None, inputs)


def _fastest_ms(kernel: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        kernel()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)
