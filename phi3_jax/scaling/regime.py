"""Does the best filter of facts move with size, and does that matter? The rule of experiments/calibration.py as code.

A run is a row: its arm (a filter f, the share of a universe of facts that its corpus keeps), size, seed, tokens and scores.
E1 to E3 are said of two utilities, in points: recall, free-running and weighted by frequency, in percent of the universe;
and the mean of that and of the arithmetic loss, which is 0 at the loss of two steps without depth and 100 at no loss. All
intervals are Student's t over seeds. The runs of a seed share a universe and asked persons, and those of one size the first
weights; sizes share no weights, arms no order, and the reasoning test is one set of items for all seeds, so that its noise
is in no interval.

    E1  slope of log2 f* on log2 N. f*(N), the best filter of a size, is the vertex of a parabola through the mean utilities
        at the best filter of the grid and its two neighbours, in log2 f. The interval is that of the jackknife over seeds.
        A size whose best filter lies at an end of the grid, with all seeds or without one of them, is left out.
    E2  regret of the largest size at the smallest size's best filter: utility at its own best minus utility there. Both
        filters are chosen on one half of the seeds and scored on the other, over all splits, so that the regret of an equal
        choice is 0 and noise does not make one. What any other filter may gain the largest size widens the interval upward.
    E3  E2 at the longest horizon, beside the shorter ones.
    E4  what loosening the filter from its first to its last multiplies the largest size's loss on reasoning outputs by,
        over the same of the smallest, as a logarithm; and that with the reasoning tokens held.

The probability that any of E1 to E3 of one utility rises by chance is held at 5 % (Holm 1979).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from phi3_jax import statistics
from phi3_jax.data.corpora import reasoning
from phi3_jax.data.corpora.facts import MAX_VALUE_BITS
from phi3_jax.errors import UserError, nearest
from phi3_jax.records import tables
from phi3_jax.statistics import Estimate

RECALL, LOSS = "knowledge/universe/recall", "reasoning/all/nll"
DEEP = "reasoning/gap3/accuracy"  # of answers that need three unwritten steps
CHANCE = 2.0**-MAX_VALUE_BITS
SCORER = 2  # the version since which recall is free-running
FAMILY = ("E1", "E2", "E3")  # of which one may rise by chance, together at 5 %
NONE = Estimate(math.nan, math.nan, math.nan, math.nan, 0)


def floor() -> float:
    """Nats an output of a policy that takes the last written number through two steps at most: the worst that counts."""
    return reasoning.depthless_policies()["compose_2"].nll


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of a plan: f is the share of the universe that its corpus keeps, `kept` the recall that this allows, `chance`
    that of who knows no fact."""

    name: str
    arm: str
    member: str
    seed: int
    tokens: int
    f: float
    kept: float
    chance: float = dataclasses.field(default=CHANCE, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Run(Planned):
    """A planned run that finished; size is its non-embedding parameters."""

    size: float
    scores: Mapping[str, float]

    def utility(self, endpoints: Sequence[str]) -> float:
        """Mean of the endpoints' scores in points."""
        return float(np.mean([self.score(end) for end in endpoints]))

    def score(self, endpoint: str) -> float:
        """Recall in percent, or the share of the floor that the loss is below it, in percent."""
        value = self.scores[endpoint]
        return 100 * (1 - value / floor() if endpoint == LOSS else value)

    def position(self, endpoint: str) -> float:
        """Share of the way from the endpoint's floor to the best score that the run's filter allows."""
        if endpoint == LOSS:
            return self.score(LOSS) / 100
        room = self.kept - self.chance
        return (self.scores[endpoint] - self.chance) / room if room > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Block:
    """The planned runs of one table, and those that finished."""

    planned: Sequence[Planned]
    runs: Sequence[Run] = ()

    def part(self, chosen: Callable[[Planned], bool]) -> Block:
        """The runs that are chosen."""
        return Block([p for p in self.planned if chosen(p)], [run for run in self.runs if chosen(run)])

    @property
    def complete(self) -> list[Run]:
        """The runs of the seeds of which every planned run finished.

        Raises:
          UserError: fewer than two such seeds.
        """
        missing = {p.name for p in self.planned} - {run.name for run in self.runs}
        lacking = {p.seed for p in self.planned if p.name in missing}
        seeds = {p.seed for p in self.planned} - lacking
        if len(seeds) < 2:
            raise UserError(
                f"{len(seeds)} of {len(seeds | lacking)} seeds have every planned run; the rule needs 2 or more"
            )
        return [run for run in self.runs if run.seed in seeds]


def read(path: Path, planned: Sequence[Planned]) -> list[Run]:
    """Finished runs of a table that `records.table.keep_finished` wrote.

    Raises:
      UserError: no table; scores of an older scorer; runs of more than one build or scorer, or of code with uncommitted
        changes; a run that is not planned (its arm, size, seed or tokens), or is there twice.
    """
    lines = tables.read(path)
    for column in ("build", "dirty", "scorer", "steps"):
        if column not in lines[0]:
            raise UserError(f"{path} has no column {column!r}: it is older than this rule; train the study again")
    for column, what in (("build", "builds"), ("scorer", "scorer versions")):
        if len(found := sorted({line[column] for line in lines})) > 1:
            raise UserError(
                f"{path} mixes runs of {len(found)} {what} ({', '.join(found)}), which do not compare; keep the rows of one"
            )
    if float(lines[0]["scorer"] or 1) < SCORER:
        raise UserError(
            f"{path} has scores of scorer {lines[0]['scorer']}, whose recall is teacher-forced; score it again"
        )
    runs: dict[str, Run] = {}
    for line in lines:
        where = f"{path} line {line.line}"
        if line["dirty"] == "True":
            raise UserError(f"{where} is a run of code with uncommitted changes; train it again from a commit")
        of = _found(line, planned)
        if of is None:
            said = f"{line['arm']} of {line['member']} with seed {line['seed']} and budget {line['budget']}"
            raise UserError(f"{where}: {said} is no run of the plan; take the line out")
        if of.name in runs:
            raise UserError(f"{where}: {of.name} is there twice; keep one line of it")
        scores = {key: line.number(key, positive=False) for key, value in line.items() if "/" in key and value}
        runs[of.name] = Run(**vars(of), size=line.number("non_embedding"), scores=scores)
    return list(runs.values())


def _found(line: tables.Row, planned: Sequence[Planned]) -> Planned | None:
    """The planned run of a line; its tokens may be less by part of a step, since a run ends with whole steps."""
    tokens = line.number("budget")
    step = tokens / line.number("steps")
    place = line["arm"], line["member"], line["seed"]
    alike = (p for p in planned if (p.arm, p.member, str(p.seed)) == place and 0 <= p.tokens - tokens < step)
    return next(alike, None)


# ------------------------------------------------------------------------------------------------ estimands


def grid(runs: Sequence[Run], value: Callable[[Run], float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values (size, f, seed), sizes, filters) of runs of which every seed has every size and filter."""
    sizes, filters, seeds = (sorted({getattr(run, key) for run in runs}) for key in ("size", "f", "seed"))
    cells = {(run.size, run.f, run.seed): value(run) for run in runs}
    values = np.array([[[cells[n, f, s] for s in seeds] for f in filters] for n in sizes])
    return values, np.array(sizes), np.array(filters)


def check_admitted(runs: Sequence[Run], endpoints: Sequence[str], admitted: Sequence[float]) -> None:
    """Refuses endpoints that cannot tell filters apart where the rule decides.

    Looked at are the middle size's best filter and its neighbours: a neighbour must lie below the upper share of `admitted`
    of the way from the endpoint's floor to the ceiling of its filter, and any of them above the lower.

    Raises:
      UserError: an endpoint without a floor here, that a run lacks, or that lies outside.
    """
    for end in endpoints:
        if end not in (RECALL, LOSS):
            raise UserError(f"the rule names endpoint {end!r}, which has no floor here{nearest(end, (RECALL, LOSS))}")
        if any(end not in run.scores for run in runs):
            raise UserError(f"the rule names endpoint {end!r}, which a run does not have; score it again")
    values, sizes, _ = grid(runs, lambda run: run.utility(endpoints))
    middle, low, high = len(sizes) // 2, *admitted
    top = int(values[middle].mean(-1).argmax())
    for end in endpoints:
        places = grid(runs, functools.partial(Run.position, endpoint=end))[0][middle].mean(-1)
        beside = [*places[max(0, top - 1) : top], *places[top + 1 : top + 2]]
        if max(places[top], *beside) > low and min(beside) < high:
            continue
        shown = ", ".join(f"{100 * place:.0f}" for place in places[max(0, top - 1) : top + 2])
        raise UserError(
            f"the rule names endpoint {end!r}, which is not admitted: at the middle size's best filter and beside it it "
            f"lies at {shown} % of its range, outside {100 * low:g} to {100 * high:g} %"
        )


def best(values: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """log2 of the best filter of each row of `values` (size, f): the vertex of a parabola through the largest value of the
    row and its two neighbours; at an end of the grid, that end."""
    x, found = np.log2(filters), []
    for row in values:
        top = int(np.argmax(row))
        if top in (0, len(x) - 1):
            found.append(x[top])
            continue
        bend, slope, _ = np.polyfit(x[top - 1 : top + 2], row[top - 1 : top + 2], 2)
        found.append(-slope / (2 * bend))
    return np.array(found)


def slope(runs: Sequence[Run], endpoints: Sequence[str]) -> tuple[Estimate, np.ndarray, int]:
    """E1: (slope of log2 f* on log2 N, log2 f* of each size, how many sizes have it at an end of the grid).

    The interval is the t interval of the jackknife's pseudo-values over seeds, nan with fewer than three sizes inside.
    """
    values, sizes, filters = grid(runs, lambda run: run.utility(endpoints))
    n = values.shape[-1]
    means = [values.mean(-1), *(np.delete(values, i, axis=-1).mean(-1) for i in range(n))]
    stars = np.array([best(mean, filters) for mean in means])  # (1 + seeds, sizes)
    inside = ~np.isin(stars, np.log2(filters[[0, -1]])).any(0)
    if inside.sum() < 3:
        return NONE, stars[0], int((~inside).sum())
    slopes = np.polyfit(np.log2(sizes[inside]), stars[:, inside].T, 1)[0]
    spread = statistics.over_seeds(n * slopes[0] - (n - 1) * slopes[1:])
    half = (spread.high - spread.low) / 2
    found = Estimate(float(slopes[0]), spread.stderr, float(slopes[0] - half), float(slopes[0] + half), n)
    return found, stars[0], int((~inside).sum())


@dataclasses.dataclass(frozen=True)
class Regret:
    """What the largest size loses at the smallest size's best filter, in points; whether a best filter is at an end."""

    estimate: Estimate
    same: bool  # both sizes choose one filter in every half: the estimate is then what the best other filter would gain
    at_edge: bool


def regret(runs: Sequence[Run], endpoints: Sequence[str]) -> Regret:
    """E2, cross-fitted over all splits of the seeds into halves; see above.

    The seeds of a half share its filters, and splits share seeds: the error is that of one split, by the mean variance over
    splits, which that of the mean over splits does not exceed.
    """
    values, _, filters = grid(runs, lambda run: run.utility(endpoints))
    small, large, n = values[0], values[-1], values.shape[-1]
    lost = np.zeros((0, n))  # (split, seed)
    for chosen in itertools.combinations(range(n), n // 2):
        row, half = np.zeros(n), np.isin(np.arange(n), chosen)
        for choose in (half, ~half):
            theirs, own = (x[:, choose].mean(1).argmax() for x in (small, large))
            row[~choose] = (large[own] - large[theirs])[~choose]
        lost = np.vstack([lost, row])
    value, stderr = float(lost.mean()), float(np.sqrt(lost.var(axis=1, ddof=1).mean() / n))
    reach = float(special.stdtrit(n - 1, (1 + statistics.LEVEL) / 2)) * stderr
    found = Estimate(value, stderr, value - reach, value + reach, n)
    theirs, own = (int(x.mean(1).argmax()) for x in (small, large))
    others = [statistics.over_seeds(large[f] - large[theirs]) for f in range(len(filters)) if f != theirs]
    other = max(others, key=lambda e: e.high)
    same = not lost.any()
    found = other if same else dataclasses.replace(found, high=max(found.high, other.high))
    return Regret(found, same, bool({theirs, own} & {0, len(filters) - 1}))


def loosening(runs: Sequence[Run], tight: str, loose: str) -> Estimate:
    """E4: log of the factor by which going from arm `tight` to `loose` raises the largest size's reasoning loss, minus the
    smallest's, of the seeds that have both arms at both."""
    ends = min(run.size for run in runs), max(run.size for run in runs)
    nats = {(run.size, run.arm, run.seed): math.log(run.scores[LOSS]) for run in runs if LOSS in run.scores}
    cells = [(size, arm) for size in ends for arm in (tight, loose)]
    whole = [s for s in sorted({run.seed for run in runs}) if all((*cell, s) in nats for cell in cells)]
    if len(whole) < 2:
        raise UserError(
            f"{len(whole)} seeds have arms {tight} and {loose} at both outer sizes; the rule needs 2 or more"
        )
    signs = (1, -1, -1, 1)  # smallest tight, smallest loose, largest tight, largest loose
    return statistics.over_seeds([sum(k * nats[(*c, s)] for k, c in zip(signs, cells, strict=True)) for s in whole])


def seen(pilot: Sequence[Run], endpoints: Sequence[str], seeds: int, admitted: Sequence[float]) -> float:
    """Points of regret that so many seeds see at 80 % power and level .05, by the pilot's noise at its noisiest size.

    The noise is that of a seed's difference between two filters whose recall is neither at its floor nor at its ceiling.

    Raises:
      UserError: no size has two such filters.
    """
    values = grid(pilot, lambda run: run.utility(endpoints))[0]
    places = grid(pilot, lambda run: run.position(RECALL))[0].mean(-1)
    spreads = []
    for one, place in zip(values, places, strict=True):
        rows = one[(place > admitted[0]) & (place < admitted[1])]
        if len(rows) > 1:
            rest = rows - rows.mean(0) - rows.mean(1, keepdims=True) + rows.mean()
            spreads.append(math.sqrt(2 * np.square(rest).sum() / ((rows.shape[0] - 1) * (rows.shape[1] - 1))))
    if not spreads:
        raise UserError("no size of the pilot has two filters in transition")
    return float(special.stdtrit(seeds - 1, 0.975) + special.stdtrit(seeds - 1, 0.8)) * max(spreads) / math.sqrt(seeds)


# ------------------------------------------------------------------------------------------------ the rule


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The answer to one estimand: a word, the number behind it, and the sentence that says both."""

    estimand: str
    word: str
    estimate: Estimate
    sentence: str

    @property
    def p(self) -> float:
        """Twice the one-sided p of Student's t that the truth is above 0, at most 1."""
        e = self.estimate
        if not e.known or e.stderr == 0:
            return 0.0 if e.value > 0 else 1.0
        return min(1.0, float(2 * special.stdtr(e.n - 1, -e.value / e.stderr)))


def of_slope(runs: Sequence[Run], endpoints: Sequence[str], rule: Mapping[str, Any], name: str = "E1") -> Verdict:
    """E1: "rises" above 0 with an estimate above the smallest slope that matters, "rises, little" with a smaller one; "does
    not" below that slope; else "not determined", as where so many sizes as `rule["at_edge"]` are at an end of the grid."""
    check_admitted(runs, endpoints, rule["admitted"])
    e, stars, at_edge = slope(runs, endpoints)
    least = rule["smallest_slope"]
    word = "rises" if e.sign > 0 else "does not" if e.high < least else "not determined"
    word = "rises, little" if word == "rises" and e.value <= least else word
    word = "not determined" if at_edge >= rule["at_edge"] else word
    shown = ", ".join(f"{2**star:.3g}" for star in stars)
    return Verdict(
        name, word, e,
        f"Slope {stated(e)} octaves an octave, best filters {shown} from the smallest size to the largest, {at_edge} at an "
        "end of the grid.",
    )  # fmt: skip


def of_regret(
    runs: Sequence[Run], endpoints: Sequence[str], margin: float, rule: Mapping[str, Any], name: str = "E2"
) -> Verdict:
    """E2: "rises" where the regret is above 0; "does not" where it, and what any other filter gains, is below the margin
    and both best filters lie inside the grid; else "not determined"."""
    check_admitted(runs, endpoints, rule["admitted"])
    found = regret(runs, endpoints)
    e = found.estimate
    word = "rises" if e.sign > 0 and not found.same else "not determined"
    word = "does not" if word != "rises" and e.high < margin and not found.at_edge else word
    what = "Both choose one filter; the best other gains the largest size" if found.same else "The largest size loses"
    edge = ", a best filter at an end of the grid" if found.at_edge else ""
    return Verdict(name, word, e, f"{what} {stated(e)} points{edge}.")


def of_horizons(
    block: Block, endpoints: Sequence[str], margin: float, rule: Mapping[str, Any], name: str = "E3"
) -> Verdict:
    """E3: `of_regret` at the longest horizon of a block; its sentence has the regrets at the shorter ones."""
    *shorter, longest = sorted({p.tokens for p in block.planned})
    at = lambda tokens: block.part(lambda p: p.tokens == tokens).complete  # noqa: E731
    found = of_regret(at(longest), endpoints, margin, rule, name)
    shown = []
    for tokens in shorter:
        try:
            shown.append(f"{stated(regret(at(tokens), endpoints).estimate)} at {tokens:,} tokens")
        except UserError:
            shown.append(f"unknown at {tokens:,} tokens")
    return dataclasses.replace(found, sentence=f"{found.sentence} Shorter horizons: {', '.join(shown)}.")


def of_reasoning(runs: Sequence[Run], tight: str, loose: str, rule: Mapping[str, Any], name: str = "E4") -> Verdict:
    """E4: "rises" above 0, "does not" where the largest's factor exceeds the smallest's by less than the margin."""
    check_admitted([run for run in runs if run.arm not in rule["controls"]], [LOSS], rule["admitted"])
    e = loosening(runs, tight, loose)
    margin = rule["reasoning_margin"]
    word = "rises" if e.sign > 0 else "does not" if e.high < math.log1p(margin) else "not determined"
    percent = [f"{100 * math.expm1(x):+.1f}" for x in (e.value, e.low, e.high)]
    return Verdict(
        name, word, e,
        f"From {tight} to {loose} the largest size's loss grows by {percent[0]} % [{percent[1]}, {percent[2]}] "
        f"({e.n} seeds) beside the smallest's; margin {100 * margin:g} %.{_deep(runs, (tight, loose))}",
    )  # fmt: skip


def _deep(runs: Sequence[Run], arms: Sequence[str]) -> str:
    """The largest size's accuracy over three unwritten steps in each arm, where the runs have it."""
    size = max(run.size for run in runs)
    largest = [run for run in runs if run.size == size and DEEP in run.scores]
    shown = [
        f"{100 * np.mean([r.scores[DEEP] for r in of]):.1f} % in {arm}"
        for arm in arms
        if (of := [r for r in largest if r.arm == arm])
    ]
    return f" Its answers after three unwritten steps are right to {' and '.join(shown)}." if shown else ""


def holm(verdicts: Sequence[Verdict], planned: int = len(FAMILY), level: float = 1 - statistics.LEVEL) -> list[Verdict]:
    """The verdicts of one family; one that rises by its own interval alone, and not after Holm's step, is not determined.

    `planned` counts those that have no verdict yet, too.
    """
    passed: set[str] = set()
    for step, verdict in enumerate(sorted(verdicts, key=lambda v: v.p)):
        if not (verdict.word.startswith("rises") and verdict.p <= level / (planned - step)):
            break
        passed.add(verdict.estimand)
    return [
        dataclasses.replace(
            v, word="not determined", sentence=f"{v.sentence} It rises alone, not among {planned} (Holm)."
        )
        if v.word.startswith("rises") and v.estimand not in passed
        else v
        for v in verdicts
    ]


def of_rates(block: Block, endpoints: Sequence[str]) -> str:
    """What E1 and E2 must say of the learning rate: that the better filter of a size hangs on it, and what did not run.

    Compared are the rates at which a size has every filter."""
    ran = {(run.arm, run.member, run.seed): run for run in block.runs}
    places: dict[tuple[str, str], list[Run | None]] = {}
    for one in block.planned:
        found = ran.get((one.arm, one.member, one.seed))
        places.setdefault((one.member, one.arm.partition("_")[2]), []).append(found)
    better: dict[str, list[float]] = {}
    for (member, _), filters in places.items():
        runs = [run for run in filters if run is not None]
        if len(runs) == len(filters):
            better.setdefault(member, []).append(max(runs, key=lambda run: run.utility(endpoints)).f)
    if all(len(found) < 2 for found in better.values()):
        return " At this learning rate; whether others agree has not run."
    missing = [one.name for one in block.planned if (one.arm, one.member, one.seed) not in ran]
    left = f" Of other learning rates {', '.join(missing)} did not run to the end." if missing else ""
    differ = sorted(member for member, found in better.items() if len(set(found)) > 1)
    if differ:
        left += f" At this learning rate: the better filter of {', '.join(differ)} differs between rates."
    return left


def decide(blocks: Mapping[str, Block], rule: Mapping[str, Any]) -> list[Verdict]:
    """The verdicts: for each utility E1 and E2 of B, E3 of C; E4 of B. "not decided" while the rule waits for the pilot.

    Args:
      blocks: {"pilot" | "B" | "C" | "D": what of it ran}; without the runs that it needs an estimand is "not determined".
      rule: of the study: after_pilot, utilities, admitted, smallest_slope, at_edge, reasoning_margin, controls.
    """
    if waits := [name for name, value in rule["after_pilot"].items() if value is None]:
        said = f"The rule waits for the pilot, which fixes: {', '.join(waits)}.{_of_pilot(blocks['pilot'], rule)}"
        return [Verdict("E1 to E4", "not decided", NONE, said)]
    return [v for line in rule["utilities"] for v in _of_line(blocks, line, rule)] + _of_arithmetic(blocks["B"], rule)


def _main(block: Block, rule: Mapping[str, Any]) -> Block:
    """B without its controls."""
    return block.part(lambda p: p.arm not in rule["controls"])


def _of_line(blocks: Mapping[str, Block], line: str, rule: Mapping[str, Any]) -> list[Verdict]:
    """E1 to E3 of one utility."""
    main, longer, endpoints = _main(blocks["B"], rule), blocks["C"], rule["utilities"][line]
    margin, rate = rule["after_pilot"][f"margin of {line}"], of_rates(blocks["D"], endpoints)
    e1, e2, e3 = (f"{estimand}, {line}" for estimand in FAMILY)
    found = [
        tried(e1, main, lambda: of_slope(main.complete, endpoints, rule, e1)),
        tried(e2, main, lambda: of_regret(main.complete, endpoints, margin, rule, e2)),
    ]
    found = [dataclasses.replace(v, sentence=v.sentence + rate) for v in found]
    return holm([*found, tried(e3, longer, lambda: of_horizons(longer, endpoints, margin, rule, e3))])


def _of_arithmetic(block: Block, rule: Mapping[str, Any]) -> list[Verdict]:
    """E4 from the tightest filter to the loosest, and from the tightest with the loosest's reasoning tokens."""
    main = _main(block, rule)
    tight, *_, loose = [p.arm for p in sorted(main.planned, key=lambda p: p.f)]
    held = rule["controls"][-1]

    def verdict(first: str, name: str) -> Verdict:
        seeds = {run.seed for run in main.complete}
        return of_reasoning([run for run in block.runs if run.seed in seeds], first, loose, rule, name)

    two = "E4", "E4, reasoning tokens held"
    return [tried(two[0], main, lambda: verdict(tight, two[0])), tried(two[1], main, lambda: verdict(held, two[1]))]


def tried(name: str, block: Block, verdict: Callable[[], Verdict]) -> Verdict:
    """A verdict, or why there is none; one of a block whose runs are not all there says so."""
    try:
        found = verdict()
    except UserError as error:
        return Verdict(name, "not determined", NONE, f"{error}.")
    missing = len(block.planned) - len(block.runs)
    return (
        dataclasses.replace(found, sentence=f"{found.sentence} Not final: {missing} runs miss.") if missing else found
    )


def _of_pilot(pilot: Block, rule: Mapping[str, Any]) -> str:
    """What regrets its noise lets seeds see, for each utility."""
    said = []
    for line, endpoints in rule["utilities"].items():
        try:
            shown = [f"{seen(pilot.complete, endpoints, n, rule['admitted']):.1f} with {n}" for n in (4, 6, 8, 12)]
            said.append(f" By its noise, points of {line} that seeds see: {', '.join(shown)}.")
        except UserError as error:
            said.append(f" Of {line}: {error}.")
    return "".join(said)


def stated(e: Estimate, digits: int = 2) -> str:
    return f"{e.value:+.{digits}f} [{e.low:+.{digits}f}, {e.high:+.{digits}f}] ({e.n} seeds)"
