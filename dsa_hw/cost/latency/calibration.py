"""Fit the latency model's constant, scales and rates to whole networks that were timed.

What isolated layers miss (call overhead, residual adds, pooling, layout changes, caches) shows in
whole networks. The fit is non-negative least squares on relative errors with a ridge toward "the
table is right" (scales 1, all else 0). Cross-validation chooses its strength, and whether every
kind of layer has one scale or one for each size; the error that is reported is of networks that
neither the fit nor that choice has seen.

``recalibrate`` fits again near one allocation, every layer with a scale of its own and a ridge
toward the first fit: whole networks that are like the allocation count, and others hardly do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from dsa_hw.cost.latency.coefficients import Coefficients, sized_kind
from dsa_hw.cost.latency.model import Features, LatencyModel
from profilers.table import LatencyTable, NetworkKey
from profilers.timing import FASTEST_REACH, Measurement

REWEIGHTINGS = 4
FINER = 1.1
"""Scales by kind and size must be better by this factor than scales by kind alone."""
LEAST_SCALE = 0.35
"""Noise must not price a kind of layer away."""
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
LOCAL_RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
"""Of scales by layer. The last one leaves hardly more than one scale for all, if that."""
FOLDS = 8
"""Parts that the networks are divided into; each part is predicted from all the others."""
NEAR = 0.15
"""Part of the latency whose layers' times may differ from the allocation's before a network counts
half in ``recalibrate``; one step of each of a few groups changes about as much. At twice of it a
sixteenth is left: what networks far away say is in the fit that the ridge pulls to."""
LEAST_WEIGHT = 1e-6
"""Of the farthest networks. Beside the ridge it is nothing; without it, parts of the networks that
have none near the allocation would have no weight to be fitted with at all."""
MEAN_OF_EXPONENTIAL = 0.74
"""Mean absolute deviation of an exponential variable, in its standard deviations."""
LEAST_NEAR = 4
"""Networks nearest to an allocation that its held-out error is of, at the least."""


@dataclass(frozen=True, slots=True)
class CalibrationPoint:
    """One timed network; its prediction comes from a fit that did not see it.

    Args:
        measured_ms: its fastest round (``Measurement.fastest_ms``).
        ci95_ms: of the undisturbed time, by what the rounds of all networks differ by.
        noise_pct: standard error of ``measured_ms``, from how its rounds differ, in per cent.
    """

    widths: tuple[int, ...]
    predicted_ms: float
    measured_ms: float
    ci95_ms: tuple[float, float]
    noise_pct: float = 0.0

    @property
    def error_pct(self) -> float:
        """Signed relative error of the held-out prediction."""
        return 100.0 * (self.predicted_ms / self.measured_ms - 1.0)


@dataclass(frozen=True, slots=True)
class Calibration:
    """A fit, and how far to trust it.

    Args:
        points: networks that the error is of: all of them, or after ``recalibrate`` those near
            the allocation.
        prior: the coefficients that ``recalibrate`` started from; None for a first fit.
    """

    coefficients: Coefficients
    points: tuple[CalibrationPoint, ...]
    ridge: float
    prior: Coefficients | None = None

    @property
    def heldout_mape_pct(self) -> float:
        """Mean absolute relative error of held-out predictions."""
        return float(np.mean([abs(p.error_pct) for p in self.points]))

    @property
    def noise_mape_pct(self) -> float:
        """What the mean error would be of a model without any: the measurements' own."""
        return float(np.mean([MEAN_OF_EXPONENTIAL * p.noise_pct for p in self.points]))

    @property
    def excess_mape_pct(self) -> float:
        """The mean error beyond that of the measurements."""
        return max(0.0, self.heldout_mape_pct**2 - self.noise_mape_pct**2) ** 0.5

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
        networks: measured; those on steps count, at least four.
    """
    networks = [key for key in networks if model.choices.allow(key.widths)]
    measured = [table.measurement(key) for key in networks]
    times = np.array([m.fastest_ms for m in measured])
    features = model.features([key.widths for key in networks])
    layers = model.graph.layers
    designs = [
        _Design.of(features, names)
        for names in ([x.spec.kind for x in layers], [sized_kind(x.spec) for x in layers])
    ]
    handicaps = (1.0, FINER)
    even = np.ones(len(times))
    predicted = np.zeros(len(times))
    for rest, left_out in _folds(len(times)):
        parts = [design.part(rest) for design in designs]
        index, ridge = _choose(parts, times[rest], even[rest], RIDGES, handicaps)
        solution = parts[index].fit(times[rest], even[rest], ridge)
        predicted[left_out] = designs[index].terms[left_out] @ solution
    index, ridge = _choose(designs, times, even, RIDGES, handicaps)
    design = designs[index]
    solution = design.fit(times, even, ridge)
    coefficients = Coefficients(float(solution[0]), design.scales(solution), design.rates(solution))
    return Calibration(coefficients, _points(networks, predicted, measured), ridge)


def recalibrate(
    model: LatencyModel,
    table: LatencyTable,
    networks: Sequence[NetworkKey],
    around: Sequence[int],
    prior: Coefficients,
) -> Calibration:
    """Fit again near an allocation.

    Args:
        networks: measured; those on steps count, at least four.
        around: (groups,) the allocation's widths.
        prior: coefficients of a first fit.
    """
    networks = [key for key in networks if model.choices.allow(key.widths)]
    measured = [table.measurement(key) for key in networks]
    times = np.array([m.fastest_ms for m in measured])
    features = model.features([key.widths for key in networks])
    distance = _distances(model, features, around)
    weights = 0.5 ** ((distance**2 - distance.min() ** 2) / NEAR**2)  # the nearest counts fully
    weights = np.maximum(weights, LEAST_WEIGHT)
    design = _Design.of_layers(model, features, prior)
    near = np.argsort(distance)[: max(LEAST_NEAR, int((weights >= 0.5).sum()))]
    predicted = np.zeros(len(times))
    for rest, left_out in _folds(len(times), near):
        _, ridge = _choose([design.part(rest)], times[rest], weights[rest], LOCAL_RIDGES, (1.0,))
        solution = design.part(rest).fit(times[rest], weights[rest], ridge)
        predicted[left_out] = design.terms[left_out] @ solution
    _, ridge = _choose([design], times, weights, LOCAL_RIDGES, (1.0,))
    solution = design.fit(times, weights, ridge)
    coefficients = Coefficients(
        float(solution[0]), prior.scales, design.rates(solution), design.scales(solution)
    )
    chosen = sorted(near.tolist())
    points = _points(
        [networks[i] for i in chosen], predicted[chosen], [measured[i] for i in chosen]
    )
    return Calibration(coefficients, points, ridge, prior)


def _distances(model: LatencyModel, features: Features, around: Sequence[int]) -> np.ndarray:
    """(networks,) what the layers' times differ by from those of ``around``, of their sum."""
    there = model.features([around]).layers[0]
    return np.abs(features.layers - there).sum(axis=1) / there.sum()


@dataclass(frozen=True, slots=True)
class _Design:
    """The terms of a fit.

    Args:
        names: of the scales, then of the rates.
        scale_count: how many of the names are scales.
        terms: (networks, 1 + scales + rates); the first column is the constant's.
        prior: (1 + scales + rates,) what the ridge pulls to.
        least: (1 + scales + rates,) bounds from below.
    """

    names: tuple[str, ...]
    scale_count: int
    terms: np.ndarray
    prior: np.ndarray
    least: np.ndarray

    @classmethod
    def of(cls, features: Features, names: Sequence[str]) -> _Design:
        """One scale for each of ``names``, (layers,), toward 1."""
        scales = list(dict.fromkeys(names))
        sums = [
            features.layers[:, [name == scale for name in names]].sum(axis=1) for scale in scales
        ]
        rates = list(features.rates)
        ones = np.ones(len(features.layers))
        terms = np.stack([ones, *sums, *features.rates.values()], axis=1)
        prior = np.array([0.0] + [1.0] * len(scales) + [0.0] * len(rates))
        return cls((*scales, *rates), len(scales), terms, prior, LEAST_SCALE * prior)

    @classmethod
    def of_layers(cls, model: LatencyModel, features: Features, prior: Coefficients) -> _Design:
        """One scale for each layer, toward what ``prior`` says."""
        layers = model.graph.layers
        rates = list(features.rates)
        ones = np.ones(len(features.layers))
        terms = np.column_stack([ones, features.layers, *features.rates.values()])
        scales = [prior.scale(layer) for layer in layers]
        toward = [prior.constant_ms, *scales, *(prior.rates_ms[kind] for kind in rates)]
        least = [0.0, *(min(LEAST_SCALE, s) for s in scales), *(0.0 for _ in rates)]
        names = (*(layer.name for layer in layers), *rates)
        return cls(names, len(layers), terms, np.array(toward), np.array(least))

    def part(self, rows: np.ndarray) -> _Design:
        """The same for some of the networks."""
        return _Design(self.names, self.scale_count, self.terms[rows], self.prior, self.least)

    def scales(self, solution: np.ndarray) -> dict[str, float]:
        """By name, from a fit of these terms."""
        values = solution[1 : 1 + self.scale_count].tolist()
        return dict(zip(self.names[: self.scale_count], values, strict=True))

    def rates(self, solution: np.ndarray) -> dict[str, float]:
        """By name, from a fit of these terms."""
        values = solution[1 + self.scale_count :].tolist()
        return dict(zip(self.names[self.scale_count :], values, strict=True))

    def fit(self, times: np.ndarray, weights: np.ndarray, ridge: float) -> np.ndarray:
        """min sum w ((X theta - y) / y)^2 + ridge * |share * (theta - prior)|^2, theta >= least.

        Networks with large residuals count less (Huber's weights): one disturbed measurement must
        not bend the fit. A coefficient's part of the ridge is its mean share of the latency: units
        do not matter.

        Args:
            times: (networks,) y, ms.
            weights: (networks,) w.
        """
        scale = np.maximum(np.average(np.abs(self.terms), axis=0, weights=weights), 1e-12)
        share = scale / np.average(times, weights=weights)
        relative = self.terms / times[:, None]
        huber = np.ones(len(times))
        solution = self.prior
        for _ in range(REWEIGHTINGS):
            root = np.sqrt(huber * weights)
            system = np.vstack([root[:, None] * relative, np.sqrt(ridge) * np.diag(share)]) / scale
            right = np.concatenate([root, np.sqrt(ridge) * share * self.prior])
            solution = np.linalg.solve(system.T @ system, system.T @ right) / scale
            if (solution < self.least).any():
                above = nnls(system, right - system @ (self.least * scale))[0]
                solution = self.least + above / scale
            residuals = np.abs(relative @ solution - 1.0)
            limit = 2.0 * _median(residuals, weights) + 1e-9
            huber = np.minimum(1.0, limit / np.maximum(residuals, 1e-12))
        return solution


def _median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    passed = np.cumsum(weights[order])
    return float(values[order[np.searchsorted(passed, passed[-1] / 2)]])


def _choose(
    designs: Sequence[_Design],
    times: np.ndarray,
    weights: np.ndarray,
    ridges: Sequence[float],
    handicaps: Sequence[float],
) -> tuple[int, float]:
    """Index of the design, and the ridge, whose held-out predictions are nearest.

    Args:
        handicaps: (designs,) what each one's error is multiplied by before it is compared.
    """
    tried = [(index, ridge) for index in range(len(designs)) for ridge in ridges]
    errors = []
    for index, ridge in tried:
        predicted = np.zeros(len(times))
        for rest, left_out in _folds(len(times)):
            solution = designs[index].part(rest).fit(times[rest], weights[rest], ridge)
            predicted[left_out] = designs[index].terms[left_out] @ solution
        error = np.average(np.abs(predicted / times - 1.0), weights=weights)
        errors.append(float(error) * handicaps[index])
    return tried[int(np.argmin(errors))]


def _folds(count: int, of: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices to fit to, and indices left out: all (or all ``of``) are left out once."""
    of = np.arange(count) if of is None else of
    parts = min(FOLDS, len(of))
    for part in range(parts):
        left_out = of[part::parts]
        yield np.setdiff1d(np.arange(count), left_out), left_out


def _points(
    networks: Sequence[NetworkKey], predicted: np.ndarray, measured: Sequence[Measurement]
) -> tuple[CalibrationPoint, ...]:
    errors = [m.fastest_error_ms / m.fastest_ms for m in measured]
    below = min(1.0, FASTEST_REACH * float(np.mean(errors)))
    return tuple(
        CalibrationPoint(
            key.widths,
            float(guess),
            m.fastest_ms,
            ((1.0 - below) * m.fastest_ms, m.fastest_ms),
            100.0 * error,
        )
        for key, guess, m, error in zip(networks, predicted, measured, errors, strict=True)
    )
