"""Scores over seeds with their intervals, and gains per doubling of parameters between the sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from phi3_jax.evaluation import statistics
from phi3_jax.reporting.table import MEMBERS, Run, number

NORMAL = 1.959964  # two-sided 95% quantile


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """One measured quantity of an evaluation and how to draw it."""

    suite: str
    task: str
    metric: str
    label: str
    unit: str
    proportion: bool = False  # a share of items: drawn in percent, and on the log-odds scale too
    down: bool = False  # smaller is better (losses)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.suite, self.task, self.metric

    @property
    def column(self) -> str:
        return "/".join(self.key)


# What is drawn first and how it is called, as written by evaluation.probes. Other rows get their own names as
# label, so that a new meter shows without a change here.
_LABELS = {
    ("knowledge", "universe", "recall"): "Recall of the whole universe of facts",
    ("knowledge", "corpus", "recall"): "Recall of the facts in the corpus",
    ("knowledge", "outside", "recall_control"): "Recall of facts never seen (control: chance)",
    ("knowledge", "corpus", "bits_per_person"): "Stored bits per person",
    ("knowledge", "corpus", "bits_per_parameter"): "Stored bits per non-embedding parameter",
    ("reasoning", "row", "exact"): "Exact rows (all outputs right)",
    ("reasoning", "all", "accuracy"): "Outputs right, all depths",
    ("knowledge", "corpus", "nll"): "Loss on facts of the corpus",
    ("reasoning", "all", "nll"): "Loss on reasoning outputs",
}
_LOSS_UNITS = {"nll": "nats per value", "loss": "nats per token", "bits_per_byte": "bits per byte"}
_SHARES = ("recall", "recall_control", "accuracy", "exact", "acc", "acc_norm", "exact_match", "pass@1", "mc2")
_CSV_ONLY = ("recall_by_frequency", "bits_total")


def _label(suite: str, task: str, metric: str) -> str:
    if (suite, task, metric) in _LABELS:
        return _LABELS[suite, task, metric]
    if suite == "text":
        return {"loss": f"Loss on {task}", "bits_per_byte": f"Bits per byte on {task}"}.get(metric, f"{task} {metric}")
    if task.startswith("gap") and metric == "accuracy":
        return f"Outputs right, gap {task[3:]}"
    return f"{suite} {task} {metric}".replace("_", " ").capitalize()


def endpoints(runs: Iterable[Run]) -> list[Endpoint]:
    """Every quantity measured at the end of a finished run, known ones first and in a fixed order."""
    seen = {key for run in runs for key in run.finals if key[2] not in _CSV_ONLY}
    order = list(_LABELS)
    out = []
    for key in sorted(seen, key=lambda k: (order.index(k) if k in order else len(order), k)):
        metric = key[2]
        share = metric in _SHARES
        unit = "%" if share else _LOSS_UNITS.get(metric, metric.replace("_", " "))
        out.append(Endpoint(*key, _label(*key), unit, share, metric in _LOSS_UNITS))
    return out


def log_odds_sensible(endpoint: Endpoint) -> bool:
    """Whether gains are drawn in points and in log-odds: shares, without the parts of a graded score."""
    return endpoint.metric in ("recall", "exact") or (endpoint.proportion and endpoint.task == "all")


def plotted_losses(ends: Iterable[Endpoint]) -> list[Endpoint]:
    """Losses without bits per byte where nats per token say the same: they differ by a constant factor."""
    losses = [e for e in ends if e.down]
    nats = {(e.suite, e.task) for e in losses if e.metric != "bits_per_byte"}
    return [e for e in losses if e.metric != "bits_per_byte" or (e.suite, e.task) not in nats]


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
class Estimate:
    """A gain or a contrast with its 95% interval; `low` and `high` are None where no error is known."""

    value: float
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """+1 or -1 where the interval excludes zero, else 0."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return 0
        return 1 if self.value > 0 else -1


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


def _interval(values: list[float], item_error: float | None) -> tuple[float | None, float | None]:
    """95% half-widths of seeds (Student's t) and of items (normal), added in quadrature.

    The items are the same for every seed, so their error does not shrink with the number of seeds.
    """
    over = statistics.over_seeds(values)
    parts = [over.high - over.value] if len(values) > 1 else []
    parts += [NORMAL * item_error] if item_error is not None else []
    half = math.hypot(*parts)
    return (over.value - half, over.value + half) if parts else (None, None)


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
            low, high = _interval(list(values.values()), item_se)
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
    _, variance = statistics.to_scale(shares.mean(), np.asarray(item), "logit")
    by_seed = dict(zip(cell.by_seed, map(float, values), strict=True))
    return by_seed, None if cell.item_se is None else float(variance)


def gains(runs: Iterable[Run], endpoint: Endpoint, scale: str) -> list[Gain]:
    """Gains per doubling of parameters at every budget where mini, small and medium share a seed.

    Seeds are paired; the errors over items are taken as independent between sizes
    (`statistics.gain_per_doubling`), which is conservative for shared items.
    """
    table = cells(runs, endpoint)
    out = []
    for budget in budgets(table.values()):
        trio = [table[m, budget] for m in MEMBERS if (m, budget) in table]
        sizes = [c.size for c in trio]
        seeds = sorted(set.intersection(*(set(c.by_seed) for c in trio))) if len(trio) == 3 else []
        if not seeds or not sizes[0] < sizes[1] < sizes[2]:
            continue
        sides = [_on_scale(c, endpoint, scale) for c in trio]
        variances = [v for _, v in sides if v is not None]
        per_seed = [statistics.gain_per_doubling([values[s] for values, _ in sides], sizes) for s in seeds]
        items = statistics.gain_per_doubling((0, 0, 0), sizes, variances) if len(variances) == 3 else None
        found = {}
        for name in ("first", "second", "contrast"):
            values = [getattr(g, name) for g in per_seed]
            error = getattr(items, f"{name}_stderr") if items else None
            found[name] = Estimate(sum(values) / len(values), *_interval(values, error))
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
        if own and number(own.get("n")) and number(own.get("chance")):
            return -own["n"] * math.log2(own["chance"])
    return None
