"""How much of "much less from 7B to 14B" survives statistics: gains per doubling of the published benchmarks.

Gains are per doubling of parameters or of training compute (C = 6 N D at the published budgets). Scores are binomial with
public test-set sizes; no per-item results are published, so the models' errors are taken as independent, which is
conservative for shared items. The formulas stand in `phi3_jax/statistics.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from phi3_jax import statistics
from phi3_jax.scaling import published
from phi3_jax.scaling.laws import Law
from phi3_jax.scaling.published import Benchmark

SCALES = ("points", "logit", "exponent")
PER = {"N": published.SIZES, "C": published.FLOPS}
# Hoffmann et al.'s law: at the true minimum for Besiroglu et al.'s points (tests/scaling/test_oracles.py), and as printed.
CHINCHILLA = Law(E=1.81722, A=477.83, B=2143.4, alpha=0.34731, beta=0.36717)
HOFFMANN = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)


def normal_p(z: float) -> float:
    """Two-sided p-value of a normal z."""
    return float(2 * special.ndtr(-abs(z)))


def on_scale(b: Benchmark, scale: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores (3,) of a benchmark and their variances on "points" (percent), "logit" (above chance) or "exponent".

    "exponent" is -log2(1 - p): its gain per doubling of N is the exponent of error ~ N^-kappa, the axis of the report's
    Figure 3.
    """
    p = np.array(b.scores)
    variance = p * (1 - p) / b.n
    if scale == "points":
        return 100 * p, 1e4 * variance
    name = {"logit": "logit", "exponent": "error_exponent"}[scale]
    return statistics.to_scale(p, variance, name, chance=b.chance)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Second gain minus first of one benchmark on one scale, with its normal 95 % interval."""

    benchmark: str
    scale: str
    per: str
    first: float
    second: float
    value: float
    stderr: float
    p: float
    holm: float  # p adjusted over the benchmarks of the table

    @property
    def z(self) -> float:
        return self.value / self.stderr

    @property
    def interval(self) -> tuple[float, float]:
        half = 1.959964 * self.stderr
        return self.value - half, self.value + half

    @property
    def weaker(self) -> bool:
        """Whether the second step is significantly weaker after Holm's correction."""
        return self.value < 0 and self.holm < 0.05

    @property
    def stronger(self) -> bool:
        """Whether the second step is significantly stronger after Holm's correction."""
        return self.value > 0 and self.holm < 0.05


def contrasts(rows: Sequence[Benchmark], scale: str = "points", per: str = "N") -> list[Contrast]:
    """The contrast of every benchmark, with Holm's correction over them (Holm 1979)."""
    found = []
    for b in rows:
        scores, variances = on_scale(b, scale)
        found.append((b.name, statistics.gain_per_doubling(scores, PER[per], variances)))
    p = np.array([normal_p(g.z) for _, g in found])
    adjusted = holm(p)
    return [
        Contrast(name, scale, per, g.first, g.second, g.contrast, g.contrast_stderr, float(p[i]), float(adjusted[i]))
        for i, (name, g) in enumerate(found)
    ]


def holm(p: np.ndarray) -> np.ndarray:
    """Holm-adjusted p-values, in the order given."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    out = np.empty(len(p))
    out[order] = np.minimum(1.0, stepped)
    return out


@dataclasses.dataclass(frozen=True)
class Summary:
    """All benchmarks together: plain mean with its SE over benchmarks, median, how many are negative, pooled mean."""

    count: int
    mean: float
    stderr: float
    median: float
    negative: int
    sign_p: float  # two-sided, against the share of other families
    base_rate: float
    pooled: float  # random-effects mean
    pooled_stderr: float
    between_sd: float  # of the true contrasts, beyond sampling


def base_rate() -> float:
    """Share of other families' size triples whose second gain per doubling is smaller than the first."""
    rows = published.families()
    return float(np.mean([row["second"] < row["first"] for row in rows]))


def summary(found: Sequence[Contrast]) -> Summary:
    """The benchmarks as a sample.

    The pooled mean is DerSimonian and Laird's random-effects estimate. The sign test asks whether more contrasts are
    negative than in other families (`base_rate`), not than one half; it takes benchmarks as independent, which they
    are not, so that its p is too small.
    """
    values, errors = np.array([c.value for c in found]), np.array([c.stderr for c in found])
    rate, negative, k = base_rate(), int((values < 0).sum()), len(values)
    chances = np.array([math.comb(k, i) * rate**i * (1 - rate) ** (k - i) for i in range(k + 1)])
    sign_p = float(chances[chances <= chances[negative] * (1 + 1e-9)].sum())
    weights = 1 / errors**2
    fixed = np.sum(weights * values) / weights.sum()
    q = float(np.sum(weights * (values - fixed) ** 2))
    between = max(0.0, (q - (k - 1)) / (weights.sum() - np.sum(weights**2) / weights.sum()))
    random = 1 / (errors**2 + between)
    return Summary(
        k, float(values.mean()), float(values.std(ddof=1) / math.sqrt(k)), float(np.median(values)), negative, sign_p, rate,
        float(np.sum(random * values) / random.sum()), float(1 / math.sqrt(random.sum())), math.sqrt(between),
    )  # fmt: skip


def equivalent(c: Contrast, margin: float, level: float = 0.05) -> bool:
    """Whether two one-sided tests place the contrast within +- margin (in the scale's unit) at `level`."""
    z = special.ndtri(1 - level)
    return c.value - z * c.stderr > -margin and c.value + z * c.stderr < margin


# ------------------------------------------------------------------------------------------------ what is expected anyway


def null_ratio(law: Law = CHINCHILLA, tokens: Sequence[float] = published.TOKENS, per_doubling: bool = False) -> float:
    """Loss saved from 7B to 14B over loss saved from 3.8B to 7B by a law that knows nothing of mixtures.

    At the published budgets, or at `tokens`; per doubling of N where asked. The law is read far outside its fit.
    """
    loss = law(np.array(published.SIZES), np.array(tokens))
    first, second = loss[0] - loss[1], loss[1] - loss[2]
    d1, d2 = np.diff(np.log2(published.SIZES))
    return float(second / d2 / (first / d1) if per_doubling else second / first)


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """A contrast per doubling of N, in points, as four parts that sum to it.

    compute: the first step took 1.49 doublings of compute, the second 0.92, in about as many doublings of parameters.
      If points came with compute at the benchmark's own average rate over both steps, this much of the contrast would
      follow: rate x (c2 / d2 - c1 / d1).
    ceiling: on the logit scale above chance equal gains are smaller gains in points near the top. It is the contrast in
      points, beyond the compute part, of the curve with the same ends (mini, medium) and logit gains in proportion to
      compute.
    recipe: phi-3-small has a recipe of its own, mini and medium share one. Where the middle point lies off that curve,
      by the median deviation of its skill group, the contrast moves by -deviation (1 / d1 + 1 / d2). The median, because
      one outlier (MATH, TriviaQA) would give its own deviation to its whole group.
    remainder: the benchmark's own deviation beyond its group's: what is left to the data mixture, and to noise.
    """

    benchmark: str
    compute: float
    ceiling: float
    recipe: float
    remainder: float
    total: float
    stderr: float


def decompose(rows: Sequence[Benchmark]) -> list[Decomposition]:
    """The split of every benchmark.

    It is a description under assumptions, not an identification: three points cannot tell the middle model's recipe from a
    change of slope; the group's median is taken as recipe because a data optimum would have to fail alike on all of a
    group's benchmarks to look the same.
    """
    d1, d2 = np.diff(np.log2(published.SIZES))
    c1, c2 = np.diff(np.log2(published.FLOPS))
    found: dict[str, tuple[float, float, float]] = {}
    for b in rows:
        points, _ = on_scale(b, "points")
        rate = (points[2] - points[0]) / (c1 + c2)
        logit, _ = on_scale(b, "logit")
        middle = logit[0] + (logit[2] - logit[0]) * c1 / (c1 + c2)
        on_curve = 100 * (b.chance + (1 - b.chance) / (1 + math.exp(-middle)))
        compute = rate * (c2 / d2 - c1 / d1)
        curve = (points[2] - on_curve) / d2 - (on_curve - points[0]) / d1
        found[b.name] = compute, curve - compute, points[1] - on_curve
    groups: dict[str, list[float]] = {}
    for b in rows:
        groups.setdefault(b.group, []).append(found[b.name][2])
    out = []
    for b, c in zip(rows, contrasts(rows), strict=True):
        compute, ceiling, off = found[b.name]
        shared = float(np.median(groups[b.group]))
        recipe = -shared * (1 / d1 + 1 / d2)
        remainder = -(off - shared) * (1 / d1 + 1 / d2)
        out.append(Decomposition(b.name, compute, ceiling, recipe, remainder, c.value, c.stderr))
    return out


@dataclasses.dataclass(frozen=True)
class Answer:
    """Benchmarks whose second step is weaker, and those whose second step is stronger, after Holm's correction."""

    weaker: list[str]
    stronger: list[str]


def answer(rows: Sequence[Benchmark]) -> Mapping[tuple[str, str], Answer]:
    """{(scale, per): the benchmarks that differ}."""
    out = {}
    for scale, per in itertools.product(SCALES, PER):
        found = contrasts(rows, scale, per)
        out[scale, per] = Answer([c.benchmark for c in found if c.weaker], [c.benchmark for c in found if c.stronger])
    return out
