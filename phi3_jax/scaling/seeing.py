"""Whether seeing grows with size as reading does, by the rule of experiments/vision.py.

A cell is an arm and a size; its score is compared in log-odds. The interaction is, within a seed, what the largest size has
over the smallest in the arm of pictures, minus the same in the arm of text. One word stands for it:

    more, less     its interval over seeds (Student's t) lies above 0, or below
    alike          it lies inside the rule's margin on both sides of 0
    undecided      otherwise, with fewer than three seeds, and where a cell is not admitted
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from phi3_jax import statistics
from phi3_jax.errors import UserError
from phi3_jax.experiment import arms_of
from phi3_jax.family import TRIO
from phi3_jax.scaling import causal
from phi3_jax.scaling.causal import Row
from phi3_jax.statistics import Estimate

FEWEST = 3  # seeds behind a decision
UNDECIDED = "undecided"
POWER = 0.8
# Of the table, easiest first: heads, and endpoints; a line is an arm and a size.
SHOWN = {
    "symbols": "seeing/scenes/accuracy",
    "scenes": "seeing/scenes/exact",
    "bars": "seeing/charts/accuracy",
    "charts": "seeing/charts/exact",
    "1 step": "seeing/sums gap1/accuracy",
    "2 steps": "seeing/sums gap2/accuracy",
    "3 steps": "seeing/sums gap3/accuracy",
    "whole sums": "seeing/sums/exact",
}


@dataclass(frozen=True)
class Found:
    """What the rule says: `word` is more, less, alike or undecided; `interaction` is None where a cell is missing."""

    word: str
    why: str
    interaction: Estimate | None


def cell(rows: Sequence[Row], arm: str, size: str, endpoint: str, logit: bool = False) -> dict[int, float]:
    """{seed: score} of a cell, as a share or in log-odds; {} where nothing of it was measured."""
    try:
        found = causal.scores(rows, arm, endpoint, "logit" if logit else "points").get(size, {})
    except UserError:
        return {}
    return found if logit else {seed: value / 100 for seed, value in found.items()}


def floor(rows: Sequence[Row], rule: Mapping[str, Any], endpoint: str) -> dict[int, float]:
    """{seed: share} of the rule's model that does not see."""
    arm, size = rule["floor"]
    return cell(rows, arm, size, endpoint)


def combined(cells: Sequence[tuple[float, Mapping[int, float]]]) -> Estimate | None:
    """A sum of cells with factors, within each seed that has all of them, over seeds; None where none has."""
    seeds = sorted(set.intersection(*(set(values) for _, values in cells)))
    sums = [sum(factor * values[seed] for factor, values in cells) for seed in seeds]
    return statistics.over_seeds(sums) if sums else None


def gap(rows: Sequence[Row], rule: Mapping[str, Any], size: str) -> Estimate | None:
    """What a size has on pictures over what it has on text, in log-odds."""
    text, picture = (cell(rows, arm, size, rule["endpoint"], True) for arm in rule["arms"])
    return combined([(1, picture), (-1, text)])


def bend(rows: Sequence[Row], arm: str, endpoint: str) -> Estimate | None:
    """The gain a doubling of the second step in size minus that of the first, in log-odds."""
    try:
        return causal.mean(causal.steps(rows, arm, endpoint, "logit").contrast)
    except (UserError, KeyError, ValueError):
        return None


def refused(rows: Sequence[Row], rule: Mapping[str, Any]) -> list[str]:
    """Why cells that the interaction is made of say nothing: at a floor or ceiling, or of who does not see."""
    said = []
    low, high = rule["admitted"]
    blind = floor(rows, rule, rule["endpoint"])
    low = max(low, float(np.mean(list(blind.values())))) if blind else low
    for arm in rule["arms"]:
        for size in rule["sizes"]:
            if values := list(cell(rows, arm, size, rule["endpoint"]).values()):
                mean = float(np.mean(values))
                if not low <= mean <= high:
                    said.append(f"{arm} {size} has {100 * mean:.1f} %, outside {100 * low:.1f} to {100 * high:.1f} %")
    endpoint, least = rule["sees"]
    for size in rule["sizes"]:
        values = list(cell(rows, rule["arms"][1], size, endpoint).values())
        if values and np.mean(values) < least:
            said.append(f"{size} sees {100 * float(np.mean(values)):.1f} % of {endpoint}, less than {100 * least:g} %")
    if not blind:
        said.append(f"the floor, {' '.join(rule['floor'])}, was not measured")
    return said


def judge(rows: Sequence[Row], rule: Mapping[str, Any]) -> Found:
    """What the rule says of the interaction."""
    small, large = rule["sizes"]
    signs = {arm: sign for arm, sign in zip(rule["arms"], (-1, 1), strict=True)}
    e = combined(
        [
            (sign * factor, cell(rows, arm, size, rule["endpoint"], True))
            for arm, sign in signs.items()
            for size, factor in ((small, -1), (large, 1))
        ]
    )
    if e is None:
        return Found(UNDECIDED, "not measured in all four cells", None)
    if why := refused(rows, rule):
        return Found(UNDECIDED, "; ".join(why), e)
    if e.n < FEWEST or not e.known:
        return Found(UNDECIDED, f"{e.n} seed{'s' * (e.n != 1)}; {FEWEST} are needed to decide", e)
    if e.sign:
        return Found("more" if e.sign > 0 else "less", "", e)
    if -rule["margin"] < e.low and e.high < rule["margin"]:
        return Found("alike", "", e)
    return Found(UNDECIDED, "the interval allows both", e)


def detectable(seed_sd: float, seeds: int) -> float:
    """The interaction that so many seeds find in 4 of 5 studies, where cells have this SD; in log-odds, by Student's t.

    The difference of four cells has twice their SD. Two-sided at 5 %, by the usual sum of the two quantiles.
    """
    if seeds < 2:
        return math.inf
    quantiles = special.stdtrit(seeds - 1, 0.975) + special.stdtrit(seeds - 1, POWER)
    return float(quantiles * 2 * seed_sd / math.sqrt(seeds))


def measured_sd(rows: Sequence[Row], rule: Mapping[str, Any]) -> float:
    """SD between seeds of a cell in log-odds, pooled over the cells of the rule's arms; nan without two seeds."""
    found = [list(cell(rows, arm, size, rule["endpoint"], True).values()) for arm in rule["arms"] for size in TRIO]
    spread = [(len(v) - 1, float(np.var(v, ddof=1))) for v in found if len(v) > 1]
    whole = sum(n for n, _ in spread)
    return math.sqrt(sum(n * var for n, var in spread) / whole) if whole else math.nan


def planned(config: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(arm, size, seed) of every run of the rule's design, whatever part of it a command asked for."""
    seeds, arms = range(config["seed"], config["seed"] + config["seeing"]["seeds"]), arms_of(config)
    return [(name, size, seed) for seed in seeds for name, arm in arms.items() for size in arm.sizes or config["sizes"]]


def lines(rows: Sequence[Row], config: Mapping[str, Any]) -> Iterator[str]:
    """Which planned runs ran, a table of cells, and what the rule says."""
    rule, ran = config["seeing"], {(row.arm, row.member, row.seed) for row in rows}
    plan = planned(config)
    yield f"{sum(run in ran for run in plan)} of {len(plan)} planned runs ran."
    if missing := [f"{arm}-{size}-s{seed}" for arm, size, seed in plan if (arm, size, seed) not in ran]:
        yield f"Not run: {', '.join(missing)}."
    trial = config["size_factor"] != 1
    if trial:
        yield f"A trial: runs are of {config['size_factor']:g} times the tokens of the design, of which it says nothing."
    yield ""
    yield from table(rows, plan)
    yield ""
    expected = rule["predictions"]
    found = judge(rows, rule)
    yield f"Interaction of size and modality, {_interval(found.interaction)}. Predicted: {expected['interaction']}."
    for size in rule["sizes"]:
        yield f"Pictures minus text at {size}, {_interval(gap(rows, rule, size))}. Predicted: {expected[f'gap of {size}']}."
    for arm in rule["arms"]:
        name = f"second minus first step, {arm}"
        beside = f" Predicted: {expected[name]}." if name in expected else ""
        yield f"{name[0].upper()}{name[1:]}, a doubling: {_interval(bend(rows, arm, rule['endpoint']))}.{beside}"
    seeds, sd = len({row.seed for row in rows}), measured_sd(rows, rule)
    if math.isfinite(sd):
        yield f"Seeds of a cell have an SD of {sd:.2f} log-odds; {rule['seed_sd']:g} was assumed."
    yield (
        f"By the SD that was assumed, {rule['seeds']} seeds find an interaction of "
        f"{detectable(rule['seed_sd'], rule['seeds']):.1f} log-odds in 4 of 5 studies."
    )
    yield ""
    why = f" ({found.why})" if found.why else ""
    yield f"Verdict: {'none, for a trial' if trial else f'{found.word}{why}'}."
    if seeds < FEWEST:
        yield (
            f"{seeds} seed{'s' * (seeds != 1)}: the table shows the shape of things. Weights, items and their order change "
            "with the seed, and nothing here says by how much; no difference above is a finding."
        )


def table(rows: Sequence[Row], plan: Sequence[tuple[str, str, int]]) -> Iterator[str]:
    """Means over seeds in per cent, a line for an arm and size, in the order of the plan."""
    yield "  ".join([f"{'per cent right':16}", "seeds", *(f"{head:>{max(7, len(head))}}" for head in SHOWN)])
    for arm, size in dict.fromkeys((arm, size) for arm, size, _ in plan):
        found = {head: list(cell(rows, arm, size, endpoint).values()) for head, endpoint in SHOWN.items()}
        if not any(found.values()):
            continue
        cells = [f"{f'{100 * float(np.mean(v)):.1f}' if v else '–':>{max(7, len(head))}}" for head, v in found.items()]
        yield "  ".join([f"{arm + ' ' + size:16}", f"{max(map(len, found.values())):5}", *cells])


def _interval(e: Estimate | None) -> str:
    if e is None:
        return "not measured"
    return f"{e.value:+.2f}{f' [{e.low:+.2f}, {e.high:+.2f}]' if e.known else ''} log-odds"


def lines_of(folder: Path) -> list[str]:
    """What the rule says of a study's folder; see `causal.with_rule`."""
    return list(lines(*causal.with_rule(folder, "seeing", "experiments/vision.py")))
