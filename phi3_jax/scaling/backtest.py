"""Forecasts of runs beyond those that a law was fitted to, whose intervals carry the error of the law's form.

Where the form is right, a new run lands in the t interval of `intervals.Worth.new_runs`; h is the distance of its further
end from the forecast, on the logarithm of the loss. No published table of runs follows the form exactly, and what it misses
grows with distance. The half width is h or, where that is more,

    K sqrt(h^2 + (r x)^2) sqrt((1 + m) / 2)

with x the logarithm of how far N, D or 6 N D lies outside the runs fitted, r the error of form per unit of x, and m the
mean square of the table's own backtests: laws fitted to the lowest 40 to 90 % of its compute predict the rest of it, and
their errors are counted in 1 / 1.96 of sqrt(h^2 + (r x)^2). The 1 beside m is a table without surprises. r is the size
of form errors in published tables, and K puts 97 of 100 of their largest runs inside (conformal prediction: Vovk et al.
2005; a scale of errors learned first: Papadopoulos et al., ECML 2002): runs of a source that had no part in K are further
off, and about 95 of 100 of them lie inside. `benchmarks/coverage.py` chooses both, and scores each source by the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from phi3_jax.errors import UserError
from phi3_jax.scaling import forms, intervals, laws

CUTS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the fitted runs' compute, that backtests are fitted below


@dataclasses.dataclass(frozen=True)
class Calibration:
    """K and r of the module's formula."""

    factor: float
    rate: float


SHIPPED = Calibration(factor=1.203, rate=0.0175)  # analysis/results/coverage/calibration.csv


@dataclasses.dataclass(frozen=True)
class Reach:
    """A law's forecasts of points, and what their error is made of; errors are of logarithms of losses.

    Attributes:
      value: (points,) loss by the law.
      half: (points,) h.
      distance: (points,) x, 0 within the runs fitted.
      tests: for each backtest its errors, halves and distances, (3, runs).
    """

    value: np.ndarray
    half: np.ndarray
    distance: np.ndarray
    tests: tuple[np.ndarray, ...]

    def scale(self, rate: float) -> np.ndarray:
        """(points,) the half width over K."""
        squares = [np.mean(np.square(1.96 * error) / (half**2 + (rate * x) ** 2)) for error, half, x in self.tests]
        surprise = float(np.mean(squares)) if squares else 1.0
        return np.sqrt((1 + surprise) / 2) * np.hypot(self.half, rate * self.distance)

    def widths(self, calibration: Calibration) -> np.ndarray:
        """(points,) half widths of 95 % intervals of ln loss, never below h."""
        return np.maximum(self.half, calibration.factor * self.scale(calibration.rate))


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Forecasts of points, each (points,): losses, 95 % intervals, and what they are compared with.

    Attributes:
      n, d: non-embedding parameters and tokens.
      value: by Hoffmann's form.
      low, high: where the run lands, with the error of form.
      law_low, law_high: where it would land if the form held.
      gadre: by Gadre's form (`forms.OverTraining`); nan where its fit does not converge.
      distance: x.
    """

    n: np.ndarray
    d: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    law_low: np.ndarray
    law_high: np.ndarray
    gadre: np.ndarray
    distance: np.ndarray

    def rows(self) -> list[dict[str, float | None]]:
        """One mapping a point, with None for what is not known."""
        columns = dataclasses.asdict(self)
        return [
            {name: float(x) if np.isfinite(x) else None for name, x in zip(columns, point, strict=True)}
            for point in zip(*columns.values(), strict=True)
        ]


def reach(fitted: laws.Fit, clusters: Sequence[object] | None, n: np.ndarray, d: np.ndarray) -> Reach:
    """A law's forecasts of N and D (points,) with its backtests; `clusters` is one label a fitted run."""
    half, distance = _error(fitted, clusters, n, d)
    return Reach(fitted.law(n, d), half, distance, tuple(_backtests(fitted, clusters)))


def forecast(
    fitted: laws.Fit, clusters: Sequence[object] | None, n: ArrayLike, d: ArrayLike, calibration: Calibration = SHIPPED
) -> Forecast:
    """Forecasts of N and D (points,) from a fit whose runs have these clusters, one label a run.

    Raises:
      UserError: the law is at a bound, or sizes and tokens rise in step.
    """
    if reason := intervals.out_of_reach(fitted):
        raise UserError(f"no forecast: {reason}")
    n, d = (np.atleast_1d(np.asarray(x, float)) for x in (n, d))
    found = reach(fitted, clusters, n, d)
    width = found.widths(calibration)
    low, high = intervals.worth(fitted, clusters).new_runs(n, d)
    try:
        gadre = forms.fit_over_training(fitted.n, fitted.d / fitted.n, fitted.loss)(n, d / n)
    except UserError:
        gadre = np.full(len(n), np.nan)
    value, ends = found.value, np.exp(width)
    return Forecast(n, d, value, value / ends, value * ends, low, high, gadre, found.distance)


def _error(
    fitted: laws.Fit, clusters: Sequence[object] | None, n: np.ndarray, d: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Half widths and distances (points,)."""
    low, high = intervals.worth(fitted, clusters).new_runs(n, d)
    outside = np.zeros(len(n))
    for x, there in ((n, fitted.n), (d, fitted.d), (n * d, fitted.n * fitted.d)):
        outside = np.maximum(outside, np.maximum(np.log(x / there.max()), np.log(there.min() / x)))
    value = fitted.law(n, d)  # of the robust fit: off the middle of the interval, which is that of least squares
    return np.maximum(np.log(high / value), np.log(value) - np.log(np.maximum(low, 1e-300))), outside


def _backtests(fitted: laws.Fit, clusters: Sequence[object] | None) -> list[np.ndarray]:
    """Errors, halves and distances (3, runs) of what lies above each cut; cuts that leave no law are left out."""
    compute, out = fitted.n * fitted.d, []
    for below in {tuple(compute <= np.quantile(compute, cut)): None for cut in CUTS}:
        seen = np.array(below)
        if seen.all():
            continue
        try:
            past = laws.fit(fitted.n[seen], fitted.d[seen], fitted.loss[seen])
        except UserError:
            continue
        if past.edges or len(past.n) < 7:
            continue
        labels = None if clusters is None else [label for label, kept in zip(clusters, below, strict=True) if kept]
        n, d = fitted.n[~seen], fitted.d[~seen]
        half, distance = _error(past, labels, n, d)
        if np.isfinite(half).all():
            out.append(np.stack([np.log(fitted.loss[~seen] / past.law(n, d)), half, distance]))
    return out
