"""How much runs differ by themselves, and whether methods differ by more than that.

Analysis of variance with two factors and one run a cell (Fisher, "The Design of Experiments",
1935): accuracy = mean + method + seed + the run's own error. A seed's data and first weights are
shared by all methods, so its effect is taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True, slots=True)
class Separability:
    """What some methods' runs with the same seeds say together.

    Args:
        run_sd_points: standard deviation of a run's own error, in points of accuracy. The mean over
            n seeds of a difference of two methods has a standard error of it times sqrt(2 / n).
        p_value: probability of methods' means at least as far apart if methods did not differ.
    """

    methods: tuple[str, ...]
    seeds: int
    run_sd_points: float
    p_value: float


def separability(methods: Sequence[str], accuracies: np.ndarray) -> Separability | None:
    """From accuracies (methods, seeds) in 0..1; None from fewer than two of either.

    Runs that are all alike have no error to compare methods with: p is 1 where the methods are
    alike too, else 0.
    """
    points = 100.0 * np.asarray(accuracies, dtype=float)
    count, seeds = points.shape
    if count < 2 or seeds < 2:
        return None
    by_method = points.mean(1, keepdims=True) - points.mean()
    by_seed = points.mean(0, keepdims=True) - points.mean()
    errors = points - points.mean() - by_method - by_seed
    freedom = (count - 1) * (seeds - 1)
    error_variance = float((errors**2).sum() / freedom)
    method_variance = float(seeds * (by_method**2).sum() / (count - 1))
    if error_variance < 1e-12:
        p_value = 1.0 if method_variance < 1e-12 else 0.0
    else:
        p_value = float(stats.f.sf(method_variance / error_variance, count - 1, freedom))
    return Separability(tuple(methods), seeds, error_variance**0.5, p_value)
