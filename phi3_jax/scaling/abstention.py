"""What runs say of the author's conjecture on reasoning, facts and invention, by the rule of experiments/abstention.py.

A condition compares two cells, each (arm, size, endpoint), within a seed: the second minus the first, with Student's t over
seeds. Its `word` is one of equal, falls and rises:

    equal    holds where the interval lies within the margin on both sides of 0; fails where it lies outside
    falls    holds where the interval lies below 0 and its middle reaches the margin; fails where the interval stays above
             -margin. rises: likewise, the other way round
    otherwise, and with fewer seeds than the rule wants, it is undecided

A condition one of whose `needs` is not met, cells with the least and the most that they may have for the comparison to mean
something, is undecided too. Where a condition has `parts` instead of cells, the fall of the condition of that name is the
change of a product, unknown values times the share of them that is answered, and is split evenly (Shapley): the change of
each factor at the mean of the other. It compares the first part with the second: it falls where fewer unknown values are
more of the fall than better discrimination.
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

HOLDS, FAILS, UNDECIDED = "holds", "does not", "undecided"
# Of the table: heads, and endpoints; a line is an arm and a size.
SHOWN = {
    "recall": "knowledge/universe/recall",
    "recall forced": "knowledge/universe/recall_teacher_forced",
    "one step": "reasoning/gap1/accuracy",
    "rows": "reasoning/row/exact",
    "unknown": "abstention/free/unknown",
    "wrong@90": "abstention/free/wrong_at_90",
    "in corpus": "abstention/free/wrong_in_corpus_at_90",
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


def parts(rows: Sequence[Row], condition: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """A seed's change of what is wrong, (by fewer unknown values, by better discrimination); see above."""
    (arm, small, wrong), (_, large, _) = condition["first"], condition["second"]
    unknown = wrong.rpartition("/")[0] + "/unknown"
    cells = [value(rows, (arm, size, endpoint)) for size in (small, large) for endpoint in (unknown, wrong)]
    fewer, better = [], []
    for seed in sorted(set.intersection(*(set(cell) for cell in cells))):
        u, w, v, x = (cell[seed] for cell in cells)
        if u and v:
            fewer.append((v - u) * (w / u + x / v) / 2)
            better.append((x / v - w / u) * (u + v) / 2)
    return fewer, better


def _changes(rows: Sequence[Row], condition: Mapping[str, Any], conditions: Mapping[str, Any]) -> Estimate | None:
    if split := condition.get("parts"):
        fewer, better = parts(rows, conditions[split])
        return statistics.over_seeds([one - other for one, other in zip(fewer, better, strict=True)]) if fewer else None
    return difference(rows, condition["first"], condition["second"])


def judge(rows: Sequence[Row], name: str, conditions: Mapping[str, Any], seeds: int) -> Found:
    """One condition of the rule, which wants so many seeds."""
    condition = conditions[name]
    e = _changes(rows, condition, conditions)
    if e is None:
        return Found(name, UNDECIDED, "not measured in both cells", None)
    for *cell, least, most in condition.get("needs", ()):
        reached = list(value(rows, cell).values())
        mean = sum(reached) / len(reached) if reached else math.nan
        if not least <= mean <= most:
            shown = f"{100 * mean:.1f} %" if reached else "not measured"
            wanted = f"from {100 * least:g} to {100 * most:g} %"
            return Found(name, UNDECIDED, f"{cell[2]} of {cell[0]} {cell[1]} is {shown}; it should be {wanted}", e)
    if e.n < seeds or not e.known:
        return Found(name, UNDECIDED, f"{e.n} seed{'s' * (e.n != 1)}; {seeds} are needed to decide", e)
    margin, sign = condition["margin"], {"falls": -1, "rises": 1}.get(condition["word"], 0)
    if not sign:
        inside, outside = -margin < e.low and e.high < margin, e.low > margin or e.high < -margin
    else:
        low, high = sorted((sign * e.low, sign * e.high))
        inside, outside = low > 0 and sign * e.value >= margin, high < margin
    word = HOLDS if inside else FAILS if outside else UNDECIDED
    return Found(name, word, "" if word != UNDECIDED else "the interval allows both", e)


def line(one: Found, condition: Mapping[str, Any]) -> str:
    """What became of a condition, beside what was predicted."""
    shown = "" if one.difference is None else f" {_interval(one.difference)}"
    why = f" ({one.why})" if one.why else ""
    return f"{one.name}  {condition['says']}:{shown}; {one.word}{why}. Predicted: {condition['predicted']}."


# What is said of a condition that holds, fails or is undecided; where "equal" fails, by the sign of the difference.
SAID = {
    "a": {
        HOLDS: "at one step of reasoning medium is no better than mini",
        +1: "reasoning grows as well",
        -1: "medium reasons worse",
        UNDECIDED: "whether reasoning grows is undecided",
    },
    "b": {
        HOLDS: "wrong answers fall with size",
        -1: "wrong answers do not fall with size",
        +1: "wrong answers do not fall with size",
        UNDECIDED: "whether wrong answers fall with size is undecided",
    },
    "c": {
        HOLDS: "and not where every size holds all facts",
        -1: "and where every size holds all facts too: size itself helps",
        +1: "and rise where every size holds all facts",
        UNDECIDED: "whether they fall where every size holds all facts is undecided",
    },
    "e": {
        HOLDS: "most of the fall is by acquired facts",
        +1: "most of the fall is by better discrimination",
        -1: "most of the fall is by acquired facts",
        UNDECIDED: "whether most of it is by acquired facts is undecided",
    },
    "d": {
        HOLDS: "equal loads a parameter invent alike",
        -1: "equal loads a parameter do not invent alike, for a cause that is open",
        +1: "equal loads a parameter do not invent alike, for a cause that is open",
        UNDECIDED: "whether equal loads a parameter invent alike is undecided",
    },
}


def verdict(found: Mapping[str, Found]) -> str:
    """What the conditions a to e are together, and each of them in words."""
    words = {name: found[name].word for name in SAID}
    if words["b"] == FAILS or FAILS in (words["a"], words["c"]):
        whole = "not supported"
    elif UNDECIDED in words.values():
        whole = "undecided"
    else:
        whole = "supported in part" if FAILS in words.values() else "supported"
    said = []
    for name, by_word in SAID.items():
        e = found[name].difference
        sign = 1 if e is None or e.value > 0 else -1
        said.append(by_word[sign if words[name] == FAILS else words[name]])
    return f"{whole}. At 90 % coverage of what a model knows: {'; '.join(said)}"


def planned(config: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(arm, size, seed) of every run of the rule's design, whatever part of it a command asked for."""
    first, seeds = config["seed"], config["abstention"]["seeds"]
    return [
        (name, size, first + i)
        for i in range(seeds)
        for name, arm in arms_of(config).items()
        if i < (seeds if arm.seeds is None else arm.seeds)
        for size in arm.sizes or config["sizes"]
    ]


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
    found = {name: judge(rows, name, rule["conditions"], rule["seeds"]) for name in rule["conditions"]}
    for name, one in found.items():
        yield line(one, rule["conditions"][name])
    fewer, better = parts(rows, rule["conditions"]["b"])
    if fewer:
        yield (
            f"   of b, {_interval(statistics.over_seeds(fewer))} by fewer unknown values, "
            f"{_interval(statistics.over_seeds(better))} by better discrimination"
        )
    yield ""
    word = verdict(found)
    seeds = {row.seed for row in rows}
    if config["size_factor"] != 1:
        word = "none, for a trial"
    yield f"Verdict: {word}."
    if 0 < len(seeds) < rule["seeds"]:
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


def _interval(e: Estimate) -> str:
    """In points."""
    spread = f" [{100 * e.low:+.1f}, {100 * e.high:+.1f}]" if math.isfinite(e.low) else ""
    return f"{100 * e.value:+.1f}{spread} points"


def lines_of(folder: Path) -> list[str]:
    """What the rule says of a study's folder; see `causal.with_rule`."""
    return list(lines(*causal.with_rule(folder, "abstention", "experiments/abstention.py")))
