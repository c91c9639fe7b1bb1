"""Further laws: over-training, repeated data, equal exponents, task loss to accuracy, and mixtures (numpy and scipy)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from scipy import interpolate, optimize

from phi3_jax.errors import UserError


def best_curve(
    form: Callable[..., np.ndarray],
    x: np.ndarray | tuple[np.ndarray, ...],
    y: np.ndarray,
    starts: Sequence[Sequence[float]],
    **options: object,
) -> np.ndarray:
    """Parameters of the least-squares fit with the smallest residual over several starts (scipy's curve_fit).

    Raises:
      UserError: no start converges.
    """
    best, value = None, np.inf
    for start in starts:
        try:
            found, _ = optimize.curve_fit(form, x, y, p0=start, maxfev=20_000, **options)
        except (RuntimeError, ValueError):  # this start does not converge
            continue
        residual = float(np.square(form(x, *found) - y).sum())
        if residual < value:
            best, value = found, residual
    if best is None:
        raise UserError(f"no fit of {form.__name__} to {len(y)} points converges; look at the points, or give more")
    return best


# ------------------------------------------------------------------------------------------------ over-training


@dataclasses.dataclass(frozen=True)
class OverTraining:
    """L(N, M) = alpha N^c + beta 6^(c / 2) (M N)^c + E with M = D / N tokens per parameter and one exponent c < 0.

    The law of Gadre et al. (arXiv:2403.08540) as their code fits it; the factor 6^(c / 2) only scales beta.
    """

    alpha: float
    beta: float
    c: float
    E: float

    def __call__(self, n: np.ndarray | float, m: np.ndarray | float) -> np.ndarray:
        """Loss at N parameters and M tokens per parameter."""
        return _over_training((np.asarray(n, float), np.asarray(m, float)), self.alpha, self.beta, self.c, self.E)


def _over_training(x: tuple[np.ndarray, np.ndarray], alpha: float, beta: float, c: float, e: float) -> np.ndarray:
    n, m = x
    return alpha * n**c + beta * 6 ** (c / 2) * (m * n) ** c + e


def fit_over_training(n: np.ndarray, m: np.ndarray, loss: np.ndarray) -> OverTraining:
    """Least squares on the loss, with a start for each of a grid of exponents (linear there in the other three)."""
    starts = []
    for c in np.arange(-0.6, -0.04, 0.05):
        columns = np.stack([n**c, 6 ** (c / 2) * (m * n) ** c, np.ones_like(n)], axis=1)
        a, b, e = optimize.nnls(columns, loss)[0]
        starts.append((a, b, c, e))
    return OverTraining(*(float(p) for p in best_curve(_over_training, (n, m), loss, starts)))


def error_law(loss: np.ndarray, eps: float, k: float, gamma: float) -> np.ndarray:
    """Downstream top-1 error of a model: eps - k exp(-gamma L) (Gadre et al., equation 5)."""
    return eps - k * np.exp(np.minimum(-gamma * loss, 500.0))


def fit_error_law(loss: np.ndarray, error: np.ndarray) -> np.ndarray:
    """(eps, k, gamma) by least squares."""
    starts = [(float(error.max()), k, gamma) for gamma in (0.2, 0.5, 1.0, 2.0) for k in (0.5, 1.0, 2.0, 5.0)]
    return best_curve(error_law, loss, error, starts)


# ------------------------------------------------------------------------------------------------ repeated data

# Muennighoff et al. (arXiv:2305.16264): how fast repeated tokens, and parameters beyond what the data support, lose value.
R_D, R_N = 15.387756, 5.309743


def effective_tokens(tokens: np.ndarray, unique: np.ndarray, r_star: float = R_D) -> np.ndarray:
    """Fresh tokens that `tokens` of `unique` ones are worth: U + U R* (1 - exp(-R / R*)), R = D / U - 1 repetitions."""
    tokens, unique = np.asarray(tokens, float), np.minimum(unique, tokens)
    return unique + unique * r_star * (1 - np.exp(-(tokens / unique - 1) / r_star))


def data_constrained(
    n: np.ndarray, tokens: np.ndarray, unique: np.ndarray, A: float, B: float, E: float, alpha: float, beta: float,
    r_d: float = R_D, r_n: float = R_N,
) -> np.ndarray:  # fmt: skip
    """Loss E + A / N'^alpha + B / D'^beta with effective tokens D', and parameters N' beyond the unique tokens' optimum.

    The optimum N_U of U unique tokens solves the law's own trade-off: N_U = G (U G)^(beta / alpha) with
    G = (alpha A / (beta B))^(1 / (alpha + beta)). N' = N_U + N_U R_N* (1 - exp(-R_N / R_N*)) with R_N = N / N_U - 1, or N
    where N is smaller than N_U.
    """
    n, tokens = np.asarray(n, float), np.asarray(tokens, float)
    unique = np.minimum(unique, tokens)
    g = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    supported = np.minimum((unique * g) ** (beta / alpha) * g, n)
    n_effective = supported + supported * r_n * (1 - np.exp(-(n / supported - 1) / r_n))
    return E + A / n_effective**alpha + B / effective_tokens(tokens, unique, r_d) ** beta


# ------------------------------------------------------------------------------------------------ task scaling


def sigmoid(loss: np.ndarray, a: float, x0: float, k: float, b: float) -> np.ndarray:
    """Accuracy of a task from its loss: a / (1 + exp(-k (L - x0))) + b, a < 0 where loss and accuracy go apart."""
    return a / (1 + np.exp(-k * (loss - x0))) + b


def fit_sigmoid(loss: np.ndarray, accuracy: np.ndarray, ideal: bool = True) -> np.ndarray:
    """(a, x0, k, b) of `sigmoid`, with a perfect model (loss 0, accuracy 1) as one point more (arXiv:2412.04403).

    No accuracy is above 1: b lies in 0..1, a in -1..0.
    """
    if ideal:
        loss, accuracy = np.append(loss, 0.0), np.append(accuracy, 1.0)
    low, span = float(np.min(accuracy)), float(np.max(accuracy) - np.min(accuracy))
    middle = float(np.median(loss))
    starts = [
        (-s, x, k, 1.0) for s in (min(span, 1.0), 1 - low) for x in (0.8 * middle, middle) for k in (1.0, 3.0, 8.0)
    ]
    limits = ([-1, 0, 0, 0], [0, np.inf, np.inf, 1])
    return best_curve(sigmoid, loss, accuracy, starts, bounds=limits)


# ------------------------------------------------------------------------------------------------ isoFLOP optima


def akima_minimum(n: np.ndarray, loss: np.ndarray, points: int = 25) -> tuple[float, float] | None:
    """(N, loss) at the least loss of an Akima curve through ln loss over ln N; None where it lies at an edge.

    Porian et al. (arXiv:2406.19146), who lay `points` into every interval between sizes.
    """
    order = np.argsort(n)
    x, y = np.log(n[order]), np.log(loss[order])
    if len(x) < 3:
        return None
    fine = np.unique(np.concatenate([np.linspace(a, b, points) for a, b in itertools.pairwise(x)]))
    curve = interpolate.Akima1DInterpolator(x, y)(fine)
    best = int(np.argmin(curve))
    if best in (0, len(fine) - 1):
        return None
    return float(np.exp(fine[best])), float(np.exp(curve[best]))


# ------------------------------------------------------------------------------------------------ mixtures


@dataclasses.dataclass(frozen=True)
class MixtureLaw:
    """L = c + exp(t . r): loss of one domain under mixture shares r that sum to 1 (Ye et al., arXiv:2403.16952)."""

    c: float
    t: np.ndarray

    def __call__(self, shares: np.ndarray) -> np.ndarray:
        """Loss (mixtures,) of shares (mixtures, domains)."""
        return self.c + np.exp(np.asarray(shares, float) @ self.t)


def fit_mixture(shares: np.ndarray, loss: np.ndarray, scale: float = 0.01) -> MixtureLaw:
    """Robust least squares (Huber beyond `scale` nats) of the law on mixtures (mixtures, domains) and their losses."""
    shares, loss = np.asarray(shares, float), np.asarray(loss, float)
    if len(loss) < shares.shape[1] + 2:
        raise UserError(
            f"{len(loss)} mixtures of {shares.shape[1]} domains do not determine a mixture law; it needs "
            f"{shares.shape[1] + 2} or more"
        )

    def residuals(p: np.ndarray) -> np.ndarray:
        return p[0] + np.exp(shares @ p[1:]) - loss

    start = np.r_[0.9 * loss.min(), np.full(shares.shape[1], np.log(0.1 * loss.min()))]
    found = optimize.least_squares(residuals, start, loss="huber", f_scale=scale, max_nfev=2000).x
    return MixtureLaw(float(found[0]), found[1:])
