"""Loss laws L(N, D) = E + A / N^alpha + B / D^beta: fits that find the optimum, and what they are worth (no jax).

How. For given exponents the law is linear in (E, A, B), so the search starts from a grid of exponents with non-negative
least squares in each cell (variable projection: Czech et al., arXiv:2603.22339, where the parabolas of isoFLOP analysis
are shown to be biased). The best cells start a quasi-Newton search, with analytic gradients, for the objective of
Hoffmann et al. (arXiv:2203.15556, approach 3): the sum (not the mean, whose small scale stopped their own search early,
Besiroglu et al., arXiv:2404.10102) over runs of Huber(delta = 1e-3) of the residual ln L - LSE(a - alpha ln N,
b - beta ln D, e). One search runs many problems at a time: starts and bootstrap draws are rows of one array.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from phi3_jax.errors import UserError

DELTA = 1e-3  # of the Huber loss on log residuals
SQUARES = 1e6  # a delta beyond every residual: least squares
GRID = np.arange(0.05, 1.21, 0.05)  # of exponents
STARTS = 24
NAMES = ("E", "A", "B", "alpha", "beta")
_CHUNK = 512  # problems searched at a time, so that their residuals stay in cache


@dataclasses.dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta in the units of N and D that it was fitted in."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        """Loss at N and D (any shapes that broadcast)."""
        return self.E + self.A / np.asarray(n, float) ** self.alpha + self.B / np.asarray(d, float) ** self.beta

    @property
    def a(self) -> float:
        """Exponent of the compute-optimal size, N ~ C^a: beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, flops: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """(N, D) of least loss at C = 6 N D FLOPs (Hoffmann et al., equation 4)."""
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        n = g * (np.asarray(flops, float) / 6) ** self.a
        return n, np.asarray(flops, float) / 6 / n


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law with its data and how the search ended.

    Attributes:
      law: the best law found.
      objective: its sum of Huber losses.
      n, d, loss: (runs,) what it was fitted to.
      optima: (starts, 6) objective and E, A, B, alpha, beta of every start's end, best first: their spread shows whether
        the optimum is one.
      condition: condition number of the Gauss-Newton matrix in (ln A, ln B, ln E, alpha, beta), ln N and ln D centred.
      edges: names of parameters that ended at a bound (E, A or B at 0, an exponent outside the grid).
    """

    law: Law
    objective: float
    n: np.ndarray
    d: np.ndarray
    loss: np.ndarray
    optima: np.ndarray
    condition: float
    edges: tuple[str, ...]

    @property
    def residuals(self) -> np.ndarray:
        """(runs,) ln L - ln prediction."""
        return np.log(self.loss) - np.log(self.law(self.n, self.d))


def check(n: ArrayLike, d: ArrayLike, loss: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three as arrays.

    Raises:
      UserError: lengths that differ, values that are no positive number, too few runs, sizes or token counts for five
        parameters, or a loss that rises with size or tokens.
    """
    arrays = [np.asarray(x, float) for x in (n, d, loss)]
    if len({a.shape for a in arrays}) > 1 or arrays[0].ndim != 1:
        raise UserError(
            f"sizes, tokens and losses of {', '.join(str(a.shape) for a in arrays)} must be lists of one length"
        )
    for name, values in zip(("size", "token count", "loss"), arrays, strict=True):
        bad = ~(np.isfinite(values) & (values > 0))
        if bad.any():
            raise UserError(
                f"{name} {values[bad][0]} of run {int(bad.argmax()) + 1} is not a positive number; leave it out"
            )
    runs, (count, tokens) = len(arrays[0]), (int(sizes(a).max()) + 1 if len(a) else 0 for a in arrays[:2])
    if runs < 6 or count < 3 or tokens < 3:
        there = f"{runs} run{'s' * (runs != 1)} of {count} size{'s' * (count != 1)}"
        raise UserError(
            f"{there} and {tokens} token count{'s' * (tokens != 1)} do not determine the law's five parameters; it takes 6 "
            "or more runs of 3 or more sizes and 3 or more token counts"
        )
    if risen := _rises(*arrays):
        raise UserError(
            f"the loss rises with {risen}: a law is one of losses, which fall; name the column of a loss, or give 1 minus "
            "a score"
        )
    return arrays[0], arrays[1], arrays[2]


def _rises(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> str:
    """ "size", "tokens", both or "": in which the logarithm of the loss rises, by more than three standard errors."""
    words, columns = ["size", "tokens"], [np.log(n), np.log(d)]
    if in_step(n, d):
        words, columns = ["size and tokens"], columns[:1]
    x = np.column_stack([np.ones(len(n)), *columns])
    inverse = np.linalg.pinv(x)
    slope, left = inverse @ np.log(loss), np.log(loss) - x @ inverse @ np.log(loss)
    error = np.sqrt(np.sum(left**2) / (len(n) - x.shape[1]) * np.square(inverse).sum(1))
    return " and ".join(word for k, word in enumerate(words, 1) if slope[k] > max(3 * error[k], 1e-9))


def in_step(n: np.ndarray, d: np.ndarray) -> bool:
    """Whether tokens are so nearly a power of the size that no runs tell the two apart."""
    return abs(np.corrcoef(np.log(n), np.log(d))[0, 1]) > 0.999


def fit(n: ArrayLike, d: ArrayLike, loss: ArrayLike, delta: float = DELTA, starts: int = STARTS) -> Fit:
    """Fits the law to runs.

    Args:
      n, d, loss: (runs,) parameters, tokens and final loss of each run (not of checkpoints before it).
      delta: of the Huber loss.
      starts: grid cells that the search starts from.

    Raises:
      UserError: see `check`.
    """
    ns, ds, losses = check(n, d, loss)
    problem = Problem(ns, ds, losses, delta)
    theta, value = problem.search(problem.start(starts))
    order = np.argsort(value)
    theta, value = theta[order], value[order]
    laws = [problem.law(t) for t in theta]
    optima = np.array([[v, *dataclasses.astuple(law)] for v, law in zip(value, laws, strict=True)])
    best = laws[0]
    at = at_bounds(middle(ns, ds, optima[:1, 1:]), losses)[0]
    edges = tuple(name for name, hit in zip(NAMES, at, strict=True) if hit)
    jacobian = problem.jacobian(theta[:1])[0]
    condition = float(np.linalg.cond(jacobian.T @ jacobian))
    return Fit(best, float(value[0]), ns, ds, losses, optima, condition, edges)


# ------------------------------------------------------------------------------------------------ what a fit is worth


def bootstrap(
    fitted: Fit, draws: int = 1000, seed: int = 0, clusters: Sequence[object] | None = None, delta: float = DELTA
) -> np.ndarray:
    """Laws fitted to resampled runs, (draws, 5): E, A, B, alpha, beta.

    Runs are drawn with replacement, or with `clusters` (one label per run) whole clusters: the forks of one trunk share its
    noise. A draw that has lost the sizes or token counts that the law needs is drawn again, which makes intervals from few
    clusters a little narrow. Each search starts at the fit's own optimum.

    Raises:
      UserError: fewer than six clusters, or hardly any draw keeps what the law needs.
    """
    labels = np.arange(len(fitted.n)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    groups, rng = int(labels.max()) + 1, np.random.default_rng(seed)
    weights = np.empty((0, len(labels)))
    for _ in range(20):
        if len(weights) >= draws or groups < 6:
            break
        counts = rng.multinomial(groups, np.full(groups, 1 / groups), size=draws)[:, labels].astype(float)
        weights = np.concatenate([weights, counts[_determined(fitted, counts > 0)]])
    if len(weights) < draws:
        raise UserError(
            f"{groups} clusters are too few to resample: 6 or more are needed, and draws that keep three sizes and three "
            "token counts; add seeds or sizes, or leave the clusters out"
        )
    problem = Problem(fitted.n, fitted.d, fitted.loss, delta)
    start = np.repeat(problem.theta(fitted.law)[None], draws, axis=0)
    theta, _ = problem.search(start, weights[:draws])
    return np.array([dataclasses.astuple(problem.law(t)) for t in theta])


def _determined(fitted: Fit, drawn: np.ndarray) -> np.ndarray:
    """Which draws (draws, runs) of bool keep six runs, three sizes and three token counts."""
    enough = drawn.sum(1) >= 6
    for label in (sizes(fitted.n), sizes(fitted.d)):
        seen = np.stack([drawn[:, label == k].any(1) for k in range(label.max() + 1)], axis=1)
        enough &= seen.sum(1) >= 3
    return enough


def middle(n: np.ndarray, d: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Laws (K, 5) with the terms of A and B at the middle of the runs in place of A and B."""
    with np.errstate(divide="ignore", over="ignore"):
        a = np.exp(np.log(found[:, 1]) - found[:, 3] * np.log(n).mean())
        b = np.exp(np.log(found[:, 2]) - found[:, 4] * np.log(d).mean())
    return np.column_stack([found[:, 0], a, b, found[:, 3:]])


def at_bounds(terms: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """(K, 5) of bool: E or a term next to nothing, an exponent outside the grid."""
    exponents = terms[:, 3:]
    return np.column_stack([terms[:, :3] < 1e-4 * loss.min(), (exponents <= 0.01) | (exponents >= 2)])


def interval(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval over the first axis."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def predict(
    fitted: Fit, laws: np.ndarray, n: np.ndarray, d: np.ndarray, level: float = 0.95, seed: int = 0
) -> dict[str, np.ndarray]:
    """Loss at new N and D (points,): `value`, and two intervals that say different things.

    `confidence_low/high`: where the law itself lies, over the bootstrapped `laws` (draws, 5). `low/high`: where a new run
    lands; a residual of the fit, widened by sqrt(runs / (runs - 5)) for the five fitted parameters, is added to each draw.
    """
    n, d = np.atleast_1d(np.asarray(n, float)), np.atleast_1d(np.asarray(d, float))
    curves = np.array([Law(*law)(n, d) for law in laws])
    runs = len(fitted.n)
    widened = fitted.residuals * math.sqrt(runs / max(1, runs - 5))
    noise = np.random.default_rng(seed).choice(widened, size=curves.shape)
    (c_low, c_high), (low, high) = interval(curves, level), interval(curves * np.exp(noise), level)
    return {"value": fitted.law(n, d), "confidence_low": c_low, "confidence_high": c_high, "low": low, "high": high}


def leave_one_size_out(fitted: Fit, delta: float = DELTA) -> list[tuple[float, float]]:
    """[(size, mean of ln measured - ln predicted)]: each size predicted by a fit to the others; too few sizes: []."""
    out = []
    label = sizes(fitted.n)
    for size in np.unique(label) if label.max() > 2 else ():
        rest = label != size
        try:
            other = fit(fitted.n[rest], fitted.d[rest], fitted.loss[rest], delta)
        except UserError:  # too little is left to say anything
            continue
        error = np.log(fitted.loss[~rest]) - np.log(other.law(fitted.n[~rest], fitted.d[~rest]))
        out.append((float(np.exp(np.log(fitted.n[~rest]).mean())), float(error.mean())))
    return out


def sizes(n: np.ndarray, gap: float = 0.02) -> np.ndarray:
    """Number of the size of each run, (runs,) from 0 up: values within 2 % of a neighbour are one size."""
    order = np.argsort(n)
    label = np.concatenate([[0], np.cumsum(np.diff(np.log(n[order])) > gap)])
    out = np.empty(len(n), int)
    out[order] = label
    return out


def trends(fitted: Fit) -> dict[str, float]:
    """Correlation of the residuals with ln N, ln D and ln(D / N): far from 0, the law's form does not hold."""
    columns = {"ln N": np.log(fitted.n), "ln D": np.log(fitted.d), "ln D/N": np.log(fitted.d / fitted.n)}
    return {name: float(np.corrcoef(x, fitted.residuals)[0, 1]) if np.ptp(x) else 0.0 for name, x in columns.items()}


# ------------------------------------------------------------------------------------------------ isoFLOP parabolas


@dataclasses.dataclass(frozen=True)
class Parabola:
    """One budget of an isoFLOP analysis: L = c0 + c1 x + c2 x^2 in x = ln N, and its vertex."""

    flops: float
    coefficients: tuple[float, float, float]
    n: float
    loss: float
    inside: bool  # whether the vertex lies within the sizes tried


def parabolas(flops: np.ndarray, n: np.ndarray, loss: np.ndarray) -> list[Parabola]:
    """Vertices of parabolas in ln N at each budget with three sizes or more (Hoffmann et al., approach 2).

    A picture, not an estimate: the vertex is biased by wide or off-centre grids and by alpha != beta even without noise
    (arXiv:2603.22339); `parabola_bias` measures by how much on a known law.
    """
    out = []
    for budget in np.unique(flops):
        here = flops == budget
        if len(np.unique(n[here])) < 3:
            continue
        x = np.log(n[here])
        c2, c1, c0 = np.polyfit(x - x.mean(), loss[here], 2)
        if c2 <= 0:
            continue
        vertex = -c1 / (2 * c2)
        inside = x.min() <= vertex + x.mean() <= x.max()
        m = x.mean()
        whole = (c0 - c1 * m + c2 * m * m, c1 - 2 * c2 * m, c2)
        out.append(Parabola(float(budget), whole, math.exp(vertex + m), float(c0 - c1 * c1 / (4 * c2)), bool(inside)))
    return out


def parabola_bias(law: Law, flops: np.ndarray, n: np.ndarray) -> tuple[float, float]:
    """(exponent a of the vertices, exponent a of the law) where `law` holds exactly at the sizes and budgets given."""
    found = parabolas(flops, n, law(n, flops / 6 / n))
    return power_law(np.array([p.flops for p in found]), np.array([p.n for p in found]))[0], law.a


def power_law(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """(exponent, coefficient) of y = coefficient x^exponent by weighted least squares on logarithms."""
    weights = np.ones_like(x, float) if weights is None else np.asarray(weights, float)
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1, w=np.sqrt(weights))
    return float(slope), float(math.exp(intercept))


# ------------------------------------------------------------------------------------------------ the search


class Problem:
    """The objective of many parameter vectors at a time: theta (K, 5) = a, b, e, alpha, beta with centred ln N, ln D."""

    def __init__(self, n: np.ndarray, d: np.ndarray, loss: np.ndarray, delta: float) -> None:
        self.ln_n, self.ln_d, self.ln_loss, self.delta = np.log(n), np.log(d), np.log(loss), delta
        self.x, self.y = self.ln_n - self.ln_n.mean(), self.ln_d - self.ln_d.mean()

    def law(self, theta: np.ndarray) -> Law:
        a, b, e, alpha, beta = (float(t) for t in theta)
        a, b = a + alpha * self.ln_n.mean(), b + beta * self.ln_d.mean()
        e, a, b = (math.exp(min(v, 700.0)) for v in (e, a, b))
        return Law(e, a, b, alpha, beta)

    def theta(self, law: Law) -> np.ndarray:
        tiny = 1e-300
        a, b = (math.log(max(v, tiny)) for v in (law.A, law.B))
        e = math.log(max(law.E, tiny))
        return np.array([a - law.alpha * self.ln_n.mean(), b - law.beta * self.ln_d.mean(), e, law.alpha, law.beta])

    def _terms(self, theta: np.ndarray) -> np.ndarray:
        """(3, K, runs) logarithms of the law's terms."""
        a, b, e, alpha, beta = theta.T[:, :, None]
        return np.stack([a - alpha * self.x, b - beta * self.y, np.broadcast_to(e, (len(theta), len(self.x)))])

    def value_and_grad(self, theta: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Objective (K,) and gradient (K, 5)."""
        shares, r = self._shares(theta)
        size = np.abs(r)
        huber = np.where(size <= self.delta, 0.5 * r * r, self.delta * (size - 0.5 * self.delta))
        slope = np.clip(r, -self.delta, self.delta)
        if weights is not None:
            huber, slope = huber * weights, slope * weights
        s = shares * slope
        sums = s.sum(-1)
        grad = np.stack([sums[0], sums[1], sums[2], -(s[0] @ self.x), -(s[1] @ self.y)], axis=1)
        return huber.sum(-1), grad

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        """ln prediction - ln loss, (K, runs)."""
        return self._shares(theta)[1]

    def _shares(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shares of the three terms (3, K, runs) and residuals prediction - measured (K, runs), in logarithms."""
        terms = self._terms(theta)
        top = terms.max(0)
        parts = np.exp(terms - top)
        total = parts.sum(0)
        return parts / total, top + np.log(total) - self.ln_loss

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        """d ln prediction / d theta, (K, runs, 5)."""
        p, _ = self._shares(theta)
        return np.stack([p[0], p[1], p[2], -p[0] * self.x, -p[1] * self.y], axis=-1)

    def start(self, starts: int) -> np.ndarray:
        """The best cells of the grid of exponents, with non-negative least squares for E, A and B in each: (starts, 5)."""
        alpha, beta = (g.ravel() for g in np.meshgrid(GRID, GRID, indexing="ij"))
        columns = np.stack(
            [np.ones((len(alpha), len(self.x))), np.exp(-alpha[:, None] * self.x), np.exp(-beta[:, None] * self.y)]
        )
        columns = columns / np.exp(self.ln_loss)  # relative residuals
        linear, value = _nnls(np.moveaxis(columns, 0, -1))
        best = np.argsort(value)[:starts]
        floor = 1e-3 * np.exp(self.ln_loss.min())
        e, a, b = np.log(np.maximum(linear[best], floor)).T
        return np.stack([a, b, e, alpha[best], beta[best]], axis=1)

    def search(self, start: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ends (K, 5) and objectives (K,) of BFGS from each start."""
        theta, value = np.empty_like(start), np.empty(len(start))
        for at in range(0, len(start), _CHUNK):
            part = slice(at, at + _CHUNK)
            theta[part], value[part] = self._bfgs(start[part], None if weights is None else weights[part])
        return theta, value

    def _bfgs(self, theta: np.ndarray, weights: np.ndarray | None, steps: int = 400) -> tuple[np.ndarray, np.ndarray]:
        """Quasi-Newton with a backtracking line search, each row on its own; rows that have ended are left out."""
        theta = theta.copy()
        value, grad = self.value_and_grad(theta, weights)
        inverse = self._first_inverse(theta, weights)
        restarted = np.zeros(len(theta), bool)
        live = np.arange(len(theta))
        for _ in range(steps):
            if not len(live):
                break
            t, g, h = theta[live], grad[live], inverse[live]
            w = None if weights is None else weights[live]
            direction = -np.einsum("kij,kj->ki", h, g)
            slope = np.einsum("ki,ki->k", direction, g)
            uphill = slope >= 0
            direction[uphill], slope[uphill] = -g[uphill], -np.square(g[uphill]).sum(1)
            step, new, new_value, new_grad = self._line(t, value[live], direction, slope, w)
            moved = step > 0
            s, y = new - t, new_grad - g
            sy = np.einsum("ki,ki->k", s, y)
            good = moved & (sy > 1e-14 * np.sqrt(np.square(s).sum(1) * np.square(y).sum(1)) + 1e-300)
            h[good] = _update(h[good], s[good], y[good], sy[good])
            gain = value[live] - new_value
            theta[live], value[live], grad[live], inverse[live] = new, new_value, new_grad, h
            small = gain <= 1e-13 * np.abs(new_value) + 1e-300
            # A row that stalls is given a fresh metric once; the second time it has ended.
            again = small & ~restarted[live]
            if again.any():
                rows = live[again]
                inverse[rows] = self._first_inverse(theta[rows], None if weights is None else weights[rows])
                restarted[rows] = True
            restarted[live[~small]] = False
            live = live[~small | again]
        return theta, value

    def _first_inverse(self, theta: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        """Inverse of the reweighted Gauss-Newton matrix: Huber's curvature as delta / max(|residual|, delta)."""
        p, r = self._shares(theta)
        j = np.stack([p[0], p[1], p[2], -p[0] * self.x, -p[1] * self.y], axis=-1)
        curvature = self.delta / np.maximum(np.abs(r), self.delta)
        curvature = curvature if weights is None else curvature * weights
        matrix = np.einsum("kni,kn,knj->kij", j, curvature, j)
        trace = np.trace(matrix, axis1=1, axis2=2)[:, None, None]
        return np.linalg.inv(matrix + 1e-9 * trace * np.eye(5))

    def _line(
        self, theta: np.ndarray, value: np.ndarray, direction: np.ndarray, slope: np.ndarray, weights: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Backtracking from a full step to one that lowers the objective enough; step 0 where none does."""
        limit = np.minimum(1.0, 2.0 / np.maximum(np.abs(direction).max(1), 1e-12))
        step, best = limit.copy(), np.zeros_like(limit)
        new, new_value = theta.copy(), value.copy()
        new_grad = np.zeros_like(theta)
        todo = np.arange(len(theta))
        for _ in range(30):
            at = theta[todo] + step[todo, None] * direction[todo]
            v, g = self.value_and_grad(at, None if weights is None else weights[todo])
            ok = v <= value[todo] + 1e-4 * step[todo] * slope[todo]
            rows = todo[ok]
            new[rows], new_value[rows], new_grad[rows], best[rows] = at[ok], v[ok], g[ok], step[rows]
            todo = todo[~ok]
            if not len(todo):
                break
            step[todo] *= 0.4
        if len(todo):
            new_grad[todo] = self.value_and_grad(theta[todo], None if weights is None else weights[todo])[1]
        return best, new, new_value, new_grad


def _update(h: np.ndarray, s: np.ndarray, y: np.ndarray, sy: np.ndarray) -> np.ndarray:
    """BFGS update of the inverse metrics (K, 5, 5)."""
    rho = 1 / sy
    hy = np.einsum("kij,kj->ki", h, y)
    yhy = np.einsum("ki,ki->k", y, hy)
    cross = s[:, :, None] * hy[:, None, :]
    outer = s[:, :, None] * s[:, None, :]
    return h - rho[:, None, None] * (cross + cross.transpose(0, 2, 1)) + (rho**2 * yhy + rho)[:, None, None] * outer


def _nnls(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative least squares of columns (K, runs, 3) to 1: coefficients (K, 3) and sums of squares (K,).

    With three unknowns the active sets can be tried one by one: the best feasible of the eight is the solution.
    """
    gram = np.einsum("kni,knj->kij", columns, columns)
    right = columns.sum(1)
    runs = columns.shape[1]
    best, value = np.zeros((len(columns), 3)), np.full(len(columns), float(runs))
    for size in (1, 2, 3):
        for chosen in itertools.combinations(range(3), size):
            pick = list(chosen)
            g = gram[:, pick][:, :, pick]
            g = g + 1e-12 * np.trace(g, axis1=1, axis2=2)[:, None, None] * np.eye(size)
            x = np.linalg.solve(g, right[:, pick][..., None])[..., 0]
            v = runs - np.einsum("ki,ki->k", x, right[:, pick])
            better = (x >= 0).all(1) & (v < value)
            value[better] = v[better]
            best[better] = 0
            best[np.ix_(better, pick)] = x[better]
    return best, value
