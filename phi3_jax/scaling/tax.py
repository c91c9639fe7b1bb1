"""What SFT and DPO change, by size: the rule of experiments/alignment_tax.py.

Each stage of a chain is a study SIZE-sSEED-STAGE in the folder, whose run has chat scores; or the folder is one that ships,
with `scores.csv`, which `python -c "from phi3_jax.scaling import tax; tax.keep('runs/alignment-tax', FOLDER)"` writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy import stats

from phi3_jax import family, statistics
from phi3_jax.errors import UserError
from phi3_jax.records import tables
from phi3_jax.records.rows import read_rows

MEASURES = {"knowledge": ("prose", "recall"), "reasoning": ("sorting", "right"), "format": ("replies", "ended")}
STAGES = ("1-base", "2-sft", "3-dpo")
# What a chat is for, as shares of its questions.
CHAT = {
    "known answered": ("known", "recall"),
    "known refused": ("known", "refused"),
    "strangers refused": ("strangers", "refused"),
    "prose refused": ("prose", "refused"),
}
TABLE = "scores.csv"
COMPARED = (("2-sft", "1-base"), ("3-dpo", "1-base"), ("3-dpo", "2-sft"))
SEEDS = 3  # that a verdict needs
CEILING, FLOOR = 0.98, 0.05  # of a base: above the one no gain is possible, within the other of chance no tax
CHANCE = {"reasoning": 1 / 6}  # a copy of the numbers in any order
_SAME = 1e-9
Scores = Mapping[tuple[str, int, str], Mapping[str, float]]  # (size, seed, stage): measures


def read(folder: Path) -> dict[tuple[str, int, str], dict[str, float]]:
    """The last scores of every stage that is there, MEASURES and CHAT.

    Raises:
      UserError: none is.
    """
    if (folder / TABLE).is_file():
        return {
            (row["size"], int(row["seed"]), row["stage"]): {name: float(row[name]) for name in (*MEASURES, *CHAT)}
            for row in tables.read(folder / TABLE)
        }
    found: dict[tuple[str, int, str], dict[str, float]] = {}
    for path in sorted(folder.glob("*/*/evals.jsonl")):
        place = re.fullmatch(r"(\w+)-s(\d+)-(.+)", path.parent.parent.name)
        rows = [row for row in read_rows(path) if row["suite"] == "chat"]
        if not place or not rows or place[3] not in STAGES:
            continue
        last = max(row["step"] for row in rows)
        values = {(row["task"], row["metric"]): row["value"] for row in rows if row["step"] == last}
        wanted = MEASURES | CHAT
        if all(what in values for what in wanted.values()):
            found[place[1], int(place[2]), place[3]] = {name: values[what] for name, what in wanted.items()}
    if not found:
        raise UserError(
            f"{folder} holds no stages with chat scores; run experiments/alignment_tax.py, or name its folder"
        )
    return found


def keep(study: str, folder: str) -> None:
    """Writes the scores of a study into the table of a folder, whole, in the order of the design."""
    scores = read(Path(study))
    places = sorted(scores, key=lambda at: (family.TRIO.index(at[0]), *at[1:]))
    rows = [
        dict(zip(("size", "seed", "stage"), place, strict=True))
        | {name: f"{value:.6g}" for name, value in scores[place].items()}
        for place in places
    ]
    Path(folder).mkdir(parents=True, exist_ok=True)
    tables.write(Path(folder) / TABLE, ("size", "seed", "stage", *MEASURES, *CHAT), rows)


def changes(scores: Scores, size: str, stage: str, measure: str, before: str = STAGES[0]) -> np.ndarray:
    """After minus before, of the seeds that have both."""
    seeds = sorted({seed for other, seed, _ in scores if other == size})
    pairs = [(scores.get((size, seed, stage)), scores.get((size, seed, before))) for seed in seeds]
    return np.array([after[measure] - before[measure] for after, before in pairs if after and before])


def said(change: np.ndarray) -> tuple[str, float]:
    """(tax, gain or undecided; about the change that so many seeds find with a power of 80 %)."""
    if len(change) < SEEDS:
        return "incomplete", math.nan
    if np.ptp(change) < _SAME:
        return "no spread", math.nan
    e, seen = statistics.over_seeds(change), _seen(change)
    return "tax" if e.high < 0 else "gain" if e.low > 0 else "undecided", float(seen)


def _seen(values: np.ndarray) -> float:
    """What a t test of 5 % on as many values finds with a power of 80 %, about."""
    degrees = len(values) - 1
    quantiles = float(stats.t.ppf(0.975, degrees) + stats.t.ppf(0.8, degrees))
    return quantiles * float(values.std(ddof=1)) / math.sqrt(len(values))


def slopes(scores: Scores, stage: str, measure: str, before: str = STAGES[0]) -> np.ndarray:
    """Change of the change a doubling of non-embedding parameters, of each seed that all sizes have."""
    doublings = np.log2([family.proxy(size, "pico").matrix_params for size in family.TRIO])
    centred = doublings - doublings.mean()
    seeds = set.intersection(
        *({seed for other, seed, at in scores if (other, at) == (size, stage)} for size in family.TRIO)
    )
    found = []
    for seed in sorted(seeds):
        try:
            values = [scores[size, seed, stage][measure] - scores[size, seed, before][measure] for size in family.TRIO]
        except KeyError:
            continue
        found.append(float(centred @ (np.array(values) - np.mean(values)) / (centred @ centred)))
    return np.array(found)


def limits(scores: Scores, measure: str) -> dict[str, str]:
    """{size: "ceiling" or "floor"} where the base's mean leaves no room for a gain, or for a tax."""
    found = {}
    for size in family.TRIO:
        base = [one[measure] for (other, _, stage), one in scores.items() if (other, stage) == (size, STAGES[0])]
        if base and np.mean(base) > CEILING:
            found[size] = "ceiling"
        elif base and np.mean(base) < CHANCE.get(measure, 0.0) + FLOOR:
            found[size] = "floor"
    return found


def lines(scores: Scores) -> list[str]:
    """The table and what the rule says, in points."""
    heads = f"{'stage':6}  {'from':6}  {'measure':10}  {'size':7}  {'seeds':>5}"
    out = [f"{heads}  {'before':>7}  {'change':>7}  {'95 %':>16}  {'seen':>6}  rule"]
    for stage, before in COMPARED:
        for measure in MEASURES:
            end, begin = limits(scores, measure), f"{stage:6}  {before:6}  {measure:10}"
            for size in family.TRIO:
                change = changes(scores, size, stage, measure, before) * 100
                if not len(change):
                    out.append(f"{begin}  {size:7}  {0:5}  not run")
                    continue
                verdict, seen = said(change)
                e = statistics.over_seeds(change) if verdict not in ("incomplete", "no spread") else None
                interval, least = (f"[{e.low:.1f}, {e.high:.1f}]", f"{seen:.1f}") if e else ("", "")
                level = 100 * np.mean([one[measure] for (s, _, at), one in scores.items() if (s, at) == (size, before)])
                numbers = f"{len(change):5}  {level:7.1f}  {change.mean():+7.1f}  {interval:>16}  {least:>6}"
                out.append(f"{begin}  {size:7}  {numbers}  {verdict}" + (f" ({end[size]})" if size in end else ""))
            found = 100 * slopes(scores, stage, measure, before)
            if len(found) >= SEEDS:
                out.append(f"{begin}  slope: {_of_slope(found, bool(end))}")
    return out + _chat(scores)


def _of_slope(found: np.ndarray, limited: bool) -> str:
    """The sentence on the slopes of a measure."""
    if limited or np.ptp(found) < 100 * _SAME:
        return f"{found.mean():+.1f} points a doubling; not read, for a base at a floor or ceiling, or no spread"
    e = statistics.over_seeds(found)
    depends = "depends on size" if e.low > 0 or e.high < 0 else f"no dependence seen, {_seen(found):.1f} would be"
    return f"{e.value:+.1f} points a doubling [{e.low:.1f}, {e.high:.1f}]: {depends}"


def _chat(scores: Scores) -> list[str]:
    """Means over seeds of what a chat is for, with the least and the most."""
    out = ["", f"{'stage':6}  {'size':7}  {'seeds':>5}" + "".join(f"  {name + ' %':>19}" for name in CHAT)]
    for stage in STAGES[1:]:
        for size in family.TRIO:
            some = [one for (other, _, at), one in scores.items() if (other, at) == (size, stage)]
            if some:
                cells = ([100 * one[name] for one in some] for name in CHAT)
                shown = "".join(f"  {f'{np.mean(c):.1f} ({min(c):.1f}-{max(c):.1f})':>19}" for c in cells)
                out.append(f"{stage:6}  {size:7}  {len(some):5}{shown}")
    return out


def lines_of(folder: Path) -> list[str]:
    """What the rule says of a folder; see `read` and `lines`."""
    return lines(read(folder))
