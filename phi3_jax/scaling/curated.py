"""Whether the best threshold of the knowledge filter rises with size, by the rule of experiments/curated.py.

A threshold is the share of the bits of all facts that an arm keeps. What a best threshold and a regret are, and where an
endpoint may decide, is `scaling.regime`'s; here stand the plan, the trend over sizes, the controls and the lines.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax import configs, statistics
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
    """E2: as `regime.of_regret`, where "rises" also needs the largest's best threshold to be the higher one at every weight
    of recall in the mean, and the smallest's to be above 0."""
    runs = found.complete
    verdict = regime.of_regret(runs, endpoints, rule["margin"], rule, name)
    small, large = _best(runs, endpoints)
    word, more = verdict.word, ""
    if word == "rises" and large < small:
        word = "does not"
    elif word == "rises" and not small:
        word, more = UNDETERMINED, " The smallest size does best without any facts, which bars a rise."
    elif word == "rises" and len(set(endpoints)) > 1:
        weighted = [_best(runs, [*endpoints, end]) for end in endpoints]  # two thirds for each in turn
        if not all(big > little for little, big in weighted):
            word, more = UNDETERMINED, " With two thirds of the weight on one endpoint it does not rise."
    best = f"{100 * small:.0f} % at the smallest, {100 * large:.0f} % at the largest"
    return dataclasses.replace(verdict, word=word, sentence=f"{verdict.sentence} Best over all seeds: {best}.{more}")


def _best(runs: Sequence[Run], endpoints: Sequence[str]) -> tuple[float, float]:
    """Best thresholds over all seeds of the smallest and the largest size."""
    values, _, filters = regime.grid(runs, lambda run: run.utility(endpoints))
    small, *_, large = filters[values.mean(-1).argmax(1)]
    return float(small), float(large)


def check_learnt(found: Block, rule: Mapping[str, Any]) -> None:
    """Refuses a comparison of sizes of which an outer one learns no facts: what it does best with is then no threshold.

    Raises:
      UserError: at an outer size no arm has a recall above that of the shuffled values in every seed, and off its floor.
    """
    for size in (rule["sizes"][0], rule["sizes"][-1]):
        here = [run for run in found.runs if run.member == size]
        control = {run.seed: run.score(RECALL) for run in here if run.arm == rule["shuffled"]}
        for arm in rule["filter"]:
            runs = [run for run in here if run.arm == arm and run.seed in control]
            off = runs and np.mean([run.position(RECALL) for run in runs]) > rule["admitted"][0]
            if off and all(run.score(RECALL) > control[run.seed] for run in runs):
                break
        else:
            raise UserError(f"{size} learns no facts in any arm beyond what values dealt anew give it")


def clipped(run: Run) -> Run:
    """The run, whose arithmetic is worth nothing, and no less, where its loss is above what needs no depth."""
    return dataclasses.replace(run, scores=dict(run.scores) | {LOSS: min(run.scores[LOSS], regime.floor())})


def decide(found: Block, rule: Mapping[str, Any]) -> list[Verdict]:
    """E1 and E2 of each utility, E3, which is E2 of random countries at the outer sizes, and E4."""
    whole = Block(found.planned, [clipped(run) for run in found.runs])
    main = whole.part(lambda p: p.arm in rule["filter"])
    ends, outer = (rule["filter"][0], rule["filter"][-1]), (rule["sizes"][0], rule["sizes"][-1])
    random = whole.part(lambda p: p.arm in (*ends, *rule["random"]) and p.member in outer)
    first, loosest = composite(rule), max(main.planned, key=lambda p: p.f).arm

    def learnt(of: Callable[[Block, str], Verdict]) -> Callable[[Block, str], Verdict]:
        def checked(part: Block, name: str) -> Verdict:
            check_learnt(found, rule)
            return of(part, name)

        return checked

    made: dict[str, tuple[Block, Callable[[Block, str], Verdict]]] = {}
    for line, names in sorted(rule["utilities"].items(), key=lambda item: item[1] != first):  # the primary first
        made[f"E1, {line}"] = main, learnt(functools.partial(of_trend, names, rule))
        made[f"E2, {line}"] = main, learnt(functools.partial(of_regret, names, rule))
    made["E3"] = random, learnt(functools.partial(of_regret, first, rule))
    made["E4"] = found, functools.partial(_of_reasoning, loosest, rule)
    return [regime.tried(name, part, functools.partial(of, part, name)) for name, (part, of) in made.items()]


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
    now = {name: config[name] for name in rule["of"] if name not in ("weighting", "arms")}
    now |= {"weighting": config["train"]["weighting"], "arms": {n: str(a.data) for n, a in arms_of(config).items()}}
    if (changed := configs.config_diff(_plain(rule["of"]), _plain(now))) is not None and changed:
        yield f"Another design than the rule's ({configs.shown_changes(changed)}), of which the rule says nothing."
        yield "Verdict: none."
        return
    if missing:
        yield "The rule is silent until every planned run has finished."
        yield "Verdict: none."
        return
    said = decide(found, rule)
    for verdict in said:
        predicted = rule["predictions"][verdict.estimand]
        yield f"{verdict.estimand}: {verdict.word} (predicted: {predicted}). {verdict.sentence}"
    yield ""
    primary, random = (next(v for v in said if v.estimand == name) for name in (rule["primary"], "E3"))
    amount = ", and so it does for countries at random: it is the amount of facts, whatever the filter's order"
    yield (
        f"Verdict: the best threshold {_WORDS.get(primary.word, primary.word)} ({rule['primary']}; real facts beside made "
        f"arithmetic, 16 visits, one learning rate){amount if primary.word == random.word == 'rises' else ''}."
    )


def _plain(tree: Any) -> Any:
    """As JSON has it."""
    return json.loads(json.dumps(tree, default=list))


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
            [clipped(run).utility(ends), run.score(RECALL), 100 * run.kept, run.score(LOSS), 100 * run.scores[EXACT]]
            for run in here
        ]
        cells = "  ".join(f"{mean:10.1f}" for mean in np.mean(values, axis=0))
        yield f"{f'{arm} {size}':18}  {len(here):5}  {cells}"


def lines_of(folder: Path) -> list[str]:
    """What the rule says of a study's folder; see `causal.with_rule`."""
    return list(lines(*causal.with_rule(folder, "curated", "experiments/curated.py")))
