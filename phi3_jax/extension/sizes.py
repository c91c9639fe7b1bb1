"""Does a larger model keep more, or less, in a longer window? The size study of experiments/longcontext.py.

Every base is extended with every list, and each extension is trained; a folder of STUDY/extensions, as `launch/extend.py`
writes it, is one of these. Its search also tried the lists without training. The rule was written before any of them ran:

    gap          of a list, trained or not: text loss in the last half of the window, on rows that nobody trained on, less
                 the loss of the same base at its original length
    interaction  of a list, trained or not: the gap of medium less that of mini, a number a seed
    verdict      the larger extrapolates worse where the interaction's t interval over seeds lies above 0, better where it
                 lies below; not determined otherwise, and with fewer than 3 seeds
"""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from phi3_jax import cluster, compile_cache, statistics
from phi3_jax.configs import RunConfig, model_from_dict
from phi3_jax.errors import STOPPED, UserError
from phi3_jax.extension import command as extend
from phi3_jax.extension import page
from phi3_jax.extension.command import FACTORS
from phi3_jax.records import files
from phi3_jax.reporting.figures import Drawn
from phi3_jax.study import workers

LISTS = ("none", "pi", "ntk", "yarn", "searched")
# The rule: which two sizes, the interval's level, and how many seeds determine something.
SMALLER, LARGER, LEVEL, LEAST_SEEDS = "mini", "medium", 0.95, 3
FOLDER = "extensions"  # of a study


@dataclass(frozen=True)
class Cell:
    """One extension: of which base, and with which list."""

    base: str
    size: str
    seed: int
    form: str

    @property
    def name(self) -> str:
        return f"{self.size}-s{self.seed}-{self.form}"

    def flags(self, study: Path, how: Mapping[str, Any]) -> dict[str, Any]:
        """What `launch/extend.py` is asked for to make it."""
        searched = self.form == "searched"
        return {
            "model": str(study / self.base), "to": how["to"], "original": None, "factors": None, "data": None,
            "method": "longrope2" if searched else self.form, "fitness": "both", "text_field": "text",
            "evaluations": how["evaluations"] if searched else 1, "train": how["train"], "mix": how["mix"],
            "seed": self.seed, "out": str(study / FOLDER / self.name),
        }  # fmt: skip

    def words(self, study: Path, how: Mapping[str, Any]) -> list[str]:
        """The same as it is typed."""
        given = {name: value for name, value in self.flags(study, how).items() if value is not None}
        return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


class Gap(NamedTuple):
    """Which gap: of a size and a seed, with a list, trained or not."""

    size: str
    seed: int
    form: str
    trained: bool


# ------------------------------------------------------------------------------------------------ the extensions


def make(study: Path, config: Mapping[str, Any], runs: Sequence[RunConfig]) -> tuple[list[str], bool]:
    """Makes the extensions that are not there yet, each of which goes on where it was stopped.

    Args:
      config: of the study; `extension` has the target, the evaluations of a search, and the tokens and mix of training.
      runs: the bases, trained.

    Returns:
      (errors, whether a signal stopped it).
    """
    planned = [Cell(run.name, run.model.member, run.seed, form) for run in runs for form in LISTS]
    left = [cell for cell in planned if not (study / FOLDER / cell.name / page.NAME).is_file()]  # which comes last
    how = config["extension"]
    print(f"{len(left)} of {len(planned)} extensions to make, in {study / FOLDER}", flush=True)
    (study / FOLDER).mkdir(exist_ok=True)
    if jax.default_backend() == "cpu":
        starts = [functools.partial(_Extension, cell, study, how) for cell in left]
        return workers.side_by_side(starts, lambda _: None, _say)
    with compile_cache.kept():  # this process holds the accelerator's memory
        for cell in left:
            if status := extend.command(cell.flags(study, how)):
                return [], status == STOPPED
    return [], False


class _Extension(workers.Beside):
    """The process that makes one extension."""

    def __init__(self, cell: Cell, study: Path, how: Mapping[str, Any], cores: set[int]) -> None:
        environment = os.environ | workers.memory_kept() | {cluster.CORES: ",".join(map(str, sorted(cores)))}
        words = ["phi3_jax", "extension", *cell.words(study, how)]
        super().__init__(words, study / FOLDER, cell.name, cores, stdout=subprocess.DEVNULL, env=environment)

    def finish(self) -> list[str]:
        """Its last words, where it failed."""
        self.log.flush()
        said = [line for line in Path(self.log.name).read_text(errors="replace").splitlines() if line.strip()]
        if self.process.returncode == 2 and said:
            self.errors.append(f"{self.name}: {said[-1].removeprefix('error: ')}")
        return super().finish()


def one(flags: Mapping[str, Any]) -> int:
    """The command of that process."""
    cluster.join()
    return extend.command(flags)


def _say(one: _Extension) -> None:
    if one.process.returncode == 0:
        print(f"extended: {one.name}", flush=True)


# ------------------------------------------------------------------------------------------------ the rule


def read(study: Path, planned: Sequence[Cell]) -> dict[Gap, float]:
    """The gaps that are there, nats. What a list does without training is read from the search's own extension.

    Raises:
      UserError: a factors.json that is not whole.
    """
    found: dict[Gap, float] = {}
    for cell in planned:
        path = study / FOLDER / cell.name / FACTORS
        if not path.is_file():
            continue
        made = files.read_json(path).get("made_by") or {}
        try:
            start = _first(made["lists"]["none"]["unseen"]["text"])
            if "trained" in made:
                found[Gap(cell.size, cell.seed, cell.form, True)] = _last(made["trained"]["unseen"]["text"]) - start
            for name, one in made["lists"].items() if cell.form == "searched" else ():
                form = name if name in LISTS else "searched"
                found[Gap(cell.size, cell.seed, form, False)] = _last(one["unseen"]["text"]) - start
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is no whole factors.json ({error!r}); remove its folder and make it again"
            ) from error
    return found


def _first(text: Mapping[str, Any]) -> float:
    return float(next(iter(text.values())))


def _last(text: Mapping[str, Any]) -> float:
    return float([*text.values()][-1])


def decide(gaps: Mapping[Gap, float]) -> list[str]:
    """A line a list and state: the interaction with its interval, and the rule's word."""
    said, seeds = [], sorted({gap.seed for gap in gaps})
    for trained in (False, True):
        for form in LISTS:
            pairs = [[Gap(size, seed, form, trained) for size in (SMALLER, LARGER)] for seed in seeds]
            both = [(gaps[a], gaps[b]) for a, b in pairs if a in gaps and b in gaps]
            if not both:
                continue
            e = statistics.over_seeds([larger - smaller for smaller, larger in both], LEVEL)
            word = "not determined"
            if e.n >= LEAST_SEEDS:
                word = "worse" if e.low > 0 else "better" if e.high < 0 else word
            state = "trained" if trained else "as searched" if form == "searched" else "untrained"
            shown = f" [{e.low:+.3f}, {e.high:+.3f}], {e.n} seeds" if e.n > 1 else ", one seed"
            said.append(
                f"{form}, {state}: the gap of {LARGER} less that of {SMALLER} is {e.value:+.3f} nats{shown}: {word}"
            )
    return said


def _planned(study: Path) -> list[Cell]:
    """The extensions of a study, in order.

    Raises:
      UserError: no study of bases.
    """
    runs = files.read_state(study / "study.json").get("runs")
    if not runs:
        raise UserError(f"{study} is no study; give the folder that experiments/longcontext.py wrote")
    return [Cell(run["name"], run["model"]["member"], run["seed"], form) for run in runs for form in LISTS]


def lines_of(study: Path) -> list[str]:
    """What ran, and what the rule says of it."""
    planned = _planned(study)
    gaps = read(study, planned)
    left = [cell.name for cell in planned if Gap(cell.size, cell.seed, cell.form, True) not in gaps]
    said = [f"{len(planned) - len(left)} of {len(planned)} planned extensions ran", *decide(gaps)]
    return said + ([f"not run: {', '.join(left)}"] if left else [])


def figures(study: Path) -> list[Drawn]:
    """The study's figure, where two sizes have a list in common."""
    described = files.read_state(study / "study.json")
    gaps = read(study, _planned(study))
    sizes = {run["model"]["member"]: model_from_dict(run["model"]).matrix_params for run in described["runs"]}
    return page.by_size(study / "figures", gaps, sizes, f"{described['title']}, NOT the released models")
