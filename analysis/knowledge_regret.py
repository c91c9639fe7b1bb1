"""Does one constant of the knowledge filter suit all sizes? The rule of experiments/knowledge.py on its runs.

    python analysis/knowledge_regret.py runs/knowledge-all
    python analysis/knowledge_regret.py runs.csv --bits 47.7        # bits of a person as the filter counts them

Prints a row for each size that c is fitted on and each other size that it is tested on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.errors import UserError
from phi3_jax.records import tables
from phi3_jax.scaling import causal

RECALL, EXACT = "knowledge/universe/recall", "reasoning/row/exact"
FILTER = Path(__file__).parent / "results" / "knowledge" / "filter.csv"
LIMIT = 0.01
Scores = Mapping[tuple[str, str], Mapping[int, float]]  # (size, arm) -> {seed: composite}
COLUMNS = (
    "fitted on",
    "c",
    "tested on",
    "chosen",
    "best",
    "regret",
    "standard error",
    "holds",
    "keep all",
    "random drop",
)


def composites(rows: Sequence[causal.Row]) -> tuple[dict[tuple[str, str], dict[int, float]], dict[str, float]]:
    """The mean of recall and exact rows of every run, 0 to 1, and the parameters of each size."""
    scores: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        value = (row.scores[RECALL] + row.scores[EXACT]) / 2
        scores.setdefault((row.member, row.arm), {})[row.seed] = value
    return scores, {row.member: row.size for row in rows}


def loads(scores: Scores, size: str) -> dict[int, str]:
    """{persons: arm} of the filters of a size, fewest first."""
    found = {int(arm[5:]): arm for member, arm in scores if member == size and arm.startswith("facts")}
    return dict(sorted(found.items()))


def best(scores: Scores, size: str) -> int:
    """The load with the highest mean."""
    arms = loads(scores, size)
    return max(arms, key=lambda load: np.mean([*scores[size, arms[load]].values()]))


def chosen(there: Sequence[int], room: float, bits: float) -> int:
    """The largest load whose bits are within the room; the smallest where none is."""
    return max((load for load in there if load * bits <= room), default=min(there))


def fitted(there: Sequence[int], load: int, parameters: float, bits: float) -> float:
    """Bits a parameter that give this load: the middle, in logarithms, of all that do."""
    at = list(there).index(load)
    step = there[1] / there[0]
    above = there[at + 1] if at + 1 < len(there) else load * step
    return float(np.sqrt(load * above)) * bits / parameters


def regret(scores: Scores, size: str, one: str, other: str) -> tuple[float, float]:
    """(mean, standard error over seeds) of the composite of an arm minus that of another, paired by seed."""
    a, b = scores[size, one], scores.get((size, other), {})
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise UserError(f"{size} has no seed in both {one} and {other}; run experiments/knowledge.py to its end")
    values = np.array([a[seed] - b[seed] for seed in seeds])
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("inf")


def judged(rows: Sequence[causal.Row], bits: float) -> list[dict[str, Any]]:
    """A row for each pair of sizes, c fitted on the first and tested on the second."""
    scores, parameters = composites(rows)
    sizes = sorted(parameters, key=lambda size: parameters[size])
    found = []
    for size in sizes:
        there = [*loads(scores, size)]
        c = fitted(there, best(scores, size), parameters[size], bits)
        for other in sizes:
            if other == size:
                continue
            arms = loads(scores, other)
            load, top = chosen([*arms], c * parameters[other], bits), best(scores, other)
            value, error = regret(scores, other, arms[top], arms[load])
            whole = regret(scores, other, arms[top], arms[max(arms)])[0]
            drop = f"random{load}"
            random = regret(scores, other, arms[top], drop)[0] if (other, drop) in scores else None
            # One seed has no standard error, and shows nothing but the smallest regret.
            holds = value <= max(error if np.isfinite(error) else 0.0, LIMIT)
            cells = (size, c, other, load, top, value, error, holds, whole, random)
            found.append(dict(zip(COLUMNS, cells, strict=True)))
    return found


def counted() -> float:
    """Bits of a person as the filter counts them on the universe of 13,500."""
    row = next(r for r in tables.read(FILTER) if (r["persons"], r["value_bits"]) == ("13500", "8"))
    return 6 * row.number("bits") / row.number("true_facts")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", type=Path, help="a study's folder, or its runs.csv")
    parser.add_argument("--bits", type=float, help="bits of a person; default: those of analysis/results/knowledge")
    given = parser.parse_args()
    try:
        table = given.table / "runs.csv" if given.table.is_dir() else given.table
        found = judged(causal.read(table), given.bits or counted())
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for row in found:
        print("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    held = all(row["holds"] for row in found)
    print(f"\nThe rule {'holds' if held else 'does not hold'}: {sum(row['holds'] for row in found)} of {len(found)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
