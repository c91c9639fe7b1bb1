"""What SFT and DPO change, by size: the rule of experiments/alignment_tax.py.

Each stage of a chain is a study SIZE-sSEED-STAGE in the folder, whose run has chat scores.
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
from phi3_jax.records.rows import read_rows

MEASURES = {"knowledge": ("prose", "recall"), "reasoning": ("sums", "right"), "format": ("replies", "ended")}
STAGES = ("1-base", "2-sft", "3-dpo")
Scores = Mapping[tuple[str, int, str], Mapping[str, float]]  # (size, seed, stage): measures


def read(folder: Path) -> dict[tuple[str, int, str], dict[str, float]]:
    """The last scores of every stage that is there.

    Raises:
      UserError: none is.
    """
    found: dict[tuple[str, int, str], dict[str, float]] = {}
    for path in sorted(folder.glob("*/*/evals.jsonl")):
        place = re.fullmatch(r"(\w+)-s(\d+)-(.+)", path.parent.parent.name)
        rows = [row for row in read_rows(path) if row["suite"] == "chat"]
        if not place or not rows or place[3] not in STAGES:
            continue
        last = max(row["step"] for row in rows)
        values = {(row["task"], row["metric"]): row["value"] for row in rows if row["step"] == last}
        if all(what in values for what in MEASURES.values()):
            found[place[1], int(place[2]), place[3]] = {name: values[what] for name, what in MEASURES.items()}
    if not found:
        raise UserError(
            f"{folder} holds no stages with chat scores; run experiments/alignment_tax.py, or name its folder"
        )
    return found


def changes(scores: Scores, size: str, stage: str, measure: str) -> np.ndarray:
    """After minus before, of the seeds that have both."""
    seeds = sorted({seed for other, seed, _ in scores if other == size})
    pairs = [(scores.get((size, seed, stage)), scores.get((size, seed, STAGES[0]))) for seed in seeds]
    return np.array([after[measure] - before[measure] for after, before in pairs if after and before])


def said(change: np.ndarray) -> tuple[str, float]:
    """(tax, gain or undecided; the change that so many seeds find with a power of 80 %)."""
    if len(change) < 2:
        return "undecided", math.nan
    e = statistics.over_seeds(change)
    degrees = len(change) - 1
    seen = float(stats.t.ppf(0.975, degrees) + stats.t.ppf(0.8, degrees)) * change.std(ddof=1) / math.sqrt(len(change))
    return "tax" if e.high < 0 else "gain" if e.low > 0 else "undecided", float(seen)


def slope(scores: Scores, stage: str, measure: str) -> statistics.Estimate | None:
    """Change of the change a doubling of non-embedding parameters, over seeds that all sizes have."""
    doublings = np.log2([family.proxy(size, "pico").matrix_params for size in family.TRIO])
    centred = doublings - doublings.mean()
    seeds = set.intersection(
        *({seed for other, seed, at in scores if (other, at) == (size, stage)} for size in family.TRIO)
    )
    slopes = []
    for seed in sorted(seeds):
        try:
            values = [
                scores[size, seed, stage][measure] - scores[size, seed, STAGES[0]][measure] for size in family.TRIO
            ]
        except KeyError:
            continue
        slopes.append(float(centred @ np.array(values) / (centred @ centred)))
    return statistics.over_seeds(slopes) if len(slopes) > 1 else None


def lines(scores: Scores) -> list[str]:
    """The table and what the rule says, in points."""
    out = [f"{'stage':6}  {'measure':10}  {'size':7}  {'seeds':>5}  {'change':>7}  {'95 %':>16}  {'seen':>6}  rule"]
    for stage in STAGES[1:]:
        for measure in MEASURES:
            for size in family.TRIO:
                change = changes(scores, size, stage, measure) * 100
                if not len(change):
                    out.append(f"{stage:6}  {measure:10}  {size:7}  {0:5}  not run")
                    continue
                verdict, seen = said(change)
                e = statistics.over_seeds(change) if len(change) > 1 else None
                interval = f"[{e.low:.1f}, {e.high:.1f}]" if e else ""
                numbers = f"{len(change):5}  {change.mean():+7.1f}  {interval:>16}  {seen:6.1f}"
                out.append(f"{stage:6}  {measure:10}  {size:7}  {numbers}  {verdict}")
            if found := slope(scores, stage, measure):
                depends = "depends on size" if found.low > 0 or found.high < 0 else "no dependence on size seen"
                out.append(
                    f"{stage:6}  {measure:10}  slope: {100 * found.value:+.1f} points a doubling [{100 * found.low:.1f}, "
                    f"{100 * found.high:.1f}]: {depends}"
                )
    return out


def lines_of(folder: Path) -> list[str]:
    """What the rule says of a folder; see `read` and `lines`."""
    return lines(read(folder))
