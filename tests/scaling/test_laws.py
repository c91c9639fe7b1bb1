"""The fitter on laws that are known, against scipy and finite differences."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import optimize, special

from phi3_jax.errors import UserError
from phi3_jax.scaling import forms, laws

TRUE = laws.Law(E=1.7, A=400.0, B=2000.0, alpha=0.34, beta=0.36)


def runs(noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, d = (g.ravel() for g in np.meshgrid(np.geomspace(1e7, 1e10, 7), np.geomspace(1e9, 1e12, 6)))
    return n, d, TRUE(n, d) * np.exp(noise * np.random.default_rng(seed).normal(size=len(n)))


def test_a_noiseless_law_is_found_to_many_digits_from_every_start() -> None:
    found = laws.fit(*runs())
    assert np.allclose([found.law.alpha, found.law.beta, found.law.E], [0.34, 0.36, 1.7], rtol=1e-4)
    assert np.allclose([found.law.A, found.law.B], [400, 2000], rtol=5e-3)
    assert found.objective < 1e-9 and not found.edges


def test_units_of_size_and_data_change_the_constants_alone() -> None:
    n, d, loss = runs(0.01)
    one, other = laws.fit(n, d, loss), laws.fit(n / 1e6, d / 1e9, loss)
    assert other.objective == pytest.approx(one.objective, rel=1e-7)
    assert other.law.alpha == pytest.approx(one.law.alpha, rel=1e-3)
    assert pytest.approx(one.law.A / 1e6**one.law.alpha, rel=2e-3) == other.law.A


def test_gradients_are_those_of_finite_differences() -> None:
    n, d, loss = runs(0.02)
    problem = laws.Problem(n, d, loss, 1e-3)
    theta = problem.start(3) + 0.03 * np.random.default_rng(1).normal(size=(3, 5))
    weights = np.random.default_rng(2).integers(0, 3, (3, len(n))).astype(float)
    _, grad = problem.value_and_grad(theta, weights)
    for k in range(3):
        numeric = optimize.approx_fprime(
            theta[k], lambda t, k=k: problem.value_and_grad(t[None], weights[k : k + 1])[0][0], 1e-7
        )
        assert np.allclose(grad[k], numeric, rtol=1e-4, atol=1e-7)


def test_the_batched_search_ends_where_scipy_does_or_lower() -> None:
    n, d, loss = runs(0.02)
    fitted = laws.fit(n, d, loss)
    counts = np.random.default_rng(0).multinomial(len(n), np.full(len(n), 1 / len(n)), size=20).astype(float)
    problem = laws.Problem(n, d, loss, laws.DELTA)
    start = np.repeat(problem.theta(fitted.law)[None], 20, axis=0)
    _, ours = problem.search(start, counts)
    for k in range(20):

        def objective(t: np.ndarray, k: int = k) -> tuple[float, np.ndarray]:
            value, grad = problem.value_and_grad(t[None], counts[k : k + 1])
            return float(value[0]) * 1e4, grad[0] * 1e4

        theirs = optimize.minimize(
            objective, start[k], jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 5000}
        )
        assert ours[k] <= theirs.fun / 1e4 * (1 + 1e-6)


def test_variable_projection_is_brute_force_non_negative_least_squares() -> None:
    rng = np.random.default_rng(0)
    columns = np.abs(rng.normal(size=(50, 12, 3))) + rng.normal(size=(50, 1, 3))
    ours, value = laws._nnls(columns)
    for k in range(50):
        theirs, norm = optimize.nnls(columns[k], np.ones(12))
        assert np.allclose(ours[k], theirs, atol=1e-6) and value[k] == pytest.approx(norm**2, abs=1e-7)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    inside, seen = 0, 0
    for seed in range(30):
        fitted = laws.fit(*runs(0.01, seed))
        low, high = laws.interval(laws.bootstrap(fitted, 200, seed))
        hits = (low[3:] <= (0.34, 0.36)) & (high[3:] >= (0.34, 0.36))
        inside, seen = inside + int(hits.sum()), seen + 2
    assert 0.8 <= inside / seen <= 1.0  # 60 intervals; percentile intervals are a little narrow


def test_a_new_run_lands_in_its_prediction_interval_and_not_in_the_law_s() -> None:
    wide, narrow = [], []
    for seed in range(12):
        fitted = laws.fit(*runs(0.02, seed))
        found = laws.predict(fitted, laws.bootstrap(fitted, 200, seed), [3e10], [3e12])
        new = TRUE(3e10, 3e12) * np.exp(0.02 * np.random.default_rng(100 + seed).normal(size=50))
        wide.append(np.mean((new > found["low"]) & (new < found["high"])))
        narrow.append(np.mean((new > found["confidence_low"]) & (new < found["confidence_high"])))
    assert 0.9 <= np.mean(wide) <= 1.0 and np.mean(narrow) < 0.87


def test_a_prediction_interval_is_the_residuals_widened_for_five_parameters() -> None:
    """Where every draw is the same law only the noise of a run is left: 8 runs, so sqrt(8 / 3) times their residuals."""
    n, d = np.array([1e7] * 3 + [1e8] * 3 + [1e9] * 2), np.array([1e9, 1e10, 1e11] * 2 + [1e9, 1e11])
    fitted = laws.fit(n, d, TRUE(n, d) * np.exp(0.02 * np.random.default_rng(3).normal(size=8)))
    draws = np.repeat([[fitted.law.E, fitted.law.A, fitted.law.B, fitted.law.alpha, fitted.law.beta]], 2000, axis=0)
    found = laws.predict(fitted, draws, 3e9, 3e11)
    value = fitted.law(3e9, 3e11)
    left = np.log(fitted.loss) - np.log(fitted.law(n, d))
    assert found["value"] == found["confidence_low"] == found["confidence_high"] == pytest.approx(value)
    # An eighth of the draws has the smallest residual, an eighth the largest: they are the 2.5 and 97.5 % points.
    assert found["low"][0] == pytest.approx(value * np.exp(left.min() * np.sqrt(8 / 3)), rel=1e-9)
    assert found["high"][0] == pytest.approx(value * np.exp(left.max() * np.sqrt(8 / 3)), rel=1e-9)
    noise = laws.predict(fitted, draws, 3e9, 3e11, level=0.5, seed=0)
    other = laws.predict(fitted, draws, 3e9, 3e11, level=0.5, seed=0)
    assert noise["low"] == other["low"] > found["low"] and noise["high"] < found["high"]


def test_percentiles_and_the_huber_loss_are_scipys() -> None:
    low, high = laws.interval(np.arange(1001.0)[:, None])
    assert (low, high) == (pytest.approx(25), pytest.approx(975))
    assert laws.DELTA == 1e-3
    fitted = laws.fit(*runs(0.02))
    left = np.log(fitted.law(fitted.n, fitted.d)) - np.log(fitted.loss)
    assert fitted.objective == pytest.approx(special.huber(1e-3, left).sum(), rel=1e-6)
    assert np.abs(left).min() < 1e-3 < np.abs(left).max(), "control: both branches"


def test_draws_follow_their_seed_and_the_optimum_of_compute_is_one() -> None:
    fitted = laws.fit(*runs(0.02))
    one, again, other = (laws.bootstrap(fitted, 20, seed) for seed in (0, 0, 1))
    assert (one == again).all() and not np.allclose(one, other)
    n, d = TRUE.optimum(1e21)
    assert 6 * n * d == pytest.approx(1e21)
    assert TRUE(n, d) < min(TRUE(n * f, d / f) for f in (0.98, 1.02))
    assert TRUE.optimum(4e21)[0] / n == pytest.approx(4**TRUE.a)


def test_parabolas_trends_and_power_laws_of_known_points() -> None:
    n = np.exp(np.array([-1.0, 0.0, 2.0, 4.0]))  # L = 3 + (ln N - 0.5)^2 / 4: the vertex is off the middle
    flops, loss = np.repeat([1e18, 1e19], 4), np.tile(3 + (np.log(n) - 0.5) ** 2 / 4, 2)
    for budget, found in zip((1e18, 1e19), laws.parabolas(flops, np.tile(n, 2), loss), strict=True):
        assert (found.flops, found.inside) == (budget, True)
        assert found.coefficients == pytest.approx((3 + 1 / 16, -0.25, 0.25))
        assert (np.log(found.n), found.loss) == (pytest.approx(0.5), pytest.approx(3.0))
    beyond = laws.parabolas(flops[:4], n, 3 + (np.log(n) - 4.5) ** 2)[0]
    assert not beyond.inside and np.log(beyond.n) == pytest.approx(4.5)
    assert laws.parabolas(flops[:4], n, -loss[:4]) == [] == laws.parabolas(flops[:2], n[:2], loss[:2])
    x = np.array([1.0, 2.0, 4.0, 8.0])
    assert laws.power_law(x, 3 * x**0.5) == pytest.approx((0.5, 3.0))
    y, weights = 3 * x**0.5 * np.array([1, 1.1, 0.8, 1.3]), np.array([1.0, 9.0, 4.0, 0.25])
    design = np.stack([np.log(x), np.ones(4)], axis=1)
    slope, intercept = np.linalg.solve(design.T @ (weights[:, None] * design), design.T @ (weights * np.log(y)))
    assert laws.power_law(x, y, weights) == pytest.approx((slope, np.exp(intercept)))
    fitted = laws.fit(*runs(0.02))
    tilted = dataclasses.replace(fitted, loss=fitted.law(fitted.n, fitted.d) * fitted.n**0.01)
    assert laws.trends(tilted)["ln N"] == pytest.approx(1.0) and laws.trends(tilted)["ln D/N"] < -0.5


def test_sizes_within_two_percent_are_one() -> None:
    assert laws.sizes(np.array([100.0, 1000.0, 101.9, 103.8, 107.0])).tolist() == [0, 2, 0, 0, 1]
    labels = [f"{n} runs of {s} sizes and {t} token" for n, s, t in ((5, 3, 3), (8, 2, 4), (8, 4, 2))]
    grids = [
        ([1, 2, 3, 1, 2], [1, 2, 3, 2, 3]),
        ([1, 2] * 4, [1, 1, 2, 2, 3, 3, 4, 4]),
        ([1, 1, 2, 2, 3, 3, 4, 4], [1, 2] * 4),
    ]
    for (n, d), words in zip(grids, labels, strict=True):
        with pytest.raises(UserError, match=words):
            laws.check(n, d, np.ones(len(n)))
    laws.check([1, 2, 3] * 2, [1, 2, 3, 2, 3, 1], np.ones(6))


def test_clusters_that_repeat_every_run_leave_the_intervals_as_wide_as_without_copies() -> None:
    n, d, loss = runs(0.02)
    one = laws.fit(n, d, loss)
    five = laws.fit(*(np.repeat(x, 5) for x in (n, d, loss)))
    plain = laws.bootstrap(one, 300).std(0)[3]
    naive = laws.bootstrap(five, 300).std(0)[3]
    clustered = laws.bootstrap(five, 300, clusters=np.repeat(np.arange(len(n)), 5)).std(0)[3]
    assert clustered == pytest.approx(plain, rel=0.15) and naive < 0.6 * plain


def test_a_draw_keeps_what_the_law_needs_and_too_few_clusters_are_refused() -> None:
    n, d = (g.ravel() for g in np.meshgrid([1e7, 1e8, 1e9], [1e9, 1e10, 1e11]))
    fitted = laws.fit(n, d, TRUE(n, d) * np.exp(0.01 * np.random.default_rng(0).normal(size=9)))
    draws = laws.bootstrap(fitted, 100)
    assert draws.shape == (100, 5) and np.isfinite(draws).all()
    with pytest.raises(UserError, match="3 clusters are too few to resample"):
        laws.bootstrap(fitted, 100, clusters=n)  # every draw that keeps the three sizes would be the data themselves


def test_leaving_out_a_size_that_breaks_the_law_shows_it() -> None:
    n, d, loss = runs(0.003)
    loss = np.where(n == n.max(), loss * 1.05, loss)
    errors = dict(laws.leave_one_size_out(laws.fit(n, d, loss)))
    assert max(errors, key=lambda size: abs(errors[size])) == pytest.approx(n.max(), rel=1e-6)
    assert errors[max(errors)] == pytest.approx(0.049, abs=0.01)


def test_parabolas_are_biased_by_unequal_exponents_and_say_by_how_much() -> None:
    flops = np.repeat(np.geomspace(1e18, 1e21, 4), 9)
    law = laws.Law(1.7, 400.0, 2000.0, 0.25, 0.5)
    n = law.optimum(flops)[0] * np.tile(np.geomspace(0.1, 10, 9), 4)
    vertices, truth = laws.parabola_bias(law, flops, n)
    assert truth == pytest.approx(2 / 3) and abs(vertices - truth) < 0.02
    centre = laws.parabolas(flops, n, law(n, flops / 6 / n))[0]
    assert abs(np.log(centre.n / law.optimum(1e18)[0])) > 0.05  # without any noise
    assert np.prod(law.optimum(1e20)) * 6 == pytest.approx(1e20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, d, x: (n, d, np.where(n > 5e9, np.nan, x)), "loss nan"),
        (lambda n, d, x: (n, -d, x), "token count -"),
        (lambda n, d, x: (np.where(n > 1e8, 1e7, 1e8), d, x), "2 sizes"),
        (lambda n, d, x: (n[:5], d[:5], x[:5]), "5 runs"),
        (lambda n, d, x: (n, d[:-1], x), "one length"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_a_line(change: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        laws.fit(*change(*runs()))
    assert "\n" not in str(caught.value)


def test_further_forms_recover_what_made_them() -> None:
    rng = np.random.default_rng(0)
    n, m = np.geomspace(1e7, 1e9, 9), np.tile([20.0, 80, 320], 3)
    true = forms.OverTraining(300.0, 500.0, -0.28, 1.8)
    assert forms.fit_over_training(n, m, true(n, m))(5e9, 20) == pytest.approx(true(5e9, 20), rel=1e-6)
    loss = np.linspace(0.6, 1.5, 40)
    a = forms.sigmoid(loss, -0.7, 0.8, 6.0, 0.98)
    assert forms.sigmoid(0.7, *forms.fit_sigmoid(loss, a, ideal=False)) == pytest.approx(
        forms.sigmoid(0.7, -0.7, 0.8, 6.0, 0.98), abs=1e-4
    )
    shares = rng.dirichlet(np.ones(4), 60)
    law = forms.MixtureLaw(2.0, np.array([0.5, -0.3, 0.1, -1.0]))
    found = forms.fit_mixture(shares, law(shares))
    assert np.allclose(found(shares), law(shares), atol=1e-4)
    with pytest.raises(UserError, match="5 mixtures of 4 domains"):
        forms.fit_mixture(shares[:5], law(shares[:5]))


def test_repeated_tokens_lose_their_value_slowly_and_then_all_of_it() -> None:
    assert forms.effective_tokens(4.8e12, 3.3e12) == pytest.approx(4.78e12, rel=2e-3)
    assert forms.effective_tokens(1e12, 2e12) == 1e12
    assert forms.effective_tokens(1e18, 1e12) == pytest.approx(1e12 * (1 + forms.R_D), rel=1e-6)
