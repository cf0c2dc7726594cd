"""Time two ONNX files against each other with nothing but ONNX Runtime and NumPy.

    python benchmarks/plain_timer.py DENSE.onnx PRUNED.onnx --threads 2 --pairs 20

It imports nothing of the package, so that what the package says of a network can be checked by
something that shares none of its code. Each timing is a fresh process with a fresh session: warmed
up, then runs in samples of some 20 ms, whose median counts. The two files alternate, so that each
timing of the second stands between two of the first; the ratio is the median over these, with a
distribution-free 95% interval (two order statistics of the binomial). A machine has states: with
``--dense-ms`` only what stands between two timings in that state counts. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time

WARM_UP_S = 0.05
SAMPLE_S = 0.02
SAMPLES = 5
TRIES = 5
LEAST_PAIRS = 6
"""Fewer have no 95% interval of their median."""


def time_once(path: str, threads: int) -> float:
    """Milliseconds a run of the model at ``path``, in this process."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    shape = [size if isinstance(size, int) else 1 for size in given.shape]
    feed = {given.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    started, runs = time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - started < WARM_UP_S:
        session.run(None, feed)
        runs += 1
    loops = max(1, math.ceil(SAMPLE_S * runs / (time.perf_counter() - started)))
    samples = []
    for _ in range(SAMPLES):
        begun = time.perf_counter()
        for _ in range(loops):
            session.run(None, feed)
        samples.append((time.perf_counter() - begun) / loops)
    return 1e3 * statistics.median(samples)


def median_interval(values: list[float]) -> tuple[float, float]:
    """The widest-reaching pair of order statistics that still covers the median in 95% of cases."""
    ordered, count = sorted(values), len(values)
    tail, below = 0.0, 0
    for rank in range(count // 2):
        tail += math.comb(count, rank) / 2**count
        if tail > 0.025:
            break
        below = rank
    return ordered[below], ordered[count - 1 - below]


def time_pairs(
    dense: str, pruned: str, threads: int, pairs: int, dense_ms: float | None, within: float
) -> dict[str, object]:
    """Both files in turn, each time in a process of its own.

    Args:
        pairs: that count.
        dense_ms: of the machine's state that is asked for: what the dense file takes there. Only
            pruned timings count whose dense neighbours, before and after, are both as fast; at most
            ``TRIES`` times ``pairs`` are taken. None: every one counts.
        within: relative difference from ``dense_ms`` that is still that state.
    """

    def timed(path: str) -> float:
        words = [sys.executable, __file__, path, "--threads", str(threads)]
        return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    around: list[float] = []
    counted: list[float] = []
    ratios: list[float] = []
    before = timed(dense)
    tries = 0
    while len(ratios) < pairs and tries < TRIES * pairs:
        tries += 1
        middle, after = timed(pruned), timed(dense)
        if dense_ms is None or all(abs(d / dense_ms - 1.0) <= within for d in (before, after)):
            around.append((before + after) / 2)
            counted.append(middle)
            ratios.append(middle / around[-1])
        before = after
    found: dict[str, object] = {"pairs": len(ratios), "tries": tries, "threads": threads}
    if len(ratios) < LEAST_PAIRS:
        return found
    return found | {
        "dense_ms": statistics.median(around),
        "pruned_ms": statistics.median(counted),
        "ratio": statistics.median(ratios),
        "ratio_ci95": median_interval(ratios),
        "ratios": ratios,
    }


def main() -> None:
    """One file: its milliseconds. Two: the second against the first, as JSON."""
    parser = argparse.ArgumentParser(description="Time ONNX files against each other.")
    parser.add_argument("models", nargs="+", help="DENSE.onnx PRUNED.onnx, or one file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--dense-ms", type=float, help="count only what is in this state")
    parser.add_argument("--within", type=float, default=0.08, help="of --dense-ms")
    given = parser.parse_args()
    if len(given.models) == 1:
        print(time_once(given.models[0], given.threads))
    elif len(given.models) == 2:
        dense, pruned = given.models
        found = time_pairs(dense, pruned, given.threads, given.pairs, given.dense_ms, given.within)
        print(json.dumps(found))
    else:
        parser.error("give one or two files")


if __name__ == "__main__":
    main()
