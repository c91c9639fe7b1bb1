"""Whether the best threshold of the knowledge filter rises with size, by the rule of experiments/curated.py.

A threshold is the share of the bits of all facts that an arm keeps. What a best threshold and a regret are, and where an
endpoint may decide, is `scaling.regime`'s; here stand the plan, the trend over sizes, the controls and the lines.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax import statistics
from phi3_jax.data.corpora import factbook
from phi3_jax.data.sources.factbook import SHUFFLED, share_of
from phi3_jax.errors import UserError
from phi3_jax.experiment import arms_of
from phi3_jax.scaling import causal, regime
from phi3_jax.scaling.causal import EXACT
from phi3_jax.scaling.regime import LOSS, RECALL, Block, Planned, Run, Verdict

UNDETERMINED = "not determined"


def threshold(data: str, seed: int) -> tuple[float, float]:
    """(share of the bits that an arm's data keep, recall that they allow) in a seed."""
    book, kept = factbook.shipped(), data.split(":")[1]
    share, random = (0.0, False) if kept == SHUFFLED else share_of(kept)
    known = book.kept(share, seed if random else None) | book.usual
    return share, float(book.bits[known].sum() / book.bits.sum())


def floor() -> float:
    """Recall of who always says the most frequent value of a field."""
    return threshold("factbook:0", 0)[1]


def planned(config: Mapping[str, Any]) -> list[Planned]:
    """Every run that a config asks for."""
    found, (tokens,) = [], config["budgets"]
    for seed in range(config["seed"], config["seed"] + config["seeds"]):
        for name, arm in arms_of(config).items():
            f, kept = threshold(str(arm.data), seed)
            for size in arm.sizes or config["sizes"]:
                run = f"{name}-{size}-s{seed}"
                found.append(Planned(run, name, size, seed, tokens, f, kept, chance=floor()))
    return found


def block(rows: Sequence[causal.Row], config: Mapping[str, Any]) -> Block:
    """The design, and of it the runs of a table that finished."""
    plan = planned(config)
    place = {(p.arm, p.member, p.seed): p for p in plan}
    found = ((row, place.get((row.arm, row.member, row.seed))) for row in rows)
    return Block(plan, [Run(**vars(p), size=row.size, scores=row.scores) for row, p in found if p])


def composite(rule: Mapping[str, Any]) -> Sequence[str]:
    """The endpoints of the utility that the primary estimand is said of."""
    found: Sequence[str] = rule["utilities"][rule["primary"].partition(", ")[2]]
    return found


# ------------------------------------------------------------------------------------------------ estimands


def ordered(stars: np.ndarray) -> float:
    """Exact one-sided p that best thresholds (size, seed) rise with size: Page's trend test on the thresholds themselves.

    The statistic is the sum over seeds of the sum of place times threshold; under the null the sizes of a seed may stand in
    any order. (Page 1963 has ranks in the place of thresholds.)
    """
    places, sums = np.arange(len(stars)), {0.0: 1.0}
    for seed in stars.T:
        orders = Counter(round(float(places @ np.array(order)), 9) for order in itertools.permutations(seed))
        whole: dict[float, float] = {}
        for (a, p), (b, n) in itertools.product(sums.items(), orders.items()):
            at = round(a + b, 9)
            whole[at] = whole.get(at, 0.0) + p * n / orders.total()
        sums = whole
    observed = float((places @ stars).sum())
    return min(1.0, sum(share for value, share in sums.items() if value >= observed - 1e-6))


def of_trend(endpoints: Sequence[str], rule: Mapping[str, Any], found: Block, name: str) -> Verdict:
    """E1: "rises" where the best thresholds of the seeds are in the order of sizes (exact test); else not determined."""
    runs = found.complete
    regime.check_admitted(runs, endpoints, rule["admitted"])
    values, sizes, filters = regime.grid(runs, lambda run: run.utility(endpoints))
    stars = filters[values.argmax(1)]  # (size, seed)
    p = ordered(stars)
    slopes = np.atleast_1d(np.polyfit(np.log2(sizes), 100 * stars, 1)[0])
    e = statistics.over_seeds(slopes)
    by_size = ", ".join("/".join(f"{100 * star:.0f}" for star in row) for row in stars)
    return Verdict(
        name, "rises" if p <= rule["level"] else UNDETERMINED, e,
        f"Best thresholds of the seeds, smallest size first: {by_size} % of the bits; {e.value:+.1f} points a doubling, "
        f"exact p {p:.2g}.",
    )  # fmt: skip


def of_regret(endpoints: Sequence[str], rule: Mapping[str, Any], found: Block, name: str) -> Verdict:
    """E2: as `regime.of_regret`, where "rises" also needs the largest's best threshold to be the higher one."""
    runs = found.complete
    verdict = regime.of_regret(runs, endpoints, rule["margin"], rule, name)
    values, _, filters = regime.grid(runs, lambda run: run.utility(endpoints))
    small, *_, large = filters[values.mean(-1).argmax(1)]
    best = f"{100 * small:.0f} % at the smallest, {100 * large:.0f} % at the largest"
    word = "does not" if verdict.word == "rises" and large < small else verdict.word
    return dataclasses.replace(verdict, word=word, sentence=f"{verdict.sentence} Best over all seeds: {best}.")


def of_order(size: str, endpoints: Sequence[str], rule: Mapping[str, Any], found: Block, name: str) -> Verdict:
    """E3: what the order of the filter is worth over random countries of as many bits, in points.

    Raises:
      UserError: fewer than two seeds have both.
    """
    share = {p.arm: p.f for p in found.planned}
    pairs = [
        (arm, random) for random in rule["random"] for arm in rule["filter"] if share.get(arm) == share.get(random, -1)
    ]
    values = {(r.arm, r.seed): r.utility(endpoints) for r in found.runs if r.member == size}
    seeds = sorted({p.seed for p in found.planned})
    whole = [s for s in seeds if pairs and all((arm, s) in values for pair in pairs for arm in pair)]
    if len(whole) < 2:
        raise UserError(f"{len(whole)} seeds have the filter and the random drop at {size}; the rule needs 2 or more")
    e = statistics.over_seeds([float(np.mean([values[a, s] - values[b, s] for a, b in pairs])) for s in whole])
    inside = -rule["margin"] < e.low and e.high < rule["margin"]
    word = "better" if e.sign > 0 else "worse" if e.sign < 0 else "alike" if inside else UNDETERMINED
    return Verdict(name, word, e, f"Filter minus random at equal bits: {regime.stated(e)} points.")


def decide(found: Block, rule: Mapping[str, Any]) -> list[Verdict]:
    """E1 and E2 of each utility, E3 at the outer sizes, E4; of fewer seeds than the rule's none is determined."""
    main, order = found.part(lambda p: p.arm in rule["filter"]), found.part(lambda p: p.arm != rule["shuffled"])
    first, loosest = composite(rule), max(main.planned, key=lambda p: p.f).arm
    made: dict[str, tuple[Block, Callable[[Block, str], Verdict]]] = {}
    for line, ends in sorted(rule["utilities"].items(), key=lambda item: item[1] != first):  # the primary first
        made[f"E1, {line}"] = main, functools.partial(of_trend, ends, rule)
        made[f"E2, {line}"] = main, functools.partial(of_regret, ends, rule)
    for size in (rule["sizes"][0], rule["sizes"][-1]):
        made[f"E3, {size}"] = order, functools.partial(of_order, size, first, rule)
    made["E4"] = found, functools.partial(_of_reasoning, loosest, rule)
    said = [regime.tried(name, part, functools.partial(of, part, name)) for name, (part, of) in made.items()]
    few = lambda v: 0 < v.estimate.n < rule["seeds"] and v.word != UNDETERMINED  # noqa: E731
    return [
        dataclasses.replace(v, word=UNDETERMINED, sentence=f"{v.sentence} The rule needs {rule['seeds']} seeds.")
        if few(v)
        else v
        for v in said
    ]


def _of_reasoning(loosest: str, rule: Mapping[str, Any], found: Block, name: str) -> Verdict:
    """E4; see `regime.of_reasoning`."""
    return regime.of_reasoning(found.complete, rule["shuffled"], loosest, rule, name)


# ------------------------------------------------------------------------------------------------ lines


def lines(rows: Sequence[causal.Row], config: Mapping[str, Any]) -> Iterator[str]:
    """Which planned runs ran, a table of cells, and what the rule says."""
    rule, found = config["curated"], block(rows, config)
    ran = {run.name for run in found.runs}
    yield f"{len(ran)} of {len(found.planned)} planned runs ran."
    if missing := [p.name for p in found.planned if p.name not in ran]:
        yield f"Not run: {', '.join(missing)}."
    yield ""
    yield from table(found, rule)
    yield ""
    part = tuple(config["sizes"]) != tuple(rule["sizes"]) or not {*rule["filter"]} <= {p.arm for p in found.planned}
    if config["size_factor"] != 1 or part:
        what = f"A trial of {config['size_factor']:g} times the tokens" if not part else "A part"
        yield f"{what} of the design, of which the rule says nothing."
        yield "Verdict: none."
        return
    said = decide(found, rule)
    for verdict in said:
        predicted = rule["predictions"][verdict.estimand]
        yield f"{verdict.estimand}: {verdict.word} (predicted: {predicted}). {verdict.sentence}"
    yield ""
    primary = next(verdict for verdict in said if verdict.estimand == rule["primary"])
    yield f"Verdict: the best threshold {_WORDS.get(primary.word, primary.word)} ({rule['primary']})."


_WORDS = {"rises": "rises with size", "does not": "does not rise with size", UNDETERMINED: "is not determined"}


def table(found: Block, rule: Mapping[str, Any]) -> Iterator[str]:
    """Means over seeds, a line for an arm and size: the composite, what it is made of, and the recall that is possible."""
    heads = ("composite", "recall", "possible", "arithmetic", "exact rows")
    yield "  ".join([f"{'per cent':18}", "seeds", *(f"{head:>10}" for head in heads)])
    order = [*rule["filter"], *rule["random"], rule["shuffled"]]
    for arm, size in dict.fromkeys((p.arm, p.member) for p in sorted(found.planned, key=lambda p: order.index(p.arm))):
        here = [run for run in found.runs if (run.arm, run.member) == (arm, size)]
        if not here:
            continue
        ends = composite(rule)
        values = [
            [run.utility(ends), run.score(RECALL), 100 * run.kept, run.score(LOSS), 100 * run.scores[EXACT]]
            for run in here
        ]
        cells = "  ".join(f"{mean:10.1f}" for mean in np.mean(values, axis=0))
        yield f"{f'{arm} {size}':18}  {len(here):5}  {cells}"


def lines_of(folder: Path) -> list[str]:
    """What the rule says of a study's folder; see `causal.with_rule`."""
    return list(lines(*causal.with_rule(folder, "curated", "experiments/curated.py")))
