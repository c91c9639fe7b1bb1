"""Scores over seeds with their intervals, and gains per doubling of parameters between the sizes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import special

from phi3_jax import statistics
from phi3_jax.data.corpora.facts import ATTRIBUTES
from phi3_jax.errors import UserError
from phi3_jax.family import TRIO
from phi3_jax.records.table import Run
from phi3_jax.scaling import noise
from phi3_jax.scaling.endpoints import Endpoint, endpoints, plotted_losses
from phi3_jax.statistics import Estimate
from phi3_jax.units import number

NORMAL = 1.959964  # two-sided 95% quantile
FREE = 4  # degrees of freedom from which a measured noise between seeds is used


@dataclasses.dataclass(frozen=True)
class Cell:
    """One endpoint of one size at one budget: mean over seeds with a 95% interval (None: unknown).

    `item_se` is the standard error from the sampling of test items; `by_seed` holds each seed's own value.
    """

    member: str
    size: float
    tokens: float
    budget: str
    value: float
    low: float | None
    high: float | None
    item_se: float | None
    by_seed: dict[int, float]
    n: int | None
    chance: float | None


@dataclasses.dataclass(frozen=True)
class Gain:
    """Gains per doubling of parameters mini -> small and small -> medium, and second minus first.

    Positive is better: a falling loss counts as a gain. In points of a percent for shares (`scale` "points"),
    in log-odds ("logit"), else in the endpoint's unit ("unit").
    """

    endpoint: Endpoint
    budget: str
    scale: str
    first: Estimate
    second: Estimate
    contrast: Estimate
    seeds: int


def _item_error(row: dict[str, Any]) -> float | None:
    """Standard error over items; never below what the row's interval says, as none is zero at 0 or 100%."""
    own, low, high = (number(row.get(k)) for k in ("stderr", "low", "high"))
    from_interval = None if low is None or high is None else (high - low) / (2 * NORMAL)
    known = [e for e in (own, from_interval) if e is not None]
    return max(known) if known else None


def _mean(values: list[float], item_error: float | None) -> Estimate:
    """Mean over seeds; the 95% half-widths of seeds (Student's t) and of items (normal) are added in quadrature.

    The items are the same for every seed, so their error does not shrink with the number of seeds. Of one seed the
    interval covers items alone; it is nan where their error is not known either.
    """
    over = statistics.over_seeds(values)
    parts = [(over.stderr, over.high - over.value)] if len(values) > 1 else []
    parts += [(item_error, NORMAL * item_error)] if item_error is not None else []
    stderr, half = (math.hypot(*column) for column in zip(*parts, strict=True)) if parts else (math.nan, math.nan)
    return Estimate(over.value, stderr, over.value - half, over.value + half, len(values))


def cells(runs: Iterable[Run], endpoint: Endpoint) -> dict[tuple[str, str], Cell]:
    """Final values of an endpoint by (member, budget name), averaged over seeds."""
    groups: dict[tuple[str, str], dict[int, tuple[Run, dict[str, Any]]]] = {}
    for run in runs:
        row = run.finals.get(endpoint.key)
        if row is not None and run.size:
            groups.setdefault((run.member, run.budget_group), {})[run.seed] = (run, row)
    out = {}
    for (member, budget), by_seed in groups.items():
        run, row = next(iter(by_seed.values()))
        values = {seed: float(r["value"]) for seed, (_, r) in sorted(by_seed.items())}
        errors = [e for _, r in by_seed.values() if (e := _item_error(r)) is not None]
        item_se = math.sqrt(sum(e * e for e in errors) / len(errors)) if errors else None
        mean = sum(values.values()) / len(values)
        low, high = number(row.get("low")), number(row.get("high"))
        if len(values) > 1 or low is None or high is None:
            found = _mean(list(values.values()), item_se)
            low, high = (found.low, found.high) if found.known else (None, None)
            if low is not None and high is not None:
                low = max(low, 0.0) if endpoint.proportion or endpoint.down else low
                high = min(high, 1.0) if endpoint.proportion else high
        n = number(row.get("n"))
        out[member, budget] = Cell(
            member, float(run.size or 0), float(run.budget or 0), budget, mean, low, high, item_se, values,
            int(n) if n else None, number(row.get("chance")),
        )  # fmt: skip
    return out


def budgets(found: Iterable[Cell]) -> list[str]:
    """Names of the budgets of some cells, smallest first."""
    largest: dict[str, float] = {}
    for cell in found:
        largest[cell.budget] = max(cell.tokens, largest.get(cell.budget, 0.0))
    return sorted(largest, key=lambda b: (largest[b], b))


def _on_scale(cell: Cell, endpoint: Endpoint, scale: str) -> tuple[dict[int, float], float | None]:
    """Values by seed and variance over items on the scale of a gain: points, log-odds or the unit itself."""
    if scale != "logit":
        factor = (-1.0 if endpoint.down else 1.0) * (100.0 if scale == "points" else 1.0)
        variance = None if cell.item_se is None else (factor * cell.item_se) ** 2
        return {seed: factor * value for seed, value in cell.by_seed.items()}, variance
    edge = 0.5 / ((cell.n or 1000) + 1)  # log-odds of 0 and 1 are infinite
    shares = np.clip(list(cell.by_seed.values()), edge, 1 - edge)
    item = 0.0 if cell.item_se is None else cell.item_se**2
    values, _ = statistics.to_scale(shares, np.zeros_like(shares), "logit")
    _, on_logit = statistics.to_scale(shares.mean(), np.asarray(item), "logit")
    by_seed = dict(zip(cell.by_seed, map(float, values), strict=True))
    return by_seed, None if cell.item_se is None else float(on_logit)


def _over_seeds(values: list[float], item_error: float | None, training: tuple[float, int] | None = None) -> Estimate:
    """Mean of one difference per seed. Of one seed the interval takes its part of training from other runs.

    `training` is (standard deviation between seeds, its degrees of freedom); without it one seed has no interval, which
    would cover items and not training.
    """
    if len(values) > 1 or not training:
        return _mean(values, item_error) if len(values) > 1 else statistics.over_seeds(values)
    (stderr, free), (value,), item = training, values, item_error or 0.0
    half = math.hypot(float(special.stdtrit(free, (1 + statistics.LEVEL) / 2)) * stderr, NORMAL * item)
    return Estimate(value, math.hypot(stderr, item), value - half, value + half, 1)


def _trained_apart(cells: Sequence[Cell], endpoint: Endpoint, scale: str) -> tuple[list[float], int] | None:
    """(variance between seeds of each cell, least degrees of freedom), as `scaling.noise` has measured it; else None."""
    if scale == "logit":
        return None
    try:
        found = [noise.of("/".join(endpoint.key), cell.size, cell.tokens) for cell in cells]
    except UserError:
        return None
    free, factor = min(n.free for n in found), 100.0 if scale == "points" else 1.0
    return ([(factor * n.sd) ** 2 for n in found], free) if free >= FREE else None


@dataclasses.dataclass(frozen=True)
class Difference:
    """One cell minus another over the seeds that both have; positive is better, as in `Gain`."""

    endpoint: Endpoint
    budget: str
    member: str
    value: Estimate
    seeds: int


def difference(first: Cell, second: Cell, endpoint: Endpoint) -> Difference | None:
    """Second minus first, paired by seed, in points of shares and else in the unit; None without a seed in common.

    The errors over items are taken as independent, which is conservative for shared items.
    """
    seeds = sorted(set(first.by_seed) & set(second.by_seed))
    if not seeds:
        return None
    scale = "points" if endpoint.proportion else "unit"
    (a, va), (b, vb) = (_on_scale(c, endpoint, scale) for c in (first, second))
    error = None if va is None or vb is None else math.sqrt(va + vb)
    apart = _trained_apart((first, second), endpoint, scale)
    training = (math.sqrt(sum(apart[0])), apart[1]) if apart else None
    found = _over_seeds([b[s] - a[s] for s in seeds], error, training)
    return Difference(endpoint, second.budget, second.member, found, len(seeds))


def between_arms(first: Iterable[Run], second: Iterable[Run], endpoint: Endpoint) -> list[Difference]:
    """The second arm minus the first, at every size and budget that both have, over the seeds that both have."""
    one, two = cells(first, endpoint), cells(second, endpoint)
    here = sorted((cell for key, cell in two.items() if key in one), key=lambda c: (c.tokens, c.size))
    found = (difference(one[c.member, c.budget], c, endpoint) for c in here)
    return [d for d in found if d]


def between_sizes(runs: Iterable[Run], endpoint: Endpoint) -> list[Difference]:
    """Each size minus the next smaller one at every budget, over the seeds that both have."""
    table = cells(runs, endpoint)
    out = []
    for budget in budgets(table.values()):
        row = sorted((c for c in table.values() if c.budget == budget), key=lambda c: c.size)
        out += [d for a, b in itertools.pairwise(row) if (d := difference(a, b, endpoint))]
    return out


@dataclasses.dataclass(frozen=True)
class Lag:
    """How far the forks of a budget lie behind their trunks at equal tokens: mean of fork minus trunk, in a loss's unit."""

    endpoint: Endpoint
    budget: str
    value: float
    forks: int


def lags(runs: Iterable[Run]) -> list[Lag]:
    """Forks compared with their trunks at the step where the fork ends, where the trunk was evaluated there too."""
    runs = list(runs)
    named = {run.name: run for run in runs}
    found: dict[tuple[Endpoint, str], list[tuple[float, float]]] = {}
    ends = plotted_losses(endpoints(runs))
    for run in runs:
        trunk = named.get(str(run.parent))
        there = {
            (str(r.get("suite")), str(r.get("task")), str(r.get("metric"))): number(r.get("value"))
            for r in (trunk.evals if trunk else [])
            if number(r.get("step")) == run.steps
        }
        for end in ends:
            if end.key in run.finals and (trunk_value := there.get(end.key)) is not None:
                value = float(run.finals[end.key]["value"]) - trunk_value
                found.setdefault((end, run.budget_group), []).append((run.budget or 0.0, value))
    order = sorted(found.items(), key=lambda pair: (ends.index(pair[0][0]), pair[1][0][0]))
    return [Lag(end, b, sum(v for _, v in values) / len(values), len(values)) for (end, b), values in order]


def gains(runs: Iterable[Run], endpoint: Endpoint, scale: str) -> list[Gain]:
    """Gains per doubling of parameters at every budget where mini, small and medium share a seed.

    Seeds are paired; of one seed there is an interval where other runs have
    measured how far seeds lie apart. The errors over items are taken as independent between sizes
    (`statistics.gain_per_doubling`), which is conservative for shared items.
    """
    table = cells(runs, endpoint)
    out = []
    for budget in budgets(table.values()):
        trio = [table[m, budget] for m in TRIO if (m, budget) in table]
        sizes = [c.size for c in trio]
        seeds = sorted(set.intersection(*(set(c.by_seed) for c in trio))) if len(trio) == 3 else []
        if not seeds or not sizes[0] < sizes[1] < sizes[2]:
            continue
        sides = [_on_scale(c, endpoint, scale) for c in trio]
        variances = [v for _, v in sides if v is not None]
        per_seed = [statistics.gain_per_doubling([values[s] for values, _ in sides], sizes) for s in seeds]
        items = statistics.gain_per_doubling((0, 0, 0), sizes, variances) if len(variances) == 3 else None
        apart = _trained_apart(trio, endpoint, scale)
        seeds_apart = statistics.gain_per_doubling((0, 0, 0), sizes, apart[0]) if apart else None
        found = {}
        for name in ("first", "second", "contrast"):
            values = [getattr(g, name) for g in per_seed]
            error = getattr(items, f"{name}_stderr") if items else None
            training = (getattr(seeds_apart, f"{name}_stderr"), apart[1]) if apart else None
            found[name] = _over_seeds(values, error, training)
        out.append(Gain(endpoint, budget, scale, **found, seeds=len(seeds)))
    return out


def recall_ceiling(runs: list[Run]) -> float | None:
    """Recall of the universe by a model that knows every fact of the corpus and guesses the rest."""
    for run in runs:
        whole = run.finals.get(("knowledge", "universe", "recall"))
        own = run.finals.get(("knowledge", "corpus", "recall"))
        if whole and own and number(whole.get("n")) and number(own.get("n")):
            share = own["n"] / whole["n"]
            return share + (1 - share) * (number(whole.get("chance")) or 0.0) if share < 1 else None
    return None


def corpus_bits(runs: list[Run]) -> float | None:
    """Bits that the facts of the corpus hold: number of values times -log2 of the chance level."""
    for run in runs:
        own = run.finals.get(("knowledge", "corpus", "recall"))
        stored = run.finals.get(("knowledge", "corpus", "bits_total"), {})
        if own and number(own.get("n")) and number(own.get("chance")):
            values = (
                ATTRIBUTES * stored["n"] if number(stored.get("n")) else own["n"]
            )  # persons may be drawn for the test
            return -values * math.log2(own["chance"])
    return None
