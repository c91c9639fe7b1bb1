"""Intervals cover, clusters widen, pairs narrow, and the gain per doubling reproduces published numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from phi3_jax import statistics
from phi3_jax.statistics import (
    clustered_mean,
    gain_per_doubling,
    over_seeds,
    paired_difference,
    proportion,
    ratio,
    to_scale,
    wilson,
)

PHI3 = (3.821079552e9, 7.392272384e9, 13.960238080e9)
PICO = (110_592, 212_992, 416_000)


@pytest.mark.parametrize("hits, n", [(0, 10), (1, 10), (5, 10), (10, 10), (13, 54_000)])
def test_wilson_agrees_with_scipy(hits, n):
    reference = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_wilson_knows_nothing_without_trials():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("p", [0.004, 0.3, 0.98])
def test_wilson_covers_where_wald_may_not(p):
    hits = np.random.default_rng(0).binomial(200, p, 4000)
    intervals = np.array([wilson(k, 200) for k in hits])
    coverage = ((intervals[:, 0] <= p) & (p <= intervals[:, 1])).mean()
    assert coverage > 0.93


def test_single_value_clusters_give_the_usual_standard_error():
    values = np.random.default_rng(0).normal(size=500)
    estimate = clustered_mean(values, np.arange(500))
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.stderr == pytest.approx(values.std(ddof=1) / np.sqrt(500))


def test_copied_values_count_once():
    values = np.random.default_rng(0).normal(size=400)
    one = clustered_mean(values, np.arange(400))
    copies = clustered_mean(np.repeat(values, 6), np.repeat(np.arange(400), 6))
    assert copies.stderr == pytest.approx(one.stderr)
    naive = clustered_mean(np.repeat(values, 6), np.arange(2400))
    assert naive.stderr < 0.5 * copies.stderr  # what ignoring clusters would claim


def test_clustered_interval_covers():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(500):
        sizes = rng.integers(1, 20, 60)
        effects = np.repeat(rng.normal(size=60), sizes)
        estimate = clustered_mean(effects + rng.normal(size=sizes.sum()), np.repeat(np.arange(60), sizes))
        covered += estimate.low <= 0 <= estimate.high
    assert 0.90 < covered / 500 < 0.98


def test_ratio_weights_by_counts_and_skips_empty_clusters():
    estimate = ratio(np.array([2.0, 30.0, 5.0]), np.array([1, 10, 0]))
    assert estimate.value == pytest.approx(32 / 11) and estimate.n == 2
    assert np.isnan(ratio(np.zeros(0), np.zeros(0)).value)
    assert np.isnan(ratio(np.ones(1), np.ones(1)).stderr)


def test_proportion_of_independent_hits_is_plain_wilson():
    hits = np.random.default_rng(0).random(1000) < 0.3
    estimate = proportion(hits)
    assert (estimate.low, estimate.high) == wilson(hits.sum(), 1000)
    assert estimate.stderr == pytest.approx(np.sqrt(estimate.value * (1 - estimate.value) / 1000))


def test_proportion_of_copies_is_wilson_of_the_originals():
    hits = np.random.default_rng(0).random(1000) < 0.3
    copies = proportion(np.repeat(hits, 6), np.repeat(np.arange(1000), 6))
    assert (copies.low, copies.high) == pytest.approx(wilson(hits.sum(), 1000), abs=2e-5)
    assert copies.n == 6000


@pytest.mark.parametrize("hits", [np.ones(12), np.zeros(12)])
def test_certain_proportions_keep_an_interval(hits):
    estimate = proportion(hits, np.repeat(np.arange(2), 6))
    assert estimate.high - estimate.low > 0.1 and estimate.stderr == 0


def test_pairing_removes_the_common_noise():
    rng = np.random.default_rng(0)
    items = rng.normal(size=2000)
    first, second = items + 0.1 * rng.normal(size=2000), items + 0.05 + 0.1 * rng.normal(size=2000)
    paired = paired_difference(first, second)
    assert paired.low < 0.05 < paired.high
    unpaired = np.sqrt(first.var(ddof=1) / 2000 + second.var(ddof=1) / 2000)
    assert paired.stderr < 0.2 * unpaired


def test_over_seeds_is_the_t_interval_of_the_pilot():
    """Pilot, interaction over 3 seeds: 18.2, 16.6, 9.6 -> +14.8, SE 2.6, 95 % interval +3.6 to +26.0."""
    estimate = over_seeds([18.2, 16.6, 9.6])
    assert estimate.value == pytest.approx(14.8, abs=0.05)
    assert estimate.stderr == pytest.approx(2.6, abs=0.05)
    assert (estimate.low, estimate.high) == pytest.approx((3.6, 26.0), abs=0.2)
    assert np.isnan(over_seeds([1.0]).low)


@pytest.mark.parametrize(
    "scores, n, first, second, z, exponents",
    [  # Phi-3 report v4 and our published re-analysis of it (gains in points, z of the contrast)
        ((68.8, 75.7, 78.0), 14_042, 7.25, 2.51, -5.0, (0.379, 0.156)),  # MMLU
        ((58.1, 58.1 - 0, 58.1), 1000, 0.0, 0.0, 0.0, (0.0, 0.0)),  # positive control: no change
    ],
)
def test_published_gains_per_doubling(scores, n, first, second, z, exponents):
    p = np.array(scores) / 100
    variances = p * (1 - p) / n
    gains = gain_per_doubling(p, PHI3, variances)
    assert gains.doublings == pytest.approx((0.952, 0.918), abs=1e-3)
    assert 100 * gains.first == pytest.approx(first, abs=0.01)
    assert 100 * gains.second == pytest.approx(second, abs=0.01)
    assert gains.z == pytest.approx(z, abs=0.05)
    error = gain_per_doubling(*scaled(p, variances, "error_exponent"))
    assert (error.first, error.second) == pytest.approx(exponents, abs=1e-3)


def scaled(p, variances, scale):
    g, v = to_scale(p, variances, scale)
    return g, PHI3, v


def test_pilot_gains_per_doubling():
    gains = gain_per_doubling([0.274, 0.448, 0.502], PICO)
    assert gains.doublings == pytest.approx((0.946, 0.966), abs=1e-3)
    assert (100 * gains.first, 100 * gains.second) == pytest.approx((18.4, 5.6), abs=0.05)
    assert 100 * gains.contrast == pytest.approx(-12.8, abs=0.1)


def test_contrast_variance_agrees_with_simulation():
    rng = np.random.default_rng(0)
    p, n = np.array([0.5, 0.6, 0.65]), 2000
    draws = rng.binomial(n, p, (4000, 3)) / n
    contrasts = [gain_per_doubling(row, PHI3).contrast for row in draws]
    predicted = gain_per_doubling(p, PHI3, p * (1 - p) / n).contrast_stderr
    assert np.std(contrasts) == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize("scale", ["accuracy", "logit", "error_exponent"])
def test_scales_carry_the_variance(scale):
    rng = np.random.default_rng(0)
    p = 0.25 + 0.5 * rng.binomial(5000, 0.6, 20_000) / 5000
    g, _ = to_scale(p, np.zeros_like(p), scale, chance=0.25, ceiling=0.95)
    _, variance = to_scale(np.array(0.55), p.var(), scale, chance=0.25, ceiling=0.95)
    assert g.var() == pytest.approx(float(variance), rel=0.03)


def test_bad_scale_and_sizes_are_errors():
    with pytest.raises(ValueError, match="scale='probit'"):
        to_scale(np.ones(1), np.ones(1), "probit")
    with pytest.raises(ValueError, match="must rise"):
        gain_per_doubling([1, 2, 3], [1, 1, 2])


def test_separation_is_the_share_of_pairs_and_its_error_that_of_redrawn_clusters() -> None:
    rng = np.random.default_rng(0)

    def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
        r = np.random.default_rng(seed)
        shared = r.normal(size=40).repeat(6), r.normal(size=50).repeat(6)
        return shared[0] + r.normal(size=240) + 0.8, shared[1] + r.normal(size=300)

    high, low = (np.round(x, 1) for x in draw(1))  # rounded: ties
    e = statistics.separation(high, low, (np.arange(240) // 6, np.arange(300) // 6))
    pairs = (high[:, None] > low).mean() + (high[:, None] == low).mean() / 2
    assert e.value == pytest.approx(pairs) and (high[:, None] == low).any()
    spread = np.std([statistics.separation(*draw(seed)).value for seed in range(2, 202)], ddof=1)
    assert e.stderr == pytest.approx(spread, rel=0.25)
    assert statistics.separation(high, low).stderr < 0.75 * spread  # without the clusters it is too small
    assert statistics.separation(rng.normal(size=9) + 99, low).value == 1


def test_slope_in_blocks_is_ordinary_least_squares_with_a_level_for_each_block() -> None:
    rng = np.random.default_rng(0)
    x, blocks = np.tile([0.0, 0.4, 1.0], 3), np.repeat([0, 1, 2], 3)
    y = 0.7 * x + np.array([3.0, -1, 2])[blocks] + rng.normal(0, 0.1, 9)
    design = np.column_stack([x, blocks[:, None] == np.arange(3)])
    fit, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    stderr = np.sqrt(residual[0] / 5 * np.linalg.inv(design.T @ design)[0, 0])
    found = statistics.slope_in_blocks(x, y, blocks.tolist())
    np.testing.assert_allclose([found.value, found.stderr], [fit[0], stderr], rtol=1e-10)
    np.testing.assert_allclose(found.high - found.value, 2.5705818 * stderr, rtol=1e-6)
    assert found.n == 9 and not statistics.slope_in_blocks(x[:3], y[:3], [0, 1, 2]).known
    assert np.isnan(statistics.slope_in_blocks(x[:2], y[:2], [0, 0]).low), "a line through two points has no residuals"
    hits = 0
    for _ in range(2000):
        noisy = 0.7 * x + rng.normal(0, 1, 3)[blocks] + rng.normal(0, 0.1, 9)
        one = statistics.slope_in_blocks(x, noisy, blocks.tolist())
        hits += one.low <= 0.7 <= one.high
    assert 0.935 < hits / 2000 < 0.965
