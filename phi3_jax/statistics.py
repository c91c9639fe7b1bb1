"""Intervals and tests of scores: Wilson, clustered means, paired differences, gain per doubling (numpy/scipy only)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # scipy.stats takes most of a second to import

LEVEL = 0.95
SCALES = ("accuracy", "logit", "error_exponent")


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error and an interval; n is the number of independent units behind it.

    What is not known, as of one seed, is nan: the standard error and both ends.
    """

    value: float
    stderr: float
    low: float
    high: float
    n: int

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def sign(self) -> int:
        """+1 or -1 where the interval excludes zero, else 0."""
        return 0 if not self.known or self.low <= 0 <= self.high else 1 if self.value > 0 else -1


def wilson(successes: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927); holds its level near 0 and 1, where the normal one fails.

    Args:
      successes: how many of n; fractions are allowed, for an effective number of independent items.
      n: trials; n = 0 says nothing and gives (0, 1).
      level: two-sided coverage.
    """
    if n <= 0:
        return 0.0, 1.0
    z, p = special.ndtri((1 + level) / 2), successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # At 0 and n the bounds are 0 and 1 but for rounding; p itself is never outside.
    return float(np.clip(centre - half, 0, p)), float(np.clip(centre + half, p, 1))


def clustered_mean(values: ArrayLike, clusters: ArrayLike, level: float = LEVEL) -> Estimate:
    """Mean of values (n,) whose noise is shared within clusters (n,): SE of Miller, arXiv:2411.00640, with G / (G - 1).

    The mean is over values, not over clusters; clusters of one value give the usual standard error.
    """
    names, index = np.unique(clusters, return_inverse=True)
    sums = np.bincount(index, weights=np.asarray(values, float), minlength=len(names))
    return ratio(sums, np.bincount(index, minlength=len(names)), level)


def ratio(totals: np.ndarray, counts: np.ndarray, level: float = LEVEL) -> Estimate:
    """Sum of totals over sum of counts, of clusters (G,), with the linearised SE and a normal interval.

    One cluster says nothing of its noise: SE and interval are then nan. No counts give nan throughout.
    """
    totals, counts = np.asarray(totals, float), np.asarray(counts, float)
    totals, counts = totals[counts > 0], counts[counts > 0]
    groups = len(counts)
    value = totals.sum() / counts.sum() if groups else np.nan
    spread = np.square(totals - value * counts).sum()
    stderr = np.sqrt(spread * groups / (groups - 1)) / counts.sum() if groups > 1 else np.nan
    half = special.ndtri((1 + level) / 2) * stderr
    return Estimate(float(value), float(stderr), float(value - half), float(value + half), groups)


def proportion(hits: ArrayLike, clusters: ArrayLike | None = None, level: float = LEVEL) -> Estimate:
    """Share of hits (n,), with a Wilson interval; with clusters (n,), n is deflated by the measured design effect.

    stderr is the clustered one, or sqrt(p (1 - p) / n). The interval uses n_eff = n * min(1, binomial variance /
    clustered variance), so it is never narrower than the plain one. n of the result counts the hits' trials.
    """
    found = np.asarray(hits, bool).ravel()
    n = found.size
    p = found.mean() if n else np.nan
    stderr, effective = np.sqrt(p * (1 - p) / n) if n else np.nan, float(n)
    if clusters is not None and n:
        clustered = clustered_mean(found, np.asarray(clusters).ravel()).stderr
        if clustered > stderr:
            effective *= (stderr / clustered) ** 2
        stderr = clustered if np.isfinite(clustered) else stderr
    low, high = wilson(p * effective, effective, level)
    return Estimate(float(p), float(stderr), low, high, n)


def paired_difference(
    first: np.ndarray, second: np.ndarray, clusters: np.ndarray | None = None, level: float = LEVEL
) -> Estimate:
    """Mean of second - first over the same items (n,), with the paired (and clustered) standard error."""
    difference = np.asarray(second, float).ravel() - np.asarray(first, float).ravel()
    clusters = np.arange(difference.size) if clusters is None else np.asarray(clusters).ravel()
    return clustered_mean(difference, clusters, level)


def separation(
    high: np.ndarray, low: np.ndarray, clusters: tuple[np.ndarray, np.ndarray] | None = None, level: float = LEVEL
) -> Estimate:
    """P(one of `high` (n,) exceeds one of `low` (m,)), ties half: the AUROC, with DeLong's error (1988, Biometrics 44:837).

    `clusters` are names of the independent units within each of the two (Obuchowski 1997, without units in both).
    """
    placed = [_below(high, low), 1 - _below(low, high)]
    units = clusters or (np.arange(len(high)), np.arange(len(low)))
    parts = [clustered_mean(values, names, level) for values, names in zip(placed, units, strict=True)]
    a, stderr = parts[0].value, float(np.sqrt(sum(part.stderr**2 for part in parts)))
    half = special.ndtri((1 + level) / 2) * stderr
    return Estimate(a, stderr, float(np.maximum(0.0, a - half)), float(np.minimum(1.0, a + half)), len(high) + len(low))


def _below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Share of `others` below each of `values` (n,), ties half."""
    ranked = np.sort(others)
    return (np.searchsorted(ranked, values, "left") + np.searchsorted(ranked, values, "right")) / (
        2 * max(1, len(ranked))
    )


def calibration_error(right: np.ndarray, sure: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy over bins of equal mass, by mass."""
    order = np.argsort(sure, kind="stable")
    parts = [part for part in np.array_split(order, bins) if part.size]
    return float(sum(abs(right[p].mean() - sure[p].mean()) * p.size for p in parts) / len(order))


def over_seeds(values: ArrayLike, level: float = LEVEL) -> Estimate:
    """Mean of one number per seed with the t interval of len(values) - 1 degrees of freedom (nan for one seed)."""
    seeds = np.asarray(values, float)
    n = seeds.size
    stderr = seeds.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    half = special.stdtrit(n - 1, (1 + level) / 2) * stderr if n > 1 else np.nan
    mean = seeds.mean() if n else np.nan
    return Estimate(float(mean), float(stderr), float(mean - half), float(mean + half), n)


def slope_in_blocks(x: ArrayLike, y: ArrayLike, blocks: Sequence[int], level: float = LEVEL) -> Estimate:
    """Slope of y on x where each block has a level of its own, with the t interval of the residuals.

    Its degrees of freedom are observations less blocks less one; nan without one, and where no block has two x.
    """
    values, names = np.array([x, y], float), np.asarray(blocks)
    for name in set(blocks):
        values[:, names == name] -= values[:, names == name].mean(axis=1, keepdims=True)
    (across, up), left = values, len(names) - len(set(blocks)) - 1
    spread = float(across @ across)
    slope = float(across @ up) / spread if spread else math.nan
    residual = up - slope * across
    stderr = math.sqrt(float(residual @ residual) / left / spread) if spread and left > 0 else math.nan
    half = float(special.stdtrit(left, (1 + level) / 2)) * stderr if left > 0 else math.nan
    return Estimate(slope, stderr, slope - half, slope + half, len(names))


def to_scale(
    p: np.ndarray, variance: np.ndarray, scale: str, chance: float = 0.0, ceiling: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracies and their variances on another scale (delta method); infinite where the scale is at p.

    Scales: "accuracy"; "logit", ln(q / (1 - q)) of q = (p - chance) / (ceiling - chance); "error_exponent",
    -log2(1 - p), whose gain per doubling is the exponent of error ~ size^-kappa (the Phi-3 report's Figure 3 axis).
    """
    p, variance = np.asarray(p, float), np.asarray(variance, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        if scale == "accuracy":
            return p, variance
        if scale == "logit":
            q = (p - chance) / (ceiling - chance)
            return np.log(q / (1 - q)), variance / ((ceiling - chance) * q * (1 - q)) ** 2
        if scale == "error_exponent":
            return -np.log2(1 - p), variance / ((1 - p) * np.log(2)) ** 2
    raise ValueError(f"scale={scale!r} is none of {', '.join(SCALES)}")


@dataclass(frozen=True)
class Gains:
    """Gains per doubling of size between three sizes, and their contrast second - first."""

    doublings: tuple[float, float]
    first: float
    second: float
    contrast: float
    first_stderr: float
    second_stderr: float
    contrast_stderr: float

    @property
    def z(self) -> float:
        """Contrast over its standard error."""
        return self.contrast / self.contrast_stderr if self.contrast_stderr else float("nan")


def gain_per_doubling(scores: ArrayLike, sizes: Sequence[float], variances: ArrayLike = (0, 0, 0)) -> Gains:
    """Gain per doubling of each step over three sizes, with the variance of independent scores propagated.

    s1 = (g2 - g1) / d1, s2 = (g3 - g2) / d2 with d = log2 of the size ratio; the middle score enters the contrast
    s2 - s1 twice: Var = v1 / d1^2 + v2 (1/d1 + 1/d2)^2 + v3 / d2^2. With the published table of Phi-3 this gives the
    contrast -5.0 SE on MMLU.

    Args:
      scores: g1, g2, g3 on any scale (see `to_scale`).
      sizes: parameters, or FLOPs, in rising order.
      variances: of the three scores.
    """
    g, v = np.asarray(scores, float), np.asarray(variances, float)
    d1, d2 = np.diff(np.log2(np.asarray(sizes, float)))
    if not (d1 > 0 and d2 > 0):
        raise ValueError(f"sizes={tuple(sizes)} must rise")
    first, second = (g[1] - g[0]) / d1, (g[2] - g[1]) / d2
    contrast = v[0] / d1**2 + v[1] * (1 / d1 + 1 / d2) ** 2 + v[2] / d2**2
    numbers = (first, second, second - first, *np.sqrt([(v[0] + v[1]) / d1**2, (v[1] + v[2]) / d2**2, contrast]))
    return Gains((float(d1), float(d2)), *map(float, numbers))
