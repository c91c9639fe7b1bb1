"""What runs say of the author's conjecture on reasoning, facts and invention, by the rule of experiments/abstention.py.

A condition compares two cells, each (arm, size, endpoint), within a seed: the second minus the first, with Student's t over
seeds. Its `word` is one of equal, falls and rises:

    equal    holds where the interval lies within the margin on both sides of 0; fails where it lies outside
    falls    holds where the interval lies below 0; fails where it lies above -margin. rises: likewise, the other way round
    otherwise, and with fewer seeds than the rule wants, it is undecided

A condition whose `needs` is not met, a cell that must reach a score for the comparison to mean something, is undecided too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_jax import statistics
from phi3_jax.experiment import arms_of
from phi3_jax.scaling import causal
from phi3_jax.scaling.causal import Row
from phi3_jax.statistics import Estimate

FEWEST = 3  # seeds behind a decision
HOLDS, FAILS, UNDECIDED = "holds", "does not", "undecided"
# Of the table: heads, and endpoints; a line is an arm and a size.
SHOWN = {
    "recall": "knowledge/universe/recall",
    "recall forced": "knowledge/universe/recall_teacher_forced",
    "one step": "reasoning/gap1/accuracy",
    "rows": "reasoning/row/exact",
    "unknown": "abstention/free/unknown",
    "wrong@90": "abstention/free/wrong_at_90",
    "invented@90": "abstention/free/invented_at_90",
    "invented>half": "abstention/free/invented_at_half",
    "AUROC": "abstention/free/auroc",
    "with search: recall": "knowledge/retrieved universe/recall",
    "wrong@90 ": "abstention/search free/wrong_at_90",
    "invented@90 ": "abstention/search free/invented_at_90",
}


@dataclass(frozen=True)
class Found:
    """What became of one condition: `word` is of HOLDS, FAILS, UNDECIDED; `difference` is None where a cell is missing."""

    name: str
    word: str
    why: str
    difference: Estimate | None


def value(rows: Sequence[Row], cell: Sequence[str]) -> dict[int, float]:
    """{seed: score} of a cell (arm, size, endpoint); {} where nothing of it was measured."""
    arm, size, endpoint = cell
    return {
        row.seed: row.scores[endpoint]
        for row in rows
        if (row.arm, row.member) == (arm, size) and endpoint in row.scores
    }


def difference(rows: Sequence[Row], first: Sequence[str], second: Sequence[str]) -> Estimate | None:
    """Second minus first over the seeds that have both; None where none has."""
    one, other = value(rows, first), value(rows, second)
    pairs = [other[seed] - one[seed] for seed in sorted(one.keys() & other.keys())]
    return statistics.over_seeds(pairs) if pairs else None


def judge(rows: Sequence[Row], name: str, condition: Mapping[str, Any]) -> Found:
    """One condition of the rule."""
    e = difference(rows, condition["first"], condition["second"])
    if e is None:
        return Found(name, UNDECIDED, "not measured in both cells", None)
    if needs := condition.get("needs"):
        *cell, least = needs
        reached = list(value(rows, cell).values())
        if not reached or sum(reached) / len(reached) < least:
            return Found(name, UNDECIDED, f"{cell[0]} {cell[1]} does not reach {least:g} of {cell[2]}", e)
    if e.n < FEWEST or not e.known:
        return Found(name, UNDECIDED, f"{e.n} seed{'s' * (e.n != 1)}; {FEWEST} are needed to decide", e)
    margin, sign = condition["margin"], {"falls": -1, "rises": 1}.get(condition["word"], 0)
    if not sign:
        inside, outside = -margin < e.low and e.high < margin, e.low > margin or e.high < -margin
    else:
        low, high = sorted((sign * e.low, sign * e.high))
        inside, outside = low > 0, high < margin
    word = HOLDS if inside else FAILS if outside else UNDECIDED
    return Found(name, word, "" if word != UNDECIDED else "the interval allows both", e)


def line(one: Found, condition: Mapping[str, Any]) -> str:
    """What became of a condition, beside what was predicted."""
    shown = "" if one.difference is None else f" {_interval(one.difference)}"
    why = f" ({one.why})" if one.why else ""
    return f"{one.name}  {condition['says']}:{shown}; {one.word}{why}. Predicted: {condition['predicted']}."


def verdict(found: Mapping[str, Found]) -> str:
    """What the conditions a to d are together."""
    a, b, c, d = (found[name].word for name in "abcd")
    if b == FAILS:
        return "not supported: what is invented does not fall with size"
    if UNDECIDED in (a, b, c, d):
        return "undecided"
    if c == FAILS:
        return "size itself helps: what is invented falls with size where there are no more facts to acquire"
    if a == FAILS:
        return "not supported as it stands: invention falls by acquired facts, and reasoning grows as well"
    return "supported" if d == HOLDS else "by better discrimination: equal loads a parameter do not invent alike"


def planned(config: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(arm, size, seed) of every run of the rule's design, whatever part of it a command asked for."""
    seeds = range(config["seed"], config["seed"] + config["abstention"]["seeds"])
    arms = arms_of(config)
    return [(name, size, seed) for seed in seeds for name, arm in arms.items() for size in arm.sizes or config["sizes"]]


def lines(rows: Sequence[Row], config: Mapping[str, Any]) -> Iterator[str]:
    """Which planned runs ran, a table of cells, every condition, and the verdict."""
    rule, ran = config["abstention"], {(row.arm, row.member, row.seed) for row in rows}
    plan = planned(config)
    yield f"{sum(run in ran for run in plan)} of {len(plan)} planned runs ran."
    missing = [f"{arm}-{size}-s{seed}" for arm, size, seed in plan if (arm, size, seed) not in ran]
    if missing:
        yield f"Not run: {', '.join(missing)}."
    if config["size_factor"] != 1:
        yield f"A trial: all counts are {config['size_factor']:g} times those of the design, of which it says nothing."
    yield ""
    yield from table(rows, plan)
    yield ""
    found = {name: judge(rows, name, condition) for name, condition in rule["conditions"].items()}
    for name, one in found.items():
        yield line(one, rule["conditions"][name])
    yield from _parts(rows, rule)
    yield ""
    word = verdict(found)
    seeds = {row.seed for row in rows}
    if config["size_factor"] != 1:
        word = "none, for a trial"
    yield f"Verdict: {word}."
    if len(seeds) < FEWEST:
        yield (
            f"{len(seeds)} seed{'s' * (len(seeds) != 1)}: the table shows the shape of things and how much items differ. "
            "Weights, the order of data and the universe of persons change with the seed, and nothing here says by how "
            "much; no difference above is a finding."
        )


def table(rows: Sequence[Row], plan: Sequence[tuple[str, str, int]], shown: Mapping[str, str] = SHOWN) -> Iterator[str]:
    """Means over seeds in per cent, a line for an arm and size, in the order of the plan; `shown` are {head: endpoint}."""
    heads = [name for name, endpoint in shown.items() if any(endpoint in row.scores for row in rows)]
    yield "  ".join([f"{'per cent':22}", "seeds", *(f"{head.strip():>{max(7, len(head.strip()))}}" for head in heads)])
    for arm, size in dict.fromkeys((arm, size) for arm, size, _ in plan):
        seeds = {row.seed for row in rows if (row.arm, row.member) == (arm, size)}
        if not seeds:
            continue
        cells = []
        for head in heads:
            values = list(value(rows, (arm, size, shown[head])).values())
            text = f"{100 * sum(values) / len(values):.1f}" if values else "–"
            cells.append(f"{text:>{max(7, len(head.strip()))}}")
        yield "  ".join([f"{arm + ' ' + size:22}", f"{len(seeds):5}", *cells])


def _parts(rows: Sequence[Row], rule: Mapping[str, Any]) -> Iterator[str]:
    """How much of the fall of condition b comes of fewer unknown values, and how much of telling them better."""
    (arm, small, wrong), (_, large, _) = rule["conditions"]["b"]["first"], rule["conditions"]["b"]["second"]
    unknown = wrong.rpartition("/")[0] + "/unknown"
    fewer, better = [], []
    for seed in sorted({row.seed for row in rows}):
        cells = [
            value(rows, (arm, size, endpoint)).get(seed) for size in (small, large) for endpoint in (unknown, wrong)
        ]
        if None in cells or not cells[0] or not cells[2]:
            continue
        u, w, v, x = (float(c) for c in cells if c is not None)
        fewer.append((v - u) * w / u)
        better.append(x - w - fewer[-1])
    if fewer:
        yield (
            f"   of b, {_interval(statistics.over_seeds(fewer))} by fewer unknown values at {small}'s discrimination, "
            f"{_interval(statistics.over_seeds(better))} by better discrimination"
        )


def _interval(e: Estimate) -> str:
    """In points."""
    spread = f" [{100 * e.low:+.1f}, {100 * e.high:+.1f}]" if math.isfinite(e.low) else ""
    return f"{100 * e.value:+.1f}{spread} points"


def lines_of(folder: Path) -> list[str]:
    """What the rule says of a study's folder; see `causal.with_rule`."""
    return list(lines(*causal.with_rule(folder, "abstention", "experiments/abstention.py")))
