"""A program that burns one core half of the time, in bursts of random seconds, until it is ended.

python benchmarks/burst_load.py SEED
"""

from __future__ import annotations

import random
import sys
import time

BURST_S = (0.3, 3.0)
"""Least and most seconds of a burst, and of the pause after it."""


def main() -> None:
    """Burn and rest by turns, for ever."""
    draw = random.Random(int(sys.argv[1]))
    while True:
        ends = time.perf_counter() + draw.uniform(*BURST_S)
        while time.perf_counter() < ends:
            pass
        time.sleep(draw.uniform(*BURST_S))


if __name__ == "__main__":
    main()
