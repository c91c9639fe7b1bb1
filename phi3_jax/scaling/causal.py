"""What a study with arms says about the data-optimal regime: interactions, best mixtures and the verdict of its rule.

A study's runs are read from its `runs.csv` (or a table of it that ships), one row per run. All intervals are Student's t
over seeds, paired by seed wherever two arms or sizes are compared: a seed has its own weights, data order and universe
of facts, so its noise holds all of theirs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax import statistics
from phi3_jax.errors import UserError, nearest
from phi3_jax.family import TRIO
from phi3_jax.records import tables
from phi3_jax.records.files import read_json
from phi3_jax.statistics import Estimate

UNIVERSE, OWN = "knowledge/universe/recall", "knowledge/corpus/recall"
EXACT = "reasoning/row/exact"
SCALES = ("points", "logit")


@dataclasses.dataclass(frozen=True)
class Row:
    """One finished run: its arm, size in non-embedding parameters, seed, and final scores by `suite/task/metric`."""

    arm: str
    member: str
    size: float
    seed: int
    scores: Mapping[str, float]
    record: Mapping[str, str]


def read(path: Path) -> list[Row]:
    """Finished runs of a `runs.csv` with arms.

    Raises:
      UserError: no such file, no column `arm`, a cell that is no number where one is needed, or no finished run.
    """
    if not path.is_file():
        raise UserError(f"no table {path}; give a study's runs.csv")
    records = tables.read(path)
    if "arm" not in records[0]:
        raise UserError(f"{path} has no column 'arm': it is no study of arms")
    rows = []
    for record in records:
        if record["status"] != "finished" or not record["arm"]:
            continue
        scores = {key: record.number(key, positive=False) for key, v in record.items() if "/" in key and v}
        seed = round(record.number("seed", positive=False))
        place = record["arm"], record["member"], record.number("non_embedding"), seed
        rows.append(Row(*place, scores, record))
    if not rows:
        raise UserError(f"{path} has no finished run; the command in study.json continues it")
    return rows


def with_rule(folder: Path, rule: str, experiment: str) -> tuple[list[Row], dict[str, Any]]:
    """Finished runs and config of a study's folder, or of one that a repository keeps: its runs.csv and study.json.

    Args:
      rule: the key of the config that holds the study's rule.
      experiment: whose study has such a rule.

    Raises:
      UserError: a file is missing, no run has finished, or the study has no such rule.
    """
    rows = read(folder / "runs.csv")
    config = read_json(folder / "study.json").get("design", {}).get("config", {})
    if not config.get(rule):
        raise UserError(f"{folder}/study.json has no such rule; give a folder of {experiment}")
    return rows, config


# ------------------------------------------------------------------------------------------------ scores of an arm


def scores(rows: Sequence[Row], arm: str, endpoint: str, scale: str = "points") -> dict[str, dict[int, float]]:
    """{member: {seed: score}} of an arm, in percent ("points") or log-odds ("logit").

    Log-odds of n items are clipped where half an item is wrong or right. Sizes come smallest first.

    Raises:
      UserError: an arm or endpoint that no run has, or another scale.
    """
    here = [row for row in rows if row.arm == arm]
    if not here:
        raise UserError(f"no finished run of arm {arm!r}{nearest(arm, sorted({row.arm for row in rows}))}")
    if scale not in SCALES:
        raise UserError(f"scale={scale!r} is none of {', '.join(SCALES)}")
    out: dict[str, dict[int, float]] = {}
    for row in sorted(here, key=lambda row: (row.size, row.seed)):
        if endpoint not in row.scores:
            continue
        value = row.scores[endpoint]
        if scale == "logit":
            edge = 0.5 / (row.scores.get(f"{endpoint}/n", 1e4) + 1)
            value = math.log((p := min(max(value, edge), 1 - edge)) / (1 - p))
        out.setdefault(row.member, {})[row.seed] = value * (100 if scale == "points" else 1)
    if not out:
        known = sorted({key for row in here for key in row.scores if not key.endswith("/n")})
        raise UserError(f"arm {arm!r} has no endpoint {endpoint!r}{nearest(endpoint, known)}")
    return out


def sizes(rows: Sequence[Row], arm: str) -> dict[str, float]:
    """Non-embedding parameters of an arm's sizes, smallest first."""
    return {row.member: row.size for row in sorted(rows, key=lambda row: row.size) if row.arm == arm}


def mean(by_seed: Mapping[int, float]) -> Estimate:
    """Mean over seeds with its t interval."""
    return statistics.over_seeds(list(by_seed.values()))


def _paired(*tables: Mapping[int, float]) -> list[int]:
    return sorted(set.intersection(*(set(t) for t in tables)))


@dataclasses.dataclass(frozen=True)
class Steps:
    """Gains per doubling of parameters mini -> small and small -> medium, and second minus first; a value per seed."""

    first: dict[int, float]
    second: dict[int, float]
    contrast: dict[int, float]


def steps(rows: Sequence[Row], arm: str, endpoint: str, scale: str = "points") -> Steps:
    """Gains of the seeds that have all three sizes.

    Raises:
      UserError: no seed has them.
    """
    table, size = scores(rows, arm, endpoint, scale), sizes(rows, arm)
    trio = [table.get(member, {}) for member in TRIO]
    seeds = _paired(*trio)
    if not seeds:
        raise UserError(f"arm {arm!r} has no seed with all of {', '.join(TRIO)}; gains need the three")
    n = [size[member] for member in TRIO]
    found = {seed: statistics.gain_per_doubling([t[seed] for t in trio], n) for seed in seeds}
    return Steps(*({s: getattr(g, name) for s, g in found.items()} for name in ("first", "second", "contrast")))


def interaction(rows: Sequence[Row], arms: tuple[str, str], endpoint: str, scale: str = "points") -> Estimate:
    """Contrast (second gain minus first) of arms[1] minus that of arms[0], paired by seed.

    Positive: the corpus of arms[0] weakens the second step, compared with that of arms[1].
    """
    one, other = (steps(rows, arm, endpoint, scale).contrast for arm in arms)
    return mean({seed: other[seed] - one[seed] for seed in _paired(one, other)})


def difference(rows: Sequence[Row], arms: tuple[str, str], endpoint: str, scale: str = "points") -> dict[str, Estimate]:
    """{member: arms[1] minus arms[0]}, paired by seed."""
    one, other = (scores(rows, arm, endpoint, scale) for arm in arms)
    pairs = {m: _paired(one[m], other[m]) for m in one if m in other}
    return {m: mean({s: other[m][s] - one[m][s] for s in seeds}) for m, seeds in pairs.items() if seeds}


def slope(rows: Sequence[Row], arm: str, endpoint: str, scale: str = "points") -> tuple[Estimate, Estimate]:
    """(gain per doubling, its change per doubling) over all sizes of an arm: a parabola in log2 N, one a seed.

    The second is the curvature, the many-size form of a contrast: negative where gains fade with size. Needs four sizes.
    """
    table, size = scores(rows, arm, endpoint, scale), sizes(rows, arm)
    seeds = _paired(*table.values())
    if len(table) < 4 or not seeds:
        raise UserError(f"arm {arm!r} has {len(table)} sizes in common; a curvature needs 4")
    x = np.log2([size[m] for m in table])
    x -= x.mean()
    fits = {s: np.polyfit(x, [table[m][s] for m in table], 2) for s in seeds}
    return mean({s: f[1] for s, f in fits.items()}), mean({s: 2 * f[0] for s, f in fits.items()})


# ------------------------------------------------------------------------------------------------ what a filter does


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """Points of universe recall that loosening adds at one size, split in two that sum to `total`.

    `coverage`: what the added facts would bring if they were recalled as well as the filtered corpus's own: the lifted
    ceiling. `competition`: what is lost because a fuller corpus is recalled less well.
    """

    total: Estimate
    coverage: Estimate
    competition: Estimate


def ceiling(rows: Sequence[Row], arms: tuple[str, str], shares: tuple[float, float]) -> dict[str, Ceiling]:
    """The split at each size; `shares` of the universe are in the corpora of the two arms.

    Recall of the universe is share x recall of the corpus's own facts (but for lucky guesses outside, 1/256 here), so
    loose - filtered = (s1 - s0) own0 + s1 (own1 - own0); guesses are left in `coverage`, so that the parts sum exactly.
    """
    whole = [scores(rows, arm, UNIVERSE) for arm in arms]
    own = [scores(rows, arm, OWN) for arm in arms]
    out = {}
    for m in whole[0]:
        seeds = _paired(*(t.get(m, {}) for t in (*whole, *own)))
        if not seeds:
            continue
        total = {s: whole[1][m][s] - whole[0][m][s] for s in seeds}
        lost = {s: shares[1] * (own[1][m][s] - own[0][m][s]) for s in seeds}
        out[m] = Ceiling(mean(total), mean({s: total[s] - lost[s] for s in seeds}), mean(lost))
    return out


def ladder_of_shares(arms: Mapping[str, Mapping[str, Any]], pair: tuple[str, str]) -> dict[str, float]:
    """{arm: knowledge share} of the arms that differ from the rule's two in the number of kept facts alone."""
    plain = {"facts", "knowledge", "reasoning", "seeds"}
    exposures = lambda arm: arm["knowledge"] / arm["facts"]  # noqa: E731
    total = lambda arm: arm["knowledge"] + arm["reasoning"]  # noqa: E731
    base = arms[pair[0]]
    out: dict[str, float] = {}
    for name, arm in arms.items():
        if set(arm) <= plain and all(arm.get(key) for key in ("facts", "knowledge", "reasoning")):
            same = math.isclose(exposures(arm), exposures(base), rel_tol=1e-3) and math.isclose(total(arm), total(base))
            out |= {name: arm["knowledge"] / total(arm)} if same else {}
    return dict(sorted(out.items(), key=lambda item: item[1]))


@dataclasses.dataclass(frozen=True)
class BestShare:
    """Composite score (percent) of one size against the knowledge share, and the best share on the grid."""

    shares: tuple[float, ...]
    composite: tuple[Estimate, ...]
    by_seed: dict[int, float]  # best share of each seed that has every arm

    @property
    def best(self) -> float:
        return self.shares[int(np.argmax([c.value for c in self.composite]))]

    @property
    def at_edge(self) -> bool:
        """Whether the best share is the first or last of the grid: the optimum may lie beyond."""
        return self.best in (self.shares[0], self.shares[-1])


def best_shares(rows: Sequence[Row], shares: Mapping[str, float], endpoints: Sequence[str]) -> dict[str, BestShare]:
    """{member: BestShare} by the mean of the endpoints, over the seeds that every arm has; {} unless all sizes have one.

    An arm without a seed of all three sizes, as in a study that still runs, is left out of the grid.
    """
    tables = {}
    for arm in shares:
        found = {row.member: {r.seed for r in rows if (r.arm, r.member) == (arm, row.member)} for row in rows}
        if set.intersection(*(found.get(member, set()) for member in TRIO)):
            tables[arm] = [scores(rows, arm, end) for end in endpoints]
    out = {}
    for member in TRIO:
        seeds = _paired(*(t.get(member, {}) for tabs in tables.values() for t in tabs)) if tables else []
        if not seeds:
            return {}
        grid = tuple(shares[arm] for arm in tables)
        values = np.array([[np.mean([t[member][s] for t in tabs]) for s in seeds] for tabs in tables.values()])
        by_seed = {s: grid[int(values[:, i].argmax())] for i, s in enumerate(seeds)}
        out[member] = BestShare(grid, tuple(statistics.over_seeds(v) for v in values), by_seed)
    return out


def frequency_thresholds(rows: Sequence[Row], arm: str) -> dict[str, Estimate]:
    """{member: log2 of the relative frequency at which half of the facts are recalled}, from power-law groups.

    Gu et al. (arXiv:2505.18091) predict f ~ N^-(1 + alpha). Group g of 100 is seen in proportion to g^-1.5; the threshold
    is where recall, smoothed to fall with rarity by isotonic regression, crosses one half, linear in log frequency
    between groups. A size that recalls all or none of the groups has no threshold and is left out.
    """
    found: dict[str, dict[int, float]] = {}
    for row in sorted((r for r in rows if r.arm == arm), key=lambda r: r.size):
        groups = {
            int(key.split("/")[1].removeprefix("group ")): value
            for key, value in row.scores.items()
            if key.endswith("recall_by_frequency")
        }
        if groups:
            numbers = sorted(groups)
            smooth = _falling([groups[g] for g in numbers])
            below = np.flatnonzero(smooth < 0.5)
            if len(below) and below[0] > 0:
                i = below[0]
                part = (smooth[i - 1] - 0.5) / (smooth[i - 1] - smooth[i])
                x = np.log2(np.array(numbers, float))
                found.setdefault(row.member, {})[row.seed] = -1.5 * (x[i - 1] + part * (x[i] - x[i - 1]))
    return {member: mean(by_seed) for member, by_seed in found.items()}


def _falling(values: Sequence[float]) -> np.ndarray:
    """Least-squares fit that never rises (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            a, n = blocks.pop()
            b, k = blocks.pop()
            blocks.append(((a * n + b * k) / (n + k), n + k))
    return np.repeat([v for v, _ in blocks], [n for _, n in blocks])


# ------------------------------------------------------------------------------------------------ the rule


@dataclasses.dataclass(frozen=True)
class Admission:
    """Whether an endpoint may decide: where `small` lies between the best degenerate policy and 1 in each arm."""

    endpoint: str
    floor: float
    positions: dict[str, float]
    admitted: bool


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`word` is one of the five of `decide`; `findings` are its conditions as sentences with numbers."""

    word: str
    findings: tuple[str, ...]
    interactions: dict[str, Estimate]
    admissions: tuple[Admission, ...]
    best: dict[str, BestShare]


def degenerate(universe: int, seed: int) -> dict[str, float]:
    """Scores of the best policies that know and compute nothing, measured on the tests' own items.

    Reasoning: the better of the best constant and the best copy offset, chosen on one half of the items and scored on the
    other. Knowledge: the most frequent value of each attribute, chosen and scored likewise.
    """
    from phi3_jax.data.corpora import facts, reasoning

    items = reasoning.degenerate_policies(reasoning.generate(0, 0, 4096, stream="eval"))
    values = facts.Universe(universe, universe, seed=seed).values
    half = len(values) // 2
    guesses = [np.bincount(column[:half]).argmax() == column[half:] for column in values.T]
    know = float(np.mean(guesses))
    return {UNIVERSE: know, OWN: know, EXACT: float(max(items["constant_row"], items["copy_row"]))}


def admit(rows: Sequence[Row], rule: Mapping[str, Any], endpoint: str, floor: float) -> Admission:
    """The rule's calibration of one endpoint, by the middle size alone, so that it is blind to the contrast."""
    low, high = rule["admitted"]
    positions = {}
    for arm in rule["arms"]:
        value = mean(scores(rows, arm, endpoint).get(TRIO[1], {0: math.nan})).value / 100
        positions[arm] = (value - floor) / (1 - floor)
    return Admission(endpoint, floor, positions, all(low <= p <= high for p in positions.values()))


def decide(
    rows: Sequence[Row], rule: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]], floors: Mapping[str, float]
) -> Verdict:
    """The verdict of a study's own rule (`design.config` of study.json).

    "supported": the interaction is above 0 on points of `knowledge` and on log-odds of `own_facts`, and the best
    knowledge share rises from mini to medium. "supported through the ceiling only": above 0 on points of `knowledge`,
    not on those log-odds. "supported in part": above 0 on both, and the share does not rise, or reasoning was not
    admitted. "not supported": not above 0 on points of `knowledge`. "no answer": `knowledge` was not admitted, or there
    are not two seeds to give an interval.
    """
    pair = tuple(rule["arms"])
    know, own, think = rule["knowledge"], rule["own_facts"], rule["reasoning"]
    admissions = tuple(admit(rows, rule, end, floors[end]) for end in (know, think))
    found = {f"{end} ({scale})": interaction(rows, pair, end, scale) for end in (know, own, think) for scale in SCALES}
    main, logit, reason = found[f"{know} (points)"], found[f"{own} (logit)"], found[f"{think} (points)"]
    best = best_shares(rows, ladder_of_shares(arms, pair), (know, think))
    rises = bool(best) and best[TRIO[-1]].best > best[TRIO[0]].best
    findings = [
        f"Recall of the universe: {interval(main)} points per doubling"
        f"{_reading(main, 'the filter weakens the second step', 'the filter strengthens the second step')}.",
        f"Recall of the corpus's own facts, log-odds: {interval(logit, 2)}"
        + _reading(
            logit,
            "the weakening is more than a ceiling",
            "among facts that were there to be learned the filter strengthens the second step",
        )
        + ".",
    ]
    if best:
        shown = ", ".join(f"{m} {'≥ ' if b.best == b.shares[-1] else ''}{b.best:.2f}" for m, b in best.items())
        findings.append(f"Best share of knowledge on the grid: {shown}: it {'rises' if rises else 'does not rise'}.")
    margin = rule["equivalence"]
    absent = abs(reason.low) < margin and abs(reason.high) < margin
    findings.append(
        f"Reasoning (exact rows): {interval(reason)} points per doubling"
        + (f"; absent within the margin of {margin:g}." if absent else "; neither shown nor excluded." if reason.sign == 0
           else "; the interval excludes 0.")
    )  # fmt: skip
    for a in admissions:
        if not a.admitted:
            where = ", ".join(f"{arm} {100 * p:.0f}%" for arm, p in a.positions.items())
            findings.append(f"{a.endpoint} was not admitted: small lies at {where} of its range.")
    if not admissions[0].admitted or not math.isfinite(main.stderr):
        word = "no answer"
    elif main.sign <= 0:
        word = "not supported"
    elif logit.sign <= 0:
        word = "supported through the ceiling only"
    else:
        word = "supported" if rises and admissions[1].admitted else "supported in part"
    return Verdict(word, tuple(findings), found, admissions, best)


def _reading(e: Estimate, positive: str, negative: str) -> str:
    if not e.known:
        return "; one seed, no interval"
    return f"; {positive}" if e.sign > 0 else f"; {negative}" if e.sign < 0 else "; the interval includes 0"


def interval(e: Estimate, digits: int = 1) -> str:
    """'+14.8 [+3.6, +26.0] (3 seeds)'."""
    text = f"{e.value:+.{digits}f}"
    if e.known:
        text += f" [{e.low:+.{digits}f}, {e.high:+.{digits}f}]"
    return f"{text} ({e.n} seed{'s' * (e.n != 1)})".replace("-", "−")


def of_study(folder: Path) -> tuple[list[Row], dict[str, Any], Verdict]:
    """Rows, config and verdict of a study folder: its `runs.csv` and `study.json`.

    Raises:
      UserError: a study without arms or a rule, without finished runs, or without the runs that the rule reads.
    """
    rows = read(folder / "runs.csv")
    config = read_json(folder / "study.json")["design"]["config"]
    if not config.get("rule"):
        raise UserError(
            f"{folder}/study.json has no rule; causal verdicts need a study such as experiments/data_optimal.py"
        )
    universe = round(config["universe"] * config["size_factor"])
    floors = degenerate(universe, min(row.seed for row in rows))
    return rows, config, decide(rows, config["rule"], config["arms"], floors)
