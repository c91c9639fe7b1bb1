"""What a fitted law is worth: Student's t intervals of its constants and of new runs, and when it is not determined.

How. The logarithm of the law is linearised at its least-squares optimum (Gauss-Newton), with residuals beyond three
standard deviations of the fit drawn in to three. Forks share the noise of their trunk: within a cluster the residuals'
covariance is s^2 ((1 - h) I + h 1 1'), with a share h that nobody knows. Given h, generalised least squares has a t
interval; over h, uniform on 0 to 1, the t distributions are mixed by their restricted likelihoods (Patterson and Thompson,
Biometrika 1971; Harville, Biometrika 1974), and the interval is that of the mixture. `benchmarks/coverage.py` measures how
often it holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from phi3_jax.scaling import laws
from phi3_jax.scaling.laws import Fit, Problem

SHARES = (np.arange(40) + 0.5) / 40  # of the noise that a cluster shares
WIDER = 1.15  # without, 92 to 95 of 100 hold: the law bends within them (benchmarks/coverage.py)
OUTLIER = 3.0  # standard deviations
SPAN = 10.0  # a parameter whose 95 % interval is wider than this factor has no known order of magnitude
_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Worth:
    """A law linearised, once for each share h of the noise that clusters share.

    Attributes:
      fitted: the law's fit.
      theta: (5,) a, b, e, alpha, beta where it is linearised (`laws.Problem`).
      steps: (H, 5) from theta to the generalised least-squares optimum.
      inverse: (H, 5, 5) covariance of that optimum over `variance`; infinite where the runs leave a direction open.
      variance: (H,) of a run's residual, the shared part included.
      weights: (H,) posterior of h, sum 1.
      shares: (H,) h.
    """

    fitted: Fit
    theta: np.ndarray
    steps: np.ndarray
    inverse: np.ndarray
    variance: np.ndarray
    weights: np.ndarray
    shares: np.ndarray

    @property
    def free(self) -> int:
        """Degrees of freedom: runs minus five constants."""
        return max(1, len(self.fitted.n) - 5)

    @property
    def shared(self) -> float:
        """Posterior mean of the share of noise that the runs of a cluster have in common; 0 without clusters."""
        return float(self.weights @ self.shares)

    def constants(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """{E, A, B, alpha, beta, a: interval}, a = beta / (alpha + beta); those of E, A and B are found on logarithms."""
        alpha, beta = self.theta[3:]
        at_a, at_b = (float(np.log(x).mean()) for x in (self.fitted.n, self.fitted.d))
        total = alpha + beta
        slopes = np.array(
            [[0, 0, 1, 0, 0], [1, 0, 0, at_a, 0], [0, 1, 0, 0, at_b], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1],
             [0, 0, 0, -beta / total**2, alpha / total**2]]
        )  # fmt: skip
        values = slopes @ self.theta
        values[5] = beta / total
        low, high = self._quantiles(values, slopes, 0.0, level)
        with np.errstate(over="ignore"):
            low[:3], high[:3] = np.exp(low[:3]), np.exp(high[:3])
        # Runs with many outliers may put the robust fit's constant outside: the interval is stretched to it.
        names = (*laws.NAMES, "a")
        fitted = np.array([getattr(self.fitted.law, name) for name in names])
        low, high = np.minimum(low, fitted), np.maximum(high, fitted)
        return {name: (float(x), float(y)) for name, x, y in zip(names, low, high, strict=True)}

    def terms(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Ends (5,) and (5,) for E, the terms of A and B at the middle of the runs, alpha and beta."""
        order = [2, 0, 1, 3, 4]
        low, high = self._quantiles(self.theta[order], np.eye(5)[order], 0.0, level)
        with np.errstate(over="ignore"):
            low[:3], high[:3] = np.exp(low[:3]), np.exp(high[:3])
        return low, high

    def new_runs(self, n: ArrayLike, d: ArrayLike, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Ends (points,) of where new runs of N and D (points,), each of its own trunk, land if the law's form holds."""
        sizes, tokens = (np.atleast_1d(np.asarray(x, float)) for x in (n, d))
        problem = Problem(sizes, tokens, np.ones(len(sizes)), laws.DELTA)
        problem.x = problem.ln_n - np.log(self.fitted.n).mean()
        problem.y = problem.ln_d - np.log(self.fitted.d).mean()
        theta = self.theta[None]
        low, high = self._quantiles(problem.residuals(theta)[0], problem.jacobian(theta)[0], 1.0, level)
        return np.exp(low), np.exp(high)

    def _quantiles(
        self, values: np.ndarray, slopes: np.ndarray, noise: float, level: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Interval of values (K,) with slopes (K, 5) in theta, and `noise` times a run's own variance."""
        centre = values + self.steps @ slopes.T
        spread = np.einsum("ki,hij,kj->hk", slopes, self.inverse, slopes) + noise
        scale = np.sqrt(np.maximum(self.variance[:, None] * spread, 0))
        middle = self.weights @ centre
        ends = [
            middle + WIDER * (_mixture(centre, scale, self.weights, self.free, q) - middle)
            for q in ((1 - level) / 2, (1 + level) / 2)
        ]
        known = np.isfinite(np.diagonal(self.inverse, axis1=1, axis2=2)).all()
        return (ends[0], ends[1]) if known else (np.full_like(middle, -np.inf), np.full_like(middle, np.inf))


def worth(fitted: Fit, clusters: Sequence[object] | None = None, shares: np.ndarray = SHARES) -> Worth:
    """Linearises a fit.

    Args:
      fitted: the fit.
      clusters: one label a run, such as the trunk that forks share; None: every run has noise of its own.
      shares: (H,) of the noise that the runs of a cluster may have in common, one of them where it is known.
    """
    label = np.arange(len(fitted.n)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    count = np.bincount(label)
    shares = shares if count.max() > 1 else np.zeros(1)
    problem, theta = _least_squares(fitted)
    free = max(1, len(label) - 5)
    for _ in range(_STEPS):
        steps, inverse, rss, weights = _generalised(problem, theta, label, count, shares)
        move = weights @ steps
        move *= min(1.0, 0.5 / max(float(np.abs(move).max()), 1e-9))
        theta, steps = theta + move, steps - move
        if len(shares) == 1:
            break
    return Worth(fitted, theta, steps, inverse, rss / free, weights, shares)


def _least_squares(fitted: Fit) -> tuple[Problem, np.ndarray]:
    """The problem with outliers drawn in, and its least-squares optimum (5,)."""
    left = fitted.residuals
    # The fit passes through as many runs as it has parameters, nearly: only the others say how far runs lie from it.
    limit = OUTLIER * max(1.4826 * float(np.median(np.sort(np.abs(left))[5:])), 1e-9)
    loss = fitted.law(fitted.n, fitted.d) * np.exp(np.clip(left, -limit, limit))
    problem = Problem(fitted.n, fitted.d, loss, laws.SQUARES)
    return problem, problem.search(problem.theta(fitted.law)[None])[0][0]


def _generalised(
    problem: Problem, theta: np.ndarray, label: np.ndarray, count: np.ndarray, shares: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Generalised least squares for every share: steps (H, 5), inverse (H, 5, 5), sums of squares (H,), weights (H,)."""
    h = shares[:, None]
    both = np.column_stack([problem.jacobian(theta[None])[0], -problem.residuals(theta[None])[0]])
    means = np.stack([np.bincount(label, column) / count for column in both.T], axis=1)[label]
    # The root of the inverse of (1 - h) I + h 1 1' takes this part of a cluster's mean away from its members.
    part = 1 - np.sqrt((1 - h) / (1 - h + count * h))
    white = (both - part[:, label, None] * means) / np.sqrt(1 - h)[..., None]
    x, y = white[..., :5], white[..., 5]
    gram = np.einsum("hni,hnj->hij", x, x)
    if np.linalg.matrix_rank(both[:, :5], 1e-7) < 5:
        gone = np.zeros((len(shares), 5))
        return gone, np.full_like(gram, np.inf), np.square(y).sum(1), np.full(len(shares), 1 / len(shares))
    inverse = np.linalg.inv(gram)
    steps = np.einsum("hij,hnj,hn->hi", inverse, x, y)
    rss = np.maximum(np.square(y - np.einsum("hni,hi->hn", x, steps)).sum(1), 1e-24)
    volume = ((count - 1) * np.log(1 - h) + np.log(1 - h + count * h)).sum(1)
    likelihood = -0.5 * (volume + np.linalg.slogdet(gram)[1] + max(1, len(label) - 5) * np.log(rss))
    weights = np.exp(likelihood - likelihood.max())
    return steps, inverse, rss, weights / weights.sum()


def _mixture(centre: np.ndarray, scale: np.ndarray, weights: np.ndarray, free: int, q: float) -> np.ndarray:
    """Quantile (K,) of mixtures, weights (H,), of t distributions at centre with scale (H, K), by bisection."""
    if len(weights) == 1:
        return centre[0] + scale[0] * special.stdtrit(free, q)
    ends = centre + scale * special.stdtrit(free, q)  # the mixture's quantile lies between those of its parts
    low, high = ends.min(0), ends.max(0)
    scale = np.maximum(scale, 1e-300)
    for _ in range(50):
        middle = (low + high) / 2
        below = weights @ special.stdtr(free, (middle - centre) / scale) < q
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def undetermined(fitted: Fit, found: Worth, draws: np.ndarray | None = None) -> str | None:
    """Why a fit's constants mean nothing, in words that follow "not determined: "; None where the runs determine them.

    The one rule of reports, cards and commands. No law is shown whose sizes and tokens rise in step, whose parameter ended
    at a bound, whose bootstrapped `draws` (draws, 5) end at bounds in more than 5 of 100, or of which a 95 % interval spans
    a factor of ten or more: of E, of the two terms at the middle of the runs (A and B alone trade off against the
    exponents), of the exponents. The intervals are Student's t and, with draws, theirs.
    """
    if reason := out_of_reach(fitted):
        return reason
    intervals = [found.terms()]
    if draws is not None and len(draws):
        terms = laws.middle(fitted.n, fitted.d, draws)
        if (share := float(laws.at_bounds(terms, fitted.loss).any(1).mean())) > 0.05:
            return f"{_runs(fitted)}, resampled, end at a bound in {100 * share:.0f} of 100 draws; {_TAKES}"
        intervals.append(laws.interval(terms))
    for low, high in intervals:
        wide = [n for n, x, y in zip(laws.NAMES, low, high, strict=True) if not (x > 0 and y < SPAN * x)]
        if wide:
            return f"{_runs(fitted)} leave the order of magnitude of {_and(wide)} open; {_TAKES}"
    return None


def out_of_reach(fitted: Fit) -> str | None:
    """Why a fit forecasts nothing: sizes and tokens in step, or a law at a bound; None where it does."""
    if laws.in_step(fitted.n, fitted.d):
        return f"{_runs(fitted)}, where tokens rise with size in step, do not tell the two apart; {_TAKES}"
    if fitted.edges:
        return f"{_runs(fitted)} put {_and(fitted.edges)} at a bound; {_TAKES}"
    return None


_TAKES = (
    "a law takes sizes and token counts that vary apart from each other, each over a factor of ten or so, and losses "
    "whose noise is small compared with what size and tokens save"
)


def _runs(fitted: Fit) -> str:
    sizes, tokens = (int(laws.sizes(x).max()) + 1 for x in (fitted.n, fitted.d))
    return f"{len(fitted.n)} runs of {sizes} sizes and {tokens} token counts"


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
