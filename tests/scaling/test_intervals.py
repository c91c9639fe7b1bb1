"""Intervals of a law against least squares by scipy, generalised least squares by dense matrices, and known truths."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from phi3_jax.scaling import intervals, laws

TRUE = laws.Law(E=1.7, A=400.0, B=2000.0, alpha=0.34, beta=0.36)
TRUNKS = np.repeat(np.arange(6), 4)


def grid(noise: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, d = (g.ravel() for g in np.meshgrid(np.geomspace(2e7, 2e9, 6), np.geomspace(1e9, 6e10, 4), indexing="ij"))
    return n, d, TRUE(n, d) * np.exp(noise)


def log_law(p: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """ln L of p = ln A', ln B', ln E, alpha, beta, with A' and B' at N = 1e8 and D = 1e10."""
    return np.log(np.exp(p[2]) + np.exp(p[0]) * (n / 1e8) ** -p[3] + np.exp(p[1]) * (d / 1e10) ** -p[4])


def least_squares(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scipy's optimum (5,), Jacobian (runs, 5) by central differences, and residuals measured - law."""
    start = [np.log(400 / 1e8**0.34), np.log(2000 / 1e10**0.36), np.log(1.7), 0.34, 0.36]
    found = optimize.least_squares(lambda p: log_law(p, n, d) - np.log(loss), start, xtol=1e-15, ftol=1e-15, gtol=1e-15)
    steps = 1e-5 * np.eye(5)
    jacobian = np.stack([(log_law(found.x + s, n, d) - log_law(found.x - s, n, d)) / 2e-5 for s in steps], axis=1)
    return found.x, jacobian, np.log(loss) - log_law(found.x, n, d)


def test_without_clusters_they_are_student_s_t_of_scipy_s_least_squares() -> None:
    n, d, loss = grid(0.003 * np.random.default_rng(0).normal(size=24))
    x, j, left = least_squares(n, d, loss)
    covariance = np.linalg.inv(j.T @ j) * (left @ left) / 19
    t = stats.t.ppf(0.975, 19) * intervals.WIDER
    found = intervals.worth(laws.fit(n, d, loss))
    assert found.shared == 0
    ends = found.constants()
    for k, name in ((3, "alpha"), (4, "beta")):
        half = t * np.sqrt(covariance[k, k])
        assert ends[name] == pytest.approx((x[k] - half, x[k] + half), rel=1e-4)
    half = t * np.sqrt(covariance[2, 2])
    assert ends["E"] == pytest.approx(np.exp([x[2] - half, x[2] + half]), rel=1e-4)
    slope = np.array([1, 0, 0, np.log(1e8), 0])  # ln A = ln A' + alpha ln 1e8
    half = t * np.sqrt(slope @ covariance @ slope)
    assert np.log(ends["A"]) == pytest.approx((slope @ x - half, slope @ x + half), rel=1e-3)
    a = x[4] / (x[3] + x[4])
    slope = np.array([0, 0, 0, -a, 1 - a]) / (x[3] + x[4])
    half = t * np.sqrt(slope @ covariance @ slope)
    assert ends["a"] == pytest.approx((a - half, a + half), rel=1e-4)

    at = np.array([1e10]), np.array([3e11])
    slope = np.array([(log_law(x + s, *at) - log_law(x - s, *at))[0] / 2e-5 for s in 1e-5 * np.eye(5)])
    half = t * np.sqrt((left @ left) / 19 + slope @ covariance @ slope)
    centre = log_law(x, *at)
    assert np.log(found.new_runs(*at)) == pytest.approx(np.array([centre - half, centre + half]), rel=1e-5)


def test_with_clusters_they_are_generalised_least_squares_mixed_over_the_share_of_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intervals, "OUTLIER", np.inf)
    rng = np.random.default_rng(3)
    n, d, loss = grid(0.004 * rng.normal(size=6)[TRUNKS] + 0.003 * rng.normal(size=24))
    found = intervals.worth(laws.fit(n, d, loss), TRUNKS)
    # By hand: dense covariance matrices around the point where `found` is linearised.
    at_n, at_d = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())
    x = found.theta + [found.theta[3] * np.log(1e8 / at_n) * -1, found.theta[4] * np.log(1e10 / at_d) * -1, 0, 0, 0]
    j = np.stack([(log_law(x + s, n, d) - log_law(x - s, n, d)) / 2e-5 for s in 1e-5 * np.eye(5)], axis=1)
    left = np.log(loss) - log_law(x, n, d)
    same = (TRUNKS[:, None] == TRUNKS[None]).astype(float)
    likelihood, centre, scale = [], [], []
    for h in intervals.SHARES:
        v = np.linalg.inv((1 - h) * np.eye(24) + h * same)
        gram = j.T @ v @ j
        step = np.linalg.solve(gram, j.T @ v @ left)
        rss = (left - j @ step) @ v @ (left - j @ step)
        likelihood.append(0.5 * (np.linalg.slogdet(v)[1] - np.linalg.slogdet(gram)[1] - 19 * np.log(rss)))
        centre.append(x[3] + step[3])
        scale.append(np.sqrt(rss / 19 * np.linalg.inv(gram)[3, 3]))
    weights = np.exp(np.array(likelihood) - max(likelihood))
    weights /= weights.sum()
    assert found.shared == pytest.approx(weights @ intervals.SHARES, rel=1e-3) and 0.2 < found.shared < 0.9
    middle = weights @ centre
    for end, share in zip(found.constants()["alpha"], (0.025, 0.975), strict=True):
        inner = middle + (end - middle) / intervals.WIDER
        assert weights @ stats.t.cdf((inner - centre) / np.array(scale), 19) == pytest.approx(share, abs=1e-3)
    apart = intervals.worth(laws.fit(n, d, loss)).constants()
    width = [float(np.diff(ends["alpha"])[0]) for ends in (found.constants(), apart)]
    assert width[0] > 1.3 * width[1], "control: forks that are taken for runs of their own look more certain"


def test_forks_that_share_noise_are_covered_and_taken_apart_they_are_not() -> None:
    hits = {"trunks": [], "apart": []}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n, d, loss = grid(0.005 * (np.sqrt(0.7) * rng.normal(size=6)[TRUNKS] + np.sqrt(0.3) * rng.normal(size=24)))
        fitted = laws.fit(n, d, loss)
        for name, clusters in (("trunks", TRUNKS), ("apart", None)):
            low, high = intervals.worth(fitted, clusters).constants()["alpha"]
            hits[name].append(low <= 0.34 <= high)
    assert np.mean(hits["trunks"]) >= 0.88 and np.mean(hits["apart"]) < 0.8


def test_an_outlier_is_drawn_in_and_moves_little() -> None:
    noise = 0.003 * np.random.default_rng(0).normal(size=24)
    clean = intervals.worth(laws.fit(*grid(noise))).constants()
    noise[5] = 0.3
    n, d, loss = grid(noise)
    spoiled, _, _ = least_squares(n, d, loss)
    found = intervals.worth(laws.fit(n, d, loss)).constants()
    centre = [np.mean(x["beta"]) for x in (clean, found)]
    assert abs(centre[1] - centre[0]) < 0.3 * abs(spoiled[4] - centre[0])


def test_runs_that_leave_a_direction_open_have_no_narrow_interval() -> None:
    n = np.geomspace(1e7, 1e9, 12)
    fitted = laws.fit(n, 20 * n, TRUE(n, 20 * n) * np.exp(0.001 * np.random.default_rng(0).normal(size=12)))
    low, high = intervals.worth(fitted).terms()
    assert not (low[3] > 0 and high[3] < intervals.SPAN * low[3])
    assert "tokens rise with size in step" in str(intervals.out_of_reach(fitted))
    assert intervals.out_of_reach(laws.fit(*grid())) is None
