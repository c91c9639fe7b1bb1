"""Does a larger model keep more, or less, in a longer window? The cells of the size study, and what its rule says.

A cell is a size, a seed, a list and whether it was trained, in FOLDER/SIZE-sSEED-LIST[-trained]/factors.json, as
`launch/extend.py` writes it. The rule was written before any cell ran:

    gap          of a cell: text loss in the last half of the window, on rows that nobody trained on, less the loss of the
                 same base at its original length
    interaction  of a list, trained or not: the gap of medium less that of mini, a number a seed
    verdict      the larger extrapolates worse where the interaction's t interval over seeds lies above 0, better where it
                 lies below; not determined otherwise, and with fewer than 3 seeds
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_jax import statistics
from phi3_jax.errors import UserError
from phi3_jax.extension.command import FACTORS
from phi3_jax.family import TRIO
from phi3_jax.records import files

LISTS = ("none", "pi", "ntk", "yarn", "searched")
SEEDS = (0, 1, 2)
# The rule: which two sizes, the interval's level, and how many seeds determine something.
SMALLER, LARGER, LEVEL, LEAST_SEEDS = "mini", "medium", 0.95, 3
TO, TOKENS, MIX, EVALUATIONS = "8x", "410k", 0.0, 300  # of a cell


@dataclass(frozen=True)
class Cell:
    """One condition of the study."""

    size: str
    seed: int
    form: str
    trained: bool

    @property
    def name(self) -> str:
        return f"{self.size}-s{self.seed}-{self.form}" + "-trained" * self.trained

    def command(self, bases: str, folder: str) -> str:
        """How it is made, from the bases of `experiments/longcontext.py:sizes`."""
        method = "longrope2" if self.form == "searched" else self.form
        search = f" --evaluations {EVALUATIONS}" if self.form == "searched" else ""
        train = f" --train {TOKENS} --mix {MIX:g}" if self.trained else ""
        model = f"{bases}/{self.size}-pico-clean-s{self.seed}-5.12M"
        where = f"--out {folder}/{self.name}"
        return f"python launch/extend.py --model {model} --to {TO} --method {method}{search}{train} {where}"


def cells() -> Iterator[Cell]:
    """All cells that must be made: what is not trained comes with each search, which tries every list."""
    for size in TRIO:
        for seed in SEEDS:
            yield Cell(size, seed, "searched", False)
            yield from (Cell(size, seed, form, True) for form in LISTS)


def read(folder: Path) -> dict[Cell, float]:
    """The gaps of the cells that are there, nats."""
    found: dict[Cell, float] = {}
    for cell in cells():
        path = folder / cell.name / FACTORS
        if not path.is_file():
            continue
        made = files.read_json(path).get("made_by") or {}
        try:
            start = _first(made["lists"]["none"]["unseen"]["text"])
            if cell.trained:
                found[cell] = _last(made["trained"]["unseen"]["text"]) - start
                continue
            for name, one in made["lists"].items():
                form = name if name in LISTS else "searched"
                found[Cell(cell.size, cell.seed, form, False)] = _last(one["unseen"]["text"]) - start
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is no whole factors.json ({error!r}); remove its folder and make it again"
            ) from error
    return found


def _first(text: Mapping[str, Any]) -> float:
    return float(next(iter(text.values())))


def _last(text: Mapping[str, Any]) -> float:
    return float([*text.values()][-1])


def decide(gaps: Mapping[Cell, float]) -> list[str]:
    """A line a list and state: the interaction with its interval, and the rule's word."""
    said = []
    for trained in (False, True):
        for form in LISTS:
            pairs = [[Cell(size, seed, form, trained) for size in (SMALLER, LARGER)] for seed in SEEDS]
            both = [(gaps[a], gaps[b]) for a, b in pairs if a in gaps and b in gaps]
            if not both:
                continue
            e = statistics.over_seeds([larger - smaller for smaller, larger in both], LEVEL)
            word = "not determined"
            if e.n >= LEAST_SEEDS:
                word = "worse" if e.low > 0 else "better" if e.high < 0 else word
            state = "trained" if trained else "as searched" if form == "searched" else "untrained"
            interval = f" [{e.low:+.3f}, {e.high:+.3f}]" if e.n > 1 else ", one seed"
            said.append(
                f"{form}, {state}: the gap of {LARGER} is {e.value:+.3f} nats{interval} that of {SMALLER}, "
                f"{e.n} seeds: {word}"
            )
    return said


def command(flags: Mapping[str, Any]) -> None:
    """The command: what ran, what the rule says of it, and how the rest is made."""
    folder = Path(flags["folder"])
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the one that holds the extensions, as mini-s0-yarn-trained")
    gaps = read(folder)
    planned = list(cells())
    left = [cell for cell in planned if cell not in gaps]
    print(f"{len(planned) - len(left)} of {len(planned)} planned extensions ran", *decide(gaps), sep="\n")
    if left:
        print(f"not run: {', '.join(cell.name for cell in left)}")
        print(f"next: {left[0].command(flags['bases'], flags['folder'])}")
