"""Fit the latency model's constant, scales and rates to whole networks that were timed.

What isolated layers miss (call overhead, residual adds, pooling, layout changes, caches) shows in
whole networks. The fit is non-negative least squares on relative errors with a ridge toward "the
table is right" (scales 1, all else 0). Leave-one-out chooses its strength, and whether every kind
of layer has one scale or one for each size. Networks with widths between steps say afterwards what
those cost beside the step that is charged for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls

from dsa_hw.deployed import WEIGHTS
from dsa_hw.latency_model import Coefficients, LatencyModel, sized_kind
from profilers.table import LatencyTable, NetworkKey
from profilers.timing import Measurement

REWEIGHTINGS = 4
FINER = 1.1
"""Scales by kind and size must be better by this factor than scales by kind alone."""
LEAST_SCALE = 0.35
"""Noise must not price a kind of layer away."""
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
    times = np.array([m.median_ms for m in measured])
    rows = [model.features(key.widths) for key in networks]
    sized = {sized_kind(layer.spec): layer.spec.kind for layer in model.graph.layers}
    rates = model.coefficients.rates_ms
    coefficients, heldout, ridge = _best(rows, times, sized, list(rates))
    if _beside_layers_ms(model, coefficients) < 0.0:
        others = [kind for kind in rates if kind != WEIGHTS]
        coefficients, heldout, ridge = _best(rows, times, sized, others)
        known = {**dict.fromkeys(rates, 0.0), **coefficients.rates_ms}
        coefficients = dataclasses.replace(coefficients, rates_ms=known)
    off_step, below_step = _off_steps(model.with_coefficients(coefficients), table, off_steps)
    coefficients = dataclasses.replace(coefficients, off_step=off_step, below_step_ms=below_step)
    points = _points(networks, heldout, measured)
    return Calibration(coefficients, points, ridge)


def _best(
    rows: Sequence[Mapping[str, float]],
    times: np.ndarray,
    sized: Mapping[str, str],
    rates: Sequence[str],
) -> tuple[Coefficients, np.ndarray, float]:
    """The fit, of all designs and ridges, whose leave-one-out predictions are nearest; these
    predictions, (networks,) ms; and its ridge.

    Args:
        sized: kind of layer, by kind and size.
    """
    names = (sized, {name: name for name in sized})
    designs = [_Design.of(rows, scales, rates) for scales in names]
    tried = [(design, ridge) for design in designs for ridge in RIDGES]
    heldout = [_leave_one_out(design, times, ridge) for design, ridge in tried]
    errors = [
        float(np.mean(np.abs(predicted / times - 1.0))) * (1.0 if design is designs[0] else FINER)
        for (design, _), predicted in zip(tried, heldout, strict=True)
    ]
    best = int(np.argmin(errors))
    design, ridge = tried[best]
    coefficients = design.coefficients(_fit(design.terms, times, design.prior, ridge))
    return coefficients, heldout[best], ridge


def _beside_layers_ms(model: LatencyModel, coefficients: Coefficients) -> float:
    """What the least network pays beside its layers.

    Weights are counted by a linear form that is exact at the dense widths and negative far below
    them: a fit may credit the smallest networks with more than they cost (docs/decisions.md).
    """
    least = model.choices.without_removal().least
    elements = model.graph.operation_elements(least.tolist())
    paid = sum(coefficients.rates_ms[kind] * count for kind, count in elements.items())
    return coefficients.constant_ms + paid


@dataclass(frozen=True, slots=True)
class _Design:
    """The terms of a fit, one of two: a scale for each kind of layer, or for each kind and size.

    Args:
        terms: (networks, 1 + scales + rates); the first column is the constant's.
        prior: "the table is right".
    """

    scales: tuple[str, ...]
    rates: tuple[str, ...]
    terms: np.ndarray
    prior: np.ndarray

    @classmethod
    def of(
        cls, rows: Sequence[Mapping[str, float]], names: Mapping[str, str], rates: Sequence[str]
    ) -> _Design:
        """Of features by kind and size; ``names`` says under which scale each of these comes."""
        scales = tuple(dict.fromkeys(names.values()))
        terms = [
            [1.0]
            + [
                sum(row[sized] for sized, name in names.items() if name == scale)
                for scale in scales
            ]
            + [row[rate] for rate in rates]
            for row in rows
        ]
        prior = [0.0] + [1.0] * len(scales) + [0.0] * len(rates)
        return cls(scales, tuple(rates), np.array(terms), np.array(prior))

    def coefficients(self, solution: np.ndarray) -> Coefficients:
        """What a fit of these terms says."""
        constant, values = float(solution[0]), solution[1:].tolist()
        return Coefficients(
            constant_ms=constant,
            scales=dict(zip(self.scales, values[: len(self.scales)], strict=True)),
            rates_ms=dict(zip(self.rates, values[len(self.scales) :], strict=True)),
        )


def _off_steps(
    model: LatencyModel, table: LatencyTable, networks: Sequence[NetworkKey]
) -> tuple[float, float]:
    """The non-negative surcharges that fit networks with widths between steps: the part between
    two steps, and ms an element below the first. 0 without any network that would show them."""
    if not networks:
        return 0.0, 0.0
    times = np.array([table.measurement(key).median_ms for key in networks])
    widths = torch.tensor([key.widths for key in networks], dtype=torch.float32)

    def predicted(**surcharge: float) -> np.ndarray:
        charged = dataclasses.replace(model.coefficients, **surcharge)
        return model.with_coefficients(charged).staircase_ms(widths).double().numpy()

    without = predicted()
    columns = (predicted(off_step=1.0) - without, predicted(below_step_ms=1.0) - without)
    charged = np.stack(columns, axis=1) / times[:, None]
    largest = np.maximum(charged.max(axis=0), 1e-12)
    off_step, below_step = nnls(charged / largest, 1.0 - without / times)[0] / largest
    return float(off_step), float(below_step)


def _fit(design: np.ndarray, times: np.ndarray, prior: np.ndarray, ridge: float) -> np.ndarray:
    """min |(X theta - y) / y|^2 + ridge * |weight * (theta - prior)|^2 over theta >= least.

    ``least`` is 0, and ``LEAST_SCALE`` for scales.

    Networks with large residuals count less (Huber's weights): one disturbed measurement must not
    bend the fit. A coefficient's weight is its mean share of the latency: units do not matter.
    """
    scale = np.maximum(np.abs(design).mean(axis=0), 1e-12)
    share = scale / times.mean()
    relative = design / times[:, None]
    least = LEAST_SCALE * prior
    weights = np.ones(len(times))
    solution = prior
    for _ in range(REWEIGHTINGS):
        root = np.sqrt(weights)
        system = np.vstack([root[:, None] * relative, np.sqrt(ridge) * np.diag(share)]) / scale
        right = np.concatenate([root, np.sqrt(ridge) * share * prior])
        solution = least + nnls(system, right - system @ (least * scale))[0] / scale
        residuals = np.abs(relative @ solution - 1.0)
        limit = 2.0 * float(np.median(residuals)) + 1e-9
        weights = np.minimum(1.0, limit / np.maximum(residuals, 1e-12))
    return solution


def _leave_one_out(design: _Design, times: np.ndarray, ridge: float) -> np.ndarray:
    predictions = np.zeros(len(times))
    for index in range(len(times)):
        rest = np.arange(len(times)) != index
        fitted = _fit(design.terms[rest], times[rest], design.prior, ridge)
        predictions[index] = design.terms[index] @ fitted
    return predictions


def _points(
    networks: Sequence[NetworkKey], predicted: np.ndarray, measured: Sequence[Measurement]
) -> tuple[CalibrationPoint, ...]:
    return tuple(
        CalibrationPoint(key.widths, float(guess), m.median_ms, m.ci95_ms)
        for key, guess, m in zip(networks, predicted, measured, strict=True)
    )
