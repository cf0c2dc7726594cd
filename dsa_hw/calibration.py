"""Fit the latency model's constant, scales and rates to whole networks that were timed.

What isolated layers miss (call overhead, residual adds, pooling, layout changes, caches) shows in
whole networks. The fit is non-negative least squares on relative errors with a ridge toward "the
table is right" (scales 1, all else 0), its strength chosen by leave-one-out. Networks with widths
between steps say afterwards what those cost beside the step that is charged for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls

from dsa_hw.latency_model import Coefficients, LatencyModel
from profilers.table import LatencyTable, NetworkKey
from profilers.timing import Measurement

REWEIGHTINGS = 4
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True, slots=True)
class CalibrationPoint:
    """One timed network; its prediction comes from a fit that did not see it."""

    widths: tuple[int, ...]
    predicted_ms: float
    measured_ms: float
    ci95_ms: tuple[float, float]

    @property
    def error_pct(self) -> float:
        """Signed relative error of the held-out prediction."""
        return 100.0 * (self.predicted_ms / self.measured_ms - 1.0)


@dataclass(frozen=True, slots=True)
class Calibration:
    """A fit, and how far to trust it."""

    coefficients: Coefficients
    points: tuple[CalibrationPoint, ...]
    ridge: float

    @property
    def heldout_mape_pct(self) -> float:
        """Mean absolute relative error of leave-one-out predictions."""
        return float(np.mean([abs(p.error_pct) for p in self.points]))

    @property
    def heldout_max_pct(self) -> float:
        """The largest of them."""
        return float(np.max([abs(p.error_pct) for p in self.points]))


def calibrate(
    model: LatencyModel, table: LatencyTable, networks: Sequence[NetworkKey]
) -> Calibration:
    """Fit to the networks' measurements in ``table``.

    Args:
        model: any calibration of it; only the table's layer times are used.
        networks: measured, at least four of them on steps.
    """
    off_steps = [key for key in networks if not model.choices.allow(key.widths)]
    networks = [key for key in networks if model.choices.allow(key.widths)]
    measured = [table.measurement(key) for key in networks]
    rows = [model.features(key.widths) for key in networks]
    kinds = list(rows[0])
    design = np.array([[1.0] + [row[kind] for kind in kinds] for row in rows])
    times = np.array([m.median_ms for m in measured])
    prior = np.array([0.0] + [1.0 if k in model.coefficients.scales else 0.0 for k in kinds])
    heldout = {ridge: _leave_one_out(design, times, prior, ridge) for ridge in RIDGES}
    ridge = min(RIDGES, key=lambda r: float(np.mean(np.abs(heldout[r] / times - 1.0))))
    solution = _fit(design, times, prior, ridge)
    values = dict(zip(kinds, solution[1:].tolist(), strict=True))
    coefficients = Coefficients(
        constant_ms=float(solution[0]),
        scales={k: values[k] for k in model.coefficients.scales},
        rates_ms={k: values[k] for k in model.coefficients.rates_ms},
    )
    surcharge = _off_step(model.with_coefficients(coefficients), table, off_steps)
    coefficients = dataclasses.replace(coefficients, off_step=surcharge)
    points = _points(networks, heldout[ridge], measured)
    return Calibration(coefficients, points, ridge)


def _off_step(model: LatencyModel, table: LatencyTable, networks: Sequence[NetworkKey]) -> float:
    """The non-negative surcharge that fits networks with widths between steps; 0 without any."""
    if not networks:
        return 0.0
    times = np.array([table.measurement(key).median_ms for key in networks])
    widths = torch.tensor([key.widths for key in networks], dtype=torch.float32)
    without = model.staircase_ms(widths).double().numpy()
    doubled = model.with_coefficients(dataclasses.replace(model.coefficients, off_step=1.0))
    charged = (doubled.staircase_ms(widths).double().numpy() - without) / times
    if not charged.any():
        return 0.0
    return max(0.0, float(charged @ (1.0 - without / times) / (charged @ charged)))


def _fit(design: np.ndarray, times: np.ndarray, prior: np.ndarray, ridge: float) -> np.ndarray:
    """min |(X theta - y) / y|^2 + ridge * |weight * (theta - prior)|^2 over theta >= 0.

    Networks with large residuals count less (Huber's weights): one disturbed measurement must not
    bend the fit. A coefficient's weight is its mean share of the latency: units do not matter.
    """
    scale = np.maximum(np.abs(design).mean(axis=0), 1e-12)
    share = scale / times.mean()
    relative = design / times[:, None]
    weights = np.ones(len(times))
    solution = prior
    for _ in range(REWEIGHTINGS):
        root = np.sqrt(weights)
        system = np.vstack([root[:, None] * relative, np.sqrt(ridge) * np.diag(share)]) / scale
        right = np.concatenate([root, np.sqrt(ridge) * share * prior])
        solution = nnls(system, right)[0] / scale
        residuals = np.abs(relative @ solution - 1.0)
        limit = 2.0 * float(np.median(residuals)) + 1e-9
        weights = np.minimum(1.0, limit / np.maximum(residuals, 1e-12))
    return solution


def _leave_one_out(
    design: np.ndarray, times: np.ndarray, prior: np.ndarray, ridge: float
) -> np.ndarray:
    predictions = np.zeros(len(times))
    for index in range(len(times)):
        rest = np.arange(len(times)) != index
        predictions[index] = design[index] @ _fit(design[rest], times[rest], prior, ridge)
    return predictions


def _points(
    networks: Sequence[NetworkKey], predicted: np.ndarray, measured: Sequence[Measurement]
) -> tuple[CalibrationPoint, ...]:
    return tuple(
        CalibrationPoint(key.widths, float(guess), m.median_ms, m.ci95_ms)
        for key, guess, m in zip(networks, predicted, measured, strict=True)
    )
